"""Measuring universal models and submodels."""
