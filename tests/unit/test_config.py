from __future__ import annotations

from pathlib import Path

import pytest

from matformer_dist.config import Config
from matformer_dist.config_file import load_config
from matformer_dist.config_language import LanguageConfig
from matformer_dist.config_vision import VisionConfig
from matformer_dist.errors import UserError

MINIMAL = """
run: {dir: runs/x}
model: {d_model: 64, n_layers: 2, n_heads: 4, d_ff: 256}
data: {train: [[1, corpus]], tokenizer: t.model}
training: {steps: 3, seq_len: 32, micro_batch_size: 2, global_batch_size: 4}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(MINIMAL)
    return file


def test_overrides_and_yaml_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(
        path,
        [
            "training.steps=7",
            "nesting.widths=[64,256]",
            "deepspeed.zero_optimization.stage=2",
            "optimizer.lr=1e-3",
            "checkpoint.resume=never",
        ],
    )
    assert config.training.total_steps == 7
    assert config.granularities.widths == (64, 256)
    assert config.deepspeed == {"zero_optimization": {"stage": 2}}
    assert config.optimizer.lr == 1e-3
    written = tmp_path / "again.yaml"
    written.write_text(config.to_yaml())
    assert load_config(written) == config


def test_tokens_become_steps(path: Path) -> None:
    config = load_config(path, ["training.steps=null", "training.tokens=1000"])
    assert config.training.total_steps == 8  # of 4 x 32 tokens


def test_granularities_default_to_the_papers(path: Path) -> None:
    assert load_config(path).granularities.widths == (32, 64, 128, 256)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.stepz=5", "unknown key training.stepz; did you mean training.steps"),
        ("trainig.steps=5", "unknown key trainig; did you mean training"),
        ("parallel.sequence=1", "parallel.sequence is 1: input should be a valid boolean"),
        ("data.prefetch=4096", "data.prefetch is 4096: input should be less than or equal to 1024"),
        ("data.workers=1000", "data.workers is 1000: input should be less than or equal to 256"),
        ("deepspeed.zero_optimization=3", "zero_optimization is 3; it must hold keys"),
        ("deepspeed.zero_optimization.stage=4", "stage is 4; it must be 0, 1, 2 or 3"),
        ("deepspeed.zero_optimization.stage=true", "stage is True; it must be 0, 1, 2 or 3"),
        ("model.ffn=relu", "model.ffn is 'relu': input should be 'swiglu' or 'gelu'"),
        ("model.d_model=none", "model.d_model is 'none'"),
        ("model.d_model=-64", "model.d_model is -64: input should be greater than 0"),
        ("model.d_model=62", "head size"),
        ("model.n_kv_heads=3", "multiple of model.n_kv_heads 3"),
        ("parallel.tensor=3", "n_heads 4 does not divide over parallel.tensor 3"),
        ("model.d_ff=257", "not a whole number"),
        ("nesting.fractions=[1/3,1]", "not a whole number"),
        ("nesting.widths=[64]", "must end with model.d_ff, which is 256"),
        ("nesting.widths=[256,64,256]", "strictly increasing"),
        ("nesting.names=[A]", "must be 4 different names"),
        ("objective.probabilities={S: 1}", "every granularity once: S, M, L, XL"),
        ("objective.probabilities={S: 1,M: 1,L: 0,XL: 0}", "sum to 2; they must sum to 1"),
        ("objective.weights={S: 1,M: 0,L: 0,XL: 0}", "set objective.probabilities"),
        ("objective.distillation=1", "XL to see the same tokens"),
        ("objective.kind=both", "objective.kind is 'both'"),
        ("training.tokens=100", "exactly one of training.steps and training.tokens"),
        ("training.steps=null", "exactly one of training.steps and training.tokens"),
        ("training.global_batch_size=3", "multiple of training.micro_batch_size 2"),
        ("training.seq_len=4096", "longer than model.max_seq_len"),
        ("evaluation.submodels=[S:1]", "evaluation.submodels: submodel 'S:1' covers 1 layers"),
        ("evaluation.submodels=['S:99999999999999']", "needs a whole number of layers"),
        ("evaluation.submodels=['S:999999999']", "covers 999999999 layers"),
        ("evaluation.submodels=[Q]", "evaluation.submodels: there is no granularity 'Q'"),
        ("training.steps='???'", "training.steps"),
        ("training.steps=true", "training.steps is True"),
        (f"training.steps={10**23}", "training.steps makes more than 1.15e+18 tokens in all"),
        (f"training.steps={10**400}", "training.steps makes more than"),
        ("training.steps='7'", "training.steps is '7'"),
        ("optimizer.lr=true", "optimizer.lr is True"),
        ("nesting.fractions=[]", "must be above 0 and end with 1"),
        ("schedule.min_lr=1", "schedule.min_lr 1 is above optimizer.lr 0.0003"),
        ("data.split=[100,0]", "data.split is [100.0, 0.0]"),
        ("data.train.0=[2,b]", "a list is overridden whole"),
        ("optimizer.lr=nan", "optimizer.lr is"),
        ("data.train=[]", "data.train"),
        ("steps=4", "section.key=value"),
        ("training.steps", "section.key=value"),
        ("parallel.tensor=[", "overrides"),
        ("run=3", "section.key=value"),
    ],
)
def test_a_mistake_is_one_clear_message(path: Path, override: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(path, [override])
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_undividable_d_ff_and_rings_name_what_works(path: Path) -> None:
    with pytest.raises(UserError, match=r"model.d_ff 255 does not divide .* nearest that does is"):
        load_config(
            path,
            ["model.d_ff=255", "nesting.widths=[51,255]", "parallel.tensor=2"],
        )
    with pytest.raises(UserError, match=r"nearest widths that do are \[100, 256\]"):
        load_config(path, ["nesting.widths=[99,256]", "parallel.tensor=4"])


@pytest.mark.parametrize(
    "text", ["", "just words", "[1, 2]", "a: [", "model: 3", "\x00", "run: {dir: x}\nmodel:\n"]
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match="config"):
        load_config(file)


@pytest.mark.parametrize(
    ("task", "override", "says"),
    [
        ("[vision]", "model.patch_size=2", "task is .'vision'.; it must be one of language, vis"),
        ("vision", "model.preset=[1]", "model.preset .1. is unknown; there are tiny, Ti/16, S/16"),
        ("vision", "model.preset=null", "^[^\n]*model.d_model is not set[^\n]*\n[^\n]*n_heads"),
    ],
)
def test_tasks_and_presets_are_names(path: Path, task: str, override: str, says: str) -> None:
    path.write_text(
        f"task: {task}\nrun: {{dir: x}}\nmodel: {{preset: tiny, n_layers: 2, d_ff: 64}}\n"
        "data: {train: digits}\n"
        "training: {steps: 3, micro_batch_size: 2, global_batch_size: 4}\n"
    )
    with pytest.raises(UserError, match=says) as error:
        load_config(path, [override])
    assert "unknown key" not in str(error.value)


def test_a_missing_file_and_key_are_named(tmp_path: Path, path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the config file"):
        load_config(tmp_path / "absent.yaml")
    path.write_text(MINIMAL.replace("d_ff: 256", ""))
    with pytest.raises(UserError, match=r"model.d_ff is not set"):
        load_config(path)


def test_a_value_left_open_is_asked_for_once(path: Path) -> None:
    path.write_text(MINIMAL.replace("d_ff: 256", 'd_ff: "???"'))
    with pytest.raises(UserError) as error:
        load_config(path)
    said = f"the config file {path} leaves model.d_ff open (???); write a value there"
    assert str(error.value) == said, "where no override can be given, none is advised"
    with pytest.raises(UserError) as error:
        load_config(path, [])
    assert str(error.value) == f"{said}, or give it as an override, model.d_ff=..."
    assert load_config(path, ["model.d_ff=64"]).model.d_ff == 64


@pytest.mark.parametrize("of_task", [LanguageConfig, VisionConfig])
def test_every_section_forbids_unknown_keys(of_task: type[Config]) -> None:
    for name, field in of_task.model_fields.items():
        section = field.annotation
        if name not in ("deepspeed", "task"):
            assert section.model_config["extra"] == "forbid"  # type: ignore[union-attr]


def test_a_key_that_stands_for_others_is_known(path: Path) -> None:
    path.write_text("task: vision\nmodel: {presett: tiny}\n")
    with pytest.raises(UserError, match=r"unknown key model.presett; did you mean model.preset\?"):
        load_config(path)
