"""Text from an extracted model, token by token, with a key-value cache.

Legend: b sequences, n tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from matformer_dist.data.tokenizer_files import load_tokenizer
from matformer_dist.errors import UserError
from matformer_dist.inference.loading import load_native, load_transformers
from matformer_dist.models.matlm import MatLM
from matformer_dist.nesting import Segment, Submodel
from matformer_dist.submodels.entry import read_entry

# Ids [b, n] that follow those of earlier calls -> logits [b, V] of the token behind the last.
NextLogits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: among the likeliest `top_k` (0: all), and of these among the
    fewest that together hold `top_p` of their probability. Temperature 0 takes the likeliest.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature {self.temperature} must be 0 (the likeliest) or above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} must be above 0 and at most 1 (no limit)")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k} must be 0 (no limit) or above")

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """logits [b, V] -> ids [b]."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        scores, ids = (logits.float() / self.temperature).sort(dim=-1, descending=True)
        if self.top_k:
            scores, ids = scores[:, : self.top_k], ids[:, : self.top_k]
        shares = scores.softmax(dim=-1)
        likelier = shares.cumsum(dim=-1) - shares
        shares = shares.masked_fill(likelier >= self.top_p, 0.0)
        drawn = torch.multinomial(shares, 1, generator=generator)
        return ids.gather(-1, drawn).squeeze(-1)


def next_logits(model: MatLM, submodel: Submodel, sequences: int, capacity: int) -> NextLogits:
    """Decode with one submodel of `model`, for at most `capacity` tokens of each sequence."""
    cache = model.new_cache(sequences, capacity)

    def step(tokens: Tensor) -> Tensor:
        hidden = model.hidden(tokens, [Segment(submodel, sequences)], cache=cache)
        last = hidden.view(*tokens.shape, -1)[:, -1]
        return model.head.logits(last, model.tied_weight)

    return step


@torch.no_grad()
def stream(
    step: NextLogits, prompts: Tensor, max_new_tokens: int, sampling: Sampling, seed: int
) -> Iterator[Tensor]:
    """prompts [b, n] -> the next ids [b], `max_new_tokens` times unless the reader stops."""
    generator = torch.Generator(prompts.device).manual_seed(seed)
    tokens = prompts
    for _ in range(max_new_tokens):
        drawn = sampling.draw(step(tokens), generator)
        yield drawn
        tokens = drawn.unsqueeze(1)


def generate(
    model: MatLM,
    submodel: Submodel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    eod: int | None = None,
) -> list[list[int]]:
    """New ids of each prompt, up to the end of its document `eod`, which is left out.

    UserError where prompts are empty, differ in length, or leave no room in the context.
    """
    lengths = sorted({len(prompt) for prompt in prompts})
    if len(lengths) != 1 or lengths[0] == 0:
        raise UserError(
            f"prompts of {lengths} tokens were given together; give prompts of one length, at "
            "least 1, or generate them one by one"
        )
    capacity = _check_context(lengths[0], max_new_tokens, model.model.max_seq_len)
    step = next_logits(model, submodel, len(prompts), capacity)
    tokens = torch.tensor([list(prompt) for prompt in prompts]).to(model.embedding.weight.device)
    results: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for drawn in stream(step, tokens, max_new_tokens, sampling, seed):
        for i, token in enumerate(drawn.tolist()):
            done[i] = done[i] or token == eod
            if not done[i]:
                results[i].append(token)
        if all(done):
            break
    return results


@dataclass(frozen=True)
class GeneratedText:
    text: str  # without the prompt
    tokens: int  # drawn, the end of the document included
    seconds: float  # of generation, prompt included, loading not


def sample(
    directory: Path | str,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    device: str | None = None,
    on_text: Callable[[str], None] = lambda text: None,
) -> GeneratedText:
    """Go on from `prompt` with an extracted model, `native` or `hf`, until its document ends.

    An empty prompt begins a document. `on_text` gets the text in parts as they come, the prompt
    first, once all is known to be well. `device`
    defaults to the GPU, if there is one; on a CPU the arithmetic is fp32. UserError for a
    directory, a prompt or sampling options that do not fit.
    """
    directory = Path(directory)
    sampling = Sampling(temperature, top_k, top_p)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float32 if where.type == "cpu" else None
    entry = read_entry(directory)
    if entry["format"] == "gguf":
        raise UserError(
            f"{directory} is in format gguf, which llama.cpp runs (see its README.md); extract "
            "with --format native or hf to generate here"
        )
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode_prompt(prompt)
    if entry["format"] == "hf":
        context, step = load_transformers(directory, dtype, where)
        _check_context(len(ids), max_new_tokens, context)
    else:
        loaded = load_native(directory, dtype, where)
        capacity = _check_context(len(ids), max_new_tokens, loaded.model.model.max_seq_len)
        step = next_logits(loaded.model, loaded.submodel, 1, capacity)

    if prompt:
        on_text(prompt)
    begun = time.monotonic()
    skipped = len(tokenizer.decode(ids))
    drawn = 0
    shown = text = ""
    for token in stream(step, torch.tensor([ids], device=where), max_new_tokens, sampling, seed):
        drawn += 1
        if int(token) == tokenizer.eod:
            break
        ids.append(int(token))
        text = tokenizer.decode(ids)[skipped:]
        ready = text.rstrip("\ufffd")  # a character whose last bytes are still to come
        if len(ready) > len(shown):
            on_text(ready[len(shown) :])
            shown = ready
    if len(text) > len(shown):
        on_text(text[len(shown) :])
    return GeneratedText(text, drawn, time.monotonic() - begun)


def _check_context(prompt: int, new: int, context: int) -> int:
    """Tokens of prompt and continuation together."""
    if new < 1 or prompt + new > context:
        raise UserError(
            f"a prompt of {prompt} tokens and {new} new tokens do not fit: there must be at least "
            f"1 new token, and both together at most {context}, the model's context"
        )
    return prompt + new
