"""Which tasks there are, what is said where their data are missing, and the whole command."""

from __future__ import annotations

import json
import math
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from matformer_dist.cli import app
from matformer_dist.errors import UserError
from matformer_dist.submodels.extract import extract
from tests.unit.evaluation import paper_rows
from tests.unit.submodels.synthetic_run import model_config, random_model, write_run

pytest.importorskip("lm_eval")

import datasets
import huggingface_hub
from huggingface_hub import constants
from lm_eval.api import metrics
from lm_eval.tasks import TaskManager

from matformer_dist.data.corpus import find_files
from matformer_dist.evaluation.downstream import bootstrap, paper_data, stdlib_data
from matformer_dist.evaluation.downstream.held_out import HELD_OUT
from matformer_dist.evaluation.downstream.quiet import quiet
from matformer_dist.evaluation.downstream.run import evaluate_tasks
from matformer_dist.evaluation.downstream.task_loading import TASKS, load_tasks

CONTEXT = 256
STORY_FILES = (
    "cloze_test_val__spring2016 - cloze_test_ALL_val.csv",
    "cloze_test_test__spring2016 - cloze_test_ALL_test.csv",
)
STORY_COLUMNS = (
    "InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4,"
    "RandomFifthSentenceQuiz1,RandomFifthSentenceQuiz2,AnswerRightEnding\n"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    return write_run(folder / "run", random_model(model_config(max_seq_len=CONTEXT)))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.utils, "get_session", refuse)


@pytest.fixture(scope="module")
def lm_evals() -> dict[str, Any]:
    """The index of lm-eval's own tasks."""
    with quiet():
        return dict(TaskManager().task_index)


def test_the_papers_group_names_25_tasks_that_exist(lm_evals: dict[str, Any]) -> None:
    group = yaml.safe_load((TASKS / "matformer_paper.yaml").read_text())
    names = [item if isinstance(item, str) else item["task"] for item in group["task"]]
    ours = {"race_middle", "record_em", "storycloze_by_hand", "webqs_examples"}
    assert len(set(names)) == 25 and {*names} - ours <= {*lm_evals}
    assert {*group["metadata"]["metrics"]} == {*names}
    assert group["num_fewshot"] == 1
    known = TaskManager(include_path=str(TASKS), include_defaults=False).all_tasks
    assert {*known} == ours | {"matformer_paper", "stdlib", "stdlib_cloze", "stdlib_choice"}
    assert not {*lm_evals} & {*known}  # none is hidden by ours


def test_the_papers_metrics_are_those_of_its_tasks(lm_evals: dict[str, Any]) -> None:
    ours = TaskManager(include_path=str(TASKS), include_defaults=False).task_index
    index = {**lm_evals, **ours}
    metrics = yaml.safe_load((TASKS / "matformer_paper.yaml").read_text())["metadata"]["metrics"]
    for name, metric in metrics.items():
        config = index[name].cfg
        filters = [one["name"] for one in config.get("filter_list", [{"name": "none"}])]
        wanted, _, kind = metric.partition(",")
        assert wanted in [one["metric"] for one in config["metric_list"]], name
        assert (kind or "none") in filters, name


def test_items_are_as_they_should_be_and_repeat() -> None:
    clozes = stdlib_data.cloze()["test"].to_list()
    assert len(clozes) == 300 and len({item["text"] for item in clozes}) == 300
    for item in clozes:
        word = item["target"].removeprefix(" ")
        assert word.isidentifier() and item["text"].count(word) >= 3 and len(item["text"]) <= 360
        assert item["target"][0] == " " or item["text"][-1] == "("
    assert max(Counter(item["target"].strip() for item in clozes).values()) <= 25
    choices = stdlib_data.choice()["test"].to_list()
    assert len(choices) == 200 and {item["label"] for item in choices} == {0, 1, 2, 3}
    texts = dict(stdlib_data._sources())
    for item in choices:
        assert len({*item["choices"]}) == 4
        assert len({tuple(sorted(one.split("\n"))) for one in item["choices"]}) == 1
        name, _, line = item["source"].partition(":")
        rest = " ".join("\n".join(texts[name].splitlines()[int(line) - 1 :]).split())
        own = " ".join((item["text"] + item["choices"][item["label"]]).split())
        assert rest.startswith(own)
    stdlib_data._sources.cache_clear()
    assert stdlib_data.choice()["test"].to_list() == choices
    assert stdlib_data.cloze()["test"].to_list() == clozes


