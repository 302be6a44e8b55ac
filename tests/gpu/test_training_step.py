"""A whole step of MatLM in fp32 on a GPU against the same on a CPU."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.device import CUDA
from tests.tolerance import assert_as_exact_as_plain

pytest.importorskip("pydantic", reason="MatLM's settings need pydantic")
pytest.importorskip("megatron.core", reason="MatLM's layers need megatron-core")

from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.models.forward_pass import Pass
from matformer_dist.models.matlm import MatLM
from matformer_dist.nesting import Nesting, Segment
from matformer_dist.parallel.layers import Initializer

VOCAB, LAYERS = 997, 3
NESTING = Nesting.from_widths([16, 33, 64, 128])
WEIGHTS, Z, KL = (0.4, 0.3, 0.2, 0.1), (1e-3,) * 4, (0.0, 0.2, 0.2, 0.2)


def passes() -> dict[str, Pass]:
    submodels = NESTING.uniforms(LAYERS)
    joint = tuple(Segment(submodel, 2) for submodel in submodels)
    dealt = tuple(Segment(s, n) for s, n in zip(submodels, (1, 3, 0, 2), strict=True))
    return {
        "joint": Pass(joint, True, WEIGHTS, Z, KL, 2.0),
        "per_sequence": Pass(dealt, False, WEIGHTS, Z, (0.0,) * 4),
    }


@pytest.mark.parametrize("kind", ["joint", "per_sequence"])
@pytest.mark.parametrize("variant", ["llama", "paper"])
def test_loss_and_gradients_are_as_exact_as_on_a_cpu(variant: str, kind: str) -> None:
    paper = {"ffn": "gelu", "norm": "layernorm", "tied_embeddings": True}
    settings = paper if variant == "paper" else {}
    model = LanguageModelConfig.model_validate(
        {"d_model": 64, "n_layers": LAYERS, "n_heads": 4, "d_ff": 128, "max_seq_len": 64}
        | {"init_std": 0.1}
        | settings
    )
    run = passes()[kind]
    sequences = 2 if run.shared_tokens else sum(s.sequences for s in run.segments)
    ids = torch.randint(VOCAB, (sequences, 50), generator=torch.Generator().manual_seed(0))
    ids[0, 7:9] = 0
    results = []
    for device, dtype in ((CUDA, torch.float32), ("cpu", torch.float32), ("cpu", torch.float64)):
        lm = MatLM(model, [NESTING] * LAYERS, VOCAB, Initializer(seed=1)).to(device, dtype)
        there = ids.to(device)
        loss, statistics = lm(there[:, :-1], there[:, 1:], run)
        named = dict(lm.named_parameters())
        gradients = torch.autograd.grad(loss, list(named.values()))
        found = {"loss": loss.detach(), "statistics": statistics.detach()}
        found |= dict(zip(named, gradients, strict=True))
        results.append({name: value.cpu() for name, value in found.items()})
    got, plain, truth = results
    for name in truth:
        # The order of sums is all that differs; it goes through the layers twice.
        assert_as_exact_as_plain(got[name], plain[name], truth[name], floor_eps=32, what=name)
