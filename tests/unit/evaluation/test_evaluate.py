"""Evaluation of a run and of what was extracted from it, against plain logits."""

from __future__ import annotations

import importlib.util
import json
import shutil
from math import isnan
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from typer.testing import CliRunner

from matformer_dist.cli import app
from matformer_dist.config_file import load_config
from matformer_dist.config_language import as_language
from matformer_dist.data.tokenizer_files import load_tokenizer
from matformer_dist.errors import UserError
from matformer_dist.evaluation import sources
from matformer_dist.evaluation.parts import Part
from matformer_dist.evaluation.run import evaluate_run
from matformer_dist.evaluation.validation import Tokens
from matformer_dist.inference.loading import load_language_model, load_model
from matformer_dist.models.matlm import MatLM
from matformer_dist.submodels.extract import extract
from tests.unit.submodels.run_with_data import SEQ_LEN, SEQUENCES, write_run_with_data
from tests.unit.submodels.synthetic_run import NESTING, model_config, random_model

MIX = "S:1,L:2"


@pytest.fixture(scope="module", params=["llama", "paper"])
def lm(request: pytest.FixtureRequest) -> MatLM:
    changes: dict[str, Any] = {"n_kv_heads": 2}
    if request.param == "paper":
        changes = {"ffn": "gelu", "norm": "layernorm", "tied_embeddings": True}
    return random_model(model_config(**changes))


