"""What README and benchmarks/results/quality/tables.md show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.quality import results
from benchmarks.quality.baseline import NAME as BASELINE
from benchmarks.quality.results import Frontier, Losses, Mean
from benchmarks.quality.study import (
    BATCHES,
    BEST,
    ENDS,
    FRACTIONS,
    HALF,
    LARGE,
    MIDDLE,
    OBJECTIVES,
    ON_GPU,
    PAPER_PROBABILITIES,
    RATES,
    REMEDIES,
    SEEDS,
    SMALL,
    TOKENS,
    read,
    tokens_alone,
)

NOTHING = "–"


def tables() -> Iterator[str]:
    """Those that have results, each a heading and a table in Markdown."""
    for size in (SMALL, MIDDLE, LARGE, *ON_GPU):
        yield from against_independent(size)
    for suffix in TOKENS:
        yield from against_independent(SMALL, suffix)
    yield from baseline()
    yield from consistency()
    yield from frontier()
    yield from variants()
    yield from drift()
    yield from continued()


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if not rows:
        return
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    lines.insert(1, "|---" + "|---:" * (len(head) - 1) + "|")
    yield f"### {title}\n\n" + "\n".join(lines)


def against_independent(size: str, suffix: str = "") -> Iterator[str]:
    """Where X is what `suffix` says of the configuration's."""
    names = read(size).granularities.names
    alone = results.alone(size, names, suffix)
    rows = []
    for objective in (*OBJECTIVES, *REMEDIES, "alone-XL-all"):
        ours = results.losses(size, objective + suffix)
        if ours:
            rows.append([objective, *(_against(ours, alone, name) for name in names)])
    if rows:
        rows.insert(0, ["alone", *(_mean(results.mean(alone, name)) for name in names)])
    for other, factor in TOKENS.items() if (size, suffix) == (SMALL, "") else ():
        more = results.alone(size, names, other)
        if more:
            label = f"alone, {factor:g} X tokens"
            rows.append([label, *(_against(more, alone, name) for name in names)])
    tokens = TOKENS.get(suffix, 1) * tokens_alone(size) / 1e6
    title = f"{size}, X = {tokens:g} M tokens: loss of models trained alone; others' less that"
    yield from table(title, ["", *names], rows)


def _mean(found: Mean | None) -> str:
    return found.text() if found else NOTHING


def _against(ours: dict[int, Losses], other: dict[int, Losses], name: str) -> str:
    """The difference in nats and in percent of the other's loss."""
    found, whole = results.difference(ours, other, name), results.mean(other, name)
    if found is None or whole is None:
        return NOTHING
    return f"{found.text('+.4f')} ({100 * found.value / whole.value:+.2f}%)"


def baseline() -> Iterator[str]:
    ours, theirs = results.losses(SMALL, "alone-XL"), results.losses(SMALL, BASELINE)
    rows = [
        [name, *(f"{of[seed]['XL']:.4f}" if seed in of else NOTHING for seed in SEEDS), _mean(mean)]
        for name, of in (("alone-XL", ours), (BASELINE, theirs))
        if (mean := results.mean(of, "XL"))
    ]
    title = f"{SMALL}: XL alone, and transformers' Llama by a plain loop"
    yield from table(title, ["", *(f"seed {seed}" for seed in SEEDS), "mean"], rows)


def consistency() -> Iterator[str]:
    found = [of for seed in SEEDS if (of := results.result(SMALL, "consistency", seed))]
    rows = []
    if found:
        for kind in ("nested", "alone"):
            for name in ("S", "M"):
                means = [
                    Mean.of([of[kind][name][key] for of in found]).text(".3f")
                    for key in ("agreement", "kl", "acceptance", "tokens_per_verify")
                ]
                rows.append([f"{name}, {kind}", *means])
    head = ["", "agreement", "KL", "acceptance", "tokens a verify"]
    yield from table(f"{SMALL}, {BEST}: drafts against XL", head, rows)


def frontier() -> Iterator[str]:
    """At the sizes of models trained alone: the widest that fits of the search, and others."""
    found = [Frontier.of(of) for seed in SEEDS if (of := results.result(SMALL, "frontier", seed))]
    rows = []
    for places in zip(*(of.alone for of in found), strict=True):
        parameters = places[0].parameters
        kinds = {
            "alone": [place.loss for place in places],
            "line": [of.line(parameters) for of in found],
            "heuristic": [of.within(parameters).heuristic.loss for of in found],
            "search": [of.within(parameters).search.loss for of in found],
        }
        rows.append([f"{parameters:,}", *(Mean.of(losses).text() for losses in kinds.values())])
    head = ["parameters", "alone", "line between uniform", "heuristic", "search"]
    yield from table(f"{SMALL}, {BEST}: Mix'n'Match", head, rows)


def variants() -> Iterator[str]:
    names = read(SMALL).granularities.names
    base = results.losses(SMALL, BEST)
    rows = []
    for suffix in (*RATES, *(f"-{label}" for label in (*FRACTIONS, *PAPER_PROBABILITIES))):
        ours = results.losses(SMALL, BEST + suffix)
        if ours:
            rows.append([BEST + suffix, *(_mean_difference(ours, base, name) for name in names)])
    yield from table(f"{SMALL}: {BEST} with another setting, less {BEST}", ["", *names], rows)
    alone = results.alone(SMALL, ENDS)
    rows = [
        [f"alone{suffix}", *(_mean_difference(ours, alone, name) for name in ENDS)]
        for suffix in (*RATES, *BATCHES)
        if (ours := results.alone(SMALL, ENDS, suffix))
    ]
    yield from table(f"{SMALL}: alone with another setting, less alone", ["", *ENDS], rows)
    skipping, sampled = (results.losses(SMALL, n) for n in ("sampled-skipping", "sampled"))
    if skipping:
        cells = [_mean_difference(skipping, sampled, name) for name in names]
        title = f"{SMALL}: sampled, neurons that a step does not run left alone, less sampled"
        yield from table(title, ["", *names], [["sampled-skipping", *cells]])


def drift() -> Iterator[str]:
    name = f"sampled-drift{HALF}"
    found = [of["inactive"] for seed in SEEDS if (of := results.result(SMALL, name, seed))]
    rows = []
    if found:
        run, not_run = (Mean.of([of[key] for of in found]) for key in ("run", "not_run"))
        share = Mean.of([of["not_run"] / of["run"] for of in found])
        rows.append([run.text(".2e"), not_run.text(".2e"), share.text(".3f")])
    head = ["steps that run them", "steps that do not", "share"]
    title = f"{SMALL}, sampled: how far a step moves XL's own neurons, root mean square of weights"
    yield from table(title, head, rows)


def _mean_difference(ours: dict[int, Losses], other: dict[int, Losses], name: str) -> str:
    found = results.difference(ours, other, name)
    return found.text("+.4f") if found else NOTHING


def continued() -> Iterator[str]:
    names = read(SMALL).granularities.names
    scratch, alone = results.losses(SMALL, BEST), results.alone(SMALL, names)
    rows = []
    for order in ("importance", "none"):
        ours = results.losses(SMALL, f"continued-{order}")
        if ours:
            rows.append([order, *(_mean(results.mean(ours, name)) for name in names)])
    if rows:
        for name, of in ((f"from scratch, {BEST}", scratch), ("alone", alone)):
            rows.append([name, *(_mean(results.mean(of, submodel)) for submodel in names)])
    title = f"{SMALL}: XL alone, imported and nested for a tenth of the FLOPs, by order of neurons"
    yield from table(title, ["", *names], rows)
