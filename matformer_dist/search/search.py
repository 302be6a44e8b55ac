"""The best submodels within budgets: foretold from one-layer changes, then measured.

1. Measure the uniform submodels, the paper's heuristic at the budgets, and one-layer changes.
2. A knapsack over what they foretell names a few candidates a budget; these are measured, and
   correct what is foretold. Again, `rounds` times.
3. Of all that was measured, the best within a budget is its slice. The heuristic's are among it:
   on the sequences that were measured, a slice is never worse than the heuristic.

Everything runs in the universal model: nothing is extracted.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from matformer_dist.config_file import load_config
from matformer_dist.errors import UserError
from matformer_dist.evaluation.measured import Measured, gain
from matformer_dist.evaluation.validation import Validation
from matformer_dist.inference.loading import LoadedModel, load_model
from matformer_dist.nesting import Nesting, Submodel, mix_n_match
from matformer_dist.run_directory import find_checkpoint
from matformer_dist.search.budget import BYTES_OF, Budget, Costs, short_cost
from matformer_dist.search.files import write_slices
from matformer_dist.search.knapsack import Knapsack
from matformer_dist.search.latency import LatencyTable, latency_table
from matformer_dist.search.measurements import Measurements
from matformer_dist.search.predictor import Predictor, one_layer_changes
from matformer_dist.submodels.slices import (
    Cost,
    MeasuredSubmodel,
    Slice,
    Slices,
    read_slices,
)

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Options:
    """How much is searched, and what memory and latency are of."""

    points: int = 24  # budgets of a whole frontier, at most
    candidates: int = 3  # measured of each budget and round
    rounds: int = 2
    batches: int | None = None  # of validation data; None: the run's evaluation.batches
    data: Path | None = None  # token files to take instead
    dtype: str = "bf16"  # of memory
    table: Path | None = None  # None: RUN/latency.json
    sequences: int = 1  # decoded together, for latency
    context: int | None = None  # tokens before the one that is timed
    device: str | None = None  # None: the GPU, if there is one

    def __post_init__(self) -> None:
        if self.dtype not in BYTES_OF:
            raise UserError(
                f"--dtype {self.dtype!r} must be one of {', '.join(BYTES_OF)}: memory is that of "
                "weights and cache in it"
            )
        for name in ("points", "candidates", "rounds", "sequences"):
            least = 2 if name == "points" else 0 if name == "rounds" else 1
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)} must be {least} or more")


@dataclass(frozen=True)
class Found:
    """What a search has found: the slices of its budgets, and all that slices.json holds."""

    run: Path
    nesting: Nesting
    slices: list[Slice]
    all: Slices
    measured_now: int  # submodels; the others were known


def search(
    run: str,
    budgets: Sequence[Budget] = (),
    *,
    kind: Cost = "params",
    options: Options | None = None,
    progress: Progress = lambda done, total: None,
) -> Found:
    """The best submodels of RUN[@STEP] within `budgets`; none given: the frontier from S to XL,
    over budgets of `kind`. Writes RUN/slices.json and slices.csv.

    `progress` is told submodels measured, of how many so far. UserError for a budget that no
    submodel meets or that all do, for lacking validation data, and where another search is at work.
    """
    options = options or Options()
    checkpoint = find_checkpoint(run)
    with _alone(checkpoint.path.parent.parent):
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded = load_model(checkpoint.path, device=device)
        config = load_config(loaded.directory / "config.yaml")
        seq_len = config.training.seq_len
        kinds = {budget.kind for budget in budgets} or {kind}
        table = _latency(loaded, options, "latency" in kinds)
        costs = Costs.of(
            loaded.model.model,
            loaded.submodel.nesting,
            loaded.model.vocab_size,
            seq_len=seq_len,
            dtype=options.dtype,
            latency_ms=table.rising_ms if table else (),
        )
        for budget in budgets:
            costs.check(budget)
        wanted = list(dict.fromkeys(budgets)) or _frontier(costs, kind, options.points)
        validation = Validation.of(config, loaded.tokenizer, options.batches, options.data)
        sha256 = checkpoint.manifest.manifest_sha256
        known = Measurements(loaded, validation, sha256)
        _measure(known, costs, wanted, options, progress)
        slices = _slices(known, costs, wanted)
        whole = Slices(
            step=checkpoint.step,
            checkpoint_sha256=sha256,
            seq_len=seq_len,
            tokens=next(iter(known.values())).tokens,
            dtype=options.dtype,
            latency_on=table.describe() if table else "",
            slices=slices,
            measured=sorted(
                (_entry(known[one], costs, one) for one in known), key=lambda one: one.parameters
            ),
        )
        whole = _joined(read_slices(loaded.directory), whole)
        write_slices(loaded.directory, whole)
        ours = {(one.kind, one.submodel) for one in slices}
        named = [one for one in whole.slices if (one.kind, one.submodel) in ours]
        return Found(loaded.directory, costs.nesting, named, whole, known.new)


@contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    with (run_dir / ".search.lock").open("ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another search of {run_dir} is at work; wait for its end: what it measures, the "
                "next one knows"
            ) from None
        yield


def _latency(loaded: LoadedModel, options: Options, is_wanted: bool) -> LatencyTable | None:
    """None where no budget is of latency and there is no table either."""
    path = options.table or loaded.directory / "latency.json"
    if not is_wanted and not path.exists():
        return None
    return latency_table(path, loaded, sequences=options.sequences, context=options.context)


def _frontier(costs: Costs, kind: Cost, points: int) -> list[Budget]:
    """Budgets from S to XL: what the heuristic's submodels cost, evenly chosen of them."""
    ladder = sorted({costs.cost(kind, one) for one in mix_n_match(costs.nesting, costs.n_layers)})
    count = min(points, len(ladder))
    if count == 1:
        return [Budget(kind, ladder[0])]
    chosen = {round(i * (len(ladder) - 1) / (count - 1)) for i in range(count)}
    uniform = {costs.cost(kind, one) for one in costs.nesting.uniforms(costs.n_layers)}
    return [Budget(kind, cost) for i, cost in enumerate(ladder) if i in chosen or cost in uniform]


