"""The training system: objective, DeepSpeed engine, loop, checkpoints, metrics."""
