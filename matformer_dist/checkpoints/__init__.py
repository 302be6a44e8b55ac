"""Checkpoints: written whole or not at all, checked, and read in whatever layout they are."""
