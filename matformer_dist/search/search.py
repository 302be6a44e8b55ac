"""The best submodels within budgets: foretold from one-layer changes, then measured.

1. Measure the uniform submodels, the paper's heuristic at the budgets, and one-layer changes.
2. A knapsack over what they foretell names a few candidates a budget; these are measured, and
   correct what is foretold. Again, `rounds` times.
3. Of all that was measured, the best within a budget is its slice. It is compared with the best of
   the heuristic's that were measured within the same budget, of which the widest is one: on these
   sequences, a slice is never worse.

Everything runs in the universal model: nothing is extracted.
"""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from matformer_dist.config import Config
from matformer_dist.config_file import load_config
from matformer_dist.errors import UserError
from matformer_dist.evaluation.validation import open_validation
from matformer_dist.inference.device import choose_device
from matformer_dist.inference.held import LoadedModel
from matformer_dist.inference.loading import load_model
from matformer_dist.nesting import Nesting, Submodel, mix_n_match
from matformer_dist.run_directory import find_checkpoint
from matformer_dist.search.budget import BYTES_OF, Budget, Costs
from matformer_dist.search.choice import choose, describe, widest_within, without_repetitions
from matformer_dist.search.files import write_slices
from matformer_dist.search.knapsack import Knapsack
from matformer_dist.search.latency import latency_table, read_latency
from matformer_dist.search.measurements import Measurements
from matformer_dist.search.predictor import Predictor, one_layer_changes
from matformer_dist.submodels.entry import is_extracted
from matformer_dist.submodels.slices import Cost, Slice, Slices, read_slices

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Options:
    """How much is searched, and what memory and latency are of."""

    points: int = 24  # budgets of a whole frontier, at most, and those of the granularities
    candidates: int = 3  # measured of each budget and round
    rounds: int = 2
    batches: int | None = None  # of validation data; None: the run's evaluation.batches
    data: str | Path | None = None  # token files, or images, to take instead
    dtype: str = "bf16"  # of memory
    table: Path | None = None  # None: RUN/latency.json
    sequences: int | None = None  # of a timed pass, or images; None: the table's, else 1
    context: int | None = None  # tokens before the one that is timed
    latency_dtype: str | None = None  # of latency; the table's, else bf16 on a GPU, fp32 on a CPU
    device: str | None = None  # None: the GPU, if there is one

    def __post_init__(self) -> None:
        for name, dtype in (("dtype", self.dtype), ("latency-dtype", self.latency_dtype)):
            if dtype is not None and dtype not in BYTES_OF:
                raise UserError(f"--{name} {dtype!r} must be one of {', '.join(BYTES_OF)}")
        for name, value, least in (
            ("points", self.points, 2),
            ("candidates", self.candidates, 1),
            ("rounds", self.rounds, 0),
            ("latency-sequences", 1 if self.sequences is None else self.sequences, 1),
        ):
            if value < least:
                raise UserError(f"--{name} {value} must be {least} or more")


@dataclass(frozen=True)
class Found:
    """What a search has found: a slice for each budget, or those of a frontier; and all that
    slices.json holds.
    """

    run: Path
    nesting: Nesting
    slices: list[Slice]
    all: Slices
    measured_now: int  # submodels; the others were known
    notes: list[str]  # what became of the slices of earlier searches, where they are not kept


def search(
    run: str,
    budgets: Sequence[Budget] = (),
    *,
    kind: Cost = "params",
    options: Options | None = None,
    progress: Progress = lambda done, total: None,
) -> Found:
    """The best submodels of RUN[@STEP] within `budgets`; none given: the frontier from S to XL,
    over budgets of `kind`. Writes RUN/slices.json and slices.csv, with the budgets of earlier
    searches of the same weights and sequences.

    `progress` is told submodels measured, of how many so far. UserError for a budget that no
    submodel meets or that all do, for lacking validation data, and where another search is at work.
    """
    options = options or Options()
    device = choose_device(options.device)
    if is_extracted(Path(run)):
        raise UserError(f"{run} is an extracted model; search the run that it was taken out of")
    checkpoint = find_checkpoint(run)
    with _alone(checkpoint.path.parent.parent):
        loaded = load_model(checkpoint.path, device=device)
        config = load_config(loaded.directory / "config.yaml")
        validation = open_validation(config, loaded.labels, options.batches, options.data)
        known = Measurements(loaded, validation, checkpoint.manifest.manifest_sha256)
        before, notes = _before(known)
        kinds = {budget.kind for budget in budgets} or {kind}
        latency_ms, latency_on = _latency(loaded, options, "latency" in kinds, before)
        costs = Costs.of(
            loaded.model.model,
            loaded.submodel.nesting,
            loaded.model.outputs,
            config.sample,
            dtype=options.dtype,
            latency_ms=latency_ms,
        )
        for budget in budgets:
            costs.check(budget)
        wanted = list(dict.fromkeys(budgets)) or _frontier(costs, kind, options.points)
        earlier = _still_meant(before, costs)
        _measure(known, costs, wanted, earlier, options, progress)
        slices = choose(known, costs, [*wanted, *map(_budget, earlier)])
        whole = _all_slices(
            known, costs, without_repetitions(slices), latency_on, options.data, config
        )
        write_slices(loaded.directory, whole)
        asked = slices[: len(wanted)]
        asked = asked if budgets else without_repetitions(asked)
        dropped = [one.name for one in before.slices if one not in earlier] if before else []
        if dropped:
            notes.append(
                f"no slices any more: {', '.join(dropped)}, whose memory or latency is counted "
                "otherwise now"
            )
        return Found(loaded.directory, costs.nesting, asked, whole, known.new, notes)


@contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    with (run_dir / ".search.lock").open("ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise UserError(
                f"another search of {run_dir} is at work; wait for its end: what it measures, the "
                "next one knows"
            ) from None
        yield


def _budget(one: Slice) -> Budget:
    return Budget(one.kind, one.budget)


def _before(known: Measurements) -> tuple[Slices | None, list[str]]:
    """What earlier searches of the same weights and sequences chose; and notes of what other slices
    this search replaces. UserError if the file is broken.
    """
    before = read_slices(known.loaded.directory)
    if before is None:
        return None, []
    if before.checkpoint_sha256 != known.checkpoint_sha256:
        return None, [f"replaced: slices of other weights, those of step {before.step}"]
    if before.data_sha256 != known.validation.digest:
        return None, [f"replaced: slices chosen on {before.units:,} other validation {before.unit}"]
    return before, []


def _all_slices(
    known: Measurements,
    costs: Costs,
    slices: list[Slice],
    latency_on: str,
    data: str | Path | None,
    config: Config,
) -> Slices:
    assert known.loaded.step is not None, "it is a run's"
    return Slices(
        step=known.loaded.step,
        checkpoint_sha256=known.checkpoint_sha256,
        data="" if data is None else str(data),
        data_sha256=known.validation.digest,
        seq_len=costs.sample.predictions,
        unit=config.unit,
        units=known.validation.predictions,
        dtype=costs.dtype,
        latency_on=latency_on,
        slices=slices,
        measured=sorted(
            (describe(known[one], costs, one) for one in known),
            key=lambda one: (one.parameters, one.loss),
        ),
    )


def _latency(
    loaded: LoadedModel, options: Options, is_wanted: bool, before: Slices | None
) -> tuple[Sequence[float], str]:
    """Of the uniform submodels in ms, narrowest first, and what it was measured on, in words.

    Where no budget is of latency, and no option is about it: that of the searches before, else that
    of the run, if it was measured here, else none.
    """
    path = options.table or loaded.directory / "latency.json"
    asked = (options.table, options.sequences, options.context, options.latency_dtype)
    is_wanted = is_wanted or any(one is not None for one in asked)
    if before and before.latency_on and not is_wanted:
        of = {one.submodel: one.latency_ms for one in before.measured}
        found = [of.get(name) for name in loaded.submodel.nesting.names]
        if all(found):
            return [ms for ms in found if ms], before.latency_on
    device = loaded.model.device
    if not is_wanted and not (path.exists() and read_latency(path).is_of(device)):
        return (), ""
    table = latency_table(
        path,
        loaded,
        sequences=options.sequences,
        context=options.context,
        dtype=options.latency_dtype,
        is_of_here=options.table is None,
    )
    return table.rising_ms, table.describe()


def _still_meant(before: Slices | None, costs: Costs) -> list[Slice]:
    """Slices of earlier searches that still cost what they did: not so where memory is of another
    dtype now, or latency of another table.
    """
    nesting, layers = costs.nesting, costs.n_layers

    def is_meant(one: Slice) -> bool:
        cost = one.cost(one.kind)
        if cost is None or one.kind not in costs.base:
            return False
        now = costs.cost(one.kind, nesting.parse(one.submodel, layers))
        smallest = costs.base[one.kind]
        return abs(now - cost) <= max(1.0, now) * 1e-9 and smallest <= one.budget * (1 + 1e-9)

    return [one for one in before.slices if is_meant(one)] if before else []


def _frontier(costs: Costs, kind: Cost, points: int) -> list[Budget]:
    """Budgets from S to XL: what the heuristic's submodels cost, evenly chosen of them."""
    ladder = sorted({costs.cost(kind, one) for one in mix_n_match(costs.nesting, costs.n_layers)})
    count = min(points, len(ladder))
    if count == 1:
        return [Budget(kind, ladder[0])]
    chosen = {round(i * (len(ladder) - 1) / (count - 1)) for i in range(count)}
    uniform = {costs.cost(kind, one) for one in costs.nesting.uniforms(costs.n_layers)}
    return [Budget(kind, cost) for i, cost in enumerate(ladder) if i in chosen or cost in uniform]


def _measure(
    known: Measurements,
    costs: Costs,
    budgets: Sequence[Budget],
    earlier: Sequence[Slice],
    options: Options,
    progress: Progress,
) -> None:
    """Measure what `budgets` ask for, and again what lacks of `earlier` slices."""
    nesting, layers = costs.nesting, costs.n_layers
    first = [
        *nesting.uniforms(layers),
        *(nesting.parse(one.submodel, layers) for one in earlier),
        *(widest_within(costs, budget) for budget in (*budgets, *map(_budget, earlier))),
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
