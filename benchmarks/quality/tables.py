"""What README and benchmarks/results/quality/tables.md show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.quality import results
from benchmarks.quality.baseline import NAME as BASELINE
from benchmarks.quality.results import Frontier, Losses, Mean
from benchmarks.quality.study import (
    BATCHES,
    BEST,
    CONTINUED,
    DRAFTS,
    ENDS,
    FEWER_STEPS,
    FRACTIONS,
    HALF,
    LARGE,
    LONG,
    MIDDLE,
    OBJECTIVES,
    ON_GPU,
    PAPER_PROBABILITIES,
    RATES,
    REMEDIES,
    SEEDS,
    SLOWER,
    SMALL,
    TOKENS,
    non_embedding,
    read,
    tokens_alone,
)

NOTHING = "–"
# What we want of a universal model against models alone, at equal FLOPs.
MOST_PERCENT = 0.5
MOST_NATS = {"S": -0.02, "M": -0.02}


def tables() -> Iterator[str]:
    """Those that have results, each a title and a table in Markdown."""
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
    yield f"{title}\n\n" + "\n".join(lines)


def against_independent(size: str, suffix: str = "") -> Iterator[str]:
    """Where X is what `suffix` says of the configuration's."""
    names = read(size).granularities.names
    alone = results.alone(size, names, suffix)
    rows = []
    for label in (*OBJECTIVES, *REMEDIES):
        ours = results.losses(size, label + suffix)
        if ours and alone:
            cells = (_against(ours, alone, name, asks=True) for name in names)
            rows.append([label, _seeds(ours), *cells])
    controls = {"XL alone, all FLOPs": results.losses(size, f"alone-XL-all{suffix}")}
    if not suffix:
        more = {other: results.alone(size, names, other) for other in TOKENS}
        controls |= {f"alone, {TOKENS[other]:g} X tokens": of for other, of in more.items()}
    for label, ours in controls.items():
        if ours:
            rows.append([label, _seeds(ours), *(_against(ours, alone, name) for name in names)])
    if rows:
        means = (_mean(results.mean(alone, name)) for name in names)
        rows.insert(0, ["alone", _seeds(alone), *means])
    if not suffix:
        ours, other = results.losses(size, BEST), results.alone(size, names, LONG)
        if ours and other:
            cells = (_against(ours, other, name) for name in names)
            rows.append([f"{BEST}, less alone of as many tokens", _seeds(other), *cells])
    tokens = TOKENS.get(suffix, 1) * tokens_alone(size)
    config = read(size)
    widest, *_ = config.granularities.uniforms(config.model.n_layers)
    n = non_embedding(size, widest)
    title = (
        f"{size}, X = {tokens / 1e6:g} M tokens ({tokens / n:.1f} a parameter of XL): loss of "
        "models trained alone; others' less that"
    )
    yield from table(title, ["", "seeds", *names], rows)


def _seeds(of: Mapping[int, object]) -> str:
    return str(len(of))


def _mean(found: Mean | None) -> str:
    return found.text() if found else NOTHING


def _against(
    ours: dict[int, Losses], other: dict[int, Losses], name: str, *, asks: bool = False
) -> str:
    """The difference in nats and in percent; `asks`: and whether that is what we want."""
    found = results.difference(ours, other, name)
    percent = results.difference(ours, other, name, in_percent=True)
    if found is None or percent is None:
        return NOTHING
    text = f"{found.text('+.4f')} ({percent.value:+.2f}%)"
    return f"{text} {verdict(name, found, percent)}" if asks else text


def verdict(name: str, nats: Mean, percent: Mean) -> str:
    """By the ends of the intervals."""
    wanted = [(percent, MOST_PERCENT)]
    if name in MOST_NATS:
        wanted.append((nats, MOST_NATS[name]))
    if all(found.ends[1] <= most for found, most in wanted):
        return "held"
    return "lost" if any(found.ends[0] > most for found, most in wanted) else "open"


def baseline() -> Iterator[str]:
    ours, theirs = results.losses(SMALL, "alone-XL"), results.losses(SMALL, BASELINE)
    rows = [
        [name, *(f"{of[seed]['XL']:.4f}" if seed in of else NOTHING for seed in SEEDS), _mean(mean)]
        for name, of in (("alone-XL", ours), (BASELINE, theirs))
        if (mean := results.mean(of, "XL"))
    ]
    between = results.difference(theirs, ours, "XL")
    if between:
        rows.append(["theirs less ours", *[""] * len(SEEDS), between.text("+.4f")])
        title = f"{SMALL}: XL alone, and transformers' Llama by a plain loop"
        yield from table(title, ["", *(f"seed {seed}" for seed in SEEDS), "mean"], rows)


