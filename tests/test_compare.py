"""`make compare`: rows over seeds from a real MLflow store."""

from __future__ import annotations

import csv
import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from support.commands import message
from support.shared import once
from train.compare import (
    HEADINGS,
    DatasetComparison,
    columns_that_fit,
    compare,
    find_baseline,
    format_row,
    make_labels,
    make_row,
    matches,
    pareto_front,
)
from train.tracking.mlflow_query import RunRecord

COMMON = {"data.name": "digits", "epochs": "12", "schedule.name": "cosine", "tracking.uri": "x", "run_dir": "None"}
NASTY = "<script>alert(1)</script>"


def add(
    client: Any, experiment: str, number: int, params: dict[str, Any], metrics: dict[str, float], **more: Any
) -> str:
    from mlflow.entities import Metric, Param

    tags = {"run_id": f"run{number}", "data_fingerprint": "f" * 64, **more.get("tags", {})}
    run = client.create_run(experiment, start_time=1000 * number, tags=tags, run_name=more.get("name", f"run {number}"))
    full = {**COMMON, **params, "run_dir": f"runs/{number}", "data.fingerprint": "f"}
    client.log_batch(
        run.info.run_id,
        [Metric(name, value, 0, 0) for name, value in metrics.items()],
        [Param(name, str(value)) for name, value in full.items()],
    )
    client.set_terminated(run.info.run_id, more.get("status", "FINISHED"))
    return run.info.run_id


def costs(macs: float) -> dict[str, float]:
    return {
        "cost/parameters": macs / 10,
        "cost/macs": macs,
        "images_per_second": 1e9 / macs,
        "cost/peak_memory_bytes": 2**30,
    }


def fill(place: Path) -> str:
    """Record vgg16 at two widths and vgg16_inception, four seeds each, and runs that must be left out."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{place / 'mlflow.db'}"
    client, number = MlflowClient(uri), 0
    lab, mixed = client.create_experiment("lab"), client.create_experiment("mixed")
    client.create_experiment("empty")
    for model, width, accuracies, macs in (
        ("vgg16", "1.0", (0.95, 0.96, 0.94, 0.95), 3e8),
        ("vgg16", "0.5", (0.93, 0.92, 0.94, 0.93), 1e8),
        ("vgg16_inception", "1.0", (0.97, 0.98, 0.97, 0.98), 2e8),
    ):
        for seed, accuracy in enumerate(accuracies):
            number += 1
            params = {"model.name": model, "model.width": width, "seed": seed}
            add(client, lab, number, params, {"test/accuracy": accuracy, "train/loss": 0.1, **costs(macs)})
    other = {"model.name": "vgg16", "model.width": "1.0", "seed": 9}
    add(client, lab, 100, other, {"test/accuracy": 0.5}, status="FAILED", name="broke")
    add(client, lab, 101, other, {"train/loss": 0.5}, name=NASTY)
    add(client, lab, 102, other, {"test/accuracy": float("nan")}, name="nan")
    add(client, lab, 103, {}, {"sweep/best": 1.0}, tags={"kind": "sweep"}, name="a sweep")
    client.delete_run(add(client, lab, 104, other, {"test/accuracy": 0.1}))
    for fingerprint, accuracy in (("a" * 64, 0.5), ("b" * 64, 0.9)):
        number += 1
        params = {"model.name": "vgg16", "seed": 0, "data.name": NASTY}
        add(client, mixed, number, params, {"test/accuracy": accuracy}, tags={"data_fingerprint": fingerprint})
    some = client.create_experiment("costs")
    for model, cost in (("inception_v3", {}), ("inception_v1", costs(2e8)), ("vgg16", costs(1e8))):
        number += 1
        add(client, some, number, {"model.name": model, "seed": 0}, {"test/accuracy": 0.9, **cost})
    return uri


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return once(tmp_path_factory, "compared", fill)


def compared(store: str, out: Path, *words: str) -> str:
    """The output of the command."""
    text = io.StringIO()
    with redirect_stdout(text):
        compare([f"uri={store}", f"out={out}", *words])
    return text.getvalue()


def lines_of(out: Path) -> list[dict[str, str]]:
    with (out / "compare.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def lab(store: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The output, and the folder of the files."""

    def make(place: Path) -> tuple[str, Path]:
        return compared(store, place, "experiment=lab", "baseline=model=vgg16,model.width=1.0"), place

    return once(tmp_path_factory, "lab", make)


