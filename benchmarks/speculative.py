"""Speculative decoding out of one universal model, on a run that was trained:

    python -m benchmarks.speculative runs/mine [--slice S:2,M:2] [--draft-tokens 2 4 8 auto]

    plain         XL alone, one token a pass
    S, M, slice   as drafts, each with a cache of its own and with XL's (shared), each number of
                  drafted tokens
    transformers  on the `hf` exports of the same submodels: XL alone, and its own assisted
                  generation with each of the drafts as the assistant, drafting as many tokens, and
                  by its default rule

Greedy, one prompt at a time, from the run's validation data (or `--prompts FILE`), all to the last
new token. All ways take turns at each prompt, so a busy machine disturbs them alike; speeds are
medians over the repetitions, and so are speed-ups: over plain decoding within each, for
transformers its own. `same` is the share of prompts for which a way's tokens are plain's: drafting
changes none but for rounding between two tokens that are as likely. Prints a table, in which what
loses stands too, and writes it as JSON.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import RESULTS, keep_freed_memory, write_result
from matformer_dist.inference.generation import Drafting, Sampling, generate
from matformer_dist.inference.language import LoadedLanguageModel
from matformer_dist.inference.loading import load_language_model
from matformer_dist.inference.speculative import Statistics
from matformer_dist.inference.speedup import Terms, find_prompts, take_turns
from matformer_dist.submodels.extract import extract

GREEDY = Sampling(temperature=0)
# Of transformers: without a threshold it drafts as many as it is told; by default it stops where it
# is unsure.
RULES = {"assistant_confidence_threshold": 0.0, "num_assistant_tokens_schedule": "constant"}
DEFAULT = {
    "assistant_confidence_threshold": 0.4, "num_assistant_tokens_schedule": "constant",
    "num_assistant_tokens": 20,
}  # fmt: skip


@dataclass
class Case:
    """One line of the table: how it answers a prompt, by its ids, adding up what it does; and what
    it was seen to do.
    """

    engine: str
    draft: str
    cache: str
    draft_tokens: str
    answer: Callable[[list[int], Statistics], list[int]]
    statistics: Statistics = field(default_factory=Statistics)
    answers: dict[int, list[int]] = field(default_factory=dict)

    @property
    def drafts(self) -> bool:
        return self.draft != "none"


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    loaded = load_language_model(args.run)
    terms = Terms(
        prompts=args.prompts, n_prompts=args.prompt_count, prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
    )  # fmt: skip
    prompts = find_prompts(loaded, terms)
    drafts = [*args.draft, *([args.slice] if args.slice else [])]
    cases = our_cases(loaded, drafts, args)
    with tempfile.TemporaryDirectory() as folder:
        cases += their_cases(str(loaded.submodel), drafts, args, Path(folder))
    ways = [way(case, prompts) for case in cases]
    for case in cases:
        case.answer(prompts[0], Statistics())  # what is slow at first only is not measured
    seconds = take_turns(ways, len(prompts), args.repetitions)
    results = tell(cases, seconds, len(prompts), args.new_tokens)
    settings = {
        "threads": args.threads, "step": loaded.step, "verifier": str(loaded.submodel),
        "model": loaded.model.model.model_dump(mode="json"),
        "widths": loaded.submodel.nesting.widths, "prompts": len(prompts),
        "prompt_tokens": [len(prompt) for prompt in prompts], "new_tokens": args.new_tokens,
        "repetitions": args.repetitions,
    }  # fmt: skip
    path = args.output or RESULTS / "speculative_cpu.json"
    write_result(path, "cpu", ("torch", "transformers"), settings, results=results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="RUN[@STEP]")
    parser.add_argument("--draft", nargs="+", default=["S", "M"])
    parser.add_argument("--slice", help="a further draft: the best slice, by name or notation")
    parser.add_argument("--draft-tokens", nargs="+", default=["2", "4", "8", "auto"])
    parser.add_argument("--prompts", type=Path, help="a prompt a line")
    parser.add_argument("--prompt-count", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON; default: in benchmarks/results/")
    return parser.parse_args()


def our_cases(
    loaded: LoadedLanguageModel, drafts: list[str], args: argparse.Namespace
) -> list[Case]:
    def case(draft: str = "none", cache: Any = "", tokens: str = "") -> Case:
        drafting = None
        if tokens:
            number: Any = tokens if tokens == "auto" else int(tokens)
            drafting = Drafting(loaded.parse(draft), number, cache)

        def answer(prompt: list[int], seen: Statistics) -> list[int]:
            (row,) = generate(
                loaded.model, loaded.submodel, [prompt], max_new_tokens=args.new_tokens,
                sampling=GREEDY, drafting=drafting, statistics=seen,
            )  # fmt: skip
            return row

        return Case("ours", draft, cache, tokens, answer)

    ways = [(d, c, t) for d in drafts for c in ("own", "shared") for t in args.draft_tokens]
    return [case(), *(case(*way) for way in ways)]


def their_cases(
    verifier: str, drafts: list[str], args: argparse.Namespace, folder: Path
) -> list[Case]:
    """transformers, on exports of the verifier and the drafts."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    models = {}
    for i, notation in enumerate([verifier, *drafts]):
        (one,) = extract(args.run, [notation], output=folder / str(i), format="hf")
        models[notation] = AutoModelForCausalLM.from_pretrained(one.path).eval()

    def case(draft: str, tokens: str) -> Case:
        rule = RULES | {"num_assistant_tokens": int(tokens)} if tokens.isdecimal() else DEFAULT

        def answer(prompt: list[int], seen: Statistics) -> list[int]:
            assistant: Any = models.get(draft)
            for name, value in rule.items() if assistant else ():
                setattr(assistant.generation_config, name, value)
            return transformers_answer(models[verifier], assistant, prompt, args.new_tokens, seen)

        return Case("transformers", draft, "own" if tokens else "", tokens, answer)

    numbers = [*(tokens for tokens in args.draft_tokens if tokens != "auto"), "default"]
    return [case("none", ""), *(case(d, t) for d in drafts for t in numbers)]