def _heuristic(costs: Costs, budget: Budget) -> Submodel:
    """The paper's submodel within a budget: the widest of its ladder from S to XL."""
    *_, widest = (
        one for one in mix_n_match(costs.nesting, costs.n_layers) if costs.fits(one, budget)
    )
    return widest


def _measure(
    known: Measurements,
    costs: Costs,
    budgets: Sequence[Budget],
    options: Options,
    progress: Progress,
) -> None:
    nesting, layers = costs.nesting, costs.n_layers
    first = [
        *nesting.uniforms(layers),
        *(_heuristic(costs, budget) for budget in budgets),
        *(changed for _, _, changed in one_layer_changes(nesting, layers)),
    ]
    first = list(dict.fromkeys(first))
    rounds = options.rounds * options.candidates * len(budgets)
    done, total = 0, len(first) + rounds

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    known.measure(first, advance)
    if len(nesting) == 1 or layers == 1:  # the uniform submodels are all there is
        return
    predictor = Predictor.from_changes(nesting, layers, known.losses)
    for i in range(options.rounds):
        predicted = predictor.corrected(known.losses)
        candidates = dict.fromkeys(_candidates(predicted, costs, budgets, known, options))
        total = done + len(candidates) + (options.rounds - i - 1) * rounds // options.rounds
        known.measure(candidates, advance)
    progress(done, done)


def _candidates(
    predictor: Predictor,
    costs: Costs,
    budgets: Sequence[Budget],
    known: Measurements,
    options: Options,
) -> Iterator[Submodel]:
    """For each budget the best few by prediction that were not measured yet."""
    sacks = {
        kind: Knapsack(predictor, costs, kind, keep=4 * options.candidates)
        for kind in {budget.kind for budget in budgets}
    }
    named: set[Submodel] = set()
    for budget in budgets:
        best = sacks[budget.kind].best(budget, 8 * options.candidates)
        new = [one for one in best if one not in known and one not in named]
        named.update(new[: options.candidates])
        yield from new[: options.candidates]


def _slices(known: Measurements, costs: Costs, budgets: Sequence[Budget]) -> list[Slice]:
    slices: list[Slice] = []
    for budget in sorted(budgets, key=lambda budget: (budget.kind, budget.limit)):
        within = [one for one in known if costs.fits(one, budget)]
        kind = budget.kind
        best = min(within, key=lambda one: (known[one].loss, costs.cost(kind, one)))
        heuristic = _heuristic(costs, budget)
        gained, interval = gain(known[best], known[heuristic])
        ladder = set(mix_n_match(costs.nesting, costs.n_layers))
        slices.append(
            Slice(
                **_entry(known[best], costs, best).model_dump(),
                name=str(best) if best.is_uniform else "",
                kind=kind,
                budget=budget.limit,
                found_by="uniform"
                if best.is_uniform
                else "heuristic"
                if best in ladder
                else "search",
                heuristic=str(heuristic),
                gain=gained,
                gain_interval=interval,
            )
        )
    return _named(slices)


def _named(slices: Sequence[Slice]) -> list[Slice]:
    """Each by its cost, with as many digits as tell them apart; a submodel that is the best of
    several budgets once, at the smallest.
    """
    once: dict[tuple[Cost, str], Slice] = {}
    for one in slices:
        once.setdefault((one.kind, one.submodel), one)
    chosen = list(once.values())
    for digits in range(3, 12):
        names = [
            one.name or short_cost(one.kind, one.cost(one.kind) or 0.0, digits) for one in chosen
        ]
        mixed = [name for name, one in zip(names, chosen, strict=True) if not one.name]
        if len(set(mixed)) == len(mixed):
            break
    return [one.model_copy(update={"name": name}) for one, name in zip(chosen, names, strict=True)]


def _entry(measured: Measured, costs: Costs, submodel: Submodel) -> MeasuredSubmodel:
    described, parameters = measured.described(), round(costs.cost("params", submodel))
    return MeasuredSubmodel(
        submodel=str(submodel),
        widths=list(submodel.widths),
        parameters=parameters,
        non_embedding_parameters=parameters - costs.embeddings,
        flops_per_token=round(costs.cost("flops", submodel)),
        memory_bytes=round(costs.cost("memory", submodel)),
        latency_ms=costs.cost("latency", submodel) if "latency" in costs.base else None,
        loss=measured.loss,
        loss_interval=described["loss_interval"],
        agreement=described["agreement"],
        kl=described["kl"],
    )


def _joined(before: Slices | None, now: Slices) -> Slices:
    """With the slices of earlier searches, where they are of the same model, data and settings."""
    same = ("checkpoint_sha256", "seq_len", "tokens", "dtype", "latency_on")
    if before is None or any(getattr(before, name) != getattr(now, name) for name in same):
        return now
    mine = {(one.kind, one.submodel) for one in now.slices}
    kept = [one for one in before.slices if (one.kind, one.submodel) not in mine]
    ordered = sorted([*kept, *now.slices], key=lambda one: (one.kind, one.budget))
    nameless = [
        one if one.found_by == "uniform" else one.model_copy(update={"name": ""}) for one in ordered
    ]
    return now.model_copy(update={"slices": _named(nameless)})
