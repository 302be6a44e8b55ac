"""The page as a reader gets it: parsed, its numbers, words and commands looked up."""

from __future__ import annotations

import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from matformer_dist import cli
from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.errors import UserError
from matformer_dist.report import write_report
from matformer_dist.report.inputs import read_run
from matformer_dist.report.machine import training_seconds
from matformer_dist.report.page import SAMPLE_CHARACTERS
from matformer_dist.submodels.formats import FORMATS
from matformer_dist.submodels.transformers_format import check_architecture

VOID = {"meta", "link", "br", "path", "input"}


class Page(HTMLParser):
    """Elements as (tag, attributes, text inside); fails where tags are not balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("td", "th"):
            self.handle_data(" ")
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for index in self.open:
            self.elements[index][2].append(data)

    def texts(self, tag: str, **attributes: str) -> list[str]:
        return [
            " ".join("".join(text).split())
            for name, attrs, text in self.elements
            if name == tag and all(attrs.get(key) == value for key, value in attributes.items())
        ]

    def data(self, key: str) -> list[Any]:
        """The JSON in the page that has this key."""
        found = [json.loads(t) for t in self.texts("script", type="application/json")]
        return [content for content in found if key in content]

    def hovers(self) -> list[Any]:
        return self.data("at")


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def edit(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_metrics(run: Path, change: Any) -> None:
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        change(line)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_opening_table_matches_evaluation(make_run: Any) -> None:
    run = make_run()
    edit(run / "evaluation.json", lambda e: e["submodels"][0].update(loss=2.34567, agreement=0.817))
    rows = page_of(run).texts("tr")
    assert rows[1] == "S 128 984 k 2.346 10.4 81.7 %"
    assert rows[4].startswith("XL 1,024 2.36 M 3.")


def test_opening_table_takes_the_training_losses_where_they_are_newer(make_run: Any) -> None:
    run = make_run()
    edit(run / "evaluation.json", lambda e: e.update(step=100))
    losses = {"S": 2.9991, "M": 2.5, "L": 2.4, "XL": 2.3}
    edit_metrics(run, lambda line: line.update(val_loss=losses) if line["step"] == 300 else None)
    page = page_of(run)
    assert "2.999" in page.texts("tr")[1]
    assert "measured at step 300 during training" in page.texts("caption")[0]


def test_headline_figures(make_run: Any) -> None:
    run = make_run()
    edit_metrics(run, lambda line: line.update(step_ms=500, tokens_per_second=8192, mfu=0.431))
    values = page_of(run).texts("dd")
    assert "1.23 M" in values and "4.10 k a step" in values
    assert "2 min 30 s" in values
    assert "8.19 k" in values and "43.1 %" in values and "812 MB" in values


def test_training_time_counts_every_step_once(make_run: Any) -> None:
    run = make_run()
    edit_metrics(run, lambda line: line.update(step_ms=1000 if line["step"] <= 100 else 250))
    assert training_seconds(read_run(run)) == pytest.approx(100 * 1.0 + 200 * 0.25)


def test_table_of_submodels_is_sorted_and_complete(make_run: Any) -> None:
    run = make_run()
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["submodels"].reverse()
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    rows = [row for row in page_of(run).texts("tr") if "matformer extract" in row]
    expected = sorted(evaluation["submodels"], key=lambda item: item["parameters"])
    assert [row.split()[0] for row in rows] == [item["submodel"] for item in expected]
    widest = expected[-1]["loss"]
    for row, item in zip(rows, expected, strict=True):
        assert f"{item['loss']:.4f}" in row
        assert f"{100 * item['agreement']:.1f} %" in row
        assert item["kind"] in row
        if item is not expected[-1]:
            assert f"{item['loss'] - widest:+.4f}" in row


def test_commands_extract_the_submodel_of_their_row(make_run: Any) -> None:
    run = make_run()
    run = run.rename(run.with_name("my run $HOME"))  # which a shell would split
    codes = [code for code in page_of(run).texts("code") if code.startswith("matformer extract")]
    words = [shlex.split(code) for code in codes]
    mixed = next(line for line in words if "S:2,M:2" in line)
    assert mixed == [
        "matformer", "extract", str(run), "--submodel", "S:2,M:2", "--format", "hf",
        "--output", str(run / "submodels" / "Sx2-Mx2"),
    ]  # fmt: skip
    outputs = [line[-1] for line in words]
    assert len(set(outputs)) == len(outputs) == 14


@pytest.mark.parametrize(
    ("ffn", "norm"),
    [("swiglu", "rmsnorm"), ("gelu", "layernorm"), ("swiglu", "layernorm"), ("gelu", "rmsnorm")],
)
@pytest.mark.parametrize("lacks", ["nothing", "samples", "all but training"])
def test_every_command_matches_what_the_cli_takes(
    make_run: Any, ffn: str, norm: str, lacks: str
) -> None:
    run = make_run(complete=lacks != "all but training")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"] |= {"ffn": ffn, "norm": norm}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    if lacks == "samples":
        (run / "samples.json").unlink()
    model = read_run(run).config.model
    lines = [code for code in page_of(run).texts("code") if code.startswith("matformer ")]
    calls = [parsed(line) for line in lines]
    models = {path.parent for path in run.rglob("submodel.json")}
    expected = {"report", "search", "speculate", "evaluate"}
    expected |= {"generate"} if lacks != "nothing" else set()
    assert {name for name, _ in calls} == expected | {"extract"}
    for name, options in calls:
        if name == "generate":
            assert Path(options["model"]) in models  # made by a command above, or there already
            continue
        assert Path(options["model" if name == "evaluate" else "run"]) == run
        if name == "extract":
            models.add(options["output"])
            for submodel in options["submodel"]:
                read_run(run).nesting.parse(submodel, model.n_layers)
            assert options["format"] in FORMATS
            if options["format"] == "hf":
                assert isinstance(model, LanguageModelConfig)
                check_architecture(model)


def parsed(line: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a command line, read by the parser of the command itself."""
    program, name, *words = shlex.split(line)
    assert program == "matformer"
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    return name, commands[name].make_context(name, words).params


