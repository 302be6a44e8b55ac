"""What is measured of several trained models together: parts 2 and 3 of the study.

    python -m benchmarks.quality.measures frontier|consistency SEED

measures one seed, of models that are trained already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.frontier import measure, unseen_half
from benchmarks.machine import RESULTS, write_result
from benchmarks.quality.corpus import described, validation_batches
from benchmarks.quality.processes import call, each
from benchmarks.quality.results import Chosen, Frontier, Point
from benchmarks.quality.study import (
    BEST,
    DRAFTS,
    LONG,
    OBJECTIVES,
    RUNS,
    SMALL,
    Run,
    between,
    more_tokens,
    read,
    universal,
    universal_of,
)
from benchmarks.quality.training import have_weights
from matformer_dist.evaluation.validation import Tokens
from matformer_dist.inference.generation import generate
from matformer_dist.inference.language import LoadedLanguageModel
from matformer_dist.inference.loading import load_language_model
from matformer_dist.inference.sampling import Sampling
from matformer_dist.nesting import Submodel
from matformer_dist.search.budget import Budget
from matformer_dist.search.search import Options, search

DRAFTED = 4  # tokens a round
REPEATED = 9  # neighbouring tokens
TEMPERATURES = (1.0, 0.0)
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 64, 32, 128


@dataclass(frozen=True)
class Model:
    """One of those that a model can be run as."""

    of: LoadedLanguageModel
    submodel: Submodel

    @classmethod
    def load(cls, run: Run, name: str) -> Model:
        of = load_language_model(run.directory)
        return cls(of, of.parse(name))

    def logits(self, tokens: Tensor) -> Tensor:
        return self.of.model.logits(tokens, self.submodel)


# 2. The frontier.


def frontier_needs(seed: int) -> list[Run]:
    return [universal_of(SMALL, seed, BEST, LONG), *between(seed)]


def frontier(seed: int) -> Frontier:
    """The search's submodels, chosen on half of the validation data, and the heuristic's of the
    same budgets, both judged on the other half; with them models of sizes between, trained alone,
    whose sizes are among the budgets.
    """
    run, *others = frontier_needs(seed)
    batches = validation_batches(read(SMALL)) // 2
    options = Options(batches=batches)
    others_loaded = [load_language_model(other.directory) for other in others]
    sizes = [sum(weight.numel() for weight in of.model.parameters()) for of in others_loaded]
    whole = search(str(run.directory), options=options)
    found = search(str(run.directory), [Budget("params", size) for size in sizes], options=options)
    slices = [*whole.slices, *found.slices]
    loaded = load_language_model(run.directory)
    unseen = unseen_half(loaded, batches)
    uniform = loaded.submodel.nesting.names
    chosen = [name for one in slices for name in (one.submodel, one.heuristic)]
    names = list(dict.fromkeys([*uniform, *chosen]))
    judged = measure(loaded, unseen, [loaded.parse(name) for name in names])
    parameters = {one.submodel: one.parameters for one in found.all.measured}
    points = {
        name: Point(name, parameters[name], judged[loaded.parse(name)].loss) for name in names
    }
    return Frontier(
        chosen_on=found.all.units,
        judged_on=unseen.predictions,
        uniform=[points[name] for name in uniform],
        chosen=[
            Chosen(round(one.budget), points[one.submodel], points[one.heuristic]) for one in slices
        ],
        alone=[
            Point(other.name, size, measure(of, unseen, [of.submodel])[of.submodel].loss)
            for other, of, size in zip(others, others_loaded, sizes, strict=True)
        ],
    )


# 3. Consistency and drafting.


def consistency_needs(seed: int) -> list[Run]:
    together = universal(SMALL, seed, BEST, OBJECTIVES[BEST])
    return [together, *more_tokens(SMALL, seed, LONG, names=(*DRAFTS, "XL"))]


def consistency(seed: int) -> dict[str, Any]:
    """S and M against XL: of one universal model, and of models that were trained alone on as many
    tokens as it.
    """
    together, *apart = consistency_needs(seed)
    names = (*DRAFTS, "XL")
    models = {
        "nested": [Model.load(together, name) for name in names],
        "alone": [Model.load(run, name) for run, name in zip(apart, names, strict=True)],
    }
    tokenizer = models["nested"][0].of.tokenizer
    validation = Tokens.of(read(SMALL), tokenizer, validation_batches(read(SMALL)))
    prompts = validation.tokens[:_PROMPTS, :_PROMPT_TOKENS].tolist()
    return {
        kind: {
            name: _likeness(draft, verifier, validation)
            | {
                f"temperature-{temperature:g}": drafting(draft, verifier, prompts, temperature)
                for temperature in TEMPERATURES
            }
            for name, draft in zip(DRAFTS, drafts, strict=True)
        }
        for kind, (*drafts, verifier) in models.items()
    }


@torch.no_grad()
def _likeness(draft: Model, verifier: Model, validation: Tokens) -> dict[str, float]:
    """A token of the validation data: share of equal best ones, and KL(verifier || draft), nats."""
    agreed = divergence = 0.0
    for tokens, _ in validation.micro_batches(torch.device("cpu")):
        p, q = (model.logits(tokens).log_softmax(dim=-1) for model in (verifier, draft))
        agreed += float((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
        divergence += float((p.exp() * (p - q)).sum())
    count = validation.predictions
    return {"agreement": agreed / count, "kl": divergence / count}


@torch.no_grad()
def drafting(
    draft: Model,
    verifier: Model,
    prompts: Sequence[Sequence[int]],
    temperature: float,
    new_tokens: int = _NEW_TOKENS,
) -> dict[str, float]:
    """Of speculative decoding behind prompts of one length: the share of drafted tokens that are
    accepted, tokens a verification yields, and how much of the text repeats what it said before.
    """
    texts = generate(
        verifier.of.model, verifier.submodel, prompts, max_new_tokens=new_tokens,
        sampling=Sampling(temperature),
    )  # fmt: skip
    whole = torch.tensor([[*p, *text] for p, text in zip(prompts, texts, strict=True)])
    would = would_be_accepted(draft, verifier, whole, temperature)[:, len(prompts[0]) - 1 :]
    drafted = accepted = verifies = verified = 0
    for row in would.tolist():
        for asked, taken in rounds(row, DRAFTED):
            drafted, accepted = drafted + asked, accepted + taken
            verifies, verified = verifies + 1, verified + taken + 1
    return {
        "acceptance": accepted / drafted,
        "tokens_per_verify": verified / verifies,
        "repeated": repeated(texts, REPEATED),
    }


def would_be_accepted(draft: Model, verifier: Model, whole: Tensor, temperature: float) -> Tensor:
    """Of each token [B, n - 1] of what the verifier wrote, but the first: would it have come from
    an accepted draft? A greedy one, if it is the same token. A draft that is drawn from q is x, and
    accepted, with probability min(p(x), q(x)), and x comes with probability p(x) (Leviathan et al.,
    2211.17192): of what is x, min(1, q(x) / p(x)) was accepted, which is drawn here.
    """
    logits = draft.logits(whole[:, :-1])
    if temperature == 0:
        return logits.argmax(dim=-1) == whole[:, 1:]
    sampling, index = Sampling(temperature), whole[:, 1:, None]
    p, q = (
        sampling.probabilities(of).gather(-1, index).squeeze(-1)
        for of in (verifier.logits(whole[:, :-1]), logits)
    )
    drawn = torch.rand(p.shape, generator=torch.Generator().manual_seed(0))
    return drawn * p < q


def repeated(texts: Sequence[Sequence[int]], length: int) -> float:
    """Share of tokens that end `length` neighbours which their text has had before."""
    again = count = 0
    for text in texts:
        seen = set()
        for end in range(length, len(text) + 1):
            part = tuple(text[end - length : end])
            again += part in seen
            seen.add(part)
        count += len(text)
    return again / count


def rounds(right: Sequence[bool], most: int) -> Iterator[tuple[int, int]]:
    """(drafted, accepted) of each round of speculative decoding, `most` drafted in one.

    right: of each token that the verifier writes, whether it would have come from an accepted
    draft. Whatever is accepted is what the verifier writes, so this is all there is to know: the
    rounds are those that decoding would go through, with a cache of the draft's own, whichever
    model drafts.
    """
    done = 1  # the prompt's pass gives the first
    while done < len(right):
        asked = min(most, len(right) - done - 1)  # the last is the verifier's
        drafted = right[done : done + asked]
        taken = drafted.index(False) if False in drafted else asked
        yield asked, taken
        done += taken + 1


Measured = Callable[[int], dict[str, Any]]
MEASURES: dict[str, tuple[Measured, Callable[[int], list[Run]]]] = {
    "frontier": (lambda seed: asdict(frontier(seed)), frontier_needs),
    "consistency": (consistency, consistency_needs),
}


def measure_all(name: str, seeds: Sequence[int], jobs: int) -> None:
    """Of every seed that has no result yet; models that are not there any more are trained anew."""
    _, needs = MEASURES[name]
    waiting = [seed for seed in seeds if not result(name, seed).exists()]
    have_weights([run for seed in waiting for run in needs(seed)], jobs)
    program = [sys.executable, "-m", "benchmarks.quality.measures", name]

    def measure_one(seed: int) -> None:
        call([*program, str(seed)], RUNS / SMALL / f"{name}-{seed}.log", jobs)

    each(measure_one, waiting, jobs, lambda seed: f"{name}-{seed}")


def result(name: str, seed: int) -> Path:
    return RESULTS / "quality" / SMALL / f"{name}-{seed}.json"


def main(name: str, seed: int) -> None:
    measured, needs = MEASURES[name]
    settings = {
        "measured": name,
        "size": SMALL,
        "seed": seed,
        "data": described(read(SMALL)),
        "models": [run.name for run in needs(seed)],
    }
    write_result(result(name, seed), "cpu", ("torch",), settings, **measured(seed))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
