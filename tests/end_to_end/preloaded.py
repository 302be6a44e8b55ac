"""Imported once, by the process that the ranks of forked.py are forked from."""

from __future__ import annotations

import os

os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")

from matformer_dist.parallel.topology import quiet_libraries

quiet_libraries()

import matformer_dist.training.loop  # noqa: E402, F401
