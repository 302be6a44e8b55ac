"""What is measured of several trained models together: parts 2 and 3 of the study."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.frontier import measure, unseen_half
from benchmarks.machine import RESULTS, write_result
from benchmarks.quality.corpus import described, validation_batches
from benchmarks.quality.results import Chosen, Frontier, Point
from benchmarks.quality.study import (
    BEST,
    BETWEEN,
    DRAFTS,
    LONG,
    OBJECTIVES,
    SMALL,
    Run,
    alone,
    more_tokens,
    read,
    universal,
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


def nested(seed: int) -> Run:
    return universal(SMALL, seed, BEST, OBJECTIVES[BEST])


# 2. The frontier.


def frontier_needs(seed: int) -> list[Run]:
    return [nested(seed), *(alone(SMALL, seed, neurons) for neurons in BETWEEN)]


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
    return [nested(seed), *more_tokens(SMALL, seed, LONG, names=(*DRAFTS, "XL"))]


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
    return {
        kind: {
            name: _likeness(draft, verifier, validation) | _drafting(draft, verifier, validation)
            for name, draft in zip(DRAFTS, drafts, strict=True)
        }
        for kind, (*drafts, verifier) in models.items()
    }


@torch.no_grad()
def _likeness(draft: Model, verifier: Model, validation: Tokens) -> dict[str, float]:
    """A token: share of equal best ones, KL(verifier || draft) in nats, and what share of the
    draft's samples at temperature 1 the verifier would accept (the mass that both have).
    """
    agreed = divergence = common = 0.0
    for tokens, _ in validation.micro_batches(torch.device("cpu")):
        p, q = (model.logits(tokens).log_softmax(dim=-1) for model in (verifier, draft))
        agreed += float((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
        divergence += float((p.exp() * (p - q)).sum())
        common += float(torch.minimum(p, q).exp().sum())
    count = validation.predictions
    return {"agreement": agreed / count, "kl": divergence / count, "overlap": common / count}


@torch.no_grad()
def _drafting(draft: Model, verifier: Model, validation: Tokens) -> dict[str, float]:
    """Of greedy decoding behind the beginnings of validation sequences."""
    prompts = validation.tokens[:_PROMPTS, :_PROMPT_TOKENS].tolist()
    texts = generate(
        verifier.of.model, verifier.submodel, prompts, max_new_tokens=_NEW_TOKENS,
        sampling=Sampling(0.0),
    )  # fmt: skip
    whole = torch.tensor([[*p, *text] for p, text in zip(prompts, texts, strict=True)])
    guesses = draft.logits(whole[:, :-1]).argmax(dim=-1)
    right = (guesses == whole[:, 1:])[:, _PROMPT_TOKENS - 1 :]
    drafted = accepted = verifies = verified = 0
    for row in right.tolist():
        for asked, taken in rounds(row, DRAFTED):
            drafted, accepted = drafted + asked, accepted + taken
            verifies, verified = verifies + 1, verified + taken + 1
    return {"acceptance": accepted / drafted, "tokens_per_verify": verified / verifies}


def rounds(right: Sequence[bool], most: int) -> Iterator[tuple[int, int]]:
    """(drafted, accepted) of each round of greedy speculative decoding, `most` drafted in one.

    right: whether the draft, behind what the verifier writes, goes on with the same token. Whatever
    is accepted is what the verifier writes, so this is all there is to know: the rounds are those
    that decoding would go through, with a cache of the draft's own, whichever model drafts.
    """
    done = 1  # the prompt's pass gives the first
    while done < len(right):
        asked = min(most, len(right) - done - 1)  # the last is the verifier's
        drafted = right[done : done + asked]
        taken = drafted.index(False) if False in drafted else asked
        yield asked, taken
        done += taken + 1


MEASURES = {
    "frontier": (lambda seed: asdict(frontier(seed)), frontier_needs),
    "consistency": (consistency, consistency_needs),
}


def measure_all(name: str, seeds: Sequence[int], jobs: int) -> None:
    """Of every seed that has no result yet; models that are not there any more are trained anew."""
    measured, needs = MEASURES[name]
    for seed in seeds:
        path = RESULTS / "quality" / SMALL / f"{name}-{seed}.json"
        if path.exists():
            continue
        have_weights(needs(seed), jobs)
        settings = {
            "measured": name,
            "size": SMALL,
            "seed": seed,
            "data": described(read(SMALL)),
            "models": [run.name for run in needs(seed)],
        }
        write_result(path, "cpu", ("torch",), settings, **measured(seed))
