"""`hf --sparse` exports: exact widths, as transformers with the shipped code runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from matformer_dist.errors import UserError
from matformer_dist.inference.generation import Sampling, generate, sample
from matformer_dist.nesting import Nesting
from matformer_dist.submodels.extract import extract
from tests.unit.submodels import synthetic_run
from tests.unit.submodels.synthetic_run import (
    NESTING,
    VOCAB,
    model_config,
    random_model,
    small_tokenizer,
    write_run,
)

transformers = pytest.importorskip("transformers")


def export(run: Path, submodels: list[str], output: Path, **options: Any) -> list[Any]:
    return extract(str(run), submodels, output=output, format="hf", sparse=True, **options)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 2, "tied_embeddings": True},
        {"kv_channels": 12, "rope_scaling": {"kind": "linear", "factor": 4.0}},
    ],
)
def test_logits_and_greedy_tokens_match_universal_model_in_place(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    lm = random_model(model_config(rope_theta=3e4, **changes))
    run = write_run(tmp_path / "run", lm, tensor=2)
    tokens = torch.randint(3, VOCAB, (2, 19), generator=torch.Generator().manual_seed(1))
    prompt = small_tokenizer().encode("def tot")
    for one in export(run, ["M", "S:2,L:1", "XL:1,S:2"], tmp_path / "out"):
        hf, info = transformers.AutoModelForCausalLM.from_pretrained(
            one.path, local_files_only=True, trust_remote_code=True, output_loading_info=True
        )
        assert not any(info.values()), info
        submodel = NESTING.parse(one.submodel, 3)
        assert sum(p.numel() for p in hf.parameters()) == one.parameters
        assert [len(layer.mlp.up_proj.weight) for layer in hf.model.layers] == [*submodel.widths]
        with torch.no_grad():
            expected = lm.logits(tokens, submodel)
            torch.testing.assert_close(hf(tokens).logits, expected, rtol=1e-5, atol=1e-5)
        (ours,) = generate(
            lm, submodel, [prompt], max_new_tokens=24, sampling=Sampling(temperature=0)
        )
        theirs = hf.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None
        )
        assert theirs[0, len(prompt) :].tolist() == ours
        text = sample(one.path, "def tot", max_new_tokens=24, temperature=0, device="cpu").text
        assert text == small_tokenizer().decode([*prompt, *ours])[len("def tot") :]


def test_sampling_runs_no_code_of_the_directory(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", random_model(model_config()))
    (one,) = export(run, ["S:2,M:1"], tmp_path / "out")
    for path in one.path.glob("*.py"):
        path.write_text("raise AssertionError('code of the directory ran')")
    assert sample(one.path, "def ", max_new_tokens=2, device="cpu").tokens > 0


def rounded_up(ffn_mult: float, hidden_size: int) -> int:
    """The width as vLLM, SGLang, TensorRT-LLM and llama.cpp's converter make it of ffn_mult."""
    width = int(2 * ffn_mult * hidden_size / 3)
    return width + -width % 256


def test_configuration_says_what_engines_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nesting = Nesting.from_widths([256, 300, 768])
    monkeypatch.setattr(synthetic_run, "NESTING", nesting)
    for d_model in (32, 40):
        lm = random_model(model_config(d_model=d_model, d_ff=768, n_kv_heads=2))
        run = write_run(tmp_path / f"run{d_model}", lm)
        submodel = ",".join(nesting.names)
        (one,) = export(run, [submodel], tmp_path / f"out{d_model}", dtype="bf16")
        config = transformers.AutoConfig.from_pretrained(one.path, trust_remote_code=True)
        assert (config.model_type, config.architectures) == ("nemotron-nas", ["DeciLMForCausalLM"])
        blocks = config.block_configs
        assert [hasattr(block.ffn, "ffn_mult") for block in blocks] == [True, False, True]
        assert [block.ffn.intermediate_size for block in blocks] == [256, 300, 768]
        assert rounded_up(blocks[0].ffn.ffn_mult, d_model) == 256
        assert rounded_up(blocks[2].ffn.ffn_mult, d_model) == 768
        for block in blocks:
            assert block.attention.no_op is block.ffn.no_op is False
            assert block.attention.replace_with_linear is block.ffn.replace_with_linear is False
            assert block.attention.n_heads_in_group == 2
        config.save_pretrained(tmp_path / "saved")
        saved = json.loads((tmp_path / "saved" / "config.json").read_text())
        assert (
            saved["block_configs"]
            == json.loads((one.path / "config.json").read_text())["block_configs"]
        )
        assert "SGLang and TensorRT-LLM do not" in (one.path / "README.md").read_text()


def test_models_that_the_architecture_is_not_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", random_model(model_config(ffn="gelu", norm="layernorm")))
    with pytest.raises(UserError, match=r"nemotron-nas\) holds swiglu .* gelu with layernorm"):
        export(run, ["M"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
