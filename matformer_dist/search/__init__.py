"""Choosing submodels: which layers to narrow, for a budget of parameters, FLOPs, memory or time."""
