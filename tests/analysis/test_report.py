"""The report: the numbers that it is made of, and the page as a browser shows it."""

import dataclasses
import json
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from d2r_fast.analysis.report import write_report
from d2r_fast.analysis.run_data import MOST_POINTS, run_data
from d2r_fast.config_json import config_to_json
from d2r_fast.evaluation.protocols import mean_interval, wilson_interval
from d2r_fast.nets.mlp import MlpConfig
from d2r_fast.training.trainer import Trainer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    "--no-sandbox",
    *("--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-quic"),
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "a<b>run"
    Trainer(tiny.RUN, path, show_progress=False).run()
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def embedded(page: Path) -> dict[str, Any]:
    """The numbers that a page holds."""
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def written(path: Path, train: list[dict], evals: list[dict]) -> Path:
    """A run directory of tiny.RUN's configuration and these records."""
    path.mkdir()
    (path / "config.json").write_text(config_to_json(tiny.RUN))
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*train, *evals]))
    return path


def test_data_is_what_metrics_say(run_dir):
    data = run_data(run_dir, play=False)
    train, evals = ([r for r in records(run_dir) if r["kind"] == kind] for kind in ("train", "eval"))
    assert (data["steps"], data["updates"], data["finished"], data["routes"]) == (100, 40, True, None)
    assert data["evals"]["success"] == [r["success"] for r in evals]
    last = evals[-1]
    assert data["evals"]["last_intervals"] == [wilson_interval(share, last["episodes"]) for share in last["success"]]
    assert (data["evals"]["low"][-1], data["evals"]["high"][-1]) == mean_interval(last["success"], last["episodes"])
    assert data["train"]["steps"] == [r["steps"] for r in train]
    np.testing.assert_allclose(data["train"]["hours"], [r["time"]["wall"] / 3600 for r in train], atol=1e-6)
    curves = data["train"]["curves"]
    assert curves["loss/critic"][:2] == [None, None]  # the warm-up has no updates
    np.testing.assert_allclose(curves["loss/critic"][2:], [r["loss/critic"] for r in train[2:]], rtol=1e-4)
    np.testing.assert_allclose(curves["policy/route_temp"], [r["policy/route_temp"] for r in train], rtol=1e-4)


