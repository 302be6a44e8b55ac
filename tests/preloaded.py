"""Imported once, by the process that those of forked.py are forked from."""

from __future__ import annotations

import os

os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")

from matformer_dist.parallel.topology import quiet_libraries

quiet_libraries()

# What training imports at once, and what it imports where it first needs it.
import deepspeed.runtime.zero.stage3  # noqa: E402, F401
import megatron.core.datasets.blended_megatron_dataset_builder  # noqa: E402
import megatron.core.datasets.gpt_dataset  # noqa: E402
import megatron.core.parallel_state  # noqa: E402
import megatron.core.tensor_parallel.layers  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401

import matformer_dist.training.loop  # noqa: E402, F401