def test_extracted_models_and_samples_are_shown(make_run: Any) -> None:
    page = page_of(make_run())
    assert any(re.match(r"S hf 984 k 3\.94 MB .* 300 .*/submodels/S$", r) for r in page.texts("tr"))
    assert "def read_lines(path):" in page.texts("code")
    assert any(pre.startswith('"""Return the path."""') for pre in page.texts("pre"))
    assert [h.split()[0] for h in page.texts("h4")] == ["S", "M", "XL"]


def test_config_is_shown(make_run: Any) -> None:
    config = next(pre for pre in page_of(make_run()).texts("pre") if pre.startswith("task:"))
    assert "d_ff: 1024" in config and "kind: per_sequence" in config


HOSTILE = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>\x00\x1b&lt;\u202e"


def test_hostile_text_stays_text(make_run: Any) -> None:
    run = make_run()
    plain = page_of(run)
    edit(run / "samples.json", lambda s: s[0].update(prompt=HOSTILE, text=HOSTILE + HOSTILE))
    edit(run / "evaluation.json", lambda e: e["submodels"][1].update(submodel=HOSTILE))
    edit(run / "submodels/S/submodel.json", lambda s: s.update(submodel=HOSTILE, format=HOSTILE))
    page = page_of(run)
    scripts = [tag for tag, _, _ in page.elements if tag == "script"]
    assert len(scripts) == len([tag for tag, _, _ in plain.elements if tag == "script"])
    assert not [tag for tag, _, _ in page.elements if tag == "img"]
    shown = HOSTILE.replace("\x00", "␀").replace("\x1b", "␛").replace("\u202e", "\ufffd")
    assert shown in page.texts("pre") and shown in page.texts("code")
    assert HOSTILE in [name for name, _ in page.data("items")[0]["items"]]


def test_long_sample_is_cut_and_says_so(make_run: Any) -> None:
    run = make_run()
    edit(run / "samples.json", lambda s: s[0].update(prompt="", text="x" * 1_000_000))
    page = page_of(run)
    assert "x" * SAMPLE_CHARACTERS in page.texts("pre")
    assert any("996,000 more characters" in note for note in page.texts("p"))


def test_page_loads_nothing(make_run: Any) -> None:
    page = page_of(make_run())
    for tag, attributes, _ in page.elements:
        assert tag not in ("img", "iframe", "object", "embed") and "src" not in attributes
        assert (attributes.get("href") or "data:").startswith("data:")
    assert not [css for css in page.texts("style") if re.search(r"url\(|@import", css)]


