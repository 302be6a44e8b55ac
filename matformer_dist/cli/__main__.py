"""`python -m matformer_dist.cli` is `matformer`."""

from __future__ import annotations

from matformer_dist.cli import main

main()
