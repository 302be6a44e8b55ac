"""The page in a headless Chromium: its explorer driven as a reader does, its look measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from matformer_dist.report.charts import PointHover
from matformer_dist.report.commands import extract_command
from matformer_dist.report.inputs import Run, read_run
from matformer_dist.report.page import write_report
from matformer_dist.report.points import join_points
from matformer_dist.report.tradeoff import loss_charts
from tests.unit.report import browser
from tests.unit.report.conftest import write_run
from tests.unit.report.synthetic_retrieval import write_retrieval
from tests.unit.report.synthetic_search import (
    COSTS,
    best_within,
    write_downstream,
    write_search,
    write_speculative,
)
from tests.unit.report.test_report_page import parsed

HOSTILE_NAME = 'it\'s "a" <script>run<!-- $HOME ünï &amp; 日本'
READ = """
const text = (id) => document.getElementById(id).textContent;
const bars = (id) => [...document.getElementById(id).children].map((bar) => [
  bar.style.getPropertyValue("--c"), Number.parseFloat(bar.style.height)]);
return {
  budget: Number(document.getElementById("explorer").dataset.budget),
  name: text("choice-name"),
  tags: text("choice-tags"),
  figures: text("choice-figures"),
  command: text("choice-command"),
  bars: bars("choice-layers"),
  rival: text("rival-text"),
  rivalSeen: document.getElementById("rival-layers").checkVisibility(),
  spoken: document.getElementById("budget").getAttribute("aria-valuetext"),
};
"""
MOVE = """
const slider = document.getElementById("budget");
slider.value = arguments[0];
slider.dispatchEvent(new Event("input", { bubbles: true }));
"""
OPEN = "document.querySelectorAll('details').forEach((one) => (one.open = true))"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if lacks := browser.why_not():
        pytest.skip(lacks)
    with browser.chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run of a name that wants to be quoted everywhere, and what its search measured."""
    directory = tmp_path_factory.mktemp("runs") / HOSTILE_NAME
    directory.mkdir()
    write_run(directory)
    measured = write_search(directory)["measured"]
    write_speculative(directory)
    write_downstream(directory)
    write_retrieval(directory)
    write_report(directory)
    return directory, measured


def show(driver: Any, run: Path, width: int = 1280, scheme: str = "light") -> None:
    browser.set_width(driver, width)
    browser.set_scheme(driver, scheme)
    driver.get((run / "report.html").as_uri())


def budget_at(measured: list[dict[str, Any]], kind: str, position: int) -> float:
    costs = [one[COSTS[kind]] for one in measured]
    return float(min(costs) + (max(costs) - min(costs)) * (position / 1000))


def choose(driver: Any, kind: str) -> None:
    driver.find_element("css selector", f"[name=budget-kind][value={kind}]").click()


def check(shown: dict[str, Any], run: Run, measured: list[dict[str, Any]], kind: str) -> None:
    """What is shown is what looking at everything that was measured gives."""
    best = best_within(measured, COSTS[kind], shown["budget"])
    assert shown["name"] == best["submodel"]
    assert f"{best['loss']:.4f}" in shown["figures"]
    low, high = best["loss_interval"]
    assert f"{low:.4f} to {high:.4f}" in shown["figures"]
    assert f"{100 * best['agreement']:.1f} %" in shown["figures"]
    assert shown["bars"] == [
        [f"var(--g{run.nesting.widths.index(width)})", pytest.approx(width / 1024 * 100)]
        for width in best["widths"]
    ]
    heuristic = {point.submodel for point in join_points(run).searched if point.kind != "mix"}
    affordable = [one for one in measured if one["submodel"] in heuristic]
    rival = best_within(affordable, COSTS[kind], shown["budget"])
    accuracy = f", accuracy {100 * rival['accuracy']:.1f} %" if run.is_vision else ""
    if rival is best:
        assert "the same submodel" in shown["rival"] and not shown["rivalSeen"]
    else:
        assert f"gives {rival['submodel']}{accuracy}, loss {rival['loss']:.4f}" in shown["rival"]
        assert f"the gain is {rival['loss'] - best['loss']:.4f}" in shown["rival"]
        assert shown["rivalSeen"]


