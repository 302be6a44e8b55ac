"""Is our XL that is trained alone as good as it should be? transformers' own Llama of its size.

A plain loop of torch over LlamaForCausalLM: its initialisation, its forward pass, torch's AdamW.
It shares with the study's models the tokens in their order, the batch, the learning rates and the
validation data, and no code that learns. Its first weights are drawn as transformers draws them:
all alike, where ours are smaller for what is added to the residual stream. That both learn alike
from equal first weights is a test's, tests/end_to_end/test_baseline.py.

    python -m benchmarks.quality.baseline SEED
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import RESULTS, write_result
from benchmarks.quality.corpus import described, prepare, validation_batches
from benchmarks.quality.processes import call, each
from benchmarks.quality.study import BASELINE, RUNS, SMALL, alone_xl, step_flops
from matformer_dist.config_language import LanguageConfig, LanguageModelConfig
from matformer_dist.data.datasets import build_datasets
from matformer_dist.data.tokenizer import Tokenizer
from matformer_dist.data.tokenizer_files import load_tokenizer
from matformer_dist.evaluation.validation import Tokens


def train_baselines(seeds: Sequence[int], jobs: int) -> None:
    """Of every seed that has no result yet, `jobs` at a time."""
    waiting = [seed for seed in seeds if not _result(seed).exists()]
    prepare(SMALL)

    def train_one(seed: int) -> None:
        log = RUNS / SMALL / f"{BASELINE}-{seed}.log"
        call([sys.executable, "-m", "benchmarks.quality.baseline", str(seed)], log, jobs)

    each(train_one, waiting, jobs, lambda seed: f"{BASELINE}-{seed}")


def _result(seed: int) -> Path:
    return RESULTS / "quality" / SMALL / f"{BASELINE}-{seed}.json"


def main(seed: int) -> None:
    config = alone_xl(seed).config()
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(config.data.tokenizer)
    model = llama(config.model)
    for _ in plain_loop(model, config, tokenizer):
        pass
    training = config.training
    write_result(
        _result(seed),
        "cpu",
        ("torch", "transformers"),
        {
            "run": BASELINE,
            "size": SMALL,
            "seed": seed,
            "config": config.model_dump(mode="json"),  # of ours, which it follows
            "data": described(config),
        },
        tokens=config.units(training.total_steps * training.global_batch_size),
        training_flops=3 * step_flops(config) * training.total_steps,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        evaluation=_evaluation(model, config, tokenizer),
    )


def plain_loop(
    model: torch.nn.Module, config: LanguageConfig, tokenizer: Tokenizer
) -> Iterator[float]:
    """Train it; the loss of each step, in nats a token."""
    optimizer = torch.optim.AdamW(
        _groups(model, config.optimizer.weight_decay),
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
    )
    steps = config.training.total_steps
    for step, sequences in enumerate(_batches(config, tokenizer, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, steps)
        loss = model(input_ids=sequences, labels=sequences).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def llama(of: LanguageModelConfig) -> torch.nn.Module:
    """transformers' model of that shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=of.vocab_size,
            hidden_size=of.d_model,
            intermediate_size=of.d_ff,
            num_hidden_layers=of.n_layers,
            num_attention_heads=of.n_heads,
            max_position_embeddings=of.max_seq_len,
            rms_norm_eps=of.norm_eps,
            rope_theta=of.rope_theta,
            tie_word_embeddings=of.tied_embeddings,
            initializer_range=of.init_std,
        )
    )


def _groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, object]]:
    weights = list(model.parameters())
    return [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": weight_decay},
        {"params": [w for w in weights if w.dim() == 1], "weight_decay": 0.0},
    ]


def learning_rate(config: LanguageConfig, step: int, steps: int) -> float:
    peak, lowest = config.optimizer.lr, config.schedule.min_lr
    warmup = config.schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    through = (step - warmup) / (steps - warmup)
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * through))


def _batches(config: LanguageConfig, tokenizer: Tokenizer, steps: int) -> list[Tensor]:
    """[b, s + 1] each: transformers shifts labels itself."""
    size = config.training.global_batch_size
    data, _ = build_datasets(config, tokenizer, steps * size, 0)
    whole = [
        torch.cat([sample["tokens"], sample["labels"][-1:]])
        for sample in (data[i] for i in range(steps * size))
    ]
    return list(torch.stack(whole).split(size))


@torch.no_grad()
def _evaluation(
    model: torch.nn.Module, config: LanguageConfig, tokenizer: Tokenizer
) -> dict[str, object]:
    """Nats a token, on the data that the study's models are evaluated on."""
    model.eval()
    validation = Tokens.of(config, tokenizer, validation_batches(config))
    total = 0.0
    for tokens, targets in validation.micro_batches(torch.device("cpu")):
        logits = model(input_ids=tokens).logits
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum"
        )
        total += losses.item()
    loss = total / validation.predictions
    return {"data_sha256": validation.digest, "submodels": [{"submodel": "XL", "loss": loss}]}


if __name__ == "__main__":
    main(int(sys.argv[1]))
