"""Which models the study trains: each a base configuration of configs/, overrides and a seed.

A model that is trained alone sees `training.tokens` of its configuration, X. A universal one spends
the forward FLOPs that its granularities would spend so, together (the paper's comparison, tables 9
to 13): that is 4X tokens for per_sequence and sampled, X for joint, which runs every granularity on
every token, and what lies between for sandwich.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias
from zlib import crc32

from benchmarks.machine import RESULTS
from matformer_dist.config_file import load_config
from matformer_dist.config_language import LanguageConfig, as_language
from matformer_dist.counting import count_parameters, forward_flops
from matformer_dist.nesting import Submodel
from matformer_dist.training.objective import Objective

CONFIGS = Path(__file__).parent / "configs"
RUNS = Path("runs/quality")
SEEDS = (1, 2, 3)
SMALL, MIDDLE, LARGE = "260k", "1m", "4m"
ON_GPU = ("78m", "180m")
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "per_sequence": ("objective.kind=per_sequence",),
    "sampled": ("objective.kind=sampled",),
    "joint": ("objective.kind=joint",),
    "joint-kd": ("objective.kind=joint", "objective.distillation=1.0"),
    "sandwich": ("objective.kind=sandwich",),
    "sandwich-kd": ("objective.kind=sandwich", "objective.distillation=1.0"),
}
# Part 1's best at SMALL, with sampled, which the other parts ask about.
BEST = "per_sequence"
BETWEEN = (96, 192)  # neurons at SMALL, half-way between M and L, L and XL
PAPER_PROBABILITIES = {  # its table T6
    "to-XL": "{S: 0.20, M: 0.22, L: 0.24, XL: 0.34}",
    "to-S": "{S: 0.44, M: 0.31, L: 0.15, XL: 0.10}",
}
FRACTIONS = {  # granularities of the same name have the same width
    "g2": ("nesting.fractions=[1/8,1]", "nesting.names=[S,XL]"),
    "g8": (
        "nesting.fractions=[1/8,1/4,3/8,1/2,5/8,3/4,7/8,1]",
        "nesting.names=[S,M,M3,L,L5,L6,L7,XL]",
    ),
    "even": ("nesting.fractions=[1/4,1/2,3/4,1]", "nesting.names=[M,L,L6,XL]"),
}
SLOWER, FASTER = "-lr-0.5", "-lr-2"
RATES = {SLOWER: 0.5, FASTER: 2.0, "-lr-4": 4.0}  # of the configuration's learning rate
DEFAULT_RATES = (SLOWER, FASTER)
FEWER_STEPS = (("joint", FASTER), ("sandwich", FASTER))  # for which it may be too low
BATCHES = {"-batch-4": 4, "-batch-2": 2}  # sequences, with sqrt of that of the learning rate
ENDS = ("S", "XL")
DRAFTS = ("S", "M")
HALF = "-half"
LONG = "-x4"
TOKENS = {HALF: 0.5, "-x2": 2.0, LONG: 4.0}  # in X
REMEDIES = {  # where distillation costs XL more than it gives the others
    "joint-kd-0.3": ("objective.distillation=0.3",),
    "joint-kd-XL": (
        "objective.distillation=1.0",
        "objective.weights={S: 0.2, M: 0.2, L: 0.2, XL: 0.4}",
    ),
}
BASELINE = "transformers-XL"  # what baseline.py trains
INACTIVE = "inactive.json"  # what inactive.py measures, in a run
CONTINUED = 0.1  # of a universal model's tokens
TRAIN = ("launch/train.py",)
SKIP, DRIFT = (("-m", "benchmarks.quality.inactive", mode) for mode in ("skip", "drift"))
Order: TypeAlias = Literal["importance", "none"]
_STEPS_AVERAGED = 4096  # of an objective that draws


@dataclass(frozen=True)
class Run:
    """One model to train. `seed` decides the order of the data, and with `family` the first
    weights: universal models that differ in one setting begin alike, so that what differs is its
    doing, and models that are trained apart never do.
    """

    size: str  # a file of configs/
    name: str
    seed: int
    family: str
    overrides: tuple[str, ...] = ()
    program: tuple[str, ...] = TRAIN
    # Begins as XL that was trained alone, imported with its neurons in this order.
    imported: Order | None = None

    def __str__(self) -> str:
        return str(self.directory)

    @property
    def directory(self) -> Path:
        return RUNS / self.size / f"{self.name}-{self.seed}"

    @property
    def result(self) -> Path:
        return RESULTS / "quality" / self.size / f"{self.name}-{self.seed}.json"

    @property
    def watches(self) -> bool:
        """Whether it leaves INACTIVE in its directory."""
        return self.program == DRIFT

    def settings(self) -> list[str]:
        """All overrides of the configuration of its size."""
        first_weights = crc32(f"{self.family}-{self.seed}".encode())
        return [
            f"run.dir={self.directory}",
            f"training.seed={first_weights}",
            f"data.seed={self.seed}",
            *self.overrides,
        ]

    def config(self) -> LanguageConfig:
        return read(self.size, self.settings())


def read(size: str, overrides: Sequence[str] = ()) -> LanguageConfig:
    return _read(size, tuple(overrides))


@cache
def _read(size: str, overrides: tuple[str, ...]) -> LanguageConfig:
    return as_language(load_config(CONFIGS / f"{size}.yaml", overrides), "the study")


def tokens_alone(size: str) -> int:
    """X."""
    tokens = read(size).training.tokens
    assert tokens is not None
    return tokens


def non_embedding(size: str, submodel: Submodel) -> int:
    """N, the parameters of a submodel of that size without the embedding."""
    model = read(size).model
    assert model.vocab_size is not None
    return count_parameters(model, model.vocab_size, submodel).non_embedding


# What is trained.


def alone(size: str, seed: int, neurons: int, name: str = "", *more: str) -> Run:
    """A model of one width, called as the granularity of that width, or by `name`."""
    nesting = read(size).granularities
    names = dict(zip(nesting.widths, nesting.names, strict=True))
    width = names.get(neurons, f"W{neurons}")
    settings = (f"model.d_ff={neurons}", "nesting.fractions=[1]", f"nesting.names=[{width}]")
    return Run(size, f"alone-{name or width}", seed, width, (*settings, *more))


def alone_xl(seed: int) -> Run:
    return alone(SMALL, seed, read(SMALL).model.d_ff)


def all_alone(
    size: str, seed: int, *more: str, suffix: str = "", names: Sequence[str] = ()
) -> list[Run]:
    """Every granularity, or those of these names."""
    nesting = read(size).granularities
    return [
        alone(size, seed, width, name + suffix, *more)
        for name, width in zip(nesting.names, nesting.widths, strict=True)
        if not names or name in names
    ]


def all_in_one(size: str, seed: int) -> Run:
    """XL alone with the FLOPs of all: what is given up for the others."""
    neurons = read(size).model.d_ff
    of_xl = alone(size, seed, neurons).overrides
    steps = round(_steps_for_all(size, of_xl))
    settings = ("training.tokens=null", f"training.steps={steps}")
    return alone(size, seed, neurons, "XL-all", *settings)


def universal(
    size: str,
    seed: int,
    name: str,
    overrides: tuple[str, ...] = (),
    *,
    share: float = 1.0,
    program: tuple[str, ...] = TRAIN,
    imported: Order | None = None,
) -> Run:
    """As many steps as spend `share` of the FLOPs of its granularities alone."""
    steps = round(share * _steps_for_all(size, overrides))
    settings = (*overrides, "training.tokens=null", f"training.steps={steps}")
    return Run(size, name, seed, "universal", settings, program, imported)


def universal_of(size: str, seed: int, objective: str, suffix: str) -> Run:
    """With FLOPs for as many tokens as `suffix` says."""
    overrides, share = OBJECTIVES[objective], TOKENS[suffix]
    return universal(size, seed, objective + suffix, overrides, share=share)


@cache
def _steps_for_all(size: str, overrides: tuple[str, ...]) -> float:
    """Steps of a universal model that spend what the configuration's granularities alone do.

    A nest of other granularities is given as much.
    """
    return _flops_alone(size) / step_flops(read(size, overrides))


@cache
def _flops_alone(size: str) -> float:
    """Of all granularities of the configuration, together."""
    configs = [run.config() for run in all_alone(size, SEEDS[0])]
    return sum(step_flops(config) * config.training.total_steps for config in configs)


def step_flops(config: LanguageConfig) -> float:
    """Forward, of a step, on average."""
    assert config.model.vocab_size is not None
    objective = Objective(
        config.objective, config.granularities, config.model.n_layers, config.training.seed
    )
    plans = [
        objective.plan(step, 0, 1, config.training.global_batch_size)
        for step in range(_STEPS_AVERAGED)
    ]
    total = 0
    for (segments, shared), count in Counter((p.segments, p.shared_tokens) for p in plans).items():
        flops = forward_flops(
            config.model, config.model.vocab_size, segments, config.sample, shared_tokens=shared
        )
        total += count * flops.total
    return total / _STEPS_AVERAGED


def rate(size: str, factor: float) -> tuple[str, str]:
    """Overrides for another learning rate than the configuration's."""
    config = read(size)
    lr, lowest = factor * config.optimizer.lr, factor * config.schedule.min_lr
    return f"optimizer.lr={lr:g}", f"schedule.min_lr={lowest:g}"


