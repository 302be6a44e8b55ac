"""lm-eval's view of a model in memory: `matformer` among its models.

Texts become tokens as by lm-eval's own `hf` model of an `hf` export, so that the numbers are equal
too; what reads like a special token in a text stays text here, though.

Legend: b sequences, s positions, n rows that are asked for, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import Collator, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from matformer_dist.errors import UserError
from matformer_dist.evaluation.downstream.continuation import Continuation, continue_prompts
from matformer_dist.inference.language import LoadedLanguageModel
from matformer_dist.inference.loading import load_language_model
from matformer_dist.nesting import Segment, Submodel

BATCH_SIZE = 16
_LOGITS_BYTES = 1 << 26  # of rows whose logits are in memory at once
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The two texts, or None, of a request; ids of the context; ids of the continuation.
Request: TypeAlias = tuple[tuple[str, str] | None, list[int], list[int]]
Progress: TypeAlias = Callable[[str, int, int], None]


@register_model("matformer")
class MatformerLM(TemplateLM):
    """One submodel of a loaded model. Adapters of the same LoadedLanguageModel share its weights.

    `pretrained` is that, or RUN[@STEP], or a `native` directory; `submodel` as in
    `LoadedLanguageModel.parse`, or with + for its commas, since those of --model_args are
    lm-eval's; else all of it. `on_progress` is called with the kind of requests, those done and
    their number; without it, a bar shows them. UserError for arguments that do not fit.
    """

    def __init__(
        self,
        pretrained: LoadedLanguageModel | str,
        submodel: Submodel | str | None = None,
        batch_size: int | str = BATCH_SIZE,
        device: str | None = None,
        dtype: str | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size {batch_size!r} must be a whole number of at least 1")
        if not isinstance(pretrained, LoadedLanguageModel):
            # lm-eval's own command says cuda:0 where its user says nothing.
            where = (device or "cuda") if torch.cuda.is_available() else "cpu"
            pretrained = load_language_model(pretrained, _parse_dtype(dtype), where)
        self.loaded = pretrained
        self.submodel = pretrained.submodel
        if submodel is not None:
            self.submodel = pretrained.parse(str(submodel).replace("+", ","))
        self.batch_size = int(batch_size)
        self.on_progress = on_progress
        self.requests = 0  # answered so far
        self.truncated = 0  # of these, with a context cut on the left
        self._model = pretrained.model
        self._tokens = pretrained.tokenizer
        self._device = self._model.embedding.weight.device

    @property
    def max_length(self) -> int:
        """The model's context, in tokens."""
        return self._model.model.max_seq_len

    @property
    def eot_token_id(self) -> int:
        return self._tokens.eod

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return self._tokens.begin

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_options: Any
    ) -> list[int]:
        """Ids of a text, with what its tokenizer puts before texts unless add_special_tokens is
        False.
        """
        if add_special_tokens is False or not string:
            return self._tokens.encode(string)
        return self._tokens.encode_prompt(string)

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of each text the sum over all its tokens in nats: windows of the whole context, in which
        every token is predicted once.
        """
        windows: list[Request] = []
        counts = []
        for request in requests:
            (text,) = request.args
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            new: list[Request] = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += new
            counts.append(len(new))
        answers = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        sums = []
        for request, count in zip(requests, counts, strict=True):
            sums.append(sum(next(answers)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, sums[-1])
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_options: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation the log-likelihood in nats, and whether it is the greedy one."""
        for texts, context, continuation in requests:
            self._check(texts, continuation)
            self.truncated += len(context) + len(continuation) > self.max_length + 1
        self.requests += len(requests)
        # Requests that differ in their last token alone are one sequence.
        collator = Collator(
            requests,
            sort_fn=lambda request: (-len(request[1] + request[2]), tuple(request[1] + request[2])),
            group_by="contexts",
            group_fn=lambda request: request[1] + request[2][:-1],
        )
        answers = []
        with self._counter("loglikelihood", len(requests), disable_tqdm) as advance:
            for batch in collator.get_batched(n=self.batch_size):
                sequences = [(one[1] + one[2])[-self.max_length - 1 : -1] for one in batch]
                asked: list[tuple[Any, list[int], Tensor]] = []
                for one, rows in zip(batch, self._hidden(sequences), strict=True):
                    texts, context, continuation = one
                    # All requests of the sequence: lm-eval hands logits on here, we hidden rows.
                    asked += collator.get_cache(
                        texts, context, continuation, rows[None, -len(continuation) :]
                    )
                new = self._score([(rows[0, -len(ids) :], ids) for _, ids, rows in asked])
                for (texts, _, _), answer in zip(asked, new, strict=True):
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answer)
                answers += new
                advance(len(new))
        result: list[tuple[float, bool]] = collator.get_original(answers)
        return result

    @torch.no_grad()
    def _hidden(self, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Final hidden rows [s, D] of each sequence; padding on the right is seen by none."""
        longest = max(map(len, sequences))
        tokens = torch.zeros(len(sequences), longest, dtype=torch.long)
        for i, ids in enumerate(sequences):
            tokens[i, : len(ids)] = torch.tensor(ids)
        segment = Segment(self.submodel, len(sequences))
        hidden = self._model.hidden(tokens.to(self._device), [segment])
        for ids, rows in zip(sequences, hidden.view(len(sequences), longest, -1), strict=True):
            yield rows[: len(ids)]

    @torch.no_grad()
    def _score(self, asked: Sequence[tuple[Tensor, list[int]]]) -> list[tuple[float, bool]]:
        """(rows [n_i, D], their next ids [n_i]) of each continuation -> its answer."""
        rows = torch.cat([rows for rows, _ in asked])
        targets = torch.tensor([wanted for _, ids in asked for wanted in ids], device=self._device)
        at_once = max(1, _LOGITS_BYTES // (4 * self._model.vocab_size))
        likelihoods, hits = [], []
        for some, next_ids in zip(rows.split(at_once), targets.split(at_once), strict=True):
            logits = self._model.head.logits(some, self._model.tied_weight).float()
            likelihoods.append(logits.log_softmax(-1).gather(1, next_ids[:, None])[:, 0])
            hits.append(logits.argmax(-1) == next_ids)
        lengths = [len(ids) for _, ids in asked]
        sums = [float(part.sum()) for part in torch.cat(likelihoods).split(lengths)]
        greedy = [bool(part.all()) for part in torch.cat(hits).split(lengths)]
        return list(zip(sums, greedy, strict=True))

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts that go on from each context, up to a stop sequence, the end of the document or
        max_gen_toks. UserError for settings that there are none of here.
        """
        self.requests += len(requests)
        collator = Collator(
            [request.args for request in requests],
            sort_fn=lambda pair: (-len(self.tok_encode(pair[0])), pair[0]),
            group_by="gen_kwargs",
            group_fn=lambda pair: pair[1],
        )
        texts: list[str] = []
        with self._counter("generate_until", len(requests), disable_tqdm) as advance:
            for batch in collator.get_batched(n=self.batch_size):
                how = Continuation.of(batch[0][1], self.max_length)
                room = self.max_length - how.max_new_tokens
                prompts = [self._tokens.encode_prompt(context) for context, _ in batch]
                self.truncated += sum(len(ids) > room for ids in prompts)
                found = continue_prompts(
                    self.loaded, self.submodel, [ids[-room:] for ids in prompts], how, len(texts)
                )
                for pair, text in zip(batch, found, strict=True):
                    texts.append(postprocess_generated_text(text, list(how.until), None))
                    self.cache_hook.add_partial("generate_until", pair, texts[-1])
                advance(len(batch))
        result: list[str] = collator.get_original(texts)
        return result

    def _check(self, texts: tuple[str, str] | None, continuation: Sequence[int]) -> None:
        if 0 < len(continuation) <= self.max_length:
            return
        shown = f", {texts[1][:40]!r}," if texts else ""
        raise UserError(
            f"a continuation{shown} has {len(continuation)} tokens; there must be at least 1, and "
            f"at most {self.max_length}, the model's context: leave its task out"
        )

    @contextmanager
    def _counter(self, kind: str, total: int, hide: bool) -> Iterator[Callable[[int], None]]:
        """Yields what is to be told of requests that are done."""
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if self.on_progress:
                self.on_progress(kind, done, total)
            bar.update(count)

        with tqdm(total=total, desc=kind, disable=hide or self.on_progress is not None) as bar:
            yield advance


def _parse_dtype(name: str | None) -> torch.dtype | None:
    if name is None or name in _DTYPES:
        return _DTYPES[name] if name else None
    raise UserError(f"dtype {name!r} must be one of {', '.join(_DTYPES)}")
