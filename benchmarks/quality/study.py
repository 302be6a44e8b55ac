"""Which models the study trains: each a base configuration of configs/, overrides and a seed.

A model that is trained alone sees `training.tokens` of its configuration, X. A universal one spends
the forward FLOPs that its granularities would spend so, together (the paper's comparison, tables 9
to 13): that is 4X tokens for per_sequence and sampled, X for joint, which runs every granularity on
every token, and what lies between for sandwich.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from zlib import crc32

from benchmarks.machine import RESULTS
from matformer_dist.config_file import load_config
from matformer_dist.config_language import LanguageConfig, as_language
from matformer_dist.counting import forward_flops
from matformer_dist.training.objective import Objective

CONFIGS = Path(__file__).parent / "configs"
RUNS = Path("runs/quality")
SEEDS = (1, 2, 3)
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "per_sequence": (),
    "sampled": ("objective.kind=sampled",),
    "joint": ("objective.kind=joint",),
    "joint-kd": ("objective.kind=joint", "objective.distillation=1.0"),
    "sandwich": ("objective.kind=sandwich",),
    "sandwich-kd": ("objective.kind=sandwich", "objective.distillation=1.0"),
}
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

    @property
    def directory(self) -> Path:
        return RUNS / self.size / f"{self.name}-{self.seed}"

    @property
    def result(self) -> Path:
        return RESULTS / "quality" / self.size / f"{self.name}-{self.seed}.json"

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
    return as_language(load_config(CONFIGS / f"{size}.yaml", overrides), "the study")


def against_independent(size: str, seeds: Sequence[int] = SEEDS) -> Iterator[Run]:
    """Each granularity alone, and the universal model by every objective."""
    nesting = read(size).granularities
    for seed in seeds:
        for name, width in zip(nesting.names, nesting.widths, strict=True):
            yield Run(size, f"alone-{name}", seed, name, alone(name, width))
        for name, overrides in OBJECTIVES.items():
            yield universal(size, name, seed, overrides)


def learning_rates(size: str, seeds: Sequence[int] = SEEDS[:1]) -> Iterator[Run]:
    """Half and double the rate of the configuration: of XL alone, and of the universal model."""
    config = read(size)
    name, width = config.granularities.names[-1], config.model.d_ff
    for seed in seeds:
        for factor in (0.5, 2.0):
            rate, lowest = (
                f"{key}={factor * value:g}"
                for key, value in (
                    ("optimizer.lr", config.optimizer.lr),
                    ("schedule.min_lr", config.schedule.min_lr),
                )
            )
            settings = (*alone(name, width), rate, lowest)
            yield Run(size, f"alone-{name}-lr-{factor:g}", seed, name, settings)
            yield universal(size, f"per_sequence-lr-{factor:g}", seed, (rate, lowest))


def alone(name: str, width: int) -> tuple[str, ...]:
    return (f"model.d_ff={width}", "nesting.fractions=[1]", f"nesting.names=[{name}]")


def universal(size: str, name: str, seed: int, overrides: tuple[str, ...]) -> Run:
    """As many steps as spend the FLOPs of its granularities alone."""
    steps = round(_flops_alone(size) / step_flops(read(size, overrides)))
    settings = (*overrides, "training.tokens=null", f"training.steps={steps}")
    return Run(size, name, seed, "universal", settings)


@cache
def _flops_alone(size: str) -> float:
    """Forward, of all steps of its granularities that are trained alone."""
    nesting = read(size).granularities
    widths = zip(nesting.names, nesting.widths, strict=True)
    configs = [read(size, alone(name, width)) for name, width in widths]
    return sum(step_flops(config) * config.training.total_steps for config in configs)


def step_flops(config: LanguageConfig) -> float:
    """Forward, of a step, on average."""
    assert config.model.vocab_size is not None
    objective = Objective(
        config.objective, config.granularities, config.model.n_layers, config.training.seed
    )
    total = 0
    for step in range(_STEPS_AVERAGED):
        plan = objective.plan(step, 0, 1, config.training.global_batch_size)
        total += forward_flops(
            config.model,
            config.model.vocab_size,
            plan.segments,
            config.sample,
            shared_tokens=plan.shared_tokens,
        ).total
    return total / _STEPS_AVERAGED