# The parts.


def independent() -> Iterator[Run]:
    """1. Each granularity alone, and the universal model by every objective."""
    for seed in SEEDS:
        yield from all_alone(SMALL, seed)
        for name, overrides in OBJECTIVES.items():
            yield universal(SMALL, seed, name, overrides)
        yield all_in_one(SMALL, seed)


def larger() -> Iterator[Run]:
    """1. The same for models of more parameters."""
    for size, names in ((MIDDLE, (BEST, "joint")), (LARGE, (BEST,))):
        yield from all_alone(size, SEEDS[0])
        for name in names:
            yield universal(size, SEEDS[0], name, OBJECTIVES[name])
    yield from more_tokens(MIDDLE, SEEDS[0], LONG)
    yield universal_of(MIDDLE, SEEDS[0], BEST, LONG)


def longer() -> Iterator[Run]:
    """1. The same with more tokens for everyone, where models alone lack them less."""
    for seed in SEEDS:
        yield universal_of(SMALL, seed, BEST, LONG)
        yield from more_tokens(SMALL, seed, LONG)


def longer_others() -> Iterator[Run]:
    """1. Does the order of the objectives hold with more tokens?"""
    for name in ("sampled", "sandwich", "joint"):
        yield universal_of(SMALL, SEEDS[0], name, LONG)


