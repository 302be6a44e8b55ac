"""`hf --nested` exports: any submodel of one directory, as transformers with the shipped code runs
it, against the universal model run in place.
"""

from __future__ import annotations

import copy
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from matformer_dist.counting import ffn_matrices
from matformer_dist.errors import UserError
from matformer_dist.inference.generation import Sampling, generate, sample
from matformer_dist.models.matlm import MatLM
from matformer_dist.submodels.extract import extract
from tests.unit.submodels.synthetic_run import (
    NESTING,
    VOCAB,
    model_config,
    random_model,
    small_tokenizer,
    write_run,
)

transformers = pytest.importorskip("transformers")

STARCODER2 = {"ffn": "gelu", "norm": "layernorm"}
LLAMA3_ROPE = {
    "kind": "llama3", "factor": 8.0, "low_freq_factor": 0.2, "high_freq_factor": 2.0,
    "original_max_seq_len": 16,
}  # fmt: skip
ARCHITECTURES = {
    "llama": {},
    "llama-tied-scaled": {
        "tied_embeddings": True, "n_kv_heads": 2, "kv_channels": 12, "rope_scaling": LLAMA3_ROPE,
    },
    "starcoder2": STARCODER2,
    "starcoder2-tied-scaled": {
        **STARCODER2, "tied_embeddings": True, "n_kv_heads": 2,
        "rope_scaling": {"kind": "linear", "factor": 4.0},
    },
}  # fmt: skip
SUBMODELS = ["S", "M", "L", "XL", "S:2,M:1", "XL,S,L"]
Built = tuple[MatLM, Path]


def export(run: Path, submodel: str, output: Path, **options: Any) -> Any:
    (one,) = extract(str(run), [submodel], output=output, format="hf", nested=True, **options)
    return one


def load(path: Path, **settings: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, local_files_only=True, trust_remote_code=True, **settings
    )


