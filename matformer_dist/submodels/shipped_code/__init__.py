"""Code that `hf --sparse` and `hf --nested` carry: transformers runs it where it is told to trust
it.
"""
