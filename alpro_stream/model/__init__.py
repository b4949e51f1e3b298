"""The networks: video encoder, text encoder, multimodal encoder, heads, and how their weights are read."""
