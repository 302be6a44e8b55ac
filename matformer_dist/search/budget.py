"""Budgets as they are written, and what submodels cost. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import get_args

from matformer_dist.config import ModelConfig, Sample
from matformer_dist.counting import count_parameters, flops_per_unit
from matformer_dist.errors import UserError
from matformer_dist.nesting import Nesting, Submodel
from matformer_dist.submodels.slices import Cost

KINDS: tuple[Cost, ...] = get_args(Cost)
_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_BYTES = {
    "": 1.0, "B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
    "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40,
}  # fmt: skip
_UNITS: dict[Cost, Mapping[str, float]] = {
    "params": _DECIMAL,
    "flops": {**_DECIMAL, **{f"{unit}FLOP": value for unit, value in _DECIMAL.items()}},
    "memory": _BYTES,
    "latency": {"ms": 1.0, "us": 1e-3, "s": 1e3},  # no unit: not what was meant, perhaps
}
_EXAMPLES: dict[Cost, str] = {
    "params": "params=1.5B",
    "flops": "flops=3G",
    "memory": "memory=4GiB",
    "latency": "latency=12ms",
}
_NUMBER = re.compile(r"([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)")
BYTES_OF = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Budget:
    """At most `limit` parameters, FLOPs of a token or image, bytes, or ms of a token or pass."""

    kind: Cost
    limit: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read KIND=NUMBER[UNIT], such as params=1.5B; UserError where that is none."""
        kind, equals, amount = (word.strip() for word in text.partition("="))
        if not equals or kind not in KINDS:
            raise UserError(
                f"--budget {text!r} must be one of params=, flops=, memory= or latency= and a "
                f"number, such as {', '.join(_EXAMPLES.values())}"
            )
        units = _UNITS[kind]
        found = _NUMBER.fullmatch(amount)
        if not found or found[2] not in units or not 0 < float(found[1]) * units[found[2]] < 1e30:
            known = ", ".join(unit for unit in units if unit)
            raise UserError(
                f"--budget {text!r} must be a number above 0 and a unit of {known}, such as "
                f"{_EXAMPLES[kind]}"
            )
        return cls(kind, float(found[1]) * units[found[2]])

    def __str__(self) -> str:
        return f"{self.kind}={short_cost(self.kind, self.limit)}"


def short_cost(kind: Cost, value: float, digits: int = 3) -> str:
    """1.31M parameters, 2.4GFLOP, 5.3MB or 12.5ms; as Budget.parse reads it."""
    if kind == "latency":
        return f"{value:.{digits}g}ms" if value < 1000 else f"{_plain(value, digits)}ms"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            letter = "B" if (kind, unit) == ("params", "G") else unit
            return f"{_plain(value / size, digits)}{letter}{_SUFFIX[kind]}"
    return f"{_plain(value, digits)}{_SUFFIX[kind]}"


def _exact_cost(kind: Cost, value: float) -> str:
    """As short_cost, with as many digits (5 or more) as say what it is."""
    texts = (short_cost(kind, value, digits) for digits in range(5, 17))
    for text in texts:
        if abs(Budget.parse(f"{kind}={text}").limit - value) <= 1e-9 * value:
            break
    return text


_SUFFIX: dict[Cost, str] = {"params": "", "flops": "FLOP", "memory": "B", "latency": "ms"}


def _plain(value: float, digits: int) -> str:
    """So many significant digits, never with an exponent."""
    whole = len(str(int(value)))
    return f"{value:.{max(0, digits - whole)}f}"


@dataclass(frozen=True)
class Costs:
    """What any submodel costs, by kind: `base`, S in every layer, and what a layer adds at each
    granularity. All kinds are sums over layers, so the uniform submodels' costs tell all.
    """

    nesting: Nesting
    n_layers: int
    base: Mapping[Cost, float]
    added: Mapping[Cost, tuple[float, ...]]  # by granularity, the narrowest's is 0
    embeddings: int  # parameters of embedding and head
    sample: Sample  # of FLOPs, and of the cache in memory
    dtype: str  # of memory

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        nesting: Nesting,
        outputs: int,
        sample: Sample,
        *,
        dtype: str,
        latency_ms: Sequence[float] = (),
    ) -> Costs:
        """Memory: weights of `dtype`, and keys and values of one sequence of a language model.

        latency_ms: of the uniform submodels, narrowest first; none: not known.
        """
        uniforms = nesting.uniforms(model.n_layers)[::-1]
        counted = [count_parameters(model, outputs, one) for one in uniforms]
        parameters = [count.total for count in counted]
        cached = model.cached_values(sample.positions)
        totals: dict[Cost, Sequence[float]] = {
            "params": parameters,
            "flops": [flops_per_unit(model, outputs, one, sample) for one in uniforms],
            "memory": [BYTES_OF[dtype] * (count + cached) for count in parameters],
        }
        if latency_ms:
            totals["latency"] = latency_ms
        return cls(
            nesting,
            model.n_layers,
            base={kind: of[0] for kind, of in totals.items()},
            added={
                kind: tuple((value - of[0]) / model.n_layers for value in of)
                for kind, of in totals.items()
            },
            embeddings=counted[0].total - counted[0].non_embedding,
            sample=sample,
            dtype=dtype,
        )

    def cost(self, kind: Cost, submodel: Submodel) -> float:
        added = self.added[kind]
        return self.base[kind] + sum(added[i] for i in submodel.granularities)

    def fits(self, submodel: Submodel, budget: Budget) -> bool:
        return self.cost(budget.kind, submodel) <= budget.limit * (1 + 1e-9)

    def check(self, budget: Budget) -> None:
        """UserError where no submodel is within the budget, or all are."""
        smallest, *_, largest = (
            self.cost(budget.kind, self.nesting.uniform(i, self.n_layers))
            for i in (0, self.nesting.largest)
        )
        assert isfinite(largest)
        low, high = smallest * (1 - 1e-9), largest * (1 + 1e-9)
        if low <= budget.limit <= high:
            return
        names = self.nesting.names
        where = (
            f"below {names[0]}, the smallest submodel"
            if budget.limit < low
            else f"above {names[-1]}, the largest"
        )
        asked = f"{budget.kind}={_exact_cost(budget.kind, budget.limit)}"
        span = [_exact_cost(budget.kind, value) for value in (smallest, largest)]
        raise UserError(
            f"the budget {asked} is {where}; this model's submodels cost {span[0]} ({names[0]}) "
            f"to {span[1]} ({names[-1]}): give one of these or between them"
        )
