"""From a checkpoint to numbers: embeddings, retrieval scores and their ranks."""