def test_hours_go_on_over_a_resume_and_rates_leave_evaluations_out(tmp_path):
    def record(kind: str, steps: int, wall: float, evaluate: float) -> dict[str, Any]:
        more = {"success": [0.5, 1.0], "mean_success": 0.75, "episode_return": [1.0, 2.0], "episodes": 4}
        more["module_use"] = [[1.0] * 4] * 2
        time = {"wall": wall, "evaluate": evaluate}
        return {"kind": kind, "steps": steps, "updates": steps // 2, "time": time} | (more if kind == "eval" else {})

    # 10 s a chunk; an evaluation of 6 s behind the second; the third is of another session, whose clock begins anew.
    train = [record("train", 100, 10, 0), record("train", 200, 20, 0), record("train", 300, 10, 0)]
    data = run_data(written(tmp_path / "run", train, [record("eval", 200, 26, 6)]), play=False)
    np.testing.assert_allclose(np.array(data["train"]["hours"]) * 3600, [10, 20, 36], atol=0.01)
    np.testing.assert_allclose(data["evals"]["hours"], [26 / 3600], atol=1e-5)
    np.testing.assert_allclose([r[0] for r in data["train"]["curves"]["rate/steps"][:2]], [20, 20], rtol=1e-3)
    assert data["hours"] == pytest.approx(0.01)


def test_route_temperatures_of_an_earlier_version_follow_from_alpha(tmp_path):
    train = [{"kind": "train", "steps": 1, "updates": 0}, {"kind": "train", "steps": 2, "updates": 1}]
    train[1]["policy/alpha"] = [0.5, 0.25]
    curves = run_data(written(tmp_path / "run", train, []), play=False)["train"]["curves"]
    assert curves["policy/route_temp"][0] is None
    np.testing.assert_allclose(curves["policy/route_temp"][1], [2 / 3, 4 / 3], rtol=1e-4)


def test_long_runs_are_thinned_to_means(tmp_path):
    n = 3 * MOST_POINTS
    train = [{"kind": "train", "steps": i, "updates": i, "loss/actor": [float(i), 0.0]} for i in range(1, n + 1)]
    data = run_data(written(tmp_path / "run", train, []), play=False)["train"]
    assert data["records_a_point"] == 3
    assert data["steps"] == list(range(3, n + 1, 3))
    assert data["curves"]["loss/actor"][:2] == [[2.0, 0.0], [5.0, 0.0]]


def test_what_is_no_run_is_told(tmp_path, run_dir):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        write_report(tmp_path / "report.html", [tmp_path])
    with pytest.raises(ValueError, match=r"metrics\.jsonl: expected records of training, got none"):
        write_report(tmp_path / "report.html", [written(tmp_path / "empty", [], [])])
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    (copy / "routes.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"routes\.json: expected what d2r routes writes"):
        write_report(tmp_path / "report.html", [copy])
    assert not (tmp_path / "report.html").exists()


def test_routes_are_played_unless_drawn_already(run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    played = run_data(copy, play=True)["routes"]
    assert played["steps"] == 100 and len(played["weight"]) == 2
    for name, steps in (("step-0000000100.pt", 7), ("step-0000000080.pt", 100)):  # of the newest: taken as it is
        (copy / "routes.json").write_text(json.dumps(played | {"checkpoint": name, "steps": 7}))
        assert run_data(copy, play=True)["routes"]["steps"] == steps


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here to open the page with")
    api = pytest.importorskip("playwright.sync_api", reason="opening the page needs playwright")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


def opened(browser: Any, path: Path, width: int, scheme: str = "light") -> tuple[Any, list[str]]:
    """A drawn page, and what went wrong on it or was asked of a network."""
    page, wrong = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if request.url == path.as_uri() else wrong.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-drawn=yes]", timeout=60_000)
    return page, wrong


def test_the_page_in_a_browser(run_dir, tmp_path, browser):
    path = tmp_path / "report.html"
    write_report(path, [run_dir])
    page, wrong = opened(browser, path, 1400)
    last = [r for r in records(run_dir) if r["kind"] == "eval"][-1]
    assert page.inner_text("h1") == "a<b>run" == page.title()
    assert page.inner_text(".mean-success") == f"{last['mean_success']:.2f}"
    for k, task in enumerate(("reach", "drawer-close")):
        cells = page.locator(f"#success tr[data-task='{task}'] td").all_inner_texts()
        low, high = wilson_interval(last["success"][k], 1)
        active = f"{sum(last['module_use'][k]):.2f}"
        result = f"{last['success'][k]:.2f}", f"{low:.2f} to {high:.2f}"
        assert cells == [task, *result, f"{last['episode_return'][k]:.0f}", active]
    assert page.locator(".plot .main-svg").count() > 40  # three to a plot
    arcs = page.locator("#route-first-graph .scatterlayer .trace path.js-line").count()
    weight = embedded(path)["runs"][0]["routes"]["weight"][0]
    assert arcs == sum(w >= 0.01 for route in weight for w in route)

    def drawn(plot: str) -> list[dict]:
        return page.evaluate(f"document.getElementById('{plot}').data.map(({{name, x, y}}) => ({{name, x, y}}))")

    assert [line["name"] for line in drawn("curve-loss-critic")] == ["reach", "drawer-close", "mean"]
    raw = drawn("curve-loss-critic")[0]
    page.select_option("#along", "updates")
    page.click("#choose summary")
    page.click("#tasks input[value=reach]")
    assert [line["name"] for line in drawn("curve-loss-critic")] == ["drawer-close", "mean"]
    page.click("#all")
    page.evaluate("document.getElementById('smoothing').value = 0.5")
    page.dispatch_event("#smoothing", "input")
    smooth = drawn("curve-loss-critic")[0]
    assert smooth["x"] == [r["updates"] for r in records(run_dir) if r["kind"] == "train"]
    a, b = raw["y"][2:4]
    np.testing.assert_allclose(smooth["y"][2:4], [a, (0.25 * a + 0.5 * b) / 0.75], rtol=1e-6)
    (trained,) = page.locator("#trained li").all_inner_texts()
    assert f"python {platform.python_version()}, torch {torch.__version__}" in trained and "core" in trained
    page.select_option("#route-second", "reach")
    assert page.text_content("#route-second-graph .gtitle").startswith("reach: ")
    picture = page.screenshot(full_page=True)
    assert picture.startswith(b"\x89PNG") and len(picture) > 50_000
    assert wrong == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_several_runs_in_a_narrow_window(run_dir, tmp_path, browser, scheme):
    other = written(tmp_path / "other", [r for r in records(run_dir) if r["kind"] == "train"], [])
    path = tmp_path / "report.html"
    write_report(path, [run_dir, other], play=False)
    page, wrong = opened(browser, path, 390, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator(".tile").count() == 2 and "no evaluation so far" in page.inner_text("#tiles")
    names = page.evaluate("document.getElementById('curve-loss-critic').data.map((line) => line.name)")
    assert names == ["a<b>run: mean", "other: mean"]
    trained = page.locator("#trained li").all_inner_texts()
    assert trained[0].startswith("a<b>run: 20") and trained[1] == "other: versions and machine: not recorded"
    assert "d2r routes" in page.inner_text("#no-routes") and page.is_hidden("#routes")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 31)"}[scheme]
    assert wrong == []


def test_a_network_without_routes(tmp_path):
    path = written(tmp_path / "run", [{"kind": "train", "steps": 1, "updates": 0}], [])
    (path / "config.json").write_text(config_to_json(dataclasses.replace(tiny.RUN, net=MlpConfig(widths=(6, 5)))))
    write_report(tmp_path / "report.html", [path])
    (run,) = embedded(tmp_path / "report.html")["runs"]
    assert (run["network"], run["routes"]) == ("mlp", None)
