"""Text from extracted models."""
