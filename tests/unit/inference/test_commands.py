"""`matformer generate` and `matformer speculate` on a run, and the same from Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from matformer_dist import cli
from matformer_dist.data.prepare import prepare_data
from matformer_dist.errors import UserError
from matformer_dist.inference.generation import Sampling, generate, sample
from matformer_dist.inference.loading import load_language_model
from matformer_dist.models.matlm import MatLM
from matformer_dist.submodels.extract import extract
from tests.unit.submodels.synthetic_run import (
    NESTING,
    TEXT,
    model_config,
    random_model,
    small_tokenizer,
    write_run,
)

PROMPTS = ["def total", "", "return sum(numbers)"]
SUBMODELS = ["S", "XL", "S:1,L:2"]


@pytest.fixture(scope="module")
def lm() -> MatLM:
    return random_model(model_config(n_kv_heads=2))


@pytest.fixture(scope="module")
def run(lm: MatLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("commands") / "run", lm)


def invoke(*words: object) -> tuple[str, str]:
    """What a command prints: to the screen, and beside it."""
    done = CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout, done.stderr


def expected_texts(lm: MatLM, new: int) -> list[str]:
    """Each prompt alone, by its submodel, greedily."""
    tokenizer = small_tokenizer()
    texts = []
    for prompt, notation in zip(PROMPTS, SUBMODELS, strict=True):
        ids = tokenizer.encode(prompt) or [tokenizer.eod]
        (row,) = generate(
            lm, NESTING.parse(notation, 3), [ids], max_new_tokens=new,
            sampling=Sampling(temperature=0), eod=tokenizer.eod,
        )  # fmt: skip
        texts.append(tokenizer.decode([*ids, *row])[len(tokenizer.decode(ids)) :])
    return texts


def options(name: str, values: list[str]) -> list[str]:
    return [word for value in values for word in (f"--{name}", value)]


def test_generate_matches_each_prompt_alone(lm: MatLM, run: Path) -> None:
    limits = ["--max-new-tokens", 20, "--temperature", 0]
    asked = [*options("prompt", PROMPTS), *options("submodel", SUBMODELS)]
    shown, _ = invoke("generate", f"{run}@5", *asked, *limits)
    texts = expected_texts(lm, 20)
    blocks = [
        f"--- {notation}\n{prompt}{text}\n"
        for notation, prompt, text in zip(SUBMODELS, PROMPTS, texts, strict=True)
    ]
    assert shown == "".join(blocks)
    assert load_language_model(run).generate(
        PROMPTS, SUBMODELS, max_new_tokens=20, temperature=0
    ) == texts  # fmt: skip
    alone, _ = invoke("generate", run, *options("prompt", PROMPTS[:1]), *limits, "--submodel", "S")
    assert alone == f"{PROMPTS[0]}{texts[0]}\n"
    whole, _ = invoke("generate", run, *limits)
    assert whole == f"{texts[1]}\n"


def test_drafts_change_no_text(run: Path) -> None:
    words = ["generate", run, *options("prompt", PROMPTS), "--max-new-tokens", 20]
    plain, silence = invoke(*words, "--temperature", 0)
    drafted, told = invoke(
        *words, "--temperature", 0, "--draft", "S", "--draft-tokens", "auto", "--draft-cache", "own"
    )
    assert drafted == plain and silence == ""
    assert told.startswith("S drafted ") and "tokens a verify" in told


def test_an_extracted_model_drafts_too(run: Path, tmp_path: Path) -> None:
    """It is nested still."""
    (one,) = extract(str(run), ["S:1,L:2"], output=tmp_path / "native", format="native")
    loaded = load_language_model(one.path)
    texts = loaded.generate(PROMPTS, max_new_tokens=9, temperature=0, draft="S", draft_tokens=2)
    assert texts == load_language_model(run).generate(
        PROMPTS, "S:1,L:2", max_new_tokens=9, temperature=0
    )
    with pytest.raises(UserError, match="submodel 'L' is wider"):
        loaded.generate(PROMPTS, "L")


def test_hf_models_answer_prompt_after_prompt(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (one,) = extract(str(run), ["L"], output=tmp_path / "hf", format="hf")
    limits = ["--max-new-tokens", 9, "--temperature", 0.8]
    shown, _ = invoke("generate", one.path, *options("prompt", PROMPTS), *limits)
    ours, _ = invoke("generate", run, "--submodel", "L", *options("prompt", PROMPTS), *limits)
    assert shown == ours
    with pytest.raises(UserError, match=r"submodel 'S' is not in .*, which is L alone"):
        invoke("generate", one.path, "--submodel", "S")
    with pytest.raises(UserError, match="of which nothing drafts here; leave --draft S out"):
        invoke("generate", one.path, "--draft", "S")


def test_nested_hf_models_answer_each_prompt_by_its_submodel(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (one,) = extract(str(run), ["XL"], output=tmp_path / "hf", format="hf", nested=True)
    asked = [*options("prompt", PROMPTS), *options("submodel", SUBMODELS), "--temperature", 0]
    # The same prompt twice: the second must not go on from what the first submodel has read.
    asked += [*options("prompt", PROMPTS[:1]), "--submodel", "M", "--max-new-tokens", 20]
    shown, _ = invoke("generate", one.path, *asked)
    ours, _ = invoke("generate", run, *asked)
    assert shown == ours
    # The second goes on from the very tokens that the first has read, by another submodel.
    pairs = [("def total", "def total(numbers"), ("return", "return sum"), ("x", "x y z")]
    for pair in pairs:
        asked = [*options("prompt", list(pair)), *options("submodel", ["S", "XL"])]
        asked += ["--temperature", 0, "--max-new-tokens", 1]
        assert invoke("generate", one.path, *asked) == invoke("generate", run, *asked)
    (small,) = extract(str(run), ["M"], output=tmp_path / "m", format="hf", nested=True)
    with pytest.raises(UserError, match="submodel 'L' is wider than"):
        invoke("generate", small.path, "--submodel", "L")
    with pytest.raises(UserError, match="2 submodels were given for 1 prompts"):
        invoke("generate", small.path, "--submodel", "S", "--submodel", "M")


@pytest.mark.parametrize(
    "words", [["generate"], ["speculate"], ["evaluate"], ["evaluate", "--tasks", "stdlib"]]
)
def test_devices_that_are_not_there_are_named(run: Path, words: list[str]) -> None:
    command, *more = words
    with pytest.raises(UserError, match="--device 'tpu' must be cpu, cuda or cuda:N"):
        invoke(command, run, *more, "--device", "tpu")


def test_sample_takes_runs(run: Path) -> None:
    text = sample(run, "def", max_new_tokens=8, temperature=0, device="cpu").text
    assert [text] == load_language_model(run).generate(["def"], max_new_tokens=8, temperature=0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--submodel", "Q"], "there is no granularity 'Q'"),
        (["--submodel", "S", "--submodel", "M"], "2 submodels were given for 1 prompts"),
        (["--draft", "XL"], "submodel XL cannot draft for itself"),
        (["--submodel", "S", "--draft", "M"], "submodel M cannot draft for S: it is wider"),
        (["--draft", "S", "--draft-tokens", "0"], "--draft-tokens '0' must be a number from 1 on"),
        (["--draft", "S", "--draft-cache", "none"], "cache 'none' must be own or shared"),
        (["--draft", "S", "--draft-tokens", "9" * 5000], "must be a number from 1 on"),
        (["--draft-tokens", "3"], "--draft-tokens is for --draft; name one"),
        (["--draft-cache", "own"], "--draft-cache is for --draft; name one"),
        (["--max-new-tokens", "48"], "both together at most 48, the model's context"),
    ],
)
def test_what_does_not_fit_is_named(run: Path, words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        invoke("generate", run, "--max-new-tokens", 9, *words)


def test_a_list_of_granularities_is_a_submodel(run: Path) -> None:
    model = load_language_model(run)
    lists = model.generate(PROMPTS, ["S", ["S", "L", "L"], "XL"], max_new_tokens=5, temperature=0)
    names = model.generate(PROMPTS, ["S", "S:1,L:2", "XL"], max_new_tokens=5, temperature=0)
    assert lists == names
    assert model.generate(PROMPTS, None, max_new_tokens=5, temperature=0) == model.generate(
        PROMPTS, "XL", max_new_tokens=5, temperature=0
    )


def test_a_step_that_is_not_there_is_named_with_those_that_are(run: Path) -> None:
    with pytest.raises(UserError, match=r"@9 is not there; checkpoints are: .*@5"):
        load_language_model(f"{run}@9")


def test_an_empty_draft_is_no_submodel(run: Path) -> None:
    """Not as if none had been asked for."""
    with pytest.raises(UserError, match="there is no slice ''"):
        load_language_model(run).generate(["def"], max_new_tokens=2, draft="")


def test_one_text_is_no_list(run: Path) -> None:
    with pytest.raises(UserError, match="prompts must be a list of texts, such as"):
        load_language_model(run).generate("def ")
    with pytest.raises(UserError, match="there is no prompt"):
        load_language_model(run).generate([])


def test_speculate_writes_what_it_shows(run: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def total\n\nreturn sum\nnumbers\n")
    shown, _ = invoke(
        "speculate", run, "--draft", "S", "--draft", "S:1,L:2", "--prompts", prompts,
        "--prompt-count", 2, "--new-tokens", 12, "--repetitions", 2, "--draft-tokens", "auto",
    )  # fmt: skip
    found = json.loads((run / "speculative.json").read_text())
    assert {key: found[key] for key in ("step", "verifier", "prompts", "new_tokens")} == {
        "step": 5, "verifier": "XL", "prompts": 2, "new_tokens": 12,
    }  # fmt: skip
    assert found["temperature"] == 0 and found["plain_tokens_per_second"] > 0
    ways = [(one["draft"], one["cache"]) for one in found["drafts"]]
    assert ways == [("S", "own"), ("S", "shared"), ("S:1,L:2", "own"), ("S:1,L:2", "shared")]
    for one in found["drafts"]:
        assert one["draft_tokens"] == "auto" and 0 <= one["acceptance"] <= 1
        assert one["tokens_per_verify"] >= 1
        assert one["tokens_per_second"] > 0 and one["speedup"] > 0
        assert f"{one['speedup']:.2f}" in shown


def test_speculate_takes_prompts_of_the_validation_data(lm: MatLM, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lm)
    texts = tmp_path / "texts.txt"
    texts.write_text(TEXT * 400)
    tokenizer = run / small_tokenizer().file_name
    prepare_data([texts], tmp_path / "data", tokenizer=tokenizer, workers=1)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= {
        "train": [[1, str(tmp_path / "data")]],
        "validation": config["data"]["train"],
    }
    config["data"]["validation"] = config["data"]["train"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    invoke("speculate", run, "--new-tokens", 4, "--repetitions", 1, "--prompt-count", 3)
    found = json.loads((run / "speculative.json").read_text())
    assert [one["draft"] for one in found["drafts"]] == ["S", "S", "M", "M", "L", "L"]
    assert found["prompts"] == 3 and found["prompt_tokens"] == [8] * 3
    other = tmp_path / "one.json"
    shown, _ = invoke(
        "speculate", run, "--new-tokens", 1, "--repetitions", 1, "--draft", "S", "--output", other
    )
    drafts = json.loads(other.read_text())["drafts"]
    assert {(one["acceptance"], one["tokens_per_verify"]) for one in drafts} == {(None, None)}
    assert "–" in shown and json.loads((run / "speculative.json").read_text()) == found
    with pytest.raises(UserError, match="--prompt-tokens 300 is more than"):
        invoke("speculate", run, "--prompt-tokens", 300)
    with pytest.raises(UserError, match=r"have not 99999 prompts .* a smaller --prompt-count"):
        invoke("speculate", run, "--prompt-count", 99999)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "the validation data of .* have not 8 prompts .* --prompts FILE"),
        (["--prompts", "/nonexistent"], "cannot read --prompts /nonexistent: No such file"),
        (["--output", "/nonexistent/x.json"], "--output /nonexistent/x.json has no folder"),
        (["--prompts", "x", "--prompt-tokens", "5"], "--prompt-tokens 5 is for prompts of the"),
        (["--verifier", "S"], "no granularity is below S"),
        (["--verifier", "M", "--draft", "L"], "submodel L cannot draft for M: it is wider"),
        (["--draft", "XL"], "submodel XL cannot draft for itself"),
        (["--cache", "none"], "--cache 'none' must be own, shared or both"),
    ],
)
def test_what_cannot_be_compared_is_named(
    lm: MatLM, tmp_path: Path, words: list[str], says: str
) -> None:
    run = write_run(tmp_path / "run", lm)
    with pytest.raises(UserError, match=says):
        invoke("speculate", run, *words)
    assert not (run / "speculative.json").exists()


def test_files_of_prompts_are_read_with_care(run: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n \n")
    with pytest.raises(UserError, match="holds no prompt; write one a line"):
        invoke("speculate", run, "--prompts", prompts)
    prompts.write_bytes(b"\xff\xfe\n")
    with pytest.raises(UserError, match="is not UTF-8"):
        invoke("speculate", run, "--prompts", prompts)
    prompts.write_text("numbers " * 30)
    with pytest.raises(UserError, match="at most 48, the model's context"):
        invoke("speculate", run, "--prompts", prompts)
