"""Submodels of a trained universal model, as models of their own."""
