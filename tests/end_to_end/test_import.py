"""`matformer import`: a Llama in, its granularities out, by the commands that README shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.conftest import matformer, refuse, succeed, train

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llama(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with the corpus' tokenizer of 600 pieces."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama") / "hf"
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="100KB")
    (folder / "tokenizer.model").write_bytes(Path(f"{corpus}.model").read_bytes())
    return folder


def test_an_imported_model_comes_out_and_speaks(llama: Path, corpus: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    run, xl, mixed = tmp_path / "run", tmp_path / "xl", tmp_path / "mixed"
    texts = corpus.parents[1] / "texts"
    shown = succeed(
        matformer(
            "import", llama, "--output", run, "--calibration", texts / "csv.py",
            "--calibration-tokens", 256, "--fractions", "1/4,1/2,1", "--names", "a,b,c",
        )
    )  # fmt: skip
    assert "neurons ordered by what they add over 256 tokens" in shown
    assert f"set data.train in {run / 'config.yaml'}" in shown
    succeed(matformer("extract", run, "--submodel", "c", "--format", "hf", "--output", xl))
    succeed(matformer("extract", run, "--submodel", "a:1,b:1", "--output", mixed))
    said = succeed(matformer("generate", mixed, "--prompt", "def ", "--max-new-tokens", 8))
    assert said.startswith("def ")
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)(tokens).logits
            for folder in (llama, xl)
        )
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tensor", "precision", "stage"), [(1, "fp32", 1), (2, "bf16", 3)])
def test_training_goes_on_from_an_imported_model(
    llama: Path, corpus: Path, tmp_path: Path, tensor: int, precision: str, stage: int
) -> None:
    """With settings that the import did not choose; then again, from its own checkpoint."""
    run = tmp_path / "run"
    succeed(matformer("import", llama, "--output", run))
    settings = (
        f"data.train=[[1,{corpus}]]", "data.split=[80,20]", "training.seq_len=32",
        "training.global_batch_size=8", f"training.precision={precision}", "evaluation.batches=2",
        f"parallel.tensor={tensor}", f"deepspeed.zero_optimization.stage={stage}",
        "schedule.kind=constant",
    )  # fmt: skip
    ranks = tensor if tensor > 1 else None
    config = run / "config.yaml"
    shown = succeed(train(config, *settings, "training.steps=3", ranks=ranks))
    assert "checkpoints/step-0" in shown and "from whole weights" in shown
    shown = succeed(train(config, *settings, "training.steps=4", ranks=ranks))
    assert "checkpoints/step-3" in shown
    other = train(config, *settings, "training.seq_len=16", ranks=ranks)
    assert other.returncode == 2 and "training.seq_len (was 32, now 16)" in other.stderr


def test_what_cannot_be_imported_is_one_message(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    for words, says in (
        ([llama, "--widths", "8,x"], "--widths '8,x' must be whole numbers"),
        ([llama, "--widths", "8,32"], "must end with model.d_ff, which is 64"),
        ([llama, "--names", "a,,b"], "--names 'a,,b' must be items"),
        ([tmp_path, "--order", "none"], "give the folder of a Hugging Face checkpoint"),
    ):
        refuse(matformer("import", *words, "--output", output), says)
    assert not list(tmp_path.iterdir())
