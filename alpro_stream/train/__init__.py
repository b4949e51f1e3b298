"""Training: ranks, the DeepSpeed engine, the schedule, the loop, checkpoints and metrics."""
