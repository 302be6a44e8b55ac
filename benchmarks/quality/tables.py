"""What README and benchmarks/results/quality/tables.md show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.quality import results
from benchmarks.quality.baseline import NAME as BASELINE
from benchmarks.quality.results import Losses, Mean
from benchmarks.quality.study import (
    BEST,
    FRACTIONS,
    LARGE,
    MIDDLE,
    OBJECTIVES,
    ON_GPU,
    PAPER_PROBABILITIES,
    SEEDS,
    SMALL,
    TOKENS,
    read,
)

NOTHING = "–"


def tables() -> Iterator[str]:
    """Those that have results, each a heading and a table in Markdown."""
    for size in (SMALL, MIDDLE, LARGE, *ON_GPU):
        yield from against_independent(size)
    yield from baseline()
    yield from consistency()
    yield from frontier()
    yield from variants()
    yield from continued()


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if not rows:
        return
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    lines.insert(1, "|---" + "|---:" * (len(head) - 1) + "|")
    yield f"### {title}\n\n" + "\n".join(lines)


def against_independent(size: str) -> Iterator[str]:
    names = read(size).granularities.names
    alone = results.alone(size, names)
    rows = []
    for objective in (*OBJECTIVES, "alone-XL-all"):
        ours = results.losses(size, objective)
        if ours:
            rows.append([objective, *(_against(ours, alone, name) for name in names)])
    if rows:
        rows.insert(0, ["alone", *(_mean(results.mean(alone, name)) for name in names)])
    for suffix in TOKENS if size == SMALL else ():
        more = results.alone(size, names, suffix)
        if more:
            label = f"alone, {TOKENS[suffix]:g} X tokens"
            rows.append([label, *(_against(more, alone, name) for name in names)])
    title = f"{size}: loss of models trained alone, and by how much the universal model's is below"
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
    found = [of for seed in SEEDS if (of := results.result(SMALL, "frontier", seed))]
    rows = []
    for place in range(len(found[0]["alone"]) if found else 0):
        cells = [_at_size(of, of["alone"][place]["parameters"]) for of in found]
        means = [Mean.of([cell[key] for cell in cells]).text() for key in cells[0]]
        alone = Mean.of([of["alone"][place]["loss"] for of in found]).text()
        rows.append([f"{found[0]['alone'][place]['parameters']:,}", alone, *means])
    head = ["parameters", "alone", "line between uniform", "heuristic", "search"]
    yield from table(f"{SMALL}, {BEST}: Mix'n'Match", head, rows)


def _at_size(found: dict[str, list[dict[str, object]]], parameters: int) -> dict[str, float]:
    """Losses of the largest submodels that are not above that size."""
    uniform = sorted((int(p["parameters"]), float(p["loss"])) for p in found["uniform"])  # type: ignore[call-overload, arg-type]
    below = max(point for point in uniform if point[0] <= parameters)
    above = min(point for point in uniform if point[0] > parameters)
    share = (parameters - below[0]) / (above[0] - below[0])
    chosen = {"line": below[1] + share * (above[1] - below[1])}
    for kind in ("heuristic", "search"):
        fitting = [
            of[kind] for of in found["slices"] if of[kind]["parameters"] <= parameters  # type: ignore[index]
        ]  # fmt: skip
        chosen[kind] = max(fitting, key=lambda point: point["parameters"])["loss"]  # type: ignore[index]
    return chosen


def variants() -> Iterator[str]:
    names = read(SMALL).granularities.names
    base = results.losses(SMALL, BEST)
    rows = []
    labels = [f"lr-{factor:g}" for factor in (0.5, 2.0)]
    for label in (*labels, *FRACTIONS, *PAPER_PROBABILITIES):
        ours = results.losses(SMALL, f"{BEST}-{label}")
        if ours:
            rows.append([label, *(_mean_difference(ours, base, name) for name in names)])
    yield from table(f"{SMALL}: {BEST} with another setting, less {BEST}", ["", *names], rows)
    alone = results.losses(SMALL, "alone-XL")
    rows = [
        [label, _mean(results.difference(ours, alone, "XL"))]
        for label in (*labels, "batch-4", "batch-2")
        if (ours := results.losses(SMALL, f"alone-XL-{label}"))
    ]
    yield from table(f"{SMALL}: XL alone with another setting, less XL alone", ["", "XL"], rows)
    skipping, sampled = (results.losses(SMALL, n) for n in ("sampled-skipping", "sampled"))
    if skipping:
        cells = [_mean_difference(skipping, sampled, name) for name in names]
        title = f"{SMALL}: sampled, neurons that a step does not run left alone, less sampled"
        yield from table(title, ["", *names], [["sampled-skipping", *cells]])


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