def more_tokens(
    size: str, seed: int, suffix: str, *more: str, names: Sequence[str] = (), label: str = ""
) -> list[Run]:
    """All alone, of as many tokens as `suffix` says; and with other settings, called `label`."""
    tokens = _tokens(size, suffix)
    return all_alone(size, seed, tokens, *more, suffix=suffix + label, names=names)


def _tokens(size: str, suffix: str) -> str:
    return f"training.tokens={round(TOKENS[suffix] * tokens_alone(size))}"


def on_gpu() -> Iterator[Run]:
    """1. At the paper's smallest sizes."""
    for size in ON_GPU:
        yield from all_alone(size, SEEDS[0])
        for name in (BEST, "joint"):
            yield universal(size, SEEDS[0], name, OBJECTIVES[name])


def frontier() -> Iterator[Run]:
    """2. Models of sizes between the granularities'."""
    for seed in SEEDS:
        yield from between(seed)


def between(seed: int) -> list[Run]:
    tokens = _tokens(SMALL, LONG)
    return [alone(SMALL, seed, neurons, f"W{neurons}{LONG}", tokens) for neurons in BETWEEN]


def defaults() -> Iterator[Run]:
    """4. What the shipped configurations leave as it is."""
    for seed in SEEDS:
        for suffix in DEFAULT_RATES:
            overrides = (*OBJECTIVES[BEST], *rate(SMALL, RATES[suffix]))
            yield universal(SMALL, seed, BEST + suffix, overrides)
        for name, probabilities in PAPER_PROBABILITIES.items():
            overrides = (*OBJECTIVES[BEST], f"objective.probabilities={probabilities}")
            yield universal(SMALL, seed, f"{BEST}-{name}", overrides)
        yield universal(SMALL, seed, "sampled-skipping", OBJECTIVES["sampled"], program=SKIP)
    for suffix in DEFAULT_RATES:
        overrides = (*OBJECTIVES[BEST], *rate(MIDDLE, RATES[suffix]))
        yield universal(MIDDLE, SEEDS[0], BEST + suffix, overrides)


