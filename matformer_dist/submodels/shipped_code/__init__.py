"""Code that `hf --sparse` exports carry: transformers runs it where it is told to trust it."""
