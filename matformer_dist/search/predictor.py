"""The loss of any submodel, foretold from one-layer changes. numpy alone.

loss(granularities) = loss(S) - sum over layers i, over steps j <= granularity of layer i, of
gain[i, j]: what widening layer i from granularity j - 1 to j gains, in nats a token.

First guess: each change is measured twice, in the uniform submodel below it (layer i widened) and
in the one above (layer i narrowed); the means are scaled, so that widening all layers gains what
the uniform submodels differ by. Then all that was measured corrects it, by ridge regression to the
first guess; leave-one-out errors choose its strength.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from matformer_dist.nesting import Nesting, Submodel

_STRENGTHS = tuple(10.0**power for power in range(-4, 3))
Gains = NDArray[np.float64]


def one_layer_changes(nesting: Nesting, n_layers: int) -> Iterator[tuple[int, int, Submodel]]:
    """(layer, step j, submodel): granularity j - 1 everywhere but in one layer, and j likewise."""
    for step in range(1, len(nesting)):
        for layer in range(n_layers):
            for around, changed in ((step - 1, step), (step, step - 1)):
                granularities = [around] * n_layers
                granularities[layer] = changed
                yield layer, step, Submodel(nesting, tuple(granularities))


@dataclass(frozen=True)
class Predictor:
    """gains [layers, granularities - 1], nats a token; `base` is the loss of S."""

    base: float
    gains: Gains

    @classmethod
    def from_changes(
        cls, nesting: Nesting, n_layers: int, losses: Mapping[Submodel, float]
    ) -> Predictor:
        """`losses`: of the uniform submodels and all one-layer changes."""
        of_uniform = [losses[nesting.uniform(i, n_layers)] for i in range(len(nesting))]
        gains = np.zeros((n_layers, len(nesting) - 1))
        for layer, step, changed in one_layer_changes(nesting, n_layers):
            is_widened = changed.granularities[layer] == step
            around = of_uniform[step - 1] if is_widened else of_uniform[step]
            difference = around - losses[changed]
            gains[layer, step - 1] += (difference if is_widened else -difference) / 2
        for step in range(1, len(nesting)):
            gained = of_uniform[step - 1] - of_uniform[step]
            gains[:, step - 1] = _scaled(gains[:, step - 1], gained)
        return cls(of_uniform[0], gains)

    def loss(self, submodel: Submodel) -> float:
        return self.base - float((_features(submodel, self.gains.shape[1]) * self.gains).sum())

    def corrected(self, losses: Mapping[Submodel, float]) -> Predictor:
        """Nearest to this one that agrees with `losses`; leave-one-out chooses how near."""
        steps = self.gains.shape[1]
        x = np.stack([_features(one, steps).ravel() for one in losses])
        missed = np.array([self.loss(one) - loss for one, loss in losses.items()])
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        turned = u.T @ missed

        def left_out(strength: float) -> float:
            shrink = s**2 / (s**2 + strength)
            fitted = u @ (shrink * turned)
            leverage = np.clip((u**2) @ shrink, 0, 1 - 1e-9)
            return float((((missed - fitted) / (1 - leverage)) ** 2).mean())

        strength = min(_STRENGTHS, key=left_out)
        change = vt.T @ (s / (s**2 + strength) * turned)
        return Predictor(self.base, self.gains + change.reshape(self.gains.shape))


def _features(submodel: Submodel, steps: int) -> Gains:
    """1 for every step that a layer is wide enough for, [layers, steps]."""
    granularities = np.array(submodel.granularities)[:, None]
    return (granularities > np.arange(steps)).astype(np.float64)


def _scaled(gains: Gains, total: float) -> Gains:
    """Gains of one step in every layer that sum to `total`; shifted where their sum says little."""
    found = float(gains.sum())
    if found > 0 and total > 0 and 0.2 < total / found < 5:
        return gains * (total / found)
    return gains + (total - found) / len(gains)
