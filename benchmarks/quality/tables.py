"""What README and benchmarks/results/quality/tables.md show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.quality import results
from benchmarks.quality.measures import DRAFTED, TEMPERATURES
from benchmarks.quality.results import Estimate, Frontier, Losses, Luck
from benchmarks.quality.study import (
    BASELINE,
    BATCHES,
    BEST,
    CONTINUED,
    DEFAULT_RATES,
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
    for size in (SMALL, MIDDLE):
        for suffix in TOKENS:
            yield from against_independent(size, suffix)
    yield from luck()
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
            cells = (_against(size, ours, alone, name, asks=True) for name in names)
            rows.append([label, _seeds(ours), *cells])
    controls = {"XL alone, all FLOPs": results.losses(size, f"alone-XL-all{suffix}")}
    if not suffix:
        more = {other: results.alone(size, names, other) for other in TOKENS}
        controls |= {f"alone, {TOKENS[other]:g} X tokens": of for other, of in more.items()}
    for label, ours in controls.items():
        if ours:
            cells = (_against(size, ours, alone, name) for name in names)
            rows.append([label, _seeds(ours), *cells])
    if rows:
        means = (_text(results.mean(size, alone, name)) for name in names)
        rows.insert(0, ["alone", _seeds(alone), *means])
    if not suffix:
        ours, other = results.losses(size, BEST), results.alone(size, names, LONG)
        if ours and other:
            cells = (_against(size, ours, other, name) for name in names)
            rows.append([f"{BEST}, less alone of as many tokens", _seeds(ours), *cells])
    tokens = TOKENS.get(suffix, 1) * tokens_alone(size)
    config = read(size)
    widest, *_ = config.granularities.uniforms(config.model.n_layers)
    n = non_embedding(size, widest)
    title = (
        f"{size}, X = {tokens / 1e6:g} M tokens, {tokens / n:.1f} for each of XL's {n / 1e6:.2f} M "
        "parameters without the embedding: loss of models trained alone; others' less that"
    )
    yield from table(title, ["", "seeds", *names], rows)


def _seeds(of: Mapping[int, Losses]) -> str:
    """How many there are of each submodel; the fewest and the most where they differ."""
    counts = Counter(name for losses in of.values() for name in losses).values()
    return "–".join(map(str, sorted({min(counts), max(counts)})))


def _text(found: Estimate | None, form: str = ".4f") -> str:
    return found.text(form) if found else NOTHING


def _against(
    size: str,
    ours: dict[int, Losses],
    other: dict[int, Losses],
    name: str,
    *,
    asks: bool = False,
) -> str:
    """The difference in nats and in percent; `asks`: and whether that is what we want."""
    found, base = results.difference(size, ours, other, name), results.mean(size, other, name)
    if found is None or base is None:
        return NOTHING
    percent = found.per(base.value)
    text = f"{found.text('+.4f')} ({percent.value:+.2f}%)"
    return f"{text} {verdict(name, found, percent)}" if asks else text


def verdict(name: str, nats: Estimate, percent: Estimate) -> str:
    """Where even the worse end of the interval is what we want, or not even the better one."""
    wanted = [(percent, MOST_PERCENT)]
    if name in MOST_NATS:
        wanted.append((nats, MOST_NATS[name]))
    if nats.half_width is None:
        return "open"
    best, worst = (
        [found.value + sign * (found.half_width or 0.0) - most for found, most in wanted]
        for sign in (-1, 1)
    )
    return "held" if max(worst) <= 0 else "lost" if max(best) > 0 else "open"


def luck() -> Iterator[str]:
    """What all intervals of losses rest on; and each model's own, which tells whether one number
    may stand for all.
    """
    names = read(SMALL).granularities.names
    pooled = [results.luck(SMALL, name) for name in names]
    rows = []
    for model in results.models(SMALL):
        of = results.losses(SMALL, model)
        own = [
            Luck.of([[losses[name] for losses in of.values() if name in losses]]) for name in names
        ]
        if any(own):
            rows.append([model, *(f"{one.deviation:.4f}" if one else NOTHING for one in own)])
    if rows:
        rows.append(["all", *(f"{one.deviation:.4f}" if one else NOTHING for one in pooled)])
        freedom = [str(one.freedom) if one else NOTHING for one in pooled]
        rows.append(["degrees of freedom", *freedom])
    title = f"{SMALL}: standard deviation of the loss over seeds"
    yield from table(title, ["", *names], rows)


def baseline() -> Iterator[str]:
    ours, theirs = results.losses(SMALL, "alone-XL"), results.losses(SMALL, BASELINE)
    rows = [
        [name, *(f"{of[seed]['XL']:.4f}" if seed in of else NOTHING for seed in SEEDS), _text(mean)]
        for name, of in (("alone-XL", ours), (BASELINE, theirs))
        if (mean := results.mean(SMALL, of, "XL"))
    ]
    between = results.difference(SMALL, theirs, ours, "XL")
    if between:
        rows.append(["theirs less ours", *[""] * len(SEEDS), between.text("+.4f")])
        title = f"{SMALL}: XL alone, and transformers' Llama by a plain loop"
        yield from table(title, ["", *(f"seed {seed}" for seed in SEEDS), "mean"], rows)


def consistency() -> Iterator[str]:
    found = list(results.by_seed(SMALL, "consistency").values())
    kinds = [
        (name, kind, [of[kind][name] for of in found])
        for kind in ("nested", "alone")
        for name in DRAFTS
        if found
    ]
    keys = {"agreement": "same best token", "kl": "KL(XL, draft)"}
    rows = [
        [f"{name}, {kind}", *(_mean([one[key] for one in of], ".3f") for key in keys)]
        for name, kind, of in kinds
    ]
    of = f"{SMALL}: S and M against XL, {BEST} and models alone of as many tokens"
    yield from table(f"{of}; on held-out text ({len(found)} seeds)", ["", *keys.values()], rows)
    keys = {
        "acceptance": "accepted",
        "tokens_per_verify": "tokens a verification",
        "repeated": "of the text repeats itself",
    }
    for temperature in TEMPERATURES:
        rows = [
            [
                f"{name}, {kind}",
                *(
                    _mean([one[f"temperature-{temperature:g}"][key] for one in of], ".3f")
                    for key in keys
                ),
            ]
            for name, kind, of in kinds
        ]
        title = f"{SMALL}: the same as drafts of {DRAFTED} tokens, at temperature {temperature:g}"
        yield from table(f"{title} ({len(found)} seeds)", ["", *keys.values()], rows)


def _mean(values: Sequence[float], form: str) -> str:
    return Estimate.of(values).text(form)


def frontier() -> Iterator[str]:
    """At all budgets of the search, which the sizes of models trained alone are among."""
    found = [Frontier.of(of) for of in results.by_seed(SMALL, "frontier").values()]
    rows = []
    for budget in sorted({one.budget for of in found for one in of.chosen}):
        at = [(of, of.within(budget)) for of in found]
        heuristic = [one.heuristic.loss - of.line(one.heuristic.parameters) for of, one in at]
        search = [one.search.loss - of.line(one.search.parameters) for of, one in at]
        gain = [one.search.loss - one.heuristic.loss for _, one in at]
        alone = [
            one.search.loss - place.loss
            for of, one in at
            for place in of.alone
            if place.parameters == budget
        ]
        columns = (heuristic, search, gain, alone)
        cells = (_mean(values, "+.4f") if values else NOTHING for values in columns)
        rows.append([f"{budget:,}", *cells])
    head = ["budget", "heuristic - line", "search - line", "search - heuristic", "search - alone"]
    title = (
        f"{SMALL}, {BEST}{LONG}: Mix'n'Match within budgets of parameters, against the line "
        "between uniform submodels and against models alone; on text that the search has not seen"
    )
    yield from table(f"{title} ({len(found)} seeds)", head, rows)


def variants() -> Iterator[str]:
    changes = [(BEST, suffix) for suffix in DEFAULT_RATES]
    changes += [(BEST, f"-{label}") for label in (*FRACTIONS, *PAPER_PROBABILITIES)]
    changes += [*FEWER_STEPS, ("sampled", "-skipping")]
    for size in (SMALL, MIDDLE):
        names = read(size).granularities.names
        rows = []
        for name, suffix in changes:
            ours, other = (results.losses(size, name + of) for of in (suffix, ""))
            if ours:
                rows.append([name + suffix, _seeds(ours), *_differences(size, ours, other, names)])
        title = (
            f"{size}: a universal model with another setting, of as many FLOPs, less that without"
        )
        yield from table(title, ["", "seeds", *names], rows)
    rows = []
    for length, suffix in [("", suffix) for suffix in (*RATES, *BATCHES)] + [(LONG, SLOWER)]:
        ours, other = (results.alone(SMALL, ENDS, length + of) for of in (suffix, ""))
        if ours:
            cells = _differences(SMALL, ours, other, ENDS)
            rows.append([f"alone{length}{suffix}", _seeds(ours), *cells])
    title = f"{SMALL}: alone with another setting, less alone"
    yield from table(title, ["", "seeds", *ENDS], rows)


def _differences(
    size: str, ours: dict[int, Losses], other: dict[int, Losses], names: Sequence[str]
) -> list[str]:
    return [_text(results.difference(size, ours, other, name), "+.4f") for name in names]


def drift() -> Iterator[str]:
    measured = results.by_seed(SMALL, f"sampled-drift{HALF}").values()
    found = [of["inactive"] for of in measured]
    rows = []
    if found:
        columns = [[of[key] for of in found] for key in ("run", "not_run")]
        share = [of["not_run"] / of["run"] for of in found]
        rows.append([*(_mean(values, ".2e") for values in columns), _mean(share, ".3f")])
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
                rows.append(
                    [f"{name}, {when}", _seeds(of), *_differences(SMALL, of, scratch, names)]
                )
    if rows:
        means = [_text(results.mean(SMALL, scratch, name)) for name in names]
        rows.insert(0, [f"from scratch, {BEST}{LONG}", _seeds(scratch), *means])
        for name, of in (
            (f"from scratch, {BEST}", results.losses(SMALL, BEST)),
            (f"alone{LONG}", alone),
        ):
            if of:
                rows.append([name, _seeds(of), *_differences(SMALL, of, scratch, names)])
    title = (
        f"{SMALL}: XL of {TOKENS[LONG]:g} X tokens imported, by the order of its neurons, before "
        f"and after {CONTINUED:.0%} of the FLOPs of nesting from scratch; less from scratch"
    )
    yield from table(title, ["", "seeds", *names], rows)