def sensitivity() -> Iterator[Run]:
    """4. One setting after the other, of universal models and of their ends alone; one seed."""
    seed = SEEDS[0]
    base, sampled, joint = (OBJECTIVES[name] for name in (BEST, "sampled", "joint"))
    for suffix, factor in RATES.items():
        rates = rate(SMALL, factor)
        yield from all_alone(SMALL, seed, *rates, suffix=suffix, names=ENDS)
    # Is a rate that suits short runs too high for long ones?
    slower = rate(SMALL, RATES[SLOWER])
    yield from more_tokens(SMALL, seed, LONG, *slower, names=ENDS, label=SLOWER)
    for name, suffix in FEWER_STEPS:
        rates = rate(SMALL, RATES[suffix])
        yield universal(SMALL, seed, name + suffix, (*OBJECTIVES[name], *rates))
    # Is it only that a universal model takes more steps of the same batch?
    whole = read(SMALL).training.global_batch_size
    for suffix, sequences in BATCHES.items():
        smaller = (
            f"training.global_batch_size={sequences}",
            f"training.micro_batch_size={sequences}",
            *rate(SMALL, (sequences / whole) ** 0.5),
        )
        yield from all_alone(SMALL, seed, *smaller, suffix=suffix, names=ENDS)
    for name, fractions in FRACTIONS.items():
        yield universal(SMALL, seed, f"{BEST}-{name}", (*base, *fractions))
    for name, remedy in REMEDIES.items():
        yield universal(SMALL, seed, name, (*joint, *remedy))
    share = TOKENS[HALF]
    yield universal(SMALL, seed, f"sampled-drift{HALF}", sampled, share=share, program=DRIFT)


def continued() -> Iterator[Run]:
    """5. XL alone, imported, and nested for a tenth of the universal model's FLOPs; and, for as
    many, XL gone on with alone.
    """
    share = CONTINUED * TOKENS[LONG]
    nested, alone_still = OBJECTIVES[BEST], "objective.probabilities={S: 0, M: 0, L: 0, XL: 1}"
    ways: dict[str, tuple[Order, tuple[str, ...]]] = {
        "importance": ("importance", nested),
        "none": ("none", nested),
        "XL": ("none", (*nested, alone_still)),
    }
    for seed in SEEDS:
        for name, (order, objective) in ways.items():
            # Other data than it has seen last, and a rate to go on with.
            overrides = (*objective, *rate(SMALL, 0.5), f"data.seed={seed + 100}")
            yield universal(
                SMALL, seed, f"continued-{name}", overrides, share=share, imported=order
            )


def parent(run: Run) -> Run:
    """What an imported one was."""
    (xl,) = more_tokens(run.size, run.seed, LONG, names=["XL"])
    return xl


def scaling() -> Iterator[Run]:
    """6. More and fewer tokens; the rest is part 1's."""
    seed = SEEDS[0]
    for suffix in (HALF, "-x2"):
        yield from more_tokens(SMALL, seed, suffix)
        yield universal_of(SMALL, seed, BEST, suffix)


MODELS = {
    "independent": independent,
    "longer": longer,
    "longer-others": longer_others,
    "larger": larger,
    "gpu": on_gpu,
    "frontier": frontier,
    "defaults": defaults,
    "sensitivity": sensitivity,
    "continued": continued,
    "scaling": scaling,
}