@pytest.mark.parametrize("kind", list(COSTS))
def test_explorer_matches_a_look_at_everything(driver: Any, searched: Any, kind: str) -> None:
    directory, measured = searched
    run = read_run(directory)
    show(driver, directory)
    choose(driver, kind)
    names = set()
    for position in (*range(0, 1001, 25), 1, 999):
        driver.execute_script(MOVE, position)
        shown = driver.execute_script(READ)
        assert shown["budget"] == budget_at(measured, kind, position)
        check(shown, run, measured, kind)
        assert shown["command"] == extract_command(run, shown["name"])
        name, options = parsed(shown["command"])
        assert (name, options["submodel"]) == ("extract", [shown["name"]])
        assert Path(options["run"]) == directory
        names.add(shown["name"])
    assert len(names) > 5
    assert browser.complaints(driver) == []


def test_explorer_is_driven_by_keyboard_alone(driver: Any, searched: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    directory, measured = searched
    show(driver, directory)
    driver.execute_script('document.querySelector("[name=budget-kind]").focus()')

    def press(key: str) -> dict[str, Any]:
        driver.switch_to.active_element.send_keys(key)
        shown: dict[str, Any] = driver.execute_script(READ)
        return shown

    check(press(Keys.ARROW_RIGHT), read_run(directory), measured, "flops")
    assert driver.switch_to.active_element.get_attribute("value") == "flops"
    press(Keys.TAB)
    slider = driver.switch_to.active_element
    assert slider.get_attribute("id") == "budget"
    assert slider.accessible_name.startswith("Within ")
    for key, position in (
        (Keys.HOME, 0),
        (Keys.ARROW_RIGHT, 1),
        (Keys.END, 1000),
        (Keys.ARROW_LEFT, 999),
        (Keys.ARROW_DOWN, 998),
    ):
        shown = press(key)
        assert slider.get_attribute("value") == str(position)
        assert shown["budget"] == budget_at(measured, "flops", position)
        assert shown["spoken"].endswith("budget of FLOPs a token")
        check(shown, read_run(directory), measured, "flops")
    assert driver.find_element("id", "choice").get_attribute("aria-live") == "polite"


def test_chosen_submodel_is_marked_in_the_charts(driver: Any, searched: Any) -> None:
    directory, _ = searched
    show(driver, directory)
    driver.execute_script(MOVE, 400)
    name = driver.execute_script(READ)["name"]
    run = read_run(directory)
    points = join_points(run)
    marked = driver.execute_script(
        'return [...document.querySelectorAll("#submodels .chosen")]'
        ".map((ring) => [ring.hidden, ring.style.left, ring.style.top]);"
    )
    for chart, (hidden, left, top) in zip(loss_charts(run, points), marked, strict=False):
        assert isinstance(chart.hover, PointHover)
        (place,) = ((x, y) for x, y, i in chart.hover.positions if points.shown[i].submodel == name)
        assert not hidden
        assert [float(left[:-1]), float(top[:-1])] == pytest.approx([100 * at for at in place])


def test_chart_of_submodels_names_them_by_keyboard(driver: Any, searched: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    directory, _ = searched
    show(driver, directory)
    plot = driver.find_element("css selector", "#submodels .plot")
    plot.send_keys(Keys.END)
    plot.send_keys(Keys.END)
    said = driver.find_element("id", "tooltip").text
    assert said.startswith("XL\n") and "95% of it" in said


def test_chart_of_retrieval_tells_what_a_query_encoder_costs(driver: Any, searched: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    directory, _ = searched
    show(driver, directory)
    plot = driver.find_element("css selector", "#retrieval .plot")
    driver.execute_async_script(  # to where it is seen, since scrolling hides what a key shows
        'const [plot, done] = arguments; plot.scrollIntoView({ block: "center" });'
        "requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50)));",
        plot,
    )
    plot.send_keys(Keys.HOME)
    plot.send_keys(Keys.HOME)
    said = driver.find_element("id", "tooltip").text
    assert said.startswith("S · gallery: XL\n") and "1-NN accuracy 72.7 %" in said
    sizes = driver.execute_script(
        'return [...document.querySelectorAll("#retrieval .marks .square")].map((square) => '
        "[getComputedStyle(square).strokeLinecap, getComputedStyle(square).strokeWidth])"
    )
    assert sizes == 3 * [["square", "7px"]]


@pytest.mark.parametrize("setting", ["granted", "denied"])
def test_copy_button_hands_the_command_over(driver: Any, searched: Any, setting: str) -> None:
    directory, _ = searched
    show(driver, directory)
    for name in ("clipboard-write", "clipboard-read"):
        driver.execute_cdp_cmd(
            "Browser.setPermission",
            {
                "permission": {"name": name},
                "setting": setting if name.endswith("write") else "granted",
            },
        )
    command = driver.execute_script(READ)["command"]
    button = driver.find_element("css selector", "#explorer button.copy")
    button.click()
    said, selected, copied = driver.execute_async_script(
        "const [button, done] = arguments;"
        "setTimeout(async () => done([button.textContent, getSelection().toString(),"
        " await navigator.clipboard.readText().catch(String)]), 200);",
        button,
    )
    if setting == "granted":
        assert (said, copied) == ("Copied", command)
    else:  # one key copies what is selected
        assert (said, selected) == ("Selected", command)


def test_page_asks_for_nothing_and_complains_of_nothing(driver: Any, searched: Any) -> None:
    directory, _ = searched
    driver.get("about:blank")
    browser.requests(driver)
    show(driver, directory)
    driver.execute_script(MOVE, 10)
    asked = [url for url in browser.requests(driver) if not url.startswith("data:")]
    assert asked == [(directory / "report.html").as_uri()]
    assert browser.complaints(driver) == []
    assert driver.find_element("css selector", "h1").text == HOSTILE_NAME


def test_page_without_a_search_complains_of_nothing(driver: Any, make_run: Any) -> None:
    run = make_run(complete=False, evaluate_every=0)
    write_report(run)
    show(driver, run)
    assert not driver.find_elements("id", "explorer")
    assert browser.complaints(driver) == []


def test_explorer_of_images_shows_accuracies(driver: Any, make_run: Any) -> None:
    run = make_run(task="vision")
    measured = {one["submodel"]: one for one in write_search(run)["measured"]}
    write_report(run)
    show(driver, run)
    rivals = 0
    for position in range(0, 1001, 100):
        driver.execute_script(MOVE, position)
        shown = driver.execute_script(READ)
        check(shown, read_run(run), list(measured.values()), "params")
        one = measured[shown["name"]]
        low, high = (f"{100 * end:.1f}" for end in one["accuracy_interval"])
        share = f"{100 * one['accuracy']:.1f} %"
        assert f"expected accuracy{share}95%: {low} to {high}" in shown["figures"]
        assert "nats per image" in shown["figures"] and "FLOPs an image" in shown["figures"]
        rivals += shown["rivalSeen"]
    assert rivals
    assert browser.complaints(driver) == []


@pytest.mark.parametrize("shape", ["hostile", "wide", "tiny", "vision"])
def test_page_fits_a_phone(driver: Any, searched: Any, make_run: Any, shape: str) -> None:
    directory, _ = searched
    if shape == "wide":
        directory = make_run(layers=48, fractions=[f"1/{2**i}" for i in range(7, 0, -1)] + [1])
    elif shape == "tiny":
        directory = make_run(layers=1, fractions=[1])
    elif shape == "vision":
        directory = make_run(task="vision")
    if shape != "hostile":
        write_search(directory)
        write_retrieval(directory)
        write_report(directory)
    show(driver, directory, width=360)
    for position in (0, 500, 1000):
        driver.execute_script(MOVE, position)
        driver.execute_script(
            "document.querySelectorAll('details').forEach((d) => (d.open = true))"
        )
        width = driver.execute_script("return document.documentElement.scrollWidth")
        bars = driver.execute_script(
            "return [...document.querySelectorAll('#choice-layers i')]"
            ".map((bar) => bar.getBoundingClientRect()).map(({ width, height }) => [width, height])"
        )
        assert width == 360
        assert len(bars) == read_run(directory).config.model.n_layers
        assert all(across >= 2 and up >= 3 for across, up in bars)
    assert browser.complaints(driver) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_schemes(driver: Any, searched: Any, scheme: str) -> None:
    directory, _ = searched
    show(driver, directory, scheme=scheme)
    driver.execute_script(OPEN)
    found = driver.execute_script(browser.CONTRASTS)
    assert len(found) > 200
    assert [(text, contrast) for text, contrast in found if contrast < 4.5] == []
    page = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (page == "rgb(18, 19, 23)") == (scheme == "dark")


def test_names_of_slices_are_shown(driver: Any, searched: Any) -> None:
    directory, _ = searched
    slices = json.loads((directory / "slices.json").read_text())["slices"]
    show(driver, directory)
    driver.execute_script(MOVE, 1000)
    shown = driver.execute_script(READ)
    last = [one for one in slices if one["kind"] == "params"][-1]
    assert shown["name"] == last["submodel"] and last["name"] in shown["tags"]
