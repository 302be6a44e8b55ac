"""Submodels extracted from tensor-parallel runs against the universal model on its own ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from matformer_dist.checkpoints.universal import load_universal
from matformer_dist.config_language import LanguageConfig
from matformer_dist.data.sentencepiece_tokenizer import train_tokenizer
from matformer_dist.data.tokenizer_files import load_tokenizer
from matformer_dist.inference.loading import load_language_model
from matformer_dist.models.matformer import MatFormer
from matformer_dist.models.matlm import MatLM
from matformer_dist.nesting import Submodel
from matformer_dist.parallel.layers import Initializer
from matformer_dist.parallel.topology import Topology, initialize, leave_groups
from matformer_dist.run_directory import find_checkpoint
from matformer_dist.submodels.extract import extract
from tests.distributed.ranks import run_ranks
from tests.distributed.training_cases import SEQ_LEN, VOCAB, tiny_config, train

RANKS = 4
IN_PLACE = ["S", "M", "L", "XL", "S:1,L:1", "XL:1,M:1"]
EXPORTED = ["M", "S:1,L:1"]
STEPS = 3

# name: tensor-parallel ranks, ZeRO stage, precision, model
CASES: dict[str, tuple[int, int, str, dict[str, Any]]] = {
    "tp2-zero0": (2, 0, "fp32", {}),
    "tp2-zero1": (2, 1, "fp32", {"n_kv_heads": 2}),
    "tp2-zero2": (2, 2, "fp32", {"ffn": "gelu", "norm": "layernorm"}),
    "tp2-zero3": (2, 3, "fp32", {"tied_embeddings": True}),
    "tp4-zero0": (4, 0, "fp32", {"tied_embeddings": True, "ffn": "gelu", "norm": "layernorm"}),
    "tp4-zero1": (4, 1, "fp32", {}),
    "tp4-zero2": (4, 2, "fp32", {"tied_embeddings": True}),
    "tp4-zero3": (4, 3, "fp32", {"ffn": "gelu", "norm": "layernorm"}),
    "tp1-zero1": (1, 1, "fp32", {}),
    "tp1-zero3": (
        1,
        3,
        "fp32",
        {"d_model": 18, "n_heads": 3, "n_kv_heads": 1},
    ),  # cuts with padding
    "tp2-zero1-bf16": (2, 1, "bf16", {"ffn": "gelu", "norm": "layernorm"}),
    "tp2-zero2-bf16": (2, 2, "bf16", {"tied_embeddings": True}),
    "tp2-zero3-bf16": (2, 3, "bf16", {}),
}


def case_config(name: str, directory: Path) -> LanguageConfig:
    tensor, stage, precision, model = CASES[name]
    base = tiny_config().model.model_dump()
    return tiny_config(
        run={"dir": str(directory / name)},
        model={**base, **model},
        parallel={"tensor": tensor},
        data={"train": [[1, "unused"]], "tokenizer": str(directory / "tokenizer.model")},
        training={
            **tiny_config().training.model_dump(), "steps": STEPS, "precision": precision,
        },
        deepspeed={"zero_optimization": {"stage": stage}},
    )  # fmt: skip


def some_tokens() -> Tensor:
    return torch.randint(0, VOCAB, (3, SEQ_LEN), generator=torch.Generator().manual_seed(2))


def submodel_of(config: LanguageConfig, notation: str) -> Submodel:
    return config.granularities.parse(notation, config.model.n_layers)


def train_and_save_each(directory: Path) -> dict[str, dict[str, NDArray[Any]]]:
    """What `train_and_save` finds in every case, on the same ranks."""
    results = {}
    for tensor in sorted({case[0] for case in CASES.values()}):
        topology = initialize(tensor)  # once: every gloo group costs threads
        for name, case in CASES.items():
            if case[0] == tensor:
                results[name] = train_and_save(case_config(name, directory), topology)
        leave_groups()
    return results


def train_and_save(config: LanguageConfig, topology: Topology) -> dict[str, NDArray[Any]]:
    """Logits by submodel (fp32), or this rank's weights (bf16), as they are after training."""
    from matformer_dist.checkpoints.store import CheckpointStore
    from matformer_dist.training import setup

    _, engine, trained = train(config, topology)
    store = CheckpointStore(config.run.dir, config.checkpoint)
    tokenizer = load_tokenizer(config.data.tokenizer)
    manifest = setup.describe(config, topology, tokenizer.digest, VOCAB, STEPS)
    store.save(engine, manifest)
    if topology.is_main:
        (config.run.dir / "config.yaml").write_text(config.to_yaml())
        (config.run.dir / tokenizer.file_name).write_bytes(tokenizer.files[tokenizer.file_name])
    copy = local_copy(config, topology, trained)
    engine.deepspeed.destroy()
    if config.training.precision == "bf16":
        return {name: p.detach().float().numpy() for name, p in copy.named_parameters()}
    with torch.no_grad():
        return {
            notation: copy.logits(some_tokens(), submodel_of(config, notation)).numpy()
            for notation in IN_PLACE
        }


