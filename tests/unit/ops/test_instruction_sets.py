"""Every version of the CPU operators that this processor can run, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from matformer_dist.ops import head_chunk
from matformer_dist.ops.nested_activation import activate, activate_backward
from tests.unit.ops.loss_problems import NATIVE

NARROWER = {  # as torch.backends.cpu names what a processor has: versions that it can run
    "DEFAULT": {"default": "baseline"},
    "AVX2": {"default": "baseline", "avx2": "AVX2"},
    "AVX512": {"default": "baseline", "avx2": "AVX2", "avx512": "AVX-512"},
}
HERE = NARROWER.get(torch.backends.cpu.get_cpu_capability(), NARROWER["DEFAULT"])


@NATIVE
@pytest.mark.parametrize("asked", ["default", "avx2", "avx512"])
def test_every_version_matches_the_reference(asked: str) -> None:
    if asked not in HERE:
        pytest.skip(f"this processor has no {asked}")
    run = subprocess.run(
        [sys.executable, "-m", __name__, HERE[asked]],
        env={**os.environ, "ATEN_CPU_CAPABILITY": asked},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "equal\n"


def compare(version: str) -> None:
    operators = torch.ops.matformer_dist
    assert operators.instruction_set() == version
    generator = torch.Generator().manual_seed(0)
    for vocab in (1, 7, 2049, 5000):
        logits = torch.randn(3, 4, vocab, generator=generator) * 5
        targets = torch.randint(vocab, (3, 4), generator=generator)
        weights = [torch.rand(3, 4, generator=generator) for _ in range(3)]
        for tau in (1.0, 2.0):
            found = []
            for twins, z in ((operators, logits.clone()), (head_chunk, logits.double())):
                wide = [w.to(z.dtype) for w in weights]
                numbers = twins.chunk_statistics(z, targets, 0, tau, True, True)
                results, best = twins.chunk_gradient_(
                    z, targets, numbers[None], *wide, 0, -100, tau, True, z.dtype
                )
                found.append((numbers[..., :3], results[2:], best.float(), z))
            for actual, expected in zip(*found, strict=True):
                torch.testing.assert_close(actual.double(), expected.double(), rtol=3e-6, atol=3e-6)
    for k in (1, 2):
        h, d_act = torch.randn(3021, k, generator=generator) * 3, torch.ones(3021)
        wide_h, wide_d = h.double(), d_act.double()
        for actual, expected in (
            (activate(h, "native"), activate(wide_h, "reference")),
            *zip(
                activate_backward(h, d_act, (3,), (1007,), True, "native"),
                activate_backward(wide_h, wide_d, (3,), (1007,), True, "reference"),
                strict=True,
            ),
        ):
            torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=2e-6)
    print("equal")


if __name__ == "__main__":
    compare(sys.argv[1])
