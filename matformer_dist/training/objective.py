"""Which granularity sees which sequence, and how their losses add up (paper sec. 3.2).

| kind         | a micro-batch of b sequences runs               | loss                            |
|--------------|-------------------------------------------------|---------------------------------|
| joint        | b sequences at every granularity                | sum_i lambda_i mean CE_i        |
| per_sequence | each sequence at one granularity, dealt by p    | mean over all tokens            |
| sampled      | b sequences at the step's one, drawn by p       | mean over all tokens            |
| sandwich     | b sequences at XL, S and one drawn between them | the three's, equal or by lambda |

The expected gradient of per_sequence and sampled is that of joint at lambda = p. Everything that
is random is a pure function of (seed, step), so all ranks agree and a resumed run repeats it.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections import Counter
from dataclasses import replace
from itertools import accumulate, pairwise

from matformer_dist.config import ObjectiveConfig
from matformer_dist.config_vision import VisionObjectiveConfig
from matformer_dist.models.forward_pass import Pass
from matformer_dist.models.mixing import SoftTargets
from matformer_dist.nesting import Nesting, Segment


class Objective:
    """Makes the Pass of every micro-batch of every step.

    `seed` decides the draws; `n_layers` is the model's, because a segment names a submodel.
    """

    def __init__(self, config: ObjectiveConfig, nesting: Nesting, n_layers: int, seed: int) -> None:
        self.config = config
        self.nesting = nesting
        self.seed = seed
        self._uniform = [nesting.uniform(i, n_layers) for i in range(len(nesting))]
        self.probabilities = self._shares(config.probabilities)
        self.weights = self._shares(config.weights)

    def _shares(self, given: dict[str, float] | None) -> list[float]:
        """One share per granularity, narrowest first; equal ones where none are given."""
        if given is None:
            return [1 / len(self.nesting)] * len(self.nesting)
        return [given[name] for name in self.nesting.names]

    def plan(self, step: int, micro_batch: int, micro_batches: int, sequences: int) -> Pass:
        """The Pass of one of a step's `micro_batches` (over all ranks and accumulation steps).

        `sequences` is the number of distinct sequences, or images, in this micro-batch.
        """
        plan = self._plan(step, micro_batch, micro_batches, sequences)
        if isinstance(self.config, VisionObjectiveConfig):
            key = f"{self.seed}:{step}:{micro_batch}"
            plan = replace(plan, soft=SoftTargets.draw(self.config, key))
        return plan

    def _plan(self, step: int, micro_batch: int, micro_batches: int, sequences: int) -> Pass:
        kind = self.config.kind
        if kind == "joint":
            return self._shared(range(len(self.nesting)), self.weights, sequences)
        if kind == "sandwich":
            chosen = self._sandwich(step)
            return self._shared(chosen, self._sandwich_weights(chosen), sequences)
        if kind == "sampled":
            counts = Counter({self._draw(step, range(len(self.nesting))): sequences})
        else:
            counts = self._deal(step, micro_batch, micro_batches, sequences)
        order = self._order(step, micro_batch, sequences) if len(counts) > 1 else None
        return replace(self._separate(counts), order=order)

    def _shared(self, granularities: range | list[int], weights: list[float], b: int) -> Pass:
        """The same b sequences at each of `granularities`, XL first: it teaches the others.

        z-loss and distillation are relative to each granularity's own weight, so their strength
        against the cross-entropy does not depend on how many granularities there are.
        """
        pairs = sorted(zip(granularities, weights, strict=True), reverse=True)
        teacher, *students = [weight for _, weight in pairs]
        kl = (0.0, *(self.config.distillation * weight for weight in students))
        return Pass(
            segments=tuple(Segment(self._uniform[i], b) for i, _ in pairs),
            shared_tokens=True,
            ce_weights=(teacher, *students),
            z_weights=tuple(self.config.z_loss * weight for _, weight in pairs),
            kl_weights=kl,
            temperature=self.config.temperature,
        )

    def _separate(self, counts: Counter[int]) -> Pass:
        """Different sequences at each granularity, weighing every token the same."""
        order = sorted((i for i in counts if counts[i]), reverse=True)
        return Pass(
            segments=tuple(Segment(self._uniform[i], counts[i]) for i in order),
            shared_tokens=False,
            ce_weights=(1.0,) * len(order),
            z_weights=(self.config.z_loss,) * len(order),
            kl_weights=(0.0,) * len(order),
        )

    def _deal(self, step: int, micro_batch: int, micro_batches: int, b: int) -> Counter[int]:
        """How many of a micro-batch's b sequences each granularity gets.

        Systematic sampling: the step's N sequences lie on a grid of N points in [0, 1) with one
        random offset, and a point's granularity is where it falls among the cumulated
        probabilities. So over a step counts are within one of N * p_i and right on average.
        Micro-batch k of M takes points k, k + M, ...: its own counts are within one of b * p_i, and
        the same at every step where b * p_i are whole numbers. Where they are not, who begins
        with which point changes from step to step, or the same rank would always have the most
        work.
        """
        first = (micro_batch + step) % micro_batches + self._random(step).random()
        last = max(i for i, p in enumerate(self.probabilities) if p > 0)
        below = [0]  # of the b points, those that lie below each cumulated probability
        for i, p in enumerate(accumulate(self.probabilities)):
            points = math.ceil(p * b - first / micro_batches)
            below.append(b if i >= last else min(max(points, below[-1]), b))
        return Counter({i: after - before for i, (before, after) in enumerate(pairwise(below))})

    def _order(self, step: int, micro_batch: int, b: int) -> tuple[int, ...]:
        """Which sequence takes which place in the segments.

        Drawn anew for every micro-batch: a blend deals its data sets in a fixed pattern, and a
        granularity must not always meet the same one.
        """
        draw = random.Random(f"order:{self.seed}:{step}:{micro_batch}")
        return tuple(draw.sample(range(b), b))

    def _draw(self, step: int, among: range) -> int:
        shares = [self.probabilities[i] for i in among]
        if sum(shares) == 0:
            shares = [1.0] * len(shares)
        scaled = [share / sum(shares) for share in shares]
        return among[self._locate(self._random(step).random(), scaled)]

    def _sandwich(self, step: int) -> list[int]:
        """XL, S and one granularity drawn between them, if there is one."""
        largest = self.nesting.largest
        chosen = {0, largest}
        if largest > 1:
            chosen.add(self._draw(step, range(1, largest)))
        return sorted(chosen)

    def _sandwich_weights(self, chosen: list[int]) -> list[float]:
        total = sum(self.weights[i] for i in chosen)
        return [self.weights[i] / total if total else 1 / len(chosen) for i in chosen]

    def _random(self, step: int) -> random.Random:
        return random.Random(f"objective:{self.seed}:{step}")

    def even_micro_batch(self) -> int | None:
        """Sequences of the smallest micro-batch at which all ranks always carry the same work.

        Its multiples are as good. None where there is none of up to a thousand sequences.
        """
        if self.config.kind != "per_sequence":
            return 1
        for b in range(1, 1001):
            if all(abs(b * p - round(b * p)) < 1e-6 for p in self.probabilities):
                return b
        return None

    @staticmethod
    def _locate(point: float, shares: list[float]) -> int:
        """Index of the share in whose part of [0, 1) the point lies."""
        last = max(i for i, share in enumerate(shares) if share > 0)
        return min(bisect_right(list(accumulate(shares)), point), last)
