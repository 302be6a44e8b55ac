"""Nested Transformers."""
