"""Text from runs and extracted models."""
