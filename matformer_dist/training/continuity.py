"""Whether a checkpoint that was saved by another layout of ranks computes what it did there."""

from __future__ import annotations

import torch

from matformer_dist.config import Config
from matformer_dist.errors import UserError
from matformer_dist.models.forward_pass import Pass
from matformer_dist.parallel.topology import Topology
from matformer_dist.run_directory import Manifest
from matformer_dist.training.engine import Engine

# By how much, relative to itself, the loss may differ: layouts add up in different orders.
ALLOWED = {"fp32": 1e-5, "bf16": 1e-2}


def probe_loss(engine: Engine, config: Config, vocab_size: int, topology: Topology) -> float:
    """XL's loss in nats per token on one sequence of made-up tokens, the same on all ranks.

    Made up, because the data that a run validates on may change with its settings.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (1, config.training.seq_len + 1)
    ids = torch.randint(vocab_size, shape, generator=generator).to(topology.device)
    largest = config.granularities.uniforms(config.model.n_layers)[0]
    plan = Pass.evaluation([largest], 1)
    statistics = engine.evaluate(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), plan)
    nll, _, _, count, _ = statistics[0].tolist()
    return float(nll / count)


def compare(saved: Manifest, loss: float) -> str:
    """What to tell of the loss then and now; UserError where it is another."""
    was = saved.probe_loss
    if was is None:
        return f"continuity not checked: the checkpoint has no loss to compare {loss:.6f} with"
    if not abs(loss - was) <= ALLOWED[saved.precision] * abs(was):
        raise UserError(
            f"XL's loss on made-up tokens was {was:.6f} when the checkpoint was saved by "
            f"{saved.layout}, and is {loss:.6f} now: what is loaded is not what was saved. Go on "
            "with the layout that saved it, and report this as an error of matformer_dist"
        )
    return f"continuity XL's loss on made-up tokens is {loss:.6f}, was {was:.6f}"
