"""Granularities of a nested FFN, and the submodels that can be taken out of it. No torch here.

A nesting cuts the `d_ff` neurons of an FFN into widths m_0 < ... < m_{g-1} = d_ff: granularity i
is the first m_i neurons (paper sec. 3.1). Ring i is what granularity i adds: [m_{i-1}, m_i).
A submodel picks one granularity per layer (paper sec. 3.3).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby, pairwise
from typing import Literal, TypeAlias

from matformer_dist.errors import UserError

# Why a submodel is looked at: one granularity, the paper's Mix'n'Match, or asked for by someone.
SubmodelKind: TypeAlias = Literal["uniform", "heuristic", "mix"]
_DEFAULT_NAMES = {1: ("XL",), 2: ("S", "XL"), 3: ("S", "M", "XL"), 4: ("S", "M", "L", "XL")}
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_COUNT = re.compile(r"0*[1-9][0-9]{0,8}")  # of layers; a longer number is a slip of the finger


def default_names(granularities: int) -> tuple[str, ...]:
    """S, M, L, XL for four granularities; subsets of them for fewer; G1 ... Gg for more."""
    if granularities in _DEFAULT_NAMES:
        return _DEFAULT_NAMES[granularities]
    return tuple(f"G{i + 1}" for i in range(granularities))


@dataclass(frozen=True)
class Nesting:
    """Widths of the granularities of one FFN, narrowest first, and their names.

    Raises UserError where widths are not strictly increasing and positive, or names do not fit.
    """

    widths: tuple[int, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.widths or self.widths[0] < 1 or any(a >= b for a, b in pairwise(self.widths)):
            raise UserError(
                f"nesting widths {list(self.widths)} must be positive and strictly increasing, "
                "for example [256, 512, 1024, 2048]"
            )
        if len(self.names) != len(self.widths) or len(set(self.names)) != len(self.names):
            raise UserError(
                f"nesting names {list(self.names)} must be {len(self.widths)} different names, "
                f"one for each of the widths {list(self.widths)}"
            )
        for name in self.names:
            if not _NAME.fullmatch(name):
                raise UserError(
                    f"nesting name {name!r} must begin with a letter and hold only letters, "
                    "digits, '.', '_' and '-'"
                )

    @classmethod
    def from_widths(cls, widths: Sequence[int], names: Sequence[str] | None = None) -> Nesting:
        return cls(tuple(widths), tuple(names) if names else default_names(len(widths)))

    @classmethod
    def from_fractions(
        cls, d_ff: int, fractions: Sequence[str | float], names: Sequence[str] | None = None
    ) -> Nesting:
        """Widths as shares of d_ff, given as numbers or as strings such as "1/8"; the last is 1."""
        shares = []
        for fraction in fractions:
            try:
                shares.append(Fraction(str(fraction)))
            except (ValueError, ZeroDivisionError):
                raise UserError(
                    f"nesting fraction {fraction!r} is not a number; write 0.125 or 1/8"
                ) from None
        if not shares or shares[-1] != 1 or any(share <= 0 for share in shares):
            raise UserError(
                f"nesting fractions {list(fractions)} must be above 0 and end with 1 (the whole "
                "FFN), for example [1/8, 1/4, 1/2, 1]"
            )
        widths = []
        for share in shares:
            width = share * d_ff
            if width.denominator != 1:
                raise UserError(
                    f"nesting fraction {share} of d_ff {d_ff} is {float(width):g} neurons, not a "
                    f"whole number; use a d_ff divisible by {share.denominator}, or give widths"
                )
            widths.append(int(width))
        return cls.from_widths(widths, names)

    def __len__(self) -> int:
        return len(self.widths)

    @property
    def d_ff(self) -> int:
        return self.widths[-1]

    @property
    def largest(self) -> int:
        """Index of XL, the whole FFN."""
        return len(self.widths) - 1

    @property
    def rings(self) -> tuple[int, ...]:
        """Neurons that each granularity adds to the one below it; they sum to d_ff."""
        return tuple(b - a for a, b in pairwise((0, *self.widths)))

    def index(self, name: str) -> int:
        """Index of the granularity called `name`."""
        if name not in self.names:
            raise UserError(
                f"there is no granularity {name!r} here; the names are {', '.join(self.names)}"
            )
        return self.names.index(name)

    def truncate(self, granularity: int) -> Nesting:
        """The nesting inside one granularity: a submodel of a nested model is nested too."""
        return Nesting(self.widths[: granularity + 1], self.names[: granularity + 1])

    def check_dealable(self, ranks: int, multiple: int = 1) -> None:
        """Raise UserError unless every ring cuts into `ranks` equal pieces of whole `multiple`s."""
        unit = ranks * multiple
        if all(ring % unit == 0 for ring in self.rings):
            return
        near = [max(unit, round(width / unit) * unit) for width in self.widths]
        for i in range(1, len(near)):
            near[i] = max(near[i], near[i - 1] + unit)
        raise UserError(
            f"nesting rings {list(self.rings)} (widths {list(self.widths)}) do not divide by "
            f"{unit} ({ranks} tensor-parallel ranks x a multiple of {multiple}); the nearest "
            f"widths that do are {near}: set nesting.widths and model.d_ff to them, or change "
            "parallel.tensor"
        )

    def uniform(self, granularity: int, n_layers: int) -> Submodel:
        return Submodel(self, (granularity,) * n_layers)

    def uniforms(self, n_layers: int) -> tuple[Submodel, ...]:
        """Every uniform submodel, widest first: the order in which rows are laid out."""
        return tuple(self.uniform(i, n_layers) for i in reversed(range(len(self))))

    def parse(self, notation: str, n_layers: int) -> Submodel:
        """Read a submodel: a name for all layers ("M"), or runs from the first layer on.

        "S:8,M:4,XL:4" is S in layers 0 to 7, M in 8 to 11, XL in 12 to 15; ":1" may be left out
        in a list. The runs must sum to n_layers.
        """
        text = notation.strip()
        if text in self.names:
            return self.uniform(self.index(text), n_layers)
        runs: list[tuple[int, int]] = []
        for part in text.split(","):
            name, colon, count = (word.strip() for word in part.partition(":"))
            if colon and not _COUNT.fullmatch(count):
                raise UserError(
                    f"submodel {notation!r}: {part.strip()!r} needs a whole number of layers "
                    "above 0 behind the colon, as in S:8,M:8"
                )
            runs.append((self.index(name), int(count) if colon else 1))
        covered = sum(count for _, count in runs)
        if covered != n_layers:
            raise UserError(
                f"submodel {notation!r} covers {covered} layers, the model has "
                f"{n_layers}; write runs that sum to {n_layers}, or one name for all layers"
            )
        return Submodel(self, tuple(i for i, count in runs for _ in range(count)))


@dataclass(frozen=True)
class Submodel:
    """One granularity per layer; `str()` gives the notation that `Nesting.parse` reads."""

    nesting: Nesting
    granularities: tuple[int, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """FFN neurons of each layer."""
        return tuple(self.nesting.widths[i] for i in self.granularities)

    @property
    def is_uniform(self) -> bool:
        return len(set(self.granularities)) == 1

    def __len__(self) -> int:
        return len(self.granularities)

    def __str__(self) -> str:
        if self.is_uniform:
            return self.nesting.names[self.granularities[0]]
        runs = ((self.nesting.names[i], len(list(run))) for i, run in groupby(self.granularities))
        return ",".join(f"{name}:{count}" for name, count in runs)


@dataclass(frozen=True)
class Segment:
    """`sequences` neighbouring sequences of a batch that all run through one submodel."""

    submodel: Submodel
    sequences: int


def mix_n_match(nesting: Nesting, n_layers: int) -> Iterator[Submodel]:
    """The paper's heuristic submodels (sec. 3.3, D.1), from S to XL, uniform ones included.

    Widths never fall with depth, only adjacent granularities meet, and the slope is the smallest
    possible: the last k layers are one granularity wider than those before them.
    """
    for narrow in range(len(nesting) - 1):
        for wide_layers in range(n_layers):
            split = n_layers - wide_layers
            yield Submodel(nesting, (narrow,) * split + (narrow + 1,) * wide_layers)
    yield nesting.uniform(nesting.largest, n_layers)
