"""The `alpro` command, and the launching of training on one machine or many."""