def test_run_that_only_trained_names_the_commands(make_run: Any) -> None:
    run = make_run(steps=30, evaluate_every=0, complete=False)
    page = page_of(run)
    codes = page.texts("code")
    assert f"matformer evaluate {run}" in codes
    assert any(code.startswith(f"matformer extract {run} --submodel L") for code in codes)
    assert f"matformer generate {run / 'submodels' / 'L'}" in codes
    assert any("No validation loss yet" in words for words in page.texts("p"))
    assert page.texts("tr")[1] == "S 128 984 k – – –"
    assert "Training loss" in page.texts("h3")


def test_run_that_is_still_training_says_where_it_is(make_run: Any) -> None:
    run = make_run(steps=300, complete=False)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:12]) + lines[12][:40])
    assert any("at step 120 of 300" in words for words in page_of(run).texts("p"))


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_number_of_granularities_has_its_labels(make_run: Any, count: int) -> None:
    fractions = [f"1/{2**i}" for i in reversed(range(1, count))] + [1]
    run = make_run(steps=100, fractions=fractions)
    names = read_run(run).nesting.names
    page = page_of(run)
    labels = page.texts("span", **{"class": "label"})
    losses = read_run(run).last.val_loss
    for name in names:
        assert f"{name} {losses[name]:.3f}" in labels
    headings = page.texts("h3")
    assert ("Loss against parameters" in headings) == (count > 1)
    assert (f"Agreement with {names[-1]}" in headings) == (count > 1)


def test_tooltip_of_the_last_step_matches_the_last_line(make_run: Any) -> None:
    run = make_run()
    last = read_run(run).last
    hover = page_of(run).hovers()[0]
    left, _, title, rows = hover["at"][-1]
    assert (left, title) == (1.0, "step 300 · 1.23 M tokens")
    assert hover["head"] == ["", "training", "validation"]
    assert rows[0] == ["S", f"{last.train_loss['S']:.3f}", f"{last.val_loss['S']:.3f}"]
    between = next(at for at in hover["at"] if at[2].startswith("step 290 "))
    assert between[2].endswith("validation of step 250")


def test_sampled_objective_shows_each_granularity_where_it_ran(make_run: Any) -> None:
    run = make_run()
    names = ["S", "M", "L", "XL"]

    def keep_one(line: dict[str, Any]) -> None:
        ran = names[line["step"] // 10 % 4]
        line["train_loss"] = {ran: float(line["step"])}

    edit_metrics(run, keep_one)
    rows = page_of(run).hovers()[0]["at"][-1][3]
    assert [row[1] for row in rows] == ["280.000", "290.000", "300.000", "270.000"]


def test_losses_that_are_not_numbers_are_reported(make_run: Any) -> None:
    run = make_run()

    def spoil(line: dict[str, Any]) -> None:
        if 100 <= line["step"] <= 120:
            line["train_loss"]["M"] = None if line["step"] == 110 else float("nan")

    edit_metrics(run, spoil)
    page = page_of(run)
    warning = next(p for p in page.texts("p") if p.startswith("Not finite."))
    assert "3 of 30 logged lines, first at step 100, last at step 120" in warning
    traces = [attrs["d"] for tag, attrs, _ in page.elements if attrs.get("class") == "thin" and tag]
    broken = [trace for trace in traces if trace and trace.count("M") == 2]
    assert len(broken) == 1


def test_long_runs_do_not_grow_the_page(make_run: Any) -> None:
    run = make_run(steps=2000, every=1)
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(2001, 20_001):
            line = lines[(step - 1) % 2000] | {"step": step, "tokens": 4096 * step}
            print(json.dumps(line), file=file)
    page = write_report(run)
    assert len(page.read_bytes()) < 400_000
    parsed = Page(page.read_text())
    assert any("400 of 20,000 points are drawn" in note for note in parsed.texts("p"))
    assert parsed.hovers()[0]["at"][-1][2] == "step 20,000 · 81.9 M tokens"


def test_report_is_written_whole_or_not_at_all(make_run: Any, tmp_path: Path) -> None:
    run = make_run()
    assert write_report(run) == run / "report.html"
    other = tmp_path / "other.html"
    assert write_report(run, other) == other
    before = other.read_text()
    (run / "evaluation.json").write_text("{")
    with pytest.raises(UserError):
        write_report(run, other)
    assert other.read_text() == before
    (run / "evaluation.json").unlink()
    with pytest.raises(UserError, match="absent/report"):
        write_report(run, tmp_path / "absent" / "report.html")
    with pytest.raises(UserError, match="must be a file"):
        write_report(run, tmp_path)
    assert not list(tmp_path.rglob(".*"))