def test_what_is_held_out_is_in_no_corpus_of_the_demo(tmp_path: Path) -> None:
    for name in HELD_OUT:
        file = tmp_path / (name if name.endswith(".py") else f"{name}/topics.py")
        file.parent.mkdir(exist_ok=True)
        file.write_text("x = 1\n")
    (tmp_path / "json.py").write_text("x = 1\n")
    found = [Path(file.path).name for file in find_files([tmp_path], ["*.py"], HELD_OUT)]
    assert found == ["json.py"]


def test_a_library_without_its_source_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    stdlib_data._sources.cache_clear()
    with pytest.raises(UserError, match=r"stdlib need the source .* lacks .*calendar\.py"):
        load_tasks(["stdlib_choice"])
    stdlib_data._sources.cache_clear()


@pytest.mark.usefixtures("no_network")
def test_all_tasks_without_data_are_named_at_once() -> None:
    begun = time.monotonic()
    with quiet(), pytest.raises(UserError) as caught:
        load_tasks(["piqa", "storycloze_by_hand", "stdlib_cloze"])
    assert time.monotonic() - begun < 30  # its index alone takes lm-eval seconds
    said = str(caught.value)
    assert (
        f"{constants.ENDPOINT} does not answer, and the data of these tasks cannot be had" in said
    )
    assert "piqa (baber/piqa)" in said and "--skip-missing" in said
    assert "storycloze_by_hand (StoryCloze's data come on request" in said
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


