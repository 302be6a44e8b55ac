"""`hf` exports against the universal model run in place at the same submodel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from matformer_dist.errors import UserError
from matformer_dist.inference.generation import Sampling, generate
from matformer_dist.submodels.extract import extract
from tests.unit.submodels.odd_texts import ODD
from tests.unit.submodels.synthetic_run import (
    NESTING,
    TEXT,
    VOCAB,
    model_config,
    random_model,
    small_tokenizer,
    write_run,
)

transformers = pytest.importorskip("transformers")

LLAMA = {"ffn": "swiglu", "norm": "rmsnorm"}
STARCODER2 = {"ffn": "gelu", "norm": "layernorm"}
LLAMA3_ROPE = {
    "kind": "llama3", "factor": 8.0, "low_freq_factor": 0.2, "high_freq_factor": 2.0,
    "original_max_seq_len": 16,
}  # fmt: skip
SUBMODELS = ["S", "M", "L", "XL", "S:2,L:1", "XL:1,S:2"]


@pytest.mark.parametrize(
    "changes",
    [
        LLAMA,
        {**LLAMA, "tied_embeddings": True, "n_kv_heads": 2, "rope_theta": 5e4, "norm_eps": 1e-3},
        {**LLAMA, "n_kv_heads": 1},
        {**LLAMA, "n_kv_heads": 2, "kv_channels": 12, "rope_scaling": LLAMA3_ROPE},
        STARCODER2,
        {**STARCODER2, "rope_scaling": {"kind": "linear", "factor": 4.0}},
        {**STARCODER2, "tied_embeddings": True, "n_kv_heads": 2, "norm_eps": 1e-3},
    ],
    ids=[
        "llama",
        "llama-grouped-tied",
        "llama-multi-query",
        "llama-3",
        "starcoder2",
        "starcoder2-linear",
        "starcoder2-tied",
    ],
)
def test_hf_logits_match_universal_model_in_place(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = model_config(**changes)
    lm = random_model(model)
    run = write_run(tmp_path / "run", lm)
    extracted = extract(str(run), SUBMODELS, output=tmp_path / "out", format="hf")
    tokens = torch.randint(0, VOCAB, (2, 19), generator=torch.Generator().manual_seed(1))
    for one in extracted:
        hf = transformers.AutoModelForCausalLM.from_pretrained(one.path, local_files_only=True)
        with torch.no_grad():
            expected = lm.logits(tokens, NESTING.parse(one.submodel, model.n_layers))
            actual = hf(tokens).logits
        assert expected.std() > 0.5
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert {json.loads((m.path / "submodel.json").read_text())["submodel"] for m in extracted} == {
        *SUBMODELS
    }


def test_narrow_layers_are_padded_and_said_to_be(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", random_model(model_config()))
    (mixed,) = extract(str(run), ["S:2,L:1"], output=tmp_path / "mixed", format="hf")
    (uniform,) = extract(str(run), ["L"], output=tmp_path / "uniform", format="hf")
    entry = json.loads((mixed.path / "submodel.json").read_text())
    assert (entry["widths"], entry["padded_width"]) == ([8, 8, 40], 40)
    assert "padded to 40" in (mixed.path / "README.md").read_text()
    assert json.loads((uniform.path / "submodel.json").read_text())["padded_width"] is None
    assert mixed.bytes == uniform.bytes and mixed.parameters < uniform.parameters


@pytest.mark.parametrize(("ffn", "norm"), [("swiglu", "layernorm"), ("gelu", "rmsnorm")])
def test_combinations_that_transformers_lacks_are_refused(
    tmp_path: Path, ffn: str, norm: str
) -> None:
    run = write_run(tmp_path / "run", random_model(model_config(ffn=ffn, norm=norm)))
    with pytest.raises(UserError, match=f"no architecture with model.ffn {ffn} .*native"):
        extract(str(run), ["M"], output=tmp_path / "out", format="hf")
    assert not (tmp_path / "out").exists()


def test_transformers_reads_every_weight_and_setting(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", random_model(model_config(rope_theta=3e4)))
    (one,) = extract(str(run), ["M"], output=tmp_path / "out", format="hf", dtype="bf16")
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(
        one.path, local_files_only=True, output_loading_info=True
    )
    assert not any(info.values()), info
    assert hf.dtype == torch.bfloat16
    assert hf.config.rope_parameters["rope_theta"] == 3e4
    assert hf.config.max_position_embeddings == 48
    assert hf.generation_config.eos_token_id == 2
    assert sum(p.numel() for p in hf.parameters()) == one.parameters


@pytest.mark.parametrize("changes", [LLAMA, STARCODER2], ids=["llama", "starcoder2"])
def test_greedy_tokens_and_tokenizer_match_ours(tmp_path: Path, changes: dict[str, Any]) -> None:
    lm = random_model(model_config(**changes, n_kv_heads=2))
    run = write_run(tmp_path / "run", lm, tensor=2)
    ours = small_tokenizer()
    for one in extract(str(run), ["M", "S:1,L:2"], output=tmp_path / "out", format="hf"):
        hf = transformers.AutoModelForCausalLM.from_pretrained(one.path, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(one.path, local_files_only=True)
        for text in [*ODD, TEXT]:
            ids = tokenizer(text)["input_ids"]
            assert ids == ours.encode(text)
            assert tokenizer.decode(ids) == text
        prompt = tokenizer("def tot", return_tensors="pt")
        theirs = hf.generate(**prompt, max_new_tokens=24, do_sample=False, eos_token_id=None)
        begun = prompt["input_ids"][0].tolist()
        (expected,) = generate(
            lm, NESTING.parse(one.submodel, 3), [begun], max_new_tokens=24,
            sampling=Sampling(temperature=0),
        )  # fmt: skip
        assert theirs[0, len(begun) :].tolist() == expected