def transformers_answer(
    verifier: Any, assistant: Any, prompt: list[int], new_tokens: int, seen: Statistics
) -> list[int]:
    """Greedily, to the last token; passes of the verifier are counted as verifies."""
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    counting = verifier.register_forward_pre_hook(count)
    ids = torch.tensor([prompt])
    out = verifier.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
        eos_token_id=None, pad_token_id=0, assistant_model=assistant,
    )  # fmt: skip
    counting.remove()
    seen.verifies += passes
    seen.verified += new_tokens
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def way(case: Case, prompts: list[list[int]]) -> Callable[[int], None]:
    def answer(i: int) -> None:
        case.answers[i] = case.answer(prompts[i], case.statistics)

    return answer


def tell(
    cases: list[Case], seconds: list[list[float]], prompts: int, new_tokens: int
) -> list[dict[str, Any]]:
    """Print and return a line each."""
    print(
        "| engine | draft | cache | drafted | accepted | tokens a verify | tokens/s | speed-up "
        "| over our plain | same |\n|---|---|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    plain = {case.engine: s for case, s in zip(cases, seconds, strict=True) if not case.drafts}
    first = cases[0].answers
    results = []
    for case, own in zip(cases, seconds, strict=True):
        counts = case.statistics
        result = {
            "engine": case.engine,
            "draft": case.draft,
            "cache": case.cache,
            "draft_tokens": case.draft_tokens,
            "acceptance": counts.acceptance if counts.drafted else None,
            "tokens_per_verify": counts.tokens_per_verify if case.drafts else 1.0,
            "tokens_per_second": prompts * new_tokens / statistics.median(own),
            "speedup": ratio(plain[case.engine], own),
            "over_our_plain": ratio(plain["ours"], own),
            "same": sum(case.answers[i] == first[i] for i in first) / prompts,
        }
        results.append(result)
        print(table_line(result), flush=True)
    return results


def ratio(base: list[float], own: list[float]) -> float:
    """Median over repetitions of how many times as fast."""
    return statistics.median(b / o for b, o in zip(base, own, strict=True))


def table_line(result: dict[str, Any]) -> str:
    accepted = result["acceptance"]
    cells = [result[key] for key in ("engine", "draft", "cache", "draft_tokens")]
    cells += ["" if accepted is None else f"{accepted:.1%}", f"{result['tokens_per_verify']:.2f}"]
    cells += [f"{result['tokens_per_second']:.0f}"]
    cells += [f"{result[key]:.2f}" for key in ("speedup", "over_our_plain", "same")]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
