"""scripts/claims/: the runs of claims compose, verdicts follow the rules, and sharing a process changes no bit."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from support.commands import ROOT, run_command, run_train
from train.config.composition import compose
from train.config.schema import Claim, Expectation

sys.path.insert(0, str(ROOT / "scripts/claims"))  # processes of a pool look up their function by its module
NAMES = sorted(path.stem for path in (ROOT / "conf/experiment/claims").glob("[!_]*.yaml"))


@pytest.fixture(scope="module")
def claims() -> ModuleType:
    return importlib.import_module("claims")


@pytest.fixture(scope="module")
def verdicts() -> ModuleType:
    return importlib.import_module("verdicts")


def test_there_are_ten_claims():
    assert len(NAMES) == 10


@pytest.mark.parametrize("name", NAMES)
def test_claim_is_documented_and_its_runs_compose(name: str, claims: ModuleType, verdicts: ModuleType):
    claim: Claim = compose([f"experiment=claims/{name}"]).claim
    assert claim.hypothesis.endswith(".")
    assert claim.source
    assert claim.seeds >= 6
    assert "digits" in claim.settings
    for expected in claim.expectations:
        assert {expected.variant, expected.against} <= set(claim.variants)
        assert expected.metric in verdicts.MEASURES
        assert expected.expect != "ratio" or 0 < expected.least < expected.most
    trials = claims.trials_of(name, claim)
    assert len({trial.key for trial in trials}) == claim.seeds * len(claim.settings) * len(claim.variants)
    assert all(trial.command.startswith("make train model=") for trial in trials)


@pytest.mark.slow
def test_claims_share_common_runs(claims: ModuleType):
    chosen = claims.claims(["bottleneck", "factorised", "auxiliary"])
    one, two, three = ({trial.key for trial in claims.trials_of(*claim)} for claim in chosen.items())
    assert one & two & three
    assert len(one | two | three) < len(one) + len(two) + len(three)


def expecting(what: str, **limits: float) -> Expectation:
    return Expectation("new", "old", "test_accuracy", what, **limits)


SURE = {seed: 0.001 * seed for seed in range(6)}  # a difference of 0.05 +- 0.002 to these
APART = {
    "better": {seed: value + 0.05 + 0.001 * (-1) ** seed for seed, value in SURE.items()},
    "equal": {seed: value + 0.001 * (-1) ** seed for seed, value in SURE.items()},
    "worse": {seed: value - 0.05 + 0.001 * (-1) ** seed for seed, value in SURE.items()},
    "unclear": {seed: value + 0.05 * (-1) ** seed for seed, value in SURE.items()},
}


@pytest.mark.parametrize(
    ("what", "margin", "expected"),
    [
        ("higher", 0.01, ("supported", "not supported", "not supported", "undecided at this size")),
        ("higher", 0.0, ("supported", "undecided at this size", "not supported", "undecided at this size")),
        ("not lower", 0.01, ("supported", "supported", "not supported", "undecided at this size")),
        ("lower", 0.01, ("not supported", "not supported", "supported", "undecided at this size")),
    ],
)
def test_verdict_follows_the_margin(what: str, margin: float, expected: tuple[str, ...], verdicts: ModuleType):
    verdict_of_each = [
        verdicts.answer(expecting(what, margin=margin), "digits", one, SURE).verdict for one in APART.values()
    ]
    assert tuple(verdict_of_each) == expected


def test_ratio_is_inside_its_range_or_not(verdicts: ModuleType):
    rule = expecting("ratio", least=7, most=15)
    assert verdicts.answer(rule, "digits", {0: 120.0}, {0: 10.0}).verdict == "supported"
    assert verdicts.answer(rule, "digits", {0: 160.0}, {0: 10.0}).verdict == "not supported"
    assert verdicts.answer(rule, "digits", {}, {0: 10.0}).verdict == "undecided at this size"


def test_claim_is_supported_only_when_every_part_is(verdicts: ModuleType):
    yes, no, open_ = (
        verdicts.Answer("digits", expecting("higher"), verdict)
        for verdict in (verdicts.SUPPORTED, verdicts.REFUTED, verdicts.OPEN)
    )
    assert verdicts.verdict([yes, yes]) == "supported"
    assert verdicts.verdict([yes, open_]) == "undecided at this size"
    assert verdicts.verdict([yes, open_, no]) == "not supported"
    assert verdicts.answer(expecting("higher"), "digits", {0: 1.0}, {0: 0.0}).verdict == verdicts.OPEN


TINY = ("model.width=0.05", "epochs=1", "steps_per_epoch=4", "threads=1", "precision=float32", "evaluate.report=false",
        "tracking.wait_seconds=0", "tracking.gradients=true", "tracking.every_steps=2")  # fmt: skip


SHARED = """
import sys; sys.path.insert(0, "scripts/claims")
import claims
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

def main():
    place, *words = sys.argv[1:]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        for seed in (3, 4):
            trial = claims.Trial("c", "digits", "v", seed, (*words, f"seed={seed}"), f"{place}/shared{seed}", "make")
            claims.append(claims.Path(place) / "rows.csv", pool.submit(claims.run, trial).result())

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_consecutive_runs_in_a_process_have_the_bits_of_separate_runs(tmp_path: Path, claims: ModuleType):
    words = [*TINY, f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"]
    (tmp_path / "shared.py").write_text(SHARED)
    done = run_command(
        sys.executable, str(tmp_path / "shared.py"), str(tmp_path), *words, env={"PYTHONPATH": "scripts/claims"}
    )
    assert done.code == 0, done.err
    assert run_train(*words, "seed=4", f"run_dir={tmp_path / 'alone'}").code == 0
    alone, shared = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("alone", "shared4"))
    assert shared["weights_sha256"] == alone["weights_sha256"]
    assert shared["test"] == alone["test"]
    first, second = claims.read(tmp_path / "rows.csv").values()
    assert first["weights_sha256"] != second["weights_sha256"] == alone["weights_sha256"][:16]
    assert float(second["gradient_norm"]) > 0
    assert int(second["branch_5x5_macs"]) > 0
    assert "status=finished" in (tmp_path / "shared4/output.txt").read_text()


def test_runs_in_the_table_are_not_repeated(tmp_path: Path, claims: ModuleType):
    table = tmp_path / "claims.csv"
    row = dict.fromkeys(claims.COLUMNS, 0) | {"key": "abc", "test_accuracy": 0.5}
    claims.append(table, row)
    claims.append(table, row | {"key": "def"})
    assert list(claims.read(table)) == ["abc", "def"]
    with table.open() as file:
        assert len(list(csv.reader(file))) == 3
    assert claims.read(tmp_path / "none.csv") == {}


def test_unknown_claim_is_named(claims: ModuleType):
    with pytest.raises(SystemExit, match=r"unknown claim beauty; valid names: against_vgg16, "):
        claims.claims(["beauty"])


def test_quick_runs_are_tiny_and_need_no_download(claims: ModuleType):
    [(name, claim)] = claims.claims(["bottleneck"], quick=True).items()
    trials = claims.trials_of(name, claim)
    assert len(trials) == 2 * len(claim.variants)
    config = compose(list(trials[0].words))
    assert (config.data.name, config.epochs, config.steps_per_epoch) == ("digits", 2, 5)
