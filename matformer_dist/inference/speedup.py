"""What speculative decoding is worth on a run: each draft against plain decoding, by the clock.

Prompts are answered one at a time, as one user would have them, each to the last of its new tokens:
the end of a document ends nothing, so that every way makes as many tokens. At each prompt the ways
take turns, and none always goes first, so that a busy machine disturbs all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matformer_dist.checkpoints.files import check_output, replace_json
from matformer_dist.config_file import load_config
from matformer_dist.config_language import as_language
from matformer_dist.data.datasets import build_datasets
from matformer_dist.errors import UserError
from matformer_dist.inference.batch import check_context
from matformer_dist.inference.device import choose_device
from matformer_dist.inference.generation import generate
from matformer_dist.inference.language import LoadedLanguageModel
from matformer_dist.inference.loading import load_language_model
from matformer_dist.inference.sampling import Sampling
from matformer_dist.inference.speculative import Drafting, Statistics, check_draft
from matformer_dist.nesting import Submodel
from matformer_dist.submodels.entry import is_extracted

SPECULATIVE = "speculative.json"
Way = Callable[[int], object]  # answers the prompt of this number


@dataclass(frozen=True)
class Speedups:
    """RUN/speculative.json."""

    step: int
    verifier: str
    prompts: int
    prompt_tokens: list[int]
    new_tokens: int  # of each prompt
    temperature: float
    plain_tokens_per_second: float
    drafts: list[dict[str, Any]]  # see `_entry`


@dataclass(frozen=True)
class Terms:
    """How drafts are compared. `draft_tokens` and `caches` hold for each of the drafts."""

    verifier: str | None = None  # the largest
    drafts: Sequence[str] = ()  # all granularities below the verifier
    caches: Sequence[str] = ("own", "shared")
    draft_tokens: int | str = 4
    prompts: Path | None = None  # one a line; else the beginnings of validation samples
    n_prompts: int = 8  # at most
    prompt_tokens: int | None = None  # of those from validation data; 32, if they have as many
    new_tokens: int = 64
    temperature: float = 0.0
    repetitions: int = 3
    seed: int = 0
    device: str | None = None  # the GPU, if there is one
    output: Path | None = None  # RUN/speculative.json


def measure_speedups(
    run: str, terms: Terms, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Path, Speedups]:
    """Compare drafts on RUN[@STEP], and write `terms.output`.

    `progress` is told of turns done and in all. UserError where run, submodels or prompts do not
    fit, or there are no prompts.
    """
    if is_extracted(Path(run)):
        raise UserError(f"{run} is an extracted model; give a run, whose submodels draft")
    check_output(terms.output)
    sampling = Sampling(terms.temperature)
    loaded = load_language_model(run, device=choose_device(terms.device))
    assert loaded.step is not None, "it is a run's"
    verifier = loaded.parse(terms.verifier) if terms.verifier else loaded.submodel
    draftings = _draftings(loaded, verifier, terms)
    prompts = find_prompts(loaded, terms)

    def way(drafting: Drafting | None, seen: Statistics) -> Way:
        def answer(i: int) -> None:
            generate(
                loaded.model, verifier, [prompts[i]], max_new_tokens=terms.new_tokens,
                sampling=sampling, seed=terms.seed + i, drafting=drafting, statistics=seen,
            )  # fmt: skip

        return answer

    seen = [Statistics() for _ in draftings]
    for drafting in (None, *draftings):
        way(drafting, Statistics())(0)  # what is slow at first only is not measured
    ways = [way(None, Statistics()), *map(way, draftings, seen)]
    seconds = take_turns(ways, len(prompts), terms.repetitions, progress)
    tokens = len(prompts) * terms.new_tokens
    result = Speedups(
        step=loaded.step,
        verifier=str(verifier),
        prompts=len(prompts),
        prompt_tokens=list(map(len, prompts)),
        new_tokens=terms.new_tokens,
        temperature=terms.temperature,
        plain_tokens_per_second=tokens / statistics.median(seconds[0]),
        drafts=[
            _entry(drafting, counts, tokens, seconds[0], own)
            for drafting, counts, own in zip(draftings, seen, seconds[1:], strict=True)
        ],
    )
    file = terms.output or loaded.directory / SPECULATIVE
    replace_json(file, asdict(result))
    return file, result


def take_turns(
    ways: Sequence[Way],
    prompts: int,
    repetitions: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[float]]:
    """Seconds of each way for all prompts, in each repetition: [ways][repetitions]."""
    seconds = [[0.0] * repetitions for _ in ways]
    done, total = 0, repetitions * prompts * len(ways)
    for repetition in range(repetitions):
        for prompt in range(prompts):
            for turn in range(len(ways)):
                i = (turn + prompt + repetition) % len(ways)
                begun = time.perf_counter()
                ways[i](prompt)  # its last token was read, so nothing is still in a queue
                seconds[i][repetition] += time.perf_counter() - begun
                done += 1
                progress(done, total)
    return seconds


def _entry(
    drafting: Drafting, counts: Statistics, tokens: int, plain: list[float], own: list[float]
) -> dict[str, Any]:
    """Speeds are medians over repetitions; `speedup` that of the ratios within each."""
    return {
        "draft": str(drafting.submodel),
        "cache": drafting.cache,
        "draft_tokens": drafting.tokens,
        "acceptance": counts.acceptance,
        "tokens_per_verify": counts.tokens_per_verify,
        "tokens_per_second": tokens / statistics.median(own),
        "speedup": statistics.median(p / o for p, o in zip(plain, own, strict=True)),
    }


def _draftings(loaded: LoadedLanguageModel, verifier: Submodel, terms: Terms) -> list[Drafting]:
    drafts = [loaded.parse(notation) for notation in terms.drafts]
    if not drafts:
        smallest = min(verifier.granularities)  # of which one may be all of a uniform verifier
        nesting, layers = verifier.nesting, len(verifier)
        drafts = [nesting.uniform(i, layers) for i in range(smallest + 1)]
        drafts = [draft for draft in drafts if draft != verifier]
    if not drafts:
        raise UserError(f"no granularity is below {verifier}; choose a larger --verifier")
    for draft in drafts:
        check_draft(draft, verifier)
        if draft == verifier:
            raise UserError(
                f"submodel {draft} cannot draft for itself; choose a narrower --draft, or a larger "
                "--verifier"
            )
    return [
        Drafting(draft, terms.draft_tokens, cache)  # type: ignore[arg-type] # it checks them
        for draft in dict.fromkeys(drafts)
        for cache in terms.caches
    ]


def find_prompts(loaded: LoadedLanguageModel, terms: Terms) -> list[list[int]]:
    """Ids of the prompts; UserError where there are none, or one does not fit the context."""
    if terms.prompts is not None:
        if terms.prompt_tokens is not None:
            raise UserError(
                f"--prompt-tokens {terms.prompt_tokens} is for prompts of the validation data; "
                "leave it out, or --prompts"
            )
        lines = [line for line in _lines(terms.prompts) if line.strip()]
        if not lines:
            raise UserError(f"{terms.prompts} holds no prompt; write one a line")
        prompts = [loaded.tokenizer.encode_prompt(line) for line in lines[: terms.n_prompts]]
    else:
        prompts = _validation_prompts(loaded, terms)
    for prompt in prompts:
        check_context(len(prompt), terms.new_tokens, loaded.model.model.max_seq_len)
    return prompts


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read --prompts {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 ({error.reason}); write it as UTF-8") from None


def _validation_prompts(loaded: LoadedLanguageModel, terms: Terms) -> list[list[int]]:
    """The beginnings of the first samples that the run is evaluated on."""
    try:
        config = as_language(load_config(loaded.directory / "config.yaml"), "speculate")
        _, validation = build_datasets(config, loaded.tokenizer, 1, terms.n_prompts)
    except UserError as error:
        raise UserError(
            f"the validation data of {loaded.directory} have not {terms.n_prompts} prompts "
            f"({error}); give a smaller --prompt-count, or --prompts FILE, with a prompt a line"
        ) from None
    most = config.training.seq_len
    if terms.prompt_tokens and terms.prompt_tokens > most:
        raise UserError(
            f"--prompt-tokens {terms.prompt_tokens} is more than the run's validation samples "
            f"have, training.seq_len {most}; give at most that, or --prompts"
        )
    length = terms.prompt_tokens or min(32, most)
    assert validation is not None, "samples were asked for"
    beginnings = [validation[i]["tokens"][:length] for i in range(terms.n_prompts)]
    return [beginning.tolist() for beginning in beginnings]
