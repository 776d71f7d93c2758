"""A walk through the MLflow UI as people use it, by a real browser: what it must show is there, and is photographed.

    python scripts/docs/ui_tour.py --out runs/ui-tour   (makes a small sweep in a store of its own first: 2 minutes)
    python scripts/docs/ui_tour.py --uri sqlite:///mlflow.db --experiment inception --out runs/ui-tour

It starts `make ui`, opens the list of experiments, the runs of one, charts of several runs side by side, the page of a
run, and a picture among its artifacts. Needs Chromium and its driver (Debian: chromium, chromium-driver).
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
CHARTS = "(train|validation)/main"
SIZE = (1500, 1000)
PATIENCE_SECONDS = 180


def make_runs(place: Path) -> str:
    """A sweep of two small runs with tests; the store's address."""
    uri = f"sqlite:///{place / 'mlflow.db'}"
    words = [*SWEEP, *SMALL, f"tracking.uri={uri}", "tracking.experiment=tour", f"run_dir={place / 'sweep'}"]
    subprocess.run(["make", "sweep", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return uri


@contextmanager
def ui(uri: str) -> Iterator[str]:
    """`make ui` over this store; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    jobs = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # nine processes for what no page of ours needs
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


def until(there: Callable[[], Any], what: str) -> Any:
    """Waits for it. Raises: TimeoutError naming what did not come."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            if found := there():
                return found
        except Exception as fault:  # pages change under the eyes of whoever reads them
            last = fault
        else:
            last = None
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {PATIENCE_SECONDS} s ({last})")
        time.sleep(0.5)


class Tour:
    """A browser, and where its photographs go."""

    def __init__(self, address: str, out: Path):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={SIZE[0]},{SIZE[1]}"):
            options.add_argument(word)
        options.binary_location = found("chromium", "chromium-browser", "google-chrome")
        service = webdriver.ChromeService(found("chromedriver"))
        self.browser = webdriver.Chrome(options=options, service=service)
        self.address, self.out = address, out
        out.mkdir(parents=True, exist_ok=True)

    def open(self, path: str) -> None:
        self.browser.get(f"{self.address}/#{path}")

    def text(self) -> str:
        return self.browser.execute_script("return document.body.innerText")

    def shows(self, *texts: str) -> None:
        """Waits until all of them can be read."""
        for text in texts:
            until(lambda text=text: text in self.text(), f"{self.browser.current_url} shows {text!r}")

    def click(self, text: str) -> None:
        """On what has this text itself."""
        script = (
            "const own = e => [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.textContent).join('').trim();"
            "const found = [...document.querySelectorAll('body *')].filter(e => own(e) === arguments[0]);"
            " if (!found.length) return false;"
            " found[found.length - 1].scrollIntoView({block: 'center'}); found[found.length - 1].click(); return true"
        )
        until(lambda: self.browser.execute_script(script, text), f"{text!r} can be clicked")

    def press(self, selector: str) -> None:
        """On the first that this finds."""
        script = "const found = document.querySelector(arguments[0]); if (found) found.click(); return !!found"
        until(lambda: self.browser.execute_script(script, selector), f"{selector} can be pressed")

    def type(self, selector: str, words: str) -> None:
        """Into the first field that this finds."""
        until(lambda: self.browser.find_element("css selector", selector), f"{selector} is there").send_keys(words)

    def picture(self) -> None:
        """Waits until an image of some size is there."""
        script = "return [...document.querySelectorAll('img')].some(i => i.complete && i.naturalWidth > 250)"
        until(lambda: self.browser.execute_script(script), "a picture is shown")

    def charts(self, count: int) -> None:
        """Waits until so many are drawn. Their tools, which hover over them where there is no mouse, are left away."""
        script = "return document.querySelectorAll('.js-plotly-plot').length"
        until(lambda: self.browser.execute_script(script) >= count, f"{count} charts are drawn")
        hide = "document.head.append(Object.assign(document.createElement('style'), {textContent: arguments[0]}))"
        self.browser.execute_script(hide, ".modebar-container {display: none}")

    def photograph(self, name: str) -> None:
        time.sleep(1.5)  # what moves comes to rest
        self.browser.save_screenshot(str(self.out / f"{name}.png"))
        print(self.out / f"{name}.png", flush=True)


def found(*names: str) -> str:
    """Raises: SystemExit if none of these programs is there."""
    for name in names:
        if path := shutil.which(name):
            return path
    sys.exit(f"error: the tour needs a browser, got no {' or '.join(names)}; install e.g. Debian's {names[0]}")


def tour(walk: Tour, uri: str, experiment: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    number = client.get_experiment_by_name(experiment).experiment_id
    runs = [
        r for r in client.search_runs([number]) if r.info.status == "FINISHED" and r.data.tags.get("kind") != "sweep"
    ]
    last = runs[0]
    walk.open("/experiments")
    walk.click("Model training")  # MLflow's menu has another one
    walk.shows(experiment)
    walk.photograph("1-experiments")
    walk.open(f"/experiments/{number}/runs")
    walk.press(".ag-row button")  # what lies below a sweep is folded
    walk.press("button[aria-label=Close]")  # the assistant
    walk.shows(*(run.info.run_name for run in runs[:4]))
    walk.photograph("2-runs")
    walk.open(f"/experiments/{number}/runs?compareRunsMode=CHART")
    walk.charts(2)
    walk.type("input[placeholder='Search metric charts']", CHARTS)
    walk.shows("validation/accuracy")
    walk.photograph("3-charts")
    chosen = ",".join(f'"{run.info.run_id}"' for run in runs[:4])
    walk.open(f'/compare-runs?runs=[{chosen}]&experiments=["{number}"]')
    walk.shows("test/accuracy", "seed")
    walk.photograph("4-compared")
    walk.open(f"/experiments/{number}/runs/{last.info.run_id}")
    walk.shows(last.info.run_name, "best/validation_accuracy", "make train")
    walk.photograph("5-run")
    walk.open(f"/experiments/{number}/runs/{last.info.run_id}/artifacts")
    walk.click(next(a.path for a in client.list_artifacts(last.info.run_id) if a.path.endswith(".png")))
    walk.picture()
    walk.photograph("6-picture")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the photographs go")
    parser.add_argument("--uri", help="an MLflow store; without it a small one is made")
    parser.add_argument("--experiment", default="tour")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tour-") as place:
        uri = options.uri or make_runs(Path(place))
        with ui(uri) as address:
            walk = Tour(address, options.out)
            try:
                tour(walk, uri, options.experiment)
            except TimeoutError as fault:
                walk.photograph("missing")
                print(f"error: {fault}", file=sys.stderr)
                return 1
            finally:
                walk.browser.quit()
    return 0


if __name__ == "__main__":
    sys.exit(main())
