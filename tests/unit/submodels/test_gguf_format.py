"""`gguf` exports: read back by the gguf package, and run by llama.cpp against our model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from matformer_dist.data.sentencepiece_tokenizer import train_tokenizer
from matformer_dist.data.tokenizer_files import load_tokenizer
from matformer_dist.errors import UserError
from matformer_dist.inference.generation import Sampling, generate, sample
from matformer_dist.submodels.extract import extract
from matformer_dist.submodels.gguf_files import quantize_q8_0
from tests.unit.byte_level import byte_level_tokenizer, save_tokenizer
from tests.unit.submodels import synthetic_run
from tests.unit.submodels.odd_texts import CORPUS, ODD
from tests.unit.submodels.synthetic_run import (
    NESTING,
    VOCAB,
    model_config,
    random_model,
    small_tokenizer,
    write_run,
)

gguf = pytest.importorskip("gguf")

CHANGES: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "llama3": {
        "rope_scaling": {
            "kind": "llama3", "factor": 8.0, "low_freq_factor": 0.2, "high_freq_factor": 2.0,
            "original_max_seq_len": 16,
        },
    },
    "wide-heads": {"kv_channels": 12, "n_kv_heads": 2},
    "linear": {"rope_scaling": {"kind": "linear", "factor": 4.0}},
    "grouped-tied": {
        "n_kv_heads": 2, "tied_embeddings": True, "rope_theta": 5e4, "norm_eps": 1e-3,
    },
}  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path / "model.gguf").tensors}


def test_file_holds_exact_widths_and_settings(tmp_path: Path) -> None:
    lm = random_model(model_config(n_kv_heads=2))
    run = write_run(tmp_path / "run", lm, tensor=2)
    mixed, uniform = extract(str(run), ["S:2,L:1", "L"], output=tmp_path / "out", format="gguf")
    tensors = read(mixed.path)
    assert [tensors[f"blk.{i}.ffn_up.weight"].data.shape for i in range(3)] == [
        (8, 32), (8, 32), (40, 32),
    ]  # fmt: skip
    assert sum(tensor.data.size for tensor in tensors.values()) == mixed.parameters
    assert mixed.bytes == 4 * mixed.parameters
    fields = gguf.GGUFReader(mixed.path / "model.gguf").fields
    assert fields["general.architecture"].contents() == "deci"
    assert fields["deci.feed_forward_length"].contents() == [8, 8, 40]
    assert fields["deci.attention.head_count_kv"].contents() == [2, 2, 2]
    fields = gguf.GGUFReader(uniform.path / "model.gguf").fields
    assert fields["general.architecture"].contents() == "llama"
    assert fields["llama.feed_forward_length"].contents() == 40
    down = lm.get_parameter("layers.2.ffn.w_out")[:40].T
    assert np.array_equal(read(uniform.path)["blk.2.ffn_down.weight"].data, down.detach().numpy())


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "q8_0"])
def test_low_precision_is_the_rounded_weight(tmp_path: Path, dtype: str) -> None:
    lm = random_model(model_config())
    run = write_run(tmp_path / "run", lm)
    (one,) = extract(str(run), ["XL"], output=tmp_path / "out", format="gguf", dtype=dtype)
    tensors = read(one.path)
    assert tensors["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    weight = lm.get_parameter("layers.1.attention.w_out").detach()
    stored = tensors["blk.1.attn_output.weight"]
    values = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).astype(np.float32))
    if dtype == "q8_0":  # blocks of 32 neighbours share a scale, in fp16, of 1/127 of their largest
        scales = weight.view(-1, 32).abs().amax(dim=1, keepdim=True) / 127
        assert ((values - weight).view(-1, 32).abs() <= 0.57 * scales).all()
        assert stored.n_bytes == weight.numel() // 32 * 34
    else:
        rounded = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
        assert torch.equal(values, weight.to(rounded).float())


def test_what_gguf_cannot_hold_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", random_model(model_config()))
    with pytest.raises(UserError, match=r"q8_0 holds rows .* of 32 .*ffn_down.*16; choose fp16"):
        extract(str(run), ["XL", "M"], output=tmp_path / "out", format="gguf", dtype="q8_0")
    gelu = write_run(tmp_path / "gelu", random_model(model_config(ffn="gelu", norm="layernorm")))
    with pytest.raises(UserError, match=r"gguf holds swiglu .* gelu with layernorm.*native"):
        extract(str(gelu), ["M"], output=tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()
    (one,) = extract(str(run), ["M"], output=tmp_path / "out", format="gguf")
    with pytest.raises(UserError, match=r"in format gguf, which llama.cpp runs"):
        sample(one.path, "def ")


def test_q8_0_is_bit_for_bit_the_packages() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(20_000, 64, generator=generator) * 10.0 ** torch.randint(
        -9, 5, (20_000, 1), generator=generator
    )
    values[7] = 0
    values[8] = torch.arange(64) - 31.5  # halves
    values[9] = 1e-30  # its scale is 0 in fp16
    for found in (values, values.T.contiguous().T, values.repeat(1, 2)[:, 32:96]):
        stored = torch.empty(len(values), 68, dtype=torch.uint8)
        largest = quantize_q8_0(found, stored)
        expected = gguf.quants.quantize(found.numpy(), gguf.GGMLQuantizationType.Q8_0)
        assert np.array_equal(stored.numpy(), expected)
        assert largest == pytest.approx(float(values.abs().max()))


def test_values_beyond_a_blocks_scale_are_refused(tmp_path: Path) -> None:
    lm = random_model(model_config())
    with torch.no_grad():
        lm.get_parameter("layers.1.attention.w_out")[3, 3] = 1e7
    run = write_run(tmp_path / "run", lm)
    with pytest.raises(
        UserError, match=r"attn_output\.weight .* 1e\+07, beyond .* q8_0; choose bf16"
    ):
        extract(str(run), ["XL"], output=tmp_path / "out", format="gguf", dtype="q8_0")


def llama_cpp_model(path: Path) -> Any:
    """llama.cpp with a key-value cache in fp32, as ours."""
    llama_cpp = pytest.importorskip("llama_cpp")
    return llama_cpp.Llama(
        str(path / "model.gguf"), n_ctx=48, n_threads=1, n_threads_batch=1, logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, verbose=False,
    )  # fmt: skip


def logits_of(llama: Any, tokens: Tensor) -> Tensor:
    """tokens [s] -> [s, V]."""
    llama.reset()
    llama.eval(tokens.tolist())
    return torch.from_numpy(np.array(llama.scores[: len(tokens)]))


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_llama_cpp_gives_our_logits_and_greedy_tokens(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    pytest.importorskip("llama_cpp")
    lm = random_model(model_config(**changes))
    run = write_run(tmp_path / "run", lm, tensor=2)
    tokens = torch.randint(3, VOCAB, (19,), generator=torch.Generator().manual_seed(1))
    prompt = small_tokenizer().encode("def tot")
    notations = ["S", "XL", "S:2,L:1", "XL:1,S:2"]
    for one in extract(str(run), notations, output=tmp_path / "out", format="gguf"):
        llama = llama_cpp_model(one.path)
        submodel = NESTING.parse(one.submodel, 3)
        with torch.no_grad():
            expected = lm.logits(tokens[None], submodel)[0]
        torch.testing.assert_close(logits_of(llama, tokens), expected, rtol=2e-5, atol=2e-5)
        (ours,) = generate(
            lm, submodel, [prompt], max_new_tokens=24, sampling=Sampling(temperature=0)
        )
        llama.reset()
        theirs = [token for token, _ in zip(llama.generate(prompt, temp=0.0), ours, strict=False)]
        assert theirs == ours


@pytest.mark.parametrize(("dtype", "error"), [("fp16", 0.03), ("bf16", 0.15), ("q8_0", 0.4)])
def test_llama_cpp_reads_every_type(tmp_path: Path, dtype: str, error: float) -> None:
    """llama.cpp rounds activations to the type too: errors are shares of the logits' spread, of
    which two unrelated models are apart by several.
    """
    pytest.importorskip("llama_cpp")
    lm = random_model(model_config())
    run = write_run(tmp_path / "run", lm)
    (one,) = extract(str(run), ["XL"], output=tmp_path / "out", format="gguf", dtype=dtype)
    tokens = torch.randint(3, VOCAB, (19,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = lm.logits(tokens[None], NESTING.parse("XL", 3))[0]
    difference = logits_of(llama_cpp_model(one.path), tokens) - expected
    assert difference.abs().max() < error * expected.std()
    assert difference.abs().max() > 1e-5, "the type must be what was asked for"


def test_llama_cpp_tokenizes_like_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    tokenizer = train_tokenizer(CORPUS, 400)  # many merges, whose order is that of their scores
    monkeypatch.setattr(synthetic_run, "VOCAB", 400)
    monkeypatch.setattr(synthetic_run, "small_tokenizer", lambda: tokenizer)
    run = write_run(tmp_path / "run", random_model(model_config()))
    (one,) = extract(str(run), ["S"], output=tmp_path / "out", format="gguf")
    llama = llama_cpp_model(one.path)
    texts = [text for text in [*ODD, *CORPUS] if "\u2581" not in text]
    assert len(texts) > 20
    for text in texts:
        ids = tokenizer.encode(text)
        assert llama.tokenize(text.encode(), add_bos=True, special=False) == ids, text
        assert llama.detokenize(ids) == text.encode()
    # As the module says: it cannot tell this character from a space.
    assert llama.tokenize("a\u2581b".encode()) == tokenizer.encode("a b")
    assert llama.token_eos() == llama.token_bos() == tokenizer.eod


@pytest.mark.parametrize("rule", ["llama-bpe", "smollm", "gpt-2"])
def test_llama_cpp_tokenizes_byte_level_bpe_like_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    pytest.importorskip("llama_cpp")
    tokenizer = byte_level_tokenizer(tmp_path / "json", CORPUS, 320, rule)
    monkeypatch.setattr(synthetic_run, "VOCAB", 320)
    monkeypatch.setattr(synthetic_run, "small_tokenizer", lambda: tokenizer)
    run = write_run(tmp_path / "run", random_model(model_config()))
    (one,) = extract(str(run), ["S"], output=tmp_path / "out", format="gguf")
    llama = llama_cpp_model(one.path)
    for text in [*ODD, *CORPUS, "it's 12345 I'LL\n\n\n x", "<|end_of_text|>"]:
        ids = tokenizer.encode(text)
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == ids, text
        begun = llama.tokenize(text.encode(), add_bos=True, special=False)
        assert begun == tokenizer.encode_prompt(text), text
        assert llama.detokenize(ids) == text.encode()
    assert llama.token_eos() == tokenizer.eod


def test_byte_level_bpe_that_llama_cpp_does_not_know_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_tokenizer(tmp_path / "json", CORPUS, VOCAB)
    content = json.loads(path.read_text())
    content["model"]["ignore_merges"] = False
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|x"
    content["normalizer"] = {"type": "NFC"}
    path.write_text(json.dumps(content))
    monkeypatch.setattr(synthetic_run, "small_tokenizer", lambda: load_tokenizer(path))
    run = write_run(tmp_path / "run", random_model(model_config()))
    with pytest.raises(UserError, match=r"it normalises text, it cuts words by none of .*gpt-2"):
        extract(str(run), ["S"], output=tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()