def test_runs_that_differ_only_in_seed_form_a_row(lab: tuple[str, Path]):
    rows = lines_of(lab[1])
    assert [(row["row"], row["n"], float(row["mean"])) for row in rows] == [
        ("vgg16_inception model.width=1.0", "4", 0.975),
        ("vgg16 model.width=1.0", "4", 0.95),
        ("vgg16 model.width=0.5", "4", 0.93),
    ]
    assert rows[0]["seeds"] == "0:0.97 1:0.98 2:0.97 3:0.98"
    assert (rows[0]["macs"], rows[0]["parameters"], rows[0]["memory"]) == ("200000000", "20000000", "1073741824")


def test_printed_interval_of_two_seeds_lies_within_0_and_1():
    runs = [
        RunRecord("", "FINISHED", 0, {"seed": str(seed)}, {"a": accuracy}, {})
        for seed, accuracy in ((0, 0.2), (1, 0.6))
    ]
    row = make_row("", runs, "a")
    cells = dict(zip(HEADINGS, format_row(row, DatasetComparison("", "", [row], None)), strict=True))
    assert (cells["accuracy"], cells["95 % interval"]) == ("0.4000 ± 0.2828", "0.0058 to 0.9870")


def test_differences_are_paired_and_the_baseline_has_none(lab: tuple[str, Path]):
    inception, baseline, narrow = lines_of(lab[1])
    assert float(inception["difference"]) == pytest.approx(0.025)
    assert float(inception["difference_low"]) == pytest.approx(0.0158, abs=1e-4)
    assert float(inception["p"]) == pytest.approx(0.0030, abs=5e-4)
    assert baseline["difference"] == ""
    assert float(narrow["difference"]) == pytest.approx(-0.02)


def test_pareto_front_is_what_nothing_beats_at_its_cost(lab: tuple[str, Path]):
    assert [row["on_pareto_front"] for row in lines_of(lab[1])] == ["1", "0", "1"]
    assert pareto_front([(1, 0.5), (1, 0.5), (2, 0.5), (3, 0.9), (3, 0.8)]) == [True, True, False, True, False]
    assert pareto_front([(float("nan"), 0.9), (1, 0.5)]) == [False, True]


def test_runs_left_out_are_reported(lab: tuple[str, Path]):
    assert "excluded 1 run not finished (failed): broke" in lab[0]
    assert f"excluded 1 run without test/accuracy: {NASTY}" in lab[0]
    assert "excluded 1 run with non-finite test/accuracy: nan" in lab[0]
    assert "a sweep" not in lab[0]


def test_values_from_runs_are_escaped_in_html(lab: tuple[str, Path], store: str, tmp_path: Path):
    compared(store, tmp_path, "experiment=mixed")
    for page in (lab[1] / "compare.html", tmp_path / "compare.html"):
        text = page.read_text()
        assert "<script" not in text
        assert "&lt;script&gt;" in text
        assert not re.search(r'(src|href)="(?!data:)', text)  # one file, no network


def test_other_data_sets_are_compared_separately(store: str, tmp_path: Path):
    output = compared(store, tmp_path, "experiment=mixed")
    assert "the runs use 2 different data sets; each is compared separately" in output
    assert [(row["data_fingerprint"][0], row["mean"], row["n"]) for row in lines_of(tmp_path)] == [
        ("a", "0.5", "1"), ("b", "0.9", "1"),
    ]  # fmt: skip


def test_filters_and_sorting(store: str, tmp_path: Path):
    compared(store, tmp_path, "experiment=lab", "model=vgg16", "sort=macs")
    assert [row["row"] for row in lines_of(tmp_path)] == ["model.width=0.5", "model.width=1.0"]


def test_a_row_without_a_known_cost_sorts_last(store: str, tmp_path: Path):
    compared(store, tmp_path, "experiment=costs", "sort=macs")
    assert [row["row"] for row in lines_of(tmp_path)] == ["vgg16", "inception_v1", "inception_v3"]


