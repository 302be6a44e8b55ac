"""Random generators go on where they were."""

from __future__ import annotations

import json
import random

import numpy as np
import torch

from matformer_dist.training import random_states


def draw() -> list[float]:
    # An odd number of normal ones: the second of a pair is kept for the next time.
    numbers = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]
    return [*numbers, *torch.randn(3).tolist()]


def test_states_survive_json_and_go_on() -> None:
    before = random_states.capture()
    try:
        random.seed(1), np.random.seed(2), torch.manual_seed(3)  # type: ignore[func-returns-value]
        draw()
        saved = json.loads(json.dumps(random_states.capture()))
        wanted = draw()
        draw()
        random_states.restore(saved)
        assert draw() == wanted
    finally:
        random_states.restore(before)


def test_kinds_that_were_not_saved_stay() -> None:
    before = random_states.capture()
    random_states.restore({})
    assert random_states.capture() == before