def local_copy(config: LanguageConfig, topology: Topology, trained: MatFormer) -> MatLM:
    """This rank's part of the model, free of ZeRO 3, which takes weights away between uses."""
    import deepspeed

    nestings = [config.granularities] * config.model.n_layers
    copy = MatLM(config.model, nestings, VOCAB, Initializer(None), topology.tensor)
    parameters = list(trained.parameters())
    stage = config.deepspeed["zero_optimization"]["stage"]
    with torch.no_grad(), deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
        for mine, theirs in zip(copy.parameters(), parameters, strict=True):
            mine.data = theirs.detach().clone()
    return copy


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The runs' directory, and what their ranks found, by rank."""
    directory = tmp_path_factory.mktemp("runs")
    text = "def total(numbers):\n    return sum(numbers)\n"
    (directory / "tokenizer.model").write_bytes(train_tokenizer([text], 290).model)
    return directory, run_ranks(RANKS, train_and_save_each, directory)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[2] == "fp32"])
def test_extracted_logits_match_ranks_in_place(
    runs: tuple[Path, list[dict[str, Any]]], name: str, tmp_path: Path
) -> None:
    directory, results = runs
    config = case_config(name, directory)
    expected = {key: torch.from_numpy(value) for key, value in results[0][name].items()}
    universal = load_language_model(f"{directory / name}@{STEPS}").model
    models: dict[str, Path] = {}
    for kind in ("native", "hf"):
        for one in extract(str(directory / name), EXPORTED, output=tmp_path / kind, format=kind):
            models[f"{kind} {one.submodel}"] = one.path
    with torch.no_grad():
        for notation, logits in expected.items():
            actual = universal.logits(some_tokens(), submodel_of(config, notation))
            torch.testing.assert_close(actual, logits, rtol=1e-5, atol=1e-5)
        for notation in EXPORTED:
            native = load_language_model(models[f"native {notation}"])
            actual = native.model.logits(some_tokens(), native.submodel)
            torch.testing.assert_close(actual, expected[notation], rtol=1e-5, atol=1e-5)
            transformers = pytest.importorskip("transformers")
            hf = transformers.AutoModelForCausalLM.from_pretrained(models[f"hf {notation}"])
            actual = hf(some_tokens()).logits
            torch.testing.assert_close(actual, expected[notation], rtol=1e-5, atol=1e-5)
    spread = (expected["S"] - expected["XL"]).abs().max()
    assert spread > 0.01, "the submodels must differ, or the test says nothing"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[2] == "bf16"])
def test_master_weights_round_to_the_weights_on_the_ranks(
    runs: tuple[Path, list[dict[str, Any]]], name: str
) -> None:
    directory, results = runs
    universal = load_universal(find_checkpoint(directory / name))
    tensor = CASES[name][0]
    finer = 0
    for key, parameter in universal.whole.items():
        whole = universal.weight(key)
        assert whole.dtype == torch.float32
        partition = getattr(parameter, "partition", None)
        for rank in range(tensor):
            mine = partition.deal(whole, rank, tensor) if partition else whole
            theirs = torch.from_numpy(results[rank][name][key])
            assert torch.equal(mine.bfloat16().float(), theirs), key
            finer += int((mine != theirs).sum())
    assert finer > 0, "fp32 master weights must hold more than bf16"
