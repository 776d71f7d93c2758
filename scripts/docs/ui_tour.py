"""Walks through the MLflow UI with a real browser: checks what its pages must show, and takes screenshots.

    python scripts/docs/ui_tour.py --out runs/ui-tour   (runs a small sweep in its own store first: 2 minutes)
    python scripts/docs/ui_tour.py --uri sqlite:///mlflow.db --experiment inception --out runs/ui-tour

Starts `make ui` and opens the list of experiments, the runs of one, charts of several runs, the page of a run, and an
image among its artifacts. Needs Chromium and its driver (Debian: chromium, chromium-driver).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "model.width=0.1", "epochs=2", "steps_per_epoch=10", "tracking.wait_seconds=600", "tracking.every_steps=5",
    "evaluate.test=true",
]  # fmt: skip
SWEEP = ["model=vgg16,vgg16_inception"]
CHARTS = "(train|validation)/accuracy"
SIZE = (1500, 1000)
PATIENCE_SECONDS = 180


def make_runs(root: Path) -> str:
    """Runs a sweep of two small runs with test results, and returns the URI of its store."""
    uri = f"sqlite:///{root / 'mlflow.db'}"
    overrides = [*SWEEP, *SMALL, f"tracking.uri={uri}", "tracking.experiment=tour", f"run_dir={root / 'sweep'}"]
    subprocess.run(["make", "sweep", *overrides], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return uri


@contextmanager
def ui(uri: str) -> Iterator[str]:
    """Runs `make ui` for this store; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    jobs = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # saves nine processes that our pages do not need
    server = subprocess.Popen(
        ["make", "ui", f"port={port}", f"uri={uri}"], cwd=ROOT, env=os.environ | jobs, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        until(lambda: urllib.request.urlopen(f"{address}/health", timeout=2).close() or True, "the UI answers")
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def until(condition: Callable[[], Any], description: str) -> Any:
    """Waits until the condition holds and returns its value. Raises: TimeoutError with the description."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            if value := condition():
                return value
        except Exception as error:  # a page may change while it is read
            last_error = error
        else:
            last_error = None
        if time.monotonic() > deadline:
            raise TimeoutError(f"timed out after {PATIENCE_SECONDS} s: {description} ({last_error})")
        time.sleep(0.5)


class Tour:
    """A browser, and the folder for its screenshots."""

    def __init__(self, address: str, out: Path):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={SIZE[0]},{SIZE[1]}"):
            options.add_argument(flag)
        options.binary_location = find_program("chromium", "chromium-browser", "google-chrome")
        service = webdriver.ChromeService(find_program("chromedriver"))
        self.browser = webdriver.Chrome(options=options, service=service)
        self.address = address
        self.out = out
        out.mkdir(parents=True, exist_ok=True)

    def open(self, path: str) -> None:
        self.browser.get(f"{self.address}/#{path}")

    def text(self) -> str:
        return self.browser.execute_script("return document.body.innerText")

    def shows(self, *texts: str) -> None:
        """Waits until the page contains all texts."""
        for text in texts:
            until(lambda text=text: text in self.text(), f"{self.browser.current_url} shows {text!r}")

    def click(self, text: str) -> None:
        """Clicks the last element whose own text this is."""
        script = (
            "const own = e => [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.textContent).join('').trim();"
            "const found = [...document.querySelectorAll('body *')].filter(e => own(e) === arguments[0]);"
            " if (!found.length) return false;"
            " found[found.length - 1].scrollIntoView({block: 'center'}); found[found.length - 1].click(); return true"
        )
        until(lambda: self.browser.execute_script(script, text), f"{text!r} can be clicked")

    def press(self, selector: str) -> None:
        """Clicks the first element that matches the selector."""
        script = "const found = document.querySelector(arguments[0]); if (found) found.click(); return !!found"
        until(lambda: self.browser.execute_script(script, selector), f"{selector} can be pressed")

    def type(self, selector: str, text: str) -> None:
        """Types into the first field that matches the selector."""
        until(lambda: self.browser.find_element("css selector", selector), f"{selector} exists").send_keys(text)

    def image(self) -> None:
        """Waits until a large image is shown."""
        script = "return [...document.querySelectorAll('img')].some(i => i.complete && i.naturalWidth > 250)"
        until(lambda: self.browser.execute_script(script), "an image is shown")

    def charts(self, count: int) -> None:
        """Waits until `count` charts are drawn, and hides their toolbars, which hover over them without a mouse."""
        script = "return document.querySelectorAll('.js-plotly-plot').length"
        until(lambda: self.browser.execute_script(script) >= count, f"{count} charts are drawn")
        hide = "document.head.append(Object.assign(document.createElement('style'), {textContent: arguments[0]}))"
        self.browser.execute_script(hide, ".modebar-container {display: none}")

    def screenshot(self, name: str) -> None:
        time.sleep(1.5)  # until animations have ended
        self.browser.save_screenshot(str(self.out / f"{name}.png"))
        print(self.out / f"{name}.png", flush=True)


def find_program(*names: str) -> str:
    """Returns the path of the first of these programs that is installed. Raises: SystemExit if none is."""
    for name in names:
        if path := shutil.which(name):
            return path
    sys.exit(f"error: no {' or '.join(names)} found; install e.g. Debian's {names[0]}")


def tour(walk: Tour, uri: str, experiment: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment_id = client.get_experiment_by_name(experiment).experiment_id
    runs = [
        r
        for r in client.search_runs([experiment_id])
        if r.info.status == "FINISHED" and r.data.tags.get("kind") != "sweep"
    ]
    last = runs[0]
    walk.open("/experiments")
    walk.click("Model training")  # the other entry of MLflow's menu
    walk.shows(experiment)
    walk.screenshot("1-experiments")
    walk.open(f"/experiments/{experiment_id}/runs")
    walk.press(".ag-row button")  # expands the runs below the sweep
    walk.press("button[aria-label=Close]")  # the assistant
    walk.shows(*(run.info.run_name for run in runs[:4]))
    walk.screenshot("2-runs")
    walk.open(f"/experiments/{experiment_id}/runs?compareRunsMode=CHART")
    walk.charts(2)
    walk.type("input[placeholder='Search metric charts']", CHARTS)
    walk.shows("validation/accuracy")
    walk.screenshot("3-charts")
    run_ids = ",".join(f'"{run.info.run_id}"' for run in runs[:4])
    walk.open(f'/compare-runs?runs=[{run_ids}]&experiments=["{experiment_id}"]')
    walk.shows("test/accuracy", "seed")
    walk.screenshot("4-compared")
    walk.open(f"/experiments/{experiment_id}/runs/{last.info.run_id}")
    walk.shows(last.info.run_name, "best/validation_accuracy", "make train")
    walk.screenshot("5-run")
    walk.open(f"/experiments/{experiment_id}/runs/{last.info.run_id}/artifacts")
    walk.click(next(a.path for a in client.list_artifacts(last.info.run_id) if a.path.endswith(".png")))
    walk.image()
    walk.screenshot("6-picture")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the screenshots")
    parser.add_argument("--uri", help="an MLflow store (default: a new one with a small sweep)")
    parser.add_argument("--experiment", default="tour")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tour-") as root:
        uri = options.uri or make_runs(Path(root))
        with ui(uri) as address:
            walk = Tour(address, options.out)
            try:
                tour(walk, uri, options.experiment)
            except TimeoutError as error:
                walk.screenshot("missing")
                print(f"error: {error}", file=sys.stderr)
                return 1
            finally:
                walk.browser.quit()
    return 0


if __name__ == "__main__":
    sys.exit(main())
