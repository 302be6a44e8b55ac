"""Operators on local tensors. They know granularities as rows and widths, and no process group."""
