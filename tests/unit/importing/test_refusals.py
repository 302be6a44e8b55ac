"""Checkpoints that MatLM cannot hold, or that are damaged: one message, and nothing written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from matformer_dist.errors import UserError
from matformer_dist.importing.import_model import import_model
from matformer_dist.importing.llama_config import read_llama_config
from tests.unit.importing.checkpoints import (
    edit_config,
    random_llama,
    save,
    some_tokens,
    transformers,
    xl_logits,
)

SINGLE = "model.safetensors"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_llama(), tmp_path_factory.mktemp("sharded") / "hf")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(random_llama(), tmp_path / "hf", "1GB")


def refused(checkpoint: Path) -> str:
    run = checkpoint.with_name("run")
    with pytest.raises(UserError) as error:
        import_model(checkpoint, run)
    assert [path.name for path in run.parent.iterdir()] == [checkpoint.name]
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "architectures is ['MistralForCausalLM']"),
        ({"architectures": ["LlamaModel"]}, "allowed is ['LlamaForCausalLM']"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2', allowed is 'llama'"),
        ({"hidden_size": ...}, "it does not set hidden_size"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', allowed is 'silu'"),
        ({"attention_bias": True}, "attention_bias is True, allowed is False"),
        ({"mlp_bias": True}, "mlp_bias is True, allowed is False"),
        ({"vocab_size": None}, "it does not set vocab_size"),
        ({"head_dim": {}}, "head_dim is {}"),
        ({"head_dim": 15}, "head_dim 15 must be even"),
        ({"sliding_window": 4096}, "sliding_window is 4096, allowed is None"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters is"),
        ({"rope_parameters": {"full": {"rope_type": "default"}}}, "the same in all layers"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "over the whole head"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling is {'type': 'yarn'"),
        ({"rope_scaling": {"type": ["linear"]}}, "allowed is rope_type default or linear or"),
        ({"rope_scaling": "dynamic"}, "rope_scaling is 'dynamic', allowed is rope_type default"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor is '2': Input"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads 3"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads is 0"),
    ],
)  # fmt: skip
def test_what_matlm_does_not_compute_is_named(
    sharded: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    directory = tmp_path / "hf"
    directory.mkdir()
    (directory / "config.json").write_bytes((sharded / "config.json").read_bytes())
    edit_config(directory, **changes)
    message = refused(directory)
    assert says in message
    assert str(directory / "config.json") in message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vocab_size": 10**12}, "model.embed_tokens.weight in .* config.json makes it"),
        ({"num_hidden_layers": 10**12}, r"num_hidden_layers is 10+, the files hold 3 layers"),
        ({"intermediate_size": 10**12}, "config.json makes it"),
    ],
)
def test_sizes_that_no_memory_holds_are_refused(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    directory = save(random_llama(), tmp_path / "hf")
    edit_config(directory, **changes)
    assert re.search(says, refused(directory))


def test_all_of_it_is_named_at_once(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((sharded / "config.json").read_bytes())
    edit_config(tmp_path, hidden_act="relu", mlp_bias=True, rope_scaling={"type": "yarn"})
    with pytest.raises(UserError, match=r"hidden_act is 'relu'.*mlp_bias is True.*rope_scaling is"):
        read_llama_config(tmp_path)


def test_configs_as_older_versions_wrote_them_are_read(tmp_path: Path) -> None:
    llama = random_llama(rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    directory = save(llama, tmp_path / "hf")
    edit_config(
        directory, rope_parameters=..., rope_theta=5e5, rope_scaling=None, head_dim=...,
        num_key_value_heads=..., mlp_bias=..., architectures=...,
    )  # fmt: skip
    assert read_llama_config(directory).model.rope_theta == 5e5
    import_model(directory, tmp_path / "run")
    with torch.no_grad():
        expected = llama(some_tokens()).logits
    actual = xl_logits(tmp_path / "run", some_tokens())
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    edit_config(directory, rope_theta=..., rope_scaling={"rope_type": "default", "rope_theta": 3e5})
    assert read_llama_config(directory).model.rope_theta == 3e5
    edit_config(directory, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    scaled = read_llama_config(directory).model
    assert scaled.rope_scaling is not None and scaled.rope_theta == 5e5
    assert (scaled.rope_scaling.kind, scaled.rope_scaling.factor) == ("linear", 2.0)


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    needed = {
        "model_type": "llama", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(needed))
    theirs = transformers.LlamaConfig(**{k: v for k, v in needed.items() if k != "model_type"})
    ours = read_llama_config(tmp_path)
    assert ours.model.norm_eps == theirs.rms_norm_eps
    assert ours.model.kv_heads == theirs.num_key_value_heads
    assert ours.model.max_seq_len == theirs.max_position_embeddings
    assert ours.model.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.model.tied_embeddings == theirs.tie_word_embeddings
    assert ours.model.init_std == theirs.initializer_range
    assert ours.eos_ids == (theirs.eos_token_id,)


def test_folders_that_are_no_checkpoint_are_refused(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("{")
    assert "cannot read" in refused(checkpoint)
    (checkpoint / "config.json").write_text("[]")
    assert "holds no JSON object" in refused(checkpoint)
    (checkpoint / "config.json").unlink()
    assert "No such file" in refused(checkpoint)


def test_pickles_are_refused_unread(checkpoint: Path) -> None:
    (checkpoint / SINGLE).unlink()
    assert "holds neither model.safetensors nor" in refused(checkpoint)
    (checkpoint / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    message = refused(checkpoint)
    assert "pytorch_model.bin, pickles, which can run any code" in message
    assert "save_pretrained" in message


def _without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda weights: weights.pop(name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_without("lm_head.weight"), "lacks lm_head.weight"),
        (_without("model.layers.1.mlp.up_proj.weight"), "lacks model.layers.1.mlp.up_proj"),
        (
            lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
            "holds model.layers.0.self_attn.q_proj.bias, which a Llama does not have",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.zeros(31)}),
            "model.norm.weight in {file} is [31], config.json makes it [32]",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}),
            "is I8, allowed are BF16, F16, F32",
        ),
        (
            lambda w: w["model.layers.2.mlp.gate_proj.weight"].fill_(float("nan")),
            "model.layers.2.mlp.gate_proj.weight in {file} holds values that are not finite",
        ),
    ],
)
def test_weights_that_are_not_the_models_are_named(
    checkpoint: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    weights = load_file(checkpoint / SINGLE)
    change(weights)
    save_file(weights, checkpoint / SINGLE)
    assert says.format(file=checkpoint / SINGLE) in refused(checkpoint)


def test_a_head_beside_tied_embeddings_must_be_the_same(tmp_path: Path) -> None:
    llama = random_llama(tie_word_embeddings=True)
    checkpoint = save(llama, tmp_path / "hf", "1GB")
    weights = load_file(checkpoint / SINGLE)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as of old
    save_file(weights, checkpoint / SINGLE)
    import_model(checkpoint, tmp_path / "good")
    with torch.no_grad():
        expected = llama(some_tokens()).logits
    actual = xl_logits(tmp_path / "good", some_tokens())
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    weights["lm_head.weight"][3, 3] += 1
    save_file(weights, checkpoint / SINGLE)
    with pytest.raises(UserError, match=r"tie_word_embeddings true, but lm_head.weight"):
        import_model(checkpoint, tmp_path / "bad")


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    checkpoint = save(random_llama(), tmp_path / "hf")
    index = checkpoint / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    moved = {**good["weight_map"], "model.norm.weight": "../model.safetensors"}
    index.write_text(json.dumps({"weight_map": moved}))
    assert "a shard lies in another folder" in refused(checkpoint)
    first = good["weight_map"]["model.embed_tokens.weight"]
    wrong = {**good["weight_map"], "model.norm.weight": first}
    index.write_text(json.dumps({"weight_map": wrong}))
    assert f"{checkpoint / first} lacks model.norm.weight" in refused(checkpoint)
    index.write_text("{}")
    assert "cannot read" in refused(checkpoint)
    index.write_text(json.dumps(good))
    (checkpoint / first).write_bytes((checkpoint / first).read_bytes()[:-100])
    assert f"cannot read {checkpoint / first}" in refused(checkpoint)
    (checkpoint / first).unlink()
    assert f"cannot read {checkpoint / first}" in refused(checkpoint)
