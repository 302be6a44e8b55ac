"""Tensor parallelism: process groups, how weights are cut, and the layers that use them."""
