"""The order of neurons: against transformers' activations, and in what it does to S."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from matformer_dist.errors import UserError
from matformer_dist.importing.calibration_text import of_tokens, read_tokens
from matformer_dist.importing.import_model import import_model
from matformer_dist.importing.importance import activation_weighted, falling, magnitude
from matformer_dist.importing.llama_config import read_llama_config
from matformer_dist.importing.llama_weights import LlamaWeights
from matformer_dist.importing.options import ImportOptions
from matformer_dist.run_directory import find_checkpoint
from tests.unit.importing.checkpoints import (
    CALIBRATION,
    load,
    random_llama,
    save,
    some_tokens,
    xl_logits,
)
from tests.unit.submodels.synthetic_run import VOCAB, small_tokenizer

WIDTHS = [8, 16, 40, 64]


def test_activations_match_transformers(tmp_path: Path) -> None:
    """Of every layer: so the hidden states that reach it are right, too."""
    llama = random_llama(num_key_value_heads=2)
    directory = save(llama, tmp_path / "hf")
    tokens = some_tokens()
    seen: list[Tensor] = []
    for layer in llama.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        llama(tokens)
    model = read_llama_config(directory).model
    source = LlamaWeights(directory, model, VOCAB)
    calibration = of_tokens(model, tokens, source.embedding())
    for i, expected in enumerate(seen):
        actual = calibration.through(source.layer(i))
        torch.testing.assert_close(actual, expected.abs().mean(dim=(0, 1)), rtol=1e-5, atol=1e-6)


def test_scores_match_their_formulas() -> None:
    w_in = torch.tensor([[3.0, 4.0, 0.0, 2.0], [1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 9.0, 9.0]])
    w_out = torch.tensor([[0.0, 1.0], [6.0, 8.0], [1.0, 1.0]])
    assert magnitude(w_in, w_out).tolist() == [5 * 2 * 1, 1 * 1 * 10, 0]
    assert activation_weighted(torch.tensor([2.0, 0.5, 0.0]), w_out).tolist() == [2, 5, 0]
    assert falling(torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0])).tolist() == [1, 3, 0, 2, 4]


@pytest.mark.parametrize("calibrated", [False, True])
def test_every_layer_is_ordered_by_its_own_importance(tmp_path: Path, calibrated: bool) -> None:
    text = tmp_path / "text.txt"
    text.write_text(CALIBRATION)
    directory = save(random_llama(), tmp_path / "hf")
    options = ImportOptions(calibration=[text] if calibrated else ())
    import_model(directory, tmp_path / "run", options)
    tokens = read_tokens([text], small_tokenizer(), 8192, 48)
    run = load(tmp_path / "run")
    calibration = of_tokens(run.model, tokens, run.embedding.weight.detach())
    orders = []
    for i, layer in enumerate(run.layers):
        weights = {name: weight.detach() for name, weight in layer.state_dict().items()}
        importance = magnitude(weights["ffn.w_in"], weights["ffn.w_out"])
        if calibrated:
            activations = calibration.through(weights)
            importance = activation_weighted(activations, weights["ffn.w_out"])
        assert (importance.diff() <= 1e-6).all() and importance[0] > 1.5 * importance[-1]
        before = LlamaWeights(directory, run.model, VOCAB).layer(i)["ffn.w_out"]
        found = (weights["ffn.w_out"][:, None] == before[None]).all(2).int().argmax(1)
        assert sorted(found.tolist()) == list(range(64))
        orders.append(found.tolist())
    assert orders[0] != orders[1]


USEFUL = 8  # neurons a layer


def trained_llama() -> Any:
    """A Llama of 8 neurons a layer, of which alone the rest, which is random, makes a model."""
    llama = random_llama(intermediate_size=USEFUL, num_hidden_layers=2)
    ids = torch.tensor(small_tokenizer().encode(CALIBRATION))
    tokens = ids[: len(ids) // 32 * 32].view(-1, 32)
    with torch.no_grad():  # hidden dimension 31 stays 0
        llama.model.embed_tokens.weight[:, 31] = 0
        for layer in llama.model.layers:
            layer.self_attn.o_proj.weight[31] = 0
            layer.mlp.down_proj.weight[31] = 0
    trained = {name: p for name, p in llama.named_parameters() if ".mlp." in name}
    optimizer = torch.optim.Adam(trained.values(), lr=3e-2)
    for _ in range(60):
        llama(tokens, labels=tokens).loss.backward()
        for name, parameter in trained.items():
            if "down" in name:
                parameter.grad[31] = 0
        optimizer.step()
        optimizer.zero_grad()
    return llama


def with_neurons_before(llama: Any, read: Tensor, scale: float) -> Any:
    """The same Llama behind 56 more neurons a layer.

    Their gate and up are `read` [D]; down is random, of `scale`, but 0 in hidden dimension 31.
    """
    more = random_llama(intermediate_size=64, num_hidden_layers=2)
    learnt = llama.state_dict()
    with torch.no_grad():
        for name, weight in more.named_parameters():
            if ".mlp." not in name:
                weight.copy_(learnt[name])
            elif "down" in name:
                weight[:, :-USEFUL].normal_(0, scale)
                weight[31] = 0
                weight[:, -USEFUL:] = learnt[name]
            else:
                weight[:-USEFUL] = read
                weight[-USEFUL:] = learnt[name]
    return more


@pytest.fixture(scope="module")
def llama() -> Any:
    return trained_llama()


@torch.no_grad()
def losses(run: Path, text: str) -> list[float]:
    """Mean nats per token of S, M, L and XL on the text."""
    lm = load(run)
    nesting = find_checkpoint(str(run)).manifest.nesting
    ids = torch.tensor(small_tokenizer().encode(text))[: 4 * 32].view(4, 32)
    found = []
    for submodel in reversed(nesting.uniforms(lm.model.n_layers)):
        logits = lm.logits(ids[:, :-1], submodel)
        found.append(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item())
    return found


def test_s_is_better_in_order_of_importance_and_xl_the_same(llama: Any, tmp_path: Path) -> None:
    """Decoys of large weights that read what is always 0: activations tell, weights do not."""
    decoys = with_neurons_before(llama, 10.0 * (torch.arange(32) == 31), scale=3.0)
    source = save(decoys, tmp_path / "hf")
    (tmp_path / "text.txt").write_text(CALIBRATION)
    runs = {
        "none": ImportOptions(widths=WIDTHS, order="none"),
        "magnitude": ImportOptions(widths=WIDTHS),
        "activation": ImportOptions(widths=WIDTHS, calibration=[tmp_path / "text.txt"]),
    }
    for name, options in runs.items():
        import_model(source, tmp_path / name, options)
    loss = {name: losses(tmp_path / name, CALIBRATION) for name in runs}
    expected = xl_logits(tmp_path / "none", some_tokens())
    for name in runs:
        actual = xl_logits(tmp_path / name, some_tokens())
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert loss[name][-1] == pytest.approx(loss["none"][-1], abs=1e-5)
    # S, 8 neurons, is then all that the model has learnt; without the order it is none of it.
    assert loss["activation"][0] == pytest.approx(loss["none"][-1], abs=1e-5)
    assert loss["none"][0] > loss["activation"][0] + 1
    assert loss["magnitude"][0] == pytest.approx(loss["none"][0], abs=1e-5)


def test_magnitude_finds_large_neurons_without_text(llama: Any, tmp_path: Path) -> None:
    source = save(with_neurons_before(llama, torch.full((32,), 1e-2), 0.1), tmp_path / "hf")
    for name, order in (("none", "none"), ("magnitude", "importance")):
        import_model(source, tmp_path / name, ImportOptions(widths=WIDTHS, order=order))
    unordered, ordered = (losses(tmp_path / n, CALIBRATION) for n in ("none", "magnitude"))
    assert ordered[-1] == pytest.approx(unordered[-1], abs=1e-5)
    assert ordered[0] == pytest.approx(ordered[-1], abs=0.05)
    assert unordered[0] > ordered[0] + 1


def test_calibration_takes_documents_as_training_does(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    (tmp_path / "a.txt").write_text("def total")
    (tmp_path / "b.jsonl").write_text('{"text": "sum("}\n{"text": ""}\n{"text": "numbers"}\n')
    eod = [tokenizer.eod]
    expected = [*tokenizer.encode("def total"), *eod, *tokenizer.encode("sum("), *eod]
    expected += [*tokenizer.encode("numbers"), *eod]
    inputs = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    assert read_tokens(inputs, tokenizer, 10**6, 10**6).tolist() == [expected]
    assert read_tokens(inputs, tokenizer, 7, 3).tolist() == [expected[:3], expected[3:6]]
    assert read_tokens(inputs, tokenizer, 2, 3).tolist() == [expected[:2]]
    assert read_tokens([tmp_path], tokenizer, 10**6, 10**6).tolist() == [expected]
    with pytest.raises(UserError, match="--calibration-tokens 0 must be above 0"):
        read_tokens(inputs, tokenizer, 0, 3)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"calibration text .*empty\.txt is empty"):
        read_tokens([tmp_path / "empty.txt"], tokenizer, 5, 3)


def test_calibration_that_overflows_is_refused(tmp_path: Path) -> None:
    llama = random_llama()
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    directory = save(llama, tmp_path / "hf")
    (tmp_path / "text.txt").write_text(CALIBRATION)
    options = ImportOptions(calibration=[tmp_path / "text.txt"])
    with pytest.raises(UserError, match="not finite in fp32"):
        import_model(directory, tmp_path / "run", options)
    assert not (tmp_path / "run").exists()


def test_few_tokens_are_said(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(CALIBRATION)
    options = ImportOptions(calibration=[tmp_path / "text.txt"], calibration_tokens=10_000)
    model = import_model(save(random_llama(), tmp_path / "hf"), tmp_path / "run", options)
    assert "10,000 were asked for" in model.notices[0]
    assert "tokens of calibration text" in model.order
