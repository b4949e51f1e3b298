"""Train ALPRO (Align and Prompt, CVPR 2022) from streamed WebDataset shards."""