@pytest.fixture(scope="module")
def run(lm: MatLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_with_data(tmp_path_factory.mktemp("evaluate") / "run", lm)


def validation_of(run: Path) -> Tokens:
    config = as_language(load_config(run / "config.yaml"), "the test")
    return Tokens.of(config, load_tokenizer(run), None)


def results(evaluation: Any) -> dict[str, dict[str, Any]]:
    return {entry["submodel"]: entry for entry in evaluation.results}


def test_numbers_match_plain_logits(lm: MatLM, run: Path) -> None:
    found = results(evaluate_run(str(run), [MIX], device="cpu"))
    assert set(found) == {"S", "M", "L", "XL", MIX}
    data = validation_of(run)
    assert data.tokens.shape == (SEQUENCES, SEQ_LEN)
    text = "".join(map(load_tokenizer(run).decode, data.targets.tolist()))
    with torch.no_grad():
        largest = lm.logits(data.tokens, NESTING.uniform(3, 3)).double().log_softmax(-1)
        for notation, entry in found.items():
            logs = lm.logits(data.tokens, NESTING.parse(notation, 3)).double().log_softmax(-1)
            nll = F.nll_loss(logs.flatten(0, 1), data.targets.flatten(), reduction="none")
            assert entry["loss"] == pytest.approx(float(nll.mean()), rel=1e-5)
            assert entry["perplexity"] == pytest.approx(float(nll.mean().exp()), rel=1e-4)
            bits = float(nll.sum()) / 0.6931471805599453
            assert entry["bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=0.02)
            agreement = (logs.argmax(-1) == largest.argmax(-1)).double().mean()
            assert entry["agreement"] == pytest.approx(float(agreement))
            kl = (largest.exp() * (largest - logs)).sum(-1).mean()
            assert entry["kl"] == pytest.approx(float(kl), abs=1e-5)
            accuracy = (logs.argmax(-1) == data.targets).double().mean()
            assert entry["accuracy"] == pytest.approx(float(accuracy))
            for name in ("loss", "agreement", "kl", "accuracy"):
                low, high = entry[f"{name}_interval"]
                assert low - 1e-9 <= entry[name] <= high + 1e-9
            assert entry["loss_interval"][1] - entry["loss_interval"][0] > 1e-3


@pytest.mark.parametrize("format", ["native", "hf", "hf --sparse", "hf --nested"])
@pytest.mark.parametrize("notation", ["M", MIX])
def test_extracted_models_match_the_run(
    lm: MatLM, run: Path, tmp_path: Path, format: str, notation: str
) -> None:
    kind, _, option = format.partition(" --")
    if kind == "hf":
        pytest.importorskip("transformers")
    if option == "sparse" and lm.model.ffn == "gelu":
        pytest.skip("the paper's models have no such format")
    options: dict[str, Any] = {option: True} if option else {}
    (one,) = extract(str(run), [notation], output=tmp_path / "one", format=kind, **options)
    expected = results(evaluate_run(str(run), [notation], device="cpu"))[notation]
    evaluation = evaluate_run(str(one.path), device="cpu")
    found = results(evaluation)[notation]
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert found["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], abs=1e-5)
    for name in ("accuracy", "loss_interval", "accuracy_interval"):
        assert found[name] == pytest.approx(expected[name], abs=1e-5)
    for name in ("parameters", "non_embedding_parameters", "flops"):
        assert found[name] == expected[name]
    for name in ("agreement", "kl", "agreement_interval", "kl_interval"):  # with the run's XL
        assert found[name] == pytest.approx(expected[name], abs=1e-5)
    written = json.loads((one.path / "evaluation.json").read_text())
    assert written["step"] == 5 and len(written["submodels"]) == len(evaluation.results)
    if kind == "native":  # is nested still
        assert "S" in results(evaluation)


def test_every_submodel_of_a_nested_export_matches_the_run(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (one,) = extract(str(run), ["XL"], output=tmp_path / "hf", format="hf", nested=True)
    expected = results(evaluate_run(str(run), [MIX], heuristic=True, device="cpu"))
    found = results(evaluate_run(str(one.path), [MIX], heuristic=True, device="cpu"))
    assert found.keys() == expected.keys()
    for notation, entry in found.items():
        for name in ("loss", "agreement", "kl", "accuracy", "bits_per_byte"):
            assert entry[name] == pytest.approx(expected[notation][name], abs=1e-5)


def test_xl_that_is_gone_is_not_agreed_with(run: Path, tmp_path: Path) -> None:
    (one,) = extract(str(run), ["M"], output=tmp_path / "m")
    (xl,) = extract(str(run), ["XL"], output=tmp_path / "xl")
    moved = shutil.copytree(run, tmp_path / "moved")
    shutil.rmtree(moved / "checkpoints")
    words = ["--run", str(moved), "--device", "cpu"]
    shown = CliRunner().invoke(app, ["evaluate", str(one.path), *words])
    assert shown.exit_code == 0 and "no agreement with XL" in shown.output
    assert "accuracy" in shown.output
    assert "step-5" in shown.output or "@5 is not there" in shown.output
    written = json.loads((one.path / "evaluation.json").read_text())["submodels"]
    assert {(entry["agreement"], entry["kl"]) for entry in written} == {(None, None)}
    expected = results(evaluate_run(str(run), device="cpu"))
    for name in ("loss", "accuracy"):  # which need no XL
        assert written[-1][name] == pytest.approx(expected["M"][name], abs=1e-5)
    whole = evaluate_run(str(xl.path), run=moved, device="cpu")  # holds XL itself
    assert results(whole)["S"]["kl"] == pytest.approx(expected["S"]["kl"], abs=1e-5)


def test_models_of_another_run_are_told_apart(run: Path, tmp_path: Path) -> None:
    """Of the same shape: nothing agrees. Of another: nothing is evaluated."""
    (one,) = extract(str(run), ["M"], output=tmp_path / "m")
    changes = load_language_model(run).model.model.model_copy(update={"init_std": 0.3})
    other = write_run_with_data(tmp_path / "other", random_model(changes))
    evaluation = evaluate_run(str(one.path), run=other, device="cpu")
    assert "holds other weights by now" in evaluation.note
    assert isnan(results(evaluation)["M"]["agreement"])
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["model"]["n_layers"] = 4
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"was not extracted from .* 4 layers"):
        evaluate_run(str(one.path), run=other, device="cpu")
    with pytest.raises(UserError, match=r"--run .*m holds no config\.yaml; give the directory"):
        evaluate_run(str(one.path), run=one.path, device="cpu")


def test_rounded_weights_are_evaluated_in_fp32(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = []
    for kind in ("native", "hf"):
        (one,) = extract(str(run), ["M"], output=tmp_path / kind, format=kind, dtype="bf16")
        found.append(results(evaluate_run(str(one.path), device="cpu"))["M"])
    whole = results(evaluate_run(str(run), device="cpu"))["M"]
    for name in ("loss", "agreement", "kl", "loss_interval"):
        assert found[0][name] == pytest.approx(found[1][name], abs=1e-5)
    assert 1e-5 < abs(found[0]["loss"] - whole["loss"]) < 0.05


def test_xl_that_does_not_fit_the_memory_is_not_agreed_with(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one,) = extract(str(run), ["M"], output=tmp_path / "m")

    def load(source: Any, *arguments: Any, **options: Any) -> Any:
        if "@" in str(source):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load_model(source, *arguments, **options)

    monkeypatch.setattr(sources, "load_model", load)
    evaluation = evaluate_run(str(one.path), device="cpu")
    assert "does not fit the memory of cpu" in evaluation.note
    assert isnan(results(evaluation)["M"]["kl"]) and results(evaluation)["M"]["loss"] > 0


def test_an_evaluation_goes_where_it_is_told(run: Path, tmp_path: Path) -> None:
    evaluate_run(str(run), device="cpu")
    before = (run / "evaluation.json").read_text()
    evaluation = evaluate_run(str(run), batches=1, output=tmp_path / "other.json", device="cpu")
    assert evaluation.file == tmp_path / "other.json"
    assert json.loads(evaluation.file.read_text())["tokens"] == evaluation.units
    assert (run / "evaluation.json").read_text() == before
    with pytest.raises(UserError, match=r"--output .*x\.json has no folder"):
        evaluate_run(str(run), output=tmp_path / "no" / "x.json", device="cpu")
    with pytest.raises(UserError, match=r"--output .* is a folder"):
        evaluate_run(str(run), output=tmp_path, device="cpu")


def test_bytes_are_those_of_the_text(run: Path) -> None:
    """Each target is as long as the text grows by it; the end of a document has none."""
    data, tokenizer = validation_of(run), load_tokenizer(run)
    total = 0
    for tokens, targets in zip(data.tokens.tolist(), data.targets.tolist(), strict=True):
        before = [token for token in tokens[:1] if token != tokenizer.eod]
        # Behind a letter, so that nothing at the beginning of a text is special.
        anchor = tokenizer.encode("x")
        behind = [token for token in targets if token != tokenizer.eod]
        whole = tokenizer.decode([*anchor, *before, *behind]).encode(errors="surrogateescape")
        total += len(whole) - len(tokenizer.decode([*anchor, *before]).encode())
    assert "\ufffd" not in tokenizer.decode(data.targets.flatten().tolist())
    assert data.text_bytes == total > 0


def test_one_sequence_alone_has_no_interval(run: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["training"] |= {"micro_batch_size": 1, "global_batch_size": 1}
    config["evaluation"]["batches"] = 1
    one = shutil.copytree(run, tmp_path / "one")
    (one / "config.yaml").write_text(yaml.safe_dump(config))
    shown = CliRunner().invoke(app, ["evaluate", str(one), "--device", "cpu"])
    assert shown.exit_code == 0 and "–" in shown.output and "nan" not in shown.output
    written = json.loads((one / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert written["submodels"][0]["loss_interval"] == [None, None]


def test_an_extracted_model_is_replaced_with_its_evaluation(run: Path, tmp_path: Path) -> None:
    for force in (False, True):
        extract(str(run), ["S"], output=tmp_path / "s", force=force)
        evaluate_run(str(tmp_path / "s"), part=Part(1, 1), device="cpu")
    assert (tmp_path / "s" / "evaluation.json").exists()


def test_less_memory_takes_more_passes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = evaluate_run(str(run), heuristic=True, device="cpu")
    passes: list[int] = []
    forward = MatLM.forward

    def short_of_memory(lm: MatLM, tokens: Any, targets: Any, plan: Any) -> Any:
        passes.append(len(plan.segments))
        if passes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(lm, tokens, targets, plan)

    monkeypatch.setattr(MatLM, "forward", short_of_memory)
    most = 2
    found = evaluate_run(str(run), heuristic=True, device="cpu")
    assert passes.count(4) == 1  # tried once
    assert results(found).keys() == results(expected).keys()
    for name, entry in results(found).items():
        assert entry["loss"] == pytest.approx(results(expected)[name]["loss"], abs=1e-6)
        assert entry["kl"] == pytest.approx(results(expected)[name]["kl"], abs=1e-6)
    most = 1
    with pytest.raises(UserError, match=r"memory of the GPU.*--device cpu"):
        evaluate_run(str(run), device="cpu")


def test_parts_match_the_whole(run: Path) -> None:
    whole = evaluate_run(str(run), heuristic=True, device="cpu")
    parts = [
        evaluate_run(str(run), heuristic=True, part=Part(i, 3), device="cpu") for i in (2, 1, 3)
    ]
    assert [part.is_whole for part in parts] == [False, False, True]
    assert len(whole.results) == 10
    for ours, expected in zip(parts[-1].results, whole.results, strict=True):
        assert ours["submodel"] == expected["submodel"]
        assert ours["loss"] == pytest.approx(expected["loss"])


def test_other_data_are_taken_where_they_are_named(run: Path, tmp_path: Path) -> None:
    before = results(evaluate_run(str(run), device="cpu"))
    same = results(evaluate_run(str(run), data=run / "validation", device="cpu"))
    assert same == before
    one = results(evaluate_run(str(run), batches=1, device="cpu"))
    assert one["S"]["loss"] != before["S"]["loss"]
    with pytest.raises(UserError, match="nowhere"):
        evaluate_run(str(run), data=tmp_path / "nowhere", device="cpu")


def test_training_data_may_be_gone(run: Path, tmp_path: Path) -> None:
    expected = validation_of(run)
    moved = shutil.copytree(run, tmp_path / "moved")
    config = yaml.safe_load((moved / "config.yaml").read_text())
    config["data"]["train"] = [[1, str(tmp_path / "gone")]]
    (moved / "config.yaml").write_text(yaml.safe_dump(config))
    assert validation_of(moved).digest == expected.digest
    del config["data"]["validation"]
    (moved / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="gone"):  # validation would be a share of it
        validation_of(moved)


def test_an_imported_run_is_evaluated_on_data_that_are_named(run: Path, tmp_path: Path) -> None:
    """Its data.train is open."""
    expected = results(evaluate_run(str(run), data=run / "validation", device="cpu"))
    imported = shutil.copytree(run, tmp_path / "imported")
    config = yaml.safe_load((imported / "config.yaml").read_text())
    config["data"]["train"] = "???"
    (imported / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"leaves data\.train open"):
        evaluate_run(str(imported), device="cpu")
    data = run / "validation"
    assert results(evaluate_run(str(imported), data=data, device="cpu")) == expected
    (one,) = extract(str(imported), ["XL"], output=tmp_path / "xl")
    assert results(evaluate_run(str(one.path), data=data, device="cpu")) == expected


def test_a_moved_run_is_to_be_named(run: Path, tmp_path: Path) -> None:
    (one,) = extract(str(run), ["S"], output=tmp_path / "s")
    entry = json.loads((one.path / "submodel.json").read_text())
    (one.path / "submodel.json").write_text(json.dumps({**entry, "run": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="name the run by --run"):
        evaluate_run(str(one.path), device="cpu")
    assert evaluate_run(str(one.path), run=run, device="cpu").results


def test_what_does_not_fit_is_named(run: Path, tmp_path: Path) -> None:
    (one,) = extract(str(run), ["M"], output=tmp_path / "m")
    with pytest.raises(UserError, match=r"wider than|no granularity 'XL'"):
        evaluate_run(str(one.path), ["XL"], device="cpu")
    (fixed,) = extract(str(run), ["M"], output=tmp_path / "hf", format="hf")
    if importlib.util.find_spec("transformers"):
        with pytest.raises(UserError, match=r"submodel 'S' is not in .* which is M alone"):
            evaluate_run(str(fixed.path), ["S"], device="cpu")
        with pytest.raises(UserError, match="leave --heuristic out"):
            evaluate_run(str(fixed.path), heuristic=True, device="cpu")
    with pytest.raises(UserError, match="for extracted models"):
        evaluate_run(str(run), run=run, device="cpu")
    with pytest.raises(UserError, match="covers 2 layers"):
        evaluate_run(str(run), ["S:2"], device="cpu")
    with pytest.raises(UserError, match="no slice '2M'"):
        evaluate_run(str(run), ["2M"], device="cpu")
    shutil.copytree(one.path, tmp_path / "g")
    entry = json.loads((one.path / "submodel.json").read_text())
    (tmp_path / "g" / "submodel.json").write_text(json.dumps({**entry, "format": "gguf"}))
    with pytest.raises(UserError, match="which other programs run"):
        evaluate_run(str(tmp_path / "g"), device="cpu")