def test_filter_values_are_parsed_as_for_a_run():
    params = {"model.blocks": "['conv', 'conv_bn']", "evaluate.test": "True", "threads": "None", "model.width": "0.50"}
    assert matches(params, {"model.blocks": "[conv,conv_bn]", "evaluate.test": "true", "threads": "null"})
    assert matches(params, {"model.width": ".5"})
    assert not matches(params, {"model.width": "0.25"})
    assert not matches(params, {"epochs": "None"})
    rows = [
        make_row("", [RunRecord("", "FINISHED", 0, {"seed": "0", "model.blocks": blocks}, {"a": 1.0}, {})], "a")
        for blocks in ("['a', 'b']", "['b', 'a']")
    ]
    assert find_baseline(rows, "model.blocks=[b,a]") is rows[1]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["experiment=nothing"], "unknown experiment nothing; experiments in the store: costs, empty, lab, mixed"),
        (["experiment=empty"], "experiment empty has no runs; train one with make train"),
        (["experiment=lab", "metric=train/loss"], "metric must be one of auto, test, validation, got train/loss"),
        (["experiment=lab", "modle=vgg16"], "experiment lab); did you mean model=vgg16?"),
        (["experiment=lab", "metric=validation"], "no finished run has best/validation_accuracy: "),
        (["experiment=lab", "epochs=99"], "no run matches epochs=99 (of 15 runs in experiment lab)"),
        (
            ["experiment=lab", "baseline=model=vgg16"],
            "baseline=model=vgg16 matches 2 rows: vgg16 model.width=",
        ),
        (
            ["experiment=lab", "baseline=model=resnet"],
            "no row matches baseline=model=resnet; the rows are: vgg16_inception model.width=1.0",
        ),
        (["experiment=lab", "sort=beauty"], "sort must be one of accuracy, name, parameters"),
        (["lab"], "arguments must be key=value, got lab"),
    ],
)
def test_invalid_comparison_is_rejected(filters: list[str], expected: str, store: str, tmp_path: Path):
    assert expected in message(compare, [f"uri={store}", f"out={tmp_path / 'out'}", *filters])
    assert not (tmp_path / "out").exists()


def test_missing_store_is_reported(tmp_path: Path):
    absent = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert "no MLflow store at sqlite:///" in message(compare, [f"uri={absent}"])
    assert not list(tmp_path.iterdir())  # a query does not create the store


def test_unreachable_store_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):  # set by the query; restored after the test
        monkeypatch.setenv(name, "")
    error = message(compare, ["uri=http://user:secret@127.0.0.1:9"])
    assert error.startswith("the MLflow store failed: ")
    assert "secret" not in error


def test_narrow_terminal_keeps_labels_and_accuracy():
    row = dict.fromkeys(HEADINGS, "0.1234 to 0.5678") | {"to baseline": "", "p": ""}
    assert columns_that_fit([row], 200) == [
        "seeds",
        "accuracy",
        "95 % interval",
        "parameters",
        "MACs",
        "images/s",
        "memory",
    ]
    assert columns_that_fit([row], 80) == ["seeds", "accuracy", "MACs"]


def test_labels_show_only_what_differs():
    one = {"model.name": "vgg16", "epochs": "12", "optimizer.name": "sgd", "optimizer.momentum": "0.9"}
    other = one | {"model.name": "vgg16_inception", "model.blocks": "['conv']"}
    third = {**one, "optimizer.name": "adamw", "optimizer.beta_1": "0.9"}
    del third["optimizer.momentum"]
    assert make_labels([one, other, third]) == [
        "vgg16 optimizer=sgd",
        "vgg16_inception optimizer=sgd",
        "vgg16 optimizer=adamw",
    ]
    assert make_labels([one]) == ["vgg16"]
    blocks = [one | {"model.blocks": f"['conv', '{kind}']"} for kind in ("a", "b")]
    assert make_labels(blocks) == ["model.blocks=[conv,a]", "model.blocks=[conv,b]"]


def test_number_of_queries_does_not_depend_on_the_number_of_runs(store: str, tmp_path: Path):
    """One query per run would take minutes for thousands of runs or a distant server."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    asked: list[str] = []

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        asked.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        counts = {}
        for experiment, seeds in (("costs", 1), ("costs", 1), ("lab", 4)):  # the first also opens the store
            asked.clear()
            compared(store, tmp_path / experiment, f"experiment={experiment}")
            counts[experiment] = len(asked)
            assert [row["seeds"].count(":") for row in lines_of(tmp_path / experiment)] == [seeds] * 3
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert 0 < counts["lab"] == counts["costs"]
