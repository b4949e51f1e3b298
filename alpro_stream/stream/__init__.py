"""The stream: a pure order of samples, and what turns a position in it into a batch of tensors."""