@pytest.mark.usefixtures("no_network")
def test_the_rest_of_a_group_runs_with_its_settings(tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text(
        "group: mine\nnum_fewshot: 2\ntask:\n"
        "  - {task: stdlib_cloze, repeats: 3, doc_to_text: !function ours.text}\n  - absent\n"
        "aggregate_metric_list: [{metric: acc}]\n"
    )
    (tmp_path / "ours.py").write_text("def text(doc):\n    return doc['text'].upper()\n")
    (tmp_path / "t.yaml").write_text("task: absent\ndataset_path: nobody/nothing\n")
    with quiet():
        loaded = load_tasks(["mine"], include=tmp_path, skip_missing=True)
        whole = load_tasks(["stdlib"])
    assert [*loaded.tasks] == ["stdlib_cloze"] and not loaded.groups
    task = loaded.tasks["stdlib_cloze"]
    assert task.doc_to_text({"text": "x"}) == "X"
    config = task.config
    assert (config.num_fewshot, config.repeats) == (2, 3)
    assert [*loaded.missing] == ["absent"] and "nobody/nothing" in loaded.missing["absent"]
    assert [*whole.groups] == ["stdlib"] and not whole.missing


def _story(number: int) -> str:
    sentences = ",".join(f"Sentence {i} of {number}." for i in range(1, 5))
    return f"id{number},{sentences},Right.,Wrong.,{1 + number % 2}\n"


def test_story_cloze_is_read_from_its_files(tmp_path: Path) -> None:
    for name in STORY_FILES:
        (tmp_path / name).write_text(STORY_COLUMNS + "".join(map(_story, range(3))))
    with quiet():
        loaded = load_tasks(["storycloze_by_hand"], metadata={"storycloze_dir": str(tmp_path)})
    task = loaded.tasks["storycloze_by_hand"]
    docs = list(task.test_docs())
    assert task.doc_to_text(docs[1]) == " ".join(f"Sentence {i} of 1." for i in range(1, 5))
    assert [task.doc_to_target(doc) for doc in docs] == [0, 1, 0]
    assert task.doc_to_choice(docs[0]) == ["Right.", "Wrong."]
    (tmp_path / STORY_FILES[0]).write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no file of Story Cloze 2016"):
        paper_data.storycloze(str(tmp_path))


def test_race_middle_asks_the_last_question_of_an_article() -> None:
    pytest.importorskip("lm_eval.tasks.race.preprocess_race")
    from lm_eval.tasks.race import preprocess_race

    questions = datasets.Dataset.from_list(
        [
            {"article": article, "question": f"Q{i}?", "answer": "B", "options": list("wxyz")}
            for article, count in (("First.", 2), ("Second.", 1))
            for i in range(count)
        ]
    )
    docs = paper_data.group_by_article(questions)
    texts = [preprocess_race.doc_to_text(doc) for doc in docs]
    assert texts == [
        "Article: First.\n\nQuestion: Q0?\nAnswer: x\nQ1?", "Article: Second.\n\nQ0?",
    ]  # fmt: skip
    assert preprocess_race.doc_to_target(docs[0]) == 1
    assert preprocess_race.doc_to_choice(docs[1]) == list("wxyz")


def test_record_takes_the_likeliest_entity() -> None:
    rows = datasets.Dataset.from_list(
        [
            {
                "passage": "Ann met Bo.\n@highlight\nThey talked\n@highlight\nFor hours",
                "query": "@placeholder was late",
                "entities": ["Bo", "the Ann.", "Bo"],
                "answers": ["Ann", "Ann"],
            }
        ]
    )
    (doc,) = paper_data.distinct_entities(rows)
    assert doc["entities"] == ["Bo", "the Ann."]
    assert paper_data.record_text(doc) == "Ann met Bo.\n\n  - They talked.\n  - For hours.\n"
    assert paper_data.record_choices(doc) == ["  - Bo was late", "  - the Ann. was late"]
    assert paper_data.record_target(doc) == "  - Ann was late"
    assert paper_data.record_match(doc, [(-2.0, False), (-1.0, False)]) == {"em": 1.0}
    assert paper_data.record_match(doc, [(-1.0, False), (-2.0, True)]) == {"em": 0.0}


def test_bootstrapped_errors_match_lm_evals() -> None:
    rng = np.random.default_rng(5)
    values = list(-rng.exponential(2.0, 60))
    with quiet():
        expected = metrics._bootstrap_internal_no_mp(metrics.perplexity, values, 4000)
    with bootstrap.in_this_process():
        stderr_of = metrics.stderr_for_metric(metrics.perplexity, 4000)
        assert stderr_of is not None
        found = stderr_of(values)
    assert found == pytest.approx(np.std(expected), rel=0.08)  # five times what 4000 leave open


@pytest.mark.filterwarnings("ignore:F-score is ill-defined")
def test_the_papers_group_runs_one_shot_and_gives_the_mean_of_25(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", paper_rows.load_dataset)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the hub is not asked for
    for name in STORY_FILES:
        (tmp_path / name).write_text(STORY_COLUMNS + "".join(map(_story, range(3))))
    run = write_run(tmp_path / "run", random_model(model_config(max_seq_len=512)))
    content = evaluate_tasks(
        str(run), ["matformer_paper"], ["S", "XL"], storycloze=tmp_path, limit=2
    ).content
    metrics = yaml.safe_load((TASKS / "matformer_paper.yaml").read_text())["metadata"]["metrics"]
    assert {*content["tasks"]} == {*metrics} and not content["missing"]
    assert {task["num_fewshot"] for task in content["tasks"].values()} == {1}
    for submodel in ("S", "XL"):
        average = content["groups"]["matformer_paper"]["results"][submodel]["average"]
        of = [content["tasks"][name]["results"][submodel][key] for name, key in metrics.items()]
        assert len(of) == 25
        assert average["value"] == pytest.approx(np.mean([one["value"] for one in of]))
        squares = np.sum([one["stderr"] ** 2 for one in of])
        assert average["stderr"] == pytest.approx(np.sqrt(squares) / 25)
        assert 0 < average["value"] < 1


def _evaluate(*words: object) -> Any:
    return CliRunner().invoke(app, ["evaluate", *map(str, words)], catch_exceptions=True)


def test_the_command_writes_and_prints_every_submodel(run: Path) -> None:
    done = _evaluate(run, "--tasks", "stdlib", "--limit", 6)
    assert done.exit_code == 0, done.output
    content = json.loads((run / "downstream.json").read_text())
    assert content["submodels"] == ["S", "M", "L", "XL"] and content["step"] == 5
    assert content["versions"]["lm_eval"] and content["versions"]["python"]
    assert {*content["tasks"]} == {"stdlib_cloze", "stdlib_choice"}
    choice = content["tasks"]["stdlib_choice"]
    assert choice["documents"] == 6 and choice["num_fewshot"] == 0
    assert len(choice["requests_sha256"]) == 64
    for submodel, group in content["groups"]["stdlib"]["results"].items():
        parts = [task["results"][submodel]["acc"] for task in content["tasks"].values()]
        assert group["acc"]["value"] == pytest.approx(sum(one["value"] for one in parts) / 2)
        assert parts[1]["stderr"] == pytest.approx(
            math.sqrt(parts[1]["value"] * (1 - parts[1]["value"]) / 5)
        )
    perplexities = content["tasks"]["stdlib_cloze"]["results"].values()
    assert len({one["perplexity"]["value"] for one in perplexities}) == 4
    words = Counter(done.output.split())
    assert words["stdlib_choice"] == 1 and "bootstrapping" not in done.output
    assert f"written to {run / 'downstream.json'}" in done.output


def test_an_extracted_model_gives_the_runs_numbers(run: Path, tmp_path: Path) -> None:
    (one,) = extract(str(run), ["S:1,L:2"], output=tmp_path / "model", format="native")
    file = tmp_path / "out.json"
    before = sorted(one.path.iterdir())
    own = evaluate_tasks(str(one.path), ["stdlib_cloze"], limit=5, num_fewshot=1, output=file)
    assert own.submodels == ["S", "S:1,L:2"] and own.file == file
    assert sorted(one.path.iterdir()) == before
    of_run = evaluate_tasks(
        str(run), ["stdlib_cloze"], ["S", "S:1,L:2"], limit=5, num_fewshot=1, output=file
    )
    tasks = [one.content["tasks"]["stdlib_cloze"] for one in (own, of_run)]
    assert tasks[0]["num_fewshot"] == 1
    assert tasks[0]["requests_sha256"] == tasks[1]["requests_sha256"]
    for submodel in own.submodels:
        values = [task["results"][submodel]["perplexity"]["value"] for task in tasks]
        assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--limit", 3], "--limit is for --tasks"),
        (["--skip-missing"], "--skip-missing is for --tasks"),
        (["--tasks", "stdlib", "--heuristic"], "--heuristic is for validation losses"),
        (["--tasks", "stdlib", "--part", "1/2"], "--part is for validation losses"),
        (["--tasks", "stdlib,"], "--tasks 'stdlib,' must be items"),
        (["--tasks", "hellaswg"], "there is no task 'hellaswg'; did you mean hellaswag"),
        (["--tasks", "stdlib", "--submodel", "S:9"], "S:9"),
        (["--tasks", "stdlib", "--include-path", "/absent"], "there is no folder /absent"),
        (
            ["--tasks", "stdlib", "--output", "/absent/x.json"],
            "--output /absent/x.json has no folder",
        ),
    ],
)
def test_bad_options(run: Path, words: list[object], says: str) -> None:
    done = _evaluate(run, *words)
    assert isinstance(done.exception, UserError)
    assert says in str(done.exception)


def test_generation_that_cannot_fit_is_told_before_anything_runs(run: Path, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(
        "task: long_answers\noutput_type: generate_until\ntest_split: test\n"
        "custom_dataset: !function matformer_dist.evaluation.downstream.stdlib_data.cloze\n"
        "doc_to_text: text\ndoc_to_target: target\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 256}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    with pytest.raises(UserError, match=r"task long_answers: .*max_gen_toks 256 .*context of 256"):
        evaluate_tasks(str(run), ["long_answers"], include=tmp_path)


def test_lm_eval_missing_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith(("lm_eval", "matformer_dist.evaluation.downstream.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install matformer-dist\[eval\]"):
        evaluate_tasks(str(run), ["stdlib"])