@pytest.fixture(scope="module", params=ARCHITECTURES.values(), ids=list(ARCHITECTURES))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A universal model, and the directory of XL taken out of it."""
    directory = tmp_path_factory.mktemp("nested")
    lm = random_model(model_config(rope_theta=3e4, **request.param))
    run = write_run(directory / "run", lm, tensor=2)
    return lm, export(run, "XL", directory / "XL").path


def tokens(sequences: int = 2) -> torch.Tensor:
    return torch.randint(3, VOCAB, (sequences, 19), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def test_logits_match_universal_model_at_every_submodel(built: Built) -> None:
    lm, path = built
    hf, info = load(path, output_loading_info=True)
    assert not any(info.values()), info
    for name in SUBMODELS:
        hf.set_submodel(name)
        submodel = NESTING.parse(name, 3)
        assert hf.submodel == str(submodel)
        expected = lm.logits(tokens(), submodel)
        assert expected.std() > 0.5
        torch.testing.assert_close(logits(hf), expected, rtol=1e-5, atol=1e-5)
        loaded = load(path, submodel=name)
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)


def test_a_smaller_submodel_is_nested_still_and_matches(built: Built, tmp_path: Path) -> None:
    lm, xl = built
    one = export(xl.parent / "run", "S:1,L:1,M:1", tmp_path / "out")
    hf, info = load(one.path, output_loading_info=True)
    assert not any(info.values()), info
    assert hf.submodel == "S:1,L:1,M:1"
    assert sum(p.numel() for p in hf.parameters()) == one.parameters
    for name in ["S:1,L:1,M:1", "S:1,M:1,S:1", "S"]:
        hf.set_submodel(name)
        expected = lm.logits(tokens(), NESTING.parse(name, 3))
        torch.testing.assert_close(logits(hf), expected, rtol=1e-5, atol=1e-5)
    for wider in ("M:1,L:1,M:1", "L"):
        with pytest.raises(ValueError, match=rf"{wider}' is wider than .* holds S:1,L:1,M:1; choo"):
            hf.set_submodel(wider)
    assert hf.submodel == "S"
    hf.set_submodel(None)
    assert hf.submodel == "S:1,L:1,M:1"


def test_the_ways_to_a_submodel_match_its_plain_export(built: Built, tmp_path: Path) -> None:
    _, path = built
    (plain,) = extract(
        str(path.parent / "run"), ["S:2,M:1"], output=tmp_path / "plain", format="hf"
    )
    expected = logits(transformers.AutoModelForCausalLM.from_pretrained(plain.path))
    later = load(path)
    later.set_submodel(["S", "S", "M"])
    models = [load(path, submodel=["S", "S", "M"]), load(path, submodel="S:2,M"), later]
    models.append(later.at("S:2,M:1"))
    for model in models:
        assert model.submodel == "S:2,M:1"
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
        assert logits(model).equal(logits(later))


def test_flops_match_the_formula(built: Built) -> None:
    lm, path = built
    hf = load(path)

    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            logits(hf)
        return counter.get_total_flops()

    whole = flops()
    a_neuron = 2 * ffn_matrices(lm.model) * lm.model.d_model * tokens().numel()
    for name in SUBMODELS:
        hf.set_submodel(name)
        saved = 3 * NESTING.d_ff - sum(NESTING.parse(name, 3).widths)
        assert whole - flops() == a_neuron * saved


def test_assisted_generation_matches_greedy(built: Built) -> None:
    lm, path = built
    model = load(path)
    draft = model.at("S")
    assert (model.submodel, draft.submodel) == ("XL", "S")
    for length in (1, 4, 11):
        prompt = tokens(1)[:, :length]
        settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
        plain = model.generate(prompt, **settings)
        assert model.generate(prompt, assistant_model=draft, **settings).equal(plain)
        (ours,) = generate(
            lm, NESTING.parse("XL", 3), prompt.tolist(), max_new_tokens=30,
            sampling=Sampling(temperature=0),
        )  # fmt: skip
        assert plain[0, length:].tolist() == ours
    assert (model.submodel, draft.submodel) == ("XL", "S")


def test_left_padded_batches_match_ragged_prompts(built: Built) -> None:
    """As pipelines make them of prompts that differ in length."""
    lm, path = built
    model = load(path)
    prompts = [[5, 9, 200, 31], [7], [1, 300, 44, 44, 2, 8, 9]]
    padded = [[0] * (7 - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (7 - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    for name in ("XL", "S:1,L:2", "S"):
        model.set_submodel(name)
        theirs = model.generate(
            torch.tensor(padded), attention_mask=torch.tensor(mask), max_new_tokens=20,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert theirs[:, 7:].tolist() == generate(
            lm, NESTING.parse(name, 3), prompts, max_new_tokens=20,
            sampling=Sampling(temperature=0),
        )  # fmt: skip


@pytest.mark.parametrize("schedule", ["constant", "heuristic", "heuristic_transient"])
def test_assistants_draft_by_any_schedule(built: Built, schedule: str) -> None:
    """Greedily the same text; sampled, by a verifier that draws as transformers does."""
    model = load(built[1])
    settings = {"max_new_tokens": 20, "eos_token_id": None}
    draft = model.at("M")
    draft.generation_config.num_assistant_tokens_schedule = schedule
    draft.generation_config.num_assistant_tokens = 3
    prompt = tokens(1)[:, :5]
    plain = model.generate(prompt, do_sample=False, **settings)
    drafted = model.generate(prompt, do_sample=False, assistant_model=draft, **settings)
    assert drafted.equal(plain)
    sampled = model.generate(prompt, do_sample=True, assistant_model=draft, **settings)
    assert sampled.shape == plain.shape and not sampled.equal(plain)


def test_a_submodel_trains_its_prefix_alone(built: Built) -> None:
    """Also where activations are made again; the gradients are the universal model's."""
    lm, path = built
    ids = tokens()
    scores = lm.logits(ids, NESTING.parse("S:1,M:2", 3))[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(scores, ids[:, 1:].flatten())
    (of_embedding,) = torch.autograd.grad(expected, [lm.embedding.weight])
    for again in (False, True):
        model = load(path, submodel="S:1,M:2").train()
        if again:
            model.gradient_checkpointing_enable()
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        embedding = model.get_input_embeddings().weight.grad
        torch.testing.assert_close(embedding, of_embedding, rtol=1e-4, atol=1e-5)
        for layer, m in zip(model.model.layers, (8, 16, 16), strict=True):
            first = next(w for name, w in layer.mlp.named_parameters() if name.endswith("weight"))
            assert first.grad[:m].ne(0).any() and first.grad[m:].eq(0).all()


def test_another_submodel_shares_every_parameter(built: Built) -> None:
    model = load(built[1])
    draft = model.at("S")
    own, others = dict(model.named_parameters()), dict(draft.named_parameters())
    assert own.keys() == others.keys()
    assert all(own[name] is others[name] for name in own)
    states = model.state_dict(), draft.state_dict()
    assert all(states[0][name].data_ptr() == states[1][name].data_ptr() for name in states[0])
    model.train()
    assert not draft.training and not any(m.training for m in draft.model.layers.modules())
    draft.to(torch.float64)  # moves buffers too, or products of two dtypes would fail
    expected = logits(load(built[1], dtype=torch.float64))
    torch.testing.assert_close(logits(model.eval()), expected, rtol=1e-5, atol=1e-5)
    model.to("meta")
    devices = {tensor.device.type for m in (model, draft) for tensor in m.model.buffers()}
    assert devices == {"meta"}


def test_copies_and_pickles_stand_alone(built: Built) -> None:
    model = load(built[1], submodel="M")
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.submodel == "M" and logits(other).equal(expected)
        assert other.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()
        other.set_submodel("S")
    assert model.submodel == "M" and logits(model).equal(expected)


def test_a_saved_model_keeps_its_submodel(built: Built, tmp_path: Path) -> None:
    model = load(built[1])
    model.at(["S", "M", "M"]).save_pretrained(tmp_path / "saved")
    saved, info = load(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    assert saved.submodel == "S:1,M:2"
    assert logits(saved).equal(logits(model.at("S:1,M:2")))
    saved.set_submodel(None)
    assert logits(saved).equal(logits(model))


@pytest.mark.parametrize(
    ("submodel", "message"),
    [
        ("Q", r"submodel 'Q': there is no granularity 'Q' here; the names are S, M, L, XL"),
        (["S", "M", 3], r"there is no granularity 3 here"),
        (3, r"submodel 3: there is no granularity 3 here"),
        (["S", "M"], r"\['S', 'M'\] covers 2 layers, the model has 3; give a name for all layers"),
        (["S"], r"\['S'\] covers 1 layers"),
        ("S:2,M:99", r"submodel 'S:2,M:99' covers 101 layers, the model has 3"),
        ("S:2,M:x", r"'M:x' needs a whole number of layers above 0 behind the colon"),
        ("S:0,M:3", r"'S:0' needs a whole number"),
        ("", r"there is no granularity ''"),
    ],
)
def test_submodels_that_do_not_fit_are_refused(built: Built, submodel: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(built[1], submodel=submodel)
    model = load(built[1], submodel="M")
    for change in (model.set_submodel, model.at):
        with pytest.raises(ValueError, match=message):
            change(submodel)
    assert model.submodel == "M"


def test_a_narrow_submodel_is_refused_where_layers_were_replaced(built: Built) -> None:
    class Adapted(torch.nn.Linear):
        pass

    model = load(built[1])
    mlp = model.model.layers[1].mlp
    name = next(name for name, _ in mlp.named_children() if name.endswith("proj"))
    getattr(mlp, name).__class__ = Adapted
    logits(model)
    model.set_submodel("S")
    with pytest.raises(TypeError, match="narrower than the weights cannot run through a Adapted"):
        logits(model)


def test_generate_runs_no_code_of_the_directory(built: Built, tmp_path: Path) -> None:
    lm, path = built
    one = export(path.parent / "run", "S:2,L:1", tmp_path / "out")
    for code in one.path.glob("*.py"):
        code.write_text("raise AssertionError('code of the directory ran')")
    prompt = small_tokenizer().encode("def tot")
    (ours,) = generate(
        lm, NESTING.parse("S:2,L:1", 3), [prompt], max_new_tokens=24,
        sampling=Sampling(temperature=0),
    )  # fmt: skip
    text = sample(one.path, "def tot", max_new_tokens=24, temperature=0, device="cpu").text
    assert text == small_tokenizer().decode([*prompt, *ours])[len("def tot") :]


def test_lm_evals_model_takes_a_submodel(built: Built) -> None:
    api = pytest.importorskip("lm_eval.api.instance")
    pytest.importorskip("accelerate")  # which its `hf` model wants
    models = pytest.importorskip("lm_eval.models.huggingface")

    lm, path = built
    harness = models.HFLM(str(path), device="cpu", trust_remote_code=True, submodel="S:2,M:1")
    request = api.Instance("loglikelihood", {}, ("def total(", "numbers):"), 0)
    ((actual, _),) = harness.loglikelihood([request])
    before, whole = (
        small_tokenizer().encode(text) for text in ("def total(", "def total(numbers):")
    )
    scores = lm.logits(torch.tensor([whole]), NESTING.parse("S:2,M:1", 3))[0].log_softmax(-1)
    expected = sum(scores[i - 1, whole[i]].item() for i in range(len(before), len(whole)))
    assert whole[: len(before)] == before and abs(actual - expected) < 1e-4


def test_directory_says_what_it_holds(built: Built, tmp_path: Path) -> None:
    one = export(built[1].parent / "run", "M:2,S:1", tmp_path / "out", dtype="bf16")
    entry = json.loads((one.path / "submodel.json").read_text())
    assert entry["nested"] and not entry["sparse"] and entry["padded_width"] is None
    config = json.loads((one.path / "config.json").read_text())
    assert config["nesting"] == {"widths": [8, 16], "names": ["S", "M"]}
    assert (config["granularities"], config["submodel"]) == (["M", "M", "S"], "M:2,S:1")
    assert config["intermediate_size"] == 16
    for code in one.path.glob("*.py"):
        needed = {*transformers.dynamic_module_utils.get_imports(code)} - {*sys.stdlib_module_names}
        assert needed <= {"torch", "transformers"}
    card = (one.path / "README.md").read_text()
    assert 'submodel="S"' in card and "the names are S, M." in card
    model = load(one.path)
    assert model.dtype == torch.bfloat16 and model.config.model_type.startswith("matformer-")
    assert sum(p.numel() for p in model.parameters()) == one.parameters


def test_models_that_transformers_has_not_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", random_model(model_config(norm="layernorm")))
    with pytest.raises(UserError, match=r"no architecture with model.ffn swiglu .*native"):
        export(run, "M", tmp_path / "out")
    assert not (tmp_path / "out").exists()
