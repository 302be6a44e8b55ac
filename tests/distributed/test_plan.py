"""`matformer plan` against what real ranks allocate and send."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from matformer_dist.config import Config
from matformer_dist.parallel.topology import initialize, leave_groups
from matformer_dist.planning.layout import PlannedRun
from matformer_dist.planning.memory import estimate_memory
from matformer_dist.planning.plan import checkpoint_bytes
from matformer_dist.training.engine import Engine, build_model
from matformer_dist.training.setup import choose_operators
from tests.distributed.memory import Measured, measure
from tests.distributed.ranks import run_ranks
from tests.distributed.traffic import Recorder, Traffic, foretold
from tests.distributed.training_cases import (
    outputs_of,
    passes,
    synthetic_batches,
    tiny_config,
    tiny_vision_config,
)

WEIGHTS = {"d_model": 256, "d_ff": 2048, "seq_len": 4}  # so that states of weights are most
ROWS = {"d_model": 128, "n_layers": 4, "d_ff": 512, "seq_len": 128, "micro_batch_size": 4}


def case(**settings: Any) -> Config:
    """A configuration from settings of all sections, each in its place."""
    places: dict[str, dict[str, Any]] = {
        "model": {"n_layers": 2, "n_heads": 4, "d_model": 32, "d_ff": 64, "init_std": 0.1},
        "training": {
            "steps": 3, "seq_len": 12, "micro_batch_size": 1, "global_batch_size": 4,
            "precision": "fp32",
        },
        "objective": {"kind": "per_sequence"},
        "parallel": {"tensor": 1},
        "zero": {"stage": 1},
    }  # fmt: skip
    homes = {
        "model": ("d_model", "n_layers", "d_ff", "n_kv_heads", "ffn", "norm", "tied_embeddings"),
        "training": (
            "seq_len", "micro_batch_size", "global_batch_size", "precision",
            "activation_checkpointing", "compile",
        ),
        "objective": ("kind", "distillation", "probabilities"),
        "parallel": ("tensor", "sequence"),
        "zero": (
            "stage", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold", "reduce_bucket_size", "offload_optimizer",
        ),
    }  # fmt: skip
    for home, keys in homes.items():
        places[home] |= {key: settings.pop(key) for key in keys if key in settings}
    assert not settings
    d_ff, seq_len = places["model"]["d_ff"], places["training"]["seq_len"]
    places["model"]["max_seq_len"] = seq_len
    zero = places.pop("zero")
    return tiny_config(
        **places,
        nesting={"widths": [d_ff // 8, d_ff // 4, d_ff // 2, d_ff]},
        deepspeed={"zero_optimization": zero},
    )


def images(stage: int = 1, **sections: dict[str, Any]) -> Config:
    """A configuration of a vision encoder, of 16 patches and a class token at the least."""
    places: dict[str, dict[str, Any]] = {
        "model": {
            "n_layers": 2, "n_heads": 4, "d_model": 32, "d_ff": 64, "init_std": 0.1,
            "image_size": 8, "patch_size": 2, "channels": 1,
        },
        "training": {
            "steps": 3, "micro_batch_size": 2, "global_batch_size": 8, "precision": "fp32",
        },
        "objective": {"kind": "joint", "label_smoothing": 0.1},
    }  # fmt: skip
    zero = {"stage": stage, **sections.pop("zero", {})}
    for name, values in sections.items():
        places[name] = {**places.get(name, {}), **values}
    d_ff = places["model"]["d_ff"]
    return tiny_vision_config(
        **places,
        nesting={"widths": [d_ff // 8, d_ff // 4, d_ff // 2, d_ff]},
        deepspeed={"zero_optimization": zero},
    )


MEANS = {"pooling": "mean", "positions": "sincos"}  # 16 rows, which can be cut
MANY_ROWS = {"d_model": 128, "n_layers": 4, "d_ff": 512, "image_size": 22}
ALONE: dict[str, tuple[Config, int]] = {
    "images": (images(model=MANY_ROWS, training={"micro_batch_size": 4}), 100),
    "images, selective checkpointing": (
        images(
            model=MANY_ROWS,
            training={"micro_batch_size": 4, "activation_checkpointing": "selective"},
        ), 100
    ),
    "images, classes": (images(stage=0, model={"d_model": 128}), 16_000),
    "rows, per_sequence": (case(**ROWS), 512),
    "rows, joint": (case(**ROWS, kind="joint", distillation=0.5), 512),
    "rows, sampled": (
        case(**ROWS, kind="sampled", probabilities={"S": 0, "M": 0, "L": 0, "XL": 1}), 512
    ),
    "rows, bf16": (case(**ROWS, precision="bf16"), 512),
    "rows, the paper's": (
        case(**ROWS, ffn="gelu", norm="layernorm", tied_embeddings=True), 512
    ),
    "rows, full checkpointing": (case(**ROWS, activation_checkpointing="full"), 512),
    "rows, selective checkpointing": (case(**ROWS, activation_checkpointing="selective"), 512),
    "rows, compiled": (case(**ROWS, kind="joint", compile=True), 512),
    "vocabulary, joint": (case(**{**ROWS, "n_layers": 1}, kind="joint"), 16_000),
    "vocabulary, bf16": (case(**{**ROWS, "n_layers": 1}, precision="bf16"), 16_000),
    "weights, ZeRO 0": (case(**WEIGHTS, stage=0), 512),
    "weights, ZeRO 1": (case(**WEIGHTS), 512),
    "weights, bf16": (case(**WEIGHTS, precision="bf16"), 512),
}  # fmt: skip
TWO_DATA_RANKS: dict[str, tuple[Config, int]] = {
    f"{precision}, ZeRO {stage}": (case(**WEIGHTS, precision=precision, stage=stage), 512)
    for precision, stages in (("fp32", (0, 1, 2, 3)), ("bf16", (1, 2, 3)))
    for stage in stages
}
TWO_TENSOR_RANKS: dict[str, tuple[Config, int]] = {
    "images": (images(model={**MANY_ROWS, "image_size": 24}, parallel={"tensor": 2}), 100),
    "images, sequence": (
        images(
            model={**MANY_ROWS, "image_size": 24, **MEANS},
            parallel={"tensor": 2, "sequence": True},
        ), 100
    ),
    "joint": (case(**ROWS, kind="joint", tensor=2), 512),
    "grouped queries": (case(**ROWS, n_kv_heads=2, tensor=2), 512),
    "bf16 weights": (case(**WEIGHTS, precision="bf16", tensor=2), 512),
    "sequence": (case(**ROWS, tensor=2, sequence=True), 512),
    "sequence, joint": (case(**ROWS, kind="joint", tensor=2, sequence=True), 512),
    "sequence, joint, compiled": (
        case(**ROWS, kind="joint", tensor=2, sequence=True, compile=True), 512
    ),
    "selective checkpointing": (
        case(**ROWS, kind="joint", tensor=2, activation_checkpointing="selective"), 512
    ),
}  # fmt: skip
LONGER = {**ROWS, "seq_len": 256, "kind": "joint", "tensor": 4}
FOUR_TENSOR_RANKS: dict[str, tuple[Config, int]] = {
    "joint": (case(**LONGER), 512),
    "sequence, joint": (case(**LONGER, sequence=True), 512),
    "sequence, selective checkpointing": (
        case(**LONGER, sequence=True, activation_checkpointing="selective"), 512
    ),
    "sequence, full checkpointing, bf16": (
        case(**LONGER, sequence=True, activation_checkpointing="full", precision="bf16"), 512
    ),
    "sequence, the paper's": (
        case(**LONGER, sequence=True, ffn="gelu", norm="layernorm", tied_embeddings=True), 512
    ),
}  # fmt: skip


def measure_all(cases: dict[str, tuple[Config, int]]) -> dict[str, Measured]:
    return {name: measure(config, vocab) for name, (config, vocab) in cases.items()}


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [(1, ALONE), (2, TWO_DATA_RANKS), (2, TWO_TENSOR_RANKS), (4, FOUR_TENSOR_RANKS)],
)
def test_memory_is_within_a_tenth_of_what_ranks_allocate(
    ranks: int, cases: dict[str, tuple[Config, int]]
) -> None:
    measured = run_ranks(ranks, measure_all, cases)
    for name, (config, vocab) in cases.items():
        run = PlannedRun(config, vocab, ranks // config.parallel.tensor, "cpu")
        planned = estimate_memory(run)
        found = max(rank[name].at_most for rank in measured)
        assert planned.total_bytes == pytest.approx(found, rel=0.1), name


def record_all(cases: dict[str, Config]) -> dict[str, Traffic]:
    """The third step's, of each: until then ZeRO 3 finds out in which order weights are used."""
    found = {}
    with Recorder() as recorder:
        for name, config in cases.items():
            topology = initialize(config.parallel.tensor)
            engine = Engine(config, build_model(config, outputs_of(config), topology), topology)
            batches = synthetic_batches(config, topology)
            for step in range(3):
                recorder.begin(topology)
                engine.train_step(batches, passes(config, engine, topology, step), 1e-3)
            found[name] = recorder.end()
            engine.deepspeed.destroy()
            leave_groups()
    return found