def consistency() -> Iterator[str]:
    found = list(results.by_seed(SMALL, "consistency").values())
    keys = {
        "agreement": "agreement",
        "kl": "KL",
        "overlap": "accepted at temperature 1",
        "acceptance": "accepted, greedy",
        "tokens_per_verify": "tokens a verify",
    }
    rows = [
        [f"{name}, {kind}", *(_mean_text([of[kind][name][key] for of in found]) for key in keys)]
        for kind in ("nested", "alone")
        for name in DRAFTS
        if found
    ]
    title = f"{SMALL}: drafts against XL, {BEST} and models alone of as many tokens"
    yield from table(f"{title} ({len(found)} seeds)", ["", *keys.values()], rows)


def _mean_text(values: Sequence[float]) -> str:
    return Mean.of(values).text(".3f")


def frontier() -> Iterator[str]:
    """At the sizes of models trained alone, which are budgets of the search."""
    found = [Frontier.of(of) for of in results.by_seed(SMALL, "frontier").values()]
    rows = []
    for places in zip(*(of.alone for of in found), strict=True):
        parameters = places[0].parameters
        within = [of.within(parameters) for of in found]
        line = Mean.of([of.line(parameters) for of in found])
        less_line = Mean.of(
            [
                one.heuristic.loss - of.line(parameters)
                for one, of in zip(within, found, strict=True)
            ]
        )
        gain = Mean.of([one.search.loss - one.heuristic.loss for one in within])
        less_alone = Mean.of(
            [one.search.loss - place.loss for one, place in zip(within, places, strict=True)]
        )
        differences = (one.text("+.4f") for one in (less_line, gain, less_alone))
        rows.append([f"{parameters:,}", line.text(), *differences])
    head = ["parameters", "line", "heuristic - line", "search - heuristic", "search - alone"]
    title = f"{SMALL}, {BEST}: Mix'n'Match against the line between uniform submodels"
    yield from table(f"{title} ({len(found)} seeds)", head, rows)


def variants() -> Iterator[str]:
    names = read(SMALL).granularities.names
    changes = [(BEST, suffix) for suffix in RATES]
    changes += [(BEST, f"-{label}") for label in (*FRACTIONS, *PAPER_PROBABILITIES)]
    changes += [*FEWER_STEPS, ("sampled", "-skipping")]
    rows = [
        [name + suffix, _seeds(ours), *_differences(ours, results.losses(SMALL, name), names)]
        for name, suffix in changes
        if (ours := results.losses(SMALL, name + suffix))
    ]
    title = f"{SMALL}: a universal model with another setting, of as many FLOPs, less that without"
    yield from table(title, ["", "seeds", *names], rows)
    changes = [("", suffix) for suffix in (*RATES, *BATCHES)] + [(LONG, SLOWER)]
    rows = [
        [
            f"alone{length}{suffix}",
            _seeds(ours),
            *_differences(ours, results.alone(SMALL, ENDS, length), ENDS),
        ]
        for length, suffix in changes
        if (ours := results.alone(SMALL, ENDS, length + suffix))
    ]
    title = f"{SMALL}: alone with another setting, less alone"
    yield from table(title, ["", "seeds", *ENDS], rows)


def _differences(
    ours: dict[int, Losses], other: dict[int, Losses], names: Sequence[str]
) -> list[str]:
    found = (results.difference(ours, other, name) for name in names)
    return [one.text("+.4f") if one else NOTHING for one in found]


def drift() -> Iterator[str]:
    measured = results.by_seed(SMALL, f"sampled-drift{HALF}").values()
    found = [of["inactive"] for of in measured]
    rows = []
    if found:
        run, not_run = (Mean.of([of[key] for of in found]) for key in ("run", "not_run"))
        share = Mean.of([of["not_run"] / of["run"] for of in found])
        rows.append([run.text(".2e"), not_run.text(".2e"), share.text(".3f")])
    head = ["steps that run them", "steps that do not", "share"]
    title = f"{SMALL}, sampled: how far a step moves XL's own neurons, root mean square of weights"
    yield from table(title, head, rows)


def continued() -> Iterator[str]:
    """Where imported models come from, before and behind the nested training."""
    names = read(SMALL).granularities.names
    scratch = results.losses(SMALL, BEST + LONG)
    alone = results.alone(SMALL, names, LONG)
    rows = []
    for name in ("importance", "none", "XL"):
        run = f"continued-{name}"
        before, ours = results.losses(SMALL, run, "before"), results.losses(SMALL, run)
        for when, of in (("before", before), ("after", ours)):
            if of:
                rows.append([f"{name}, {when}", _seeds(of), *_differences(of, scratch, names)])
    if rows:
        means = [_mean(results.mean(scratch, name)) for name in names]
        rows.insert(0, [f"from scratch, {BEST}{LONG}", _seeds(scratch), *means])
        rows.append([f"alone{LONG}", _seeds(alone), *_differences(alone, scratch, names)])
    title = (
        f"{SMALL}: XL of {TOKENS[LONG]:g} X tokens imported, by the order of its neurons, before "
        f"and after {CONTINUED:.0%} of the FLOPs of nesting from scratch; less from scratch"
    )
    yield from table(title, ["", "seeds", *names], rows)
