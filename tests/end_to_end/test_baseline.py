"""The baseline of benchmarks/quality, and launch/train.py: from equal first weights and tokens, a
plain loop over transformers' model loses as much at every step as a run of ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality.baseline import llama, plain_loop
from benchmarks.quality.study import SMALL, read
from matformer_dist.config_file import load_config
from matformer_dist.config_language import as_language
from matformer_dist.data.tokenizer_files import load_tokenizer
from tests.end_to_end.conftest import matformer, succeed, train

STEPS = 40


def test_both_learn_alike_from_equal_first_weights(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    shape = read(SMALL)
    torch.manual_seed(3)
    theirs: Any = llama(shape.model.model_copy(update={"vocab_size": 600, "n_layers": 2}))
    exported, run = tmp_path / "hf", tmp_path / "run"
    theirs.save_pretrained(exported)
    (exported / "tokenizer.model").write_bytes(Path(f"{corpus}.model").read_bytes())
    width = str(shape.model.d_ff)
    succeed(matformer("import", exported, "--output", run, "--widths", width, "--names", "XL"))
    optimizer = shape.optimizer
    settings = (
        f"data.train=[[1,{corpus}]]", "data.split=[80,20]", "training.seq_len=64",
        "training.micro_batch_size=4", "training.global_batch_size=4", "training.precision=fp32",
        f"training.steps={STEPS}", f"optimizer.lr={optimizer.lr}",
        f"optimizer.weight_decay={optimizer.weight_decay}", "optimizer.grad_clip=1.0",
        "schedule.kind=cosine", "schedule.warmup_steps=10", "schedule.min_lr=8e-4",
        "deepspeed.zero_optimization.stage=0", "evaluation.batches=1", "logging.every=1",
    )  # fmt: skip
    path = run / "config.yaml"
    config = as_language(load_config(path, settings), "the test")
    succeed(train(path, *settings))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ours = [line["train_loss"]["XL"] for line in lines if "train_loss" in line]
    expected = list(plain_loop(theirs, config, load_tokenizer(config.data.tokenizer)))
    assert len(ours) == STEPS and expected[0] - expected[-1] > 1
    assert ours == pytest.approx(expected, rel=1e-4)