SENT_BY_FOUR: dict[str, Config] = {
    f"T {tensor}, {precision}, ZeRO {stage}, {kind}": case(
        tensor=tensor, precision=precision, stage=stage, kind=kind
    )
    for tensor in (1, 2, 4)
    for precision, stage, kind in (
        ("fp32", 0, "joint"), ("fp32", 1, "per_sequence"), ("fp32", 2, "joint"),
        ("bf16", 1, "sandwich"), ("bf16", 2, "joint"),
    )
} | {
    "recomputed": case(tensor=2, activation_checkpointing="full"),
    "selectively": case(tensor=2, activation_checkpointing="selective", sequence=True),
    "ZeRO 3, T 2, bf16": case(
        stage=3, stage3_param_persistence_threshold=2000, tensor=2, precision="bf16"
    ),
    "sequence": case(tensor=2, sequence=True),
    "sequence, recomputed": case(tensor=2, sequence=True, activation_checkpointing="full"),
    "sequence, joint": case(tensor=4, kind="joint", sequence=True, norm="layernorm"),
    "images, T 2, ZeRO 2": images(2, parallel={"tensor": 2}),
    "images, T 2, bf16, ZeRO 3": images(
        3, parallel={"tensor": 2}, model=MEANS, training={"precision": "bf16"}
    ),
    "images, T 2, sequence": images(
        model=MEANS, parallel={"tensor": 2, "sequence": True},
        objective={"kind": "per_sequence", "label_smoothing": 0.0},
    ),
    "images, T 2, bf16, sequence, recomputed": images(
        2, model={**MEANS, "positions": "learned"}, parallel={"tensor": 2, "sequence": True},
        training={"precision": "bf16", "activation_checkpointing": "full"},
    ),
}  # fmt: skip
CUT = {"stage": 3, "stage3_param_persistence_threshold": 2000}  # some of such small weights stay
NOTHING_STAYS = {**CUT, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
SENT_BY_TWO: dict[str, Config] = {
    f"in pieces, {precision}, ZeRO {stage}": case(
        precision=precision, stage=stage, reduce_bucket_size=elements
    )
    for precision, stage, elements in (
        ("fp32", 0, 1500), ("fp32", 1, 3000), ("fp32", 2, 9000), ("bf16", 1, 3000),
        ("bf16", 2, 1500), ("fp32", 3, 5000),
    )
} | {
    "in pieces, offloaded": case(
        precision="bf16", reduce_bucket_size=5000, offload_optimizer={"device": "cpu"}
    ),
    "in pieces, the paper's": case(
        stage=2, reduce_bucket_size=5000, ffn="gelu", norm="layernorm", tied_embeddings=True
    ),
    "images, ZeRO 0": images(0),
    "images, in pieces, ZeRO 1": images(1, zero={"reduce_bucket_size": 1500}),
    "images, in pieces, ZeRO 2": images(2, zero={"reduce_bucket_size": 1500}),
    "images, in pieces, ZeRO 3": images(3, zero={"reduce_bucket_size": 1500}),
    "images, ZeRO 3, each by itself": images(
        3, zero={
            "stage3_param_persistence_threshold": 50, "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        },
    ),
    "ZeRO 3, small weights": case(stage=3),
    "ZeRO 3, all at once": case(**CUT, global_batch_size=8),
    "ZeRO 3, each by itself": case(**NOTHING_STAYS),
    "ZeRO 3, recomputed": case(**NOTHING_STAYS, activation_checkpointing="full"),
    "ZeRO 3, some ahead": case(
        stage=3, n_layers=4, norm="layernorm", tied_embeddings=True,
        stage3_max_reuse_distance=30_000, stage3_prefetch_bucket_size=7_000,
        stage3_param_persistence_threshold=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("ranks", "cases"), [(2, SENT_BY_TWO), (4, SENT_BY_FOUR)])
def test_collectives_and_their_bytes_are_those_of_the_plan(
    ranks: int, cases: dict[str, Config]
) -> None:
    for rank in run_ranks(ranks, record_all, cases):
        for name, sent in rank.items():
            config = cases[name]
            data_size = ranks // config.parallel.tensor
            run = PlannedRun(config, outputs_of(config), data_size, "cpu")
            assert sent == foretold(run), name


def count_gloos(cases: dict[str, Config]) -> dict[str, Counter[str]]:
    """All collectives that gloo runs in the third step, also those of compiled blocks."""
    topology = initialize(2)
    found = {}
    for name, config in cases.items():
        model = build_model(config, outputs_of(config), topology)
        choose_operators(config, topology)
        engine = Engine(config, model, topology)
        batches = synthetic_batches(config, topology)
        for step in range(3):
            with profile(activities=[ProfilerActivity.CPU]) as recorded:
                engine.train_step(batches, passes(config, engine, topology, step), 1e-3)
        events = recorded.key_averages()
        found[name] = Counter(
            {e.key.removeprefix("gloo:"): e.count for e in events if e.key.startswith("gloo:")}
        )
        engine.deepspeed.destroy()
    return found


COMPILED: dict[str, Config] = {
    checkpointing: case(
        tensor=2, kind="joint", compile=True, sequence=True, activation_checkpointing=checkpointing
    )
    for checkpointing in ("none", "selective")
}


def test_compiled_blocks_gather_as_often_as_planned() -> None:
    """Gloo's reduce-scatter is an all-reduce, so that those cannot be told apart here."""
    for rank in run_ranks(2, count_gloos, COMPILED, timeout_s=500):
        for name, counted in rank.items():
            planned = foretold(PlannedRun(COMPILED[name], outputs_of(COMPILED[name]), 1, "cpu"))
            assert counted["all_gather"] == planned["all_gather", "tensor"][0], name


def saved_bytes(cases: dict[str, Config], directory: str) -> dict[str, int]:
    """Of the files of a checkpoint behind one step, each case's, over all ranks."""
    found = {}
    for name, config in cases.items():
        topology = initialize(config.parallel.tensor)
        engine = Engine(config, build_model(config, 512, topology), topology)
        batches = synthetic_batches(config, topology, 512)
        engine.train_step(batches, passes(config, engine, topology, 0), 1e-3)
        engine.save(directory, name)
        dist.barrier()
        files = Path(directory, name).rglob("*")
        found[name] = sum(path.stat().st_size for path in files if path.is_file())
        engine.deepspeed.destroy()
        leave_groups()
    return found


def test_a_checkpoint_takes_the_bytes_of_the_plan(tmp_path: Path) -> None:
    cases = {name.replace(", ", "-"): config for name, (config, _) in TWO_DATA_RANKS.items()}
    for name, size in run_ranks(2, saved_bytes, cases, str(tmp_path))[0].items():
        planned = checkpoint_bytes(PlannedRun(cases[name], 512, 2, "cpu"))
        assert size == pytest.approx(planned, rel=0.02), name
