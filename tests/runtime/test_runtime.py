"""train/runtime/setup.py: how `auto` is resolved, and which modules the commands import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.commands import ROOT, run_command
from train.config.composition import compose
from train.config.schema import MIN_IMAGE_SIZE
from train.run import factory
from train.runtime import setup

MEASURED = {
    "cpu": {"vgg16": {"precision": "mixed_bfloat16", "jit": "on", "cores": 0.5, "why": "measured 7.00x faster"}}
}
LARGE = {
    "tensorflow", "keras", "tensorflow_datasets", "mlflow", "sklearn", "scipy", "pandas", "matplotlib", "optuna",
    "sqlalchemy", "ray", "submitit",
}  # fmt: skip


NO_EVIDENCE = ["evaluate.test=false", "evaluate.report=false"]  # evaluation and plots come after the last step


@pytest.fixture
def a_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without bfloat16, with eight cores and its own table."""
    monkeypatch.setattr(setup, "AUTO_SETTINGS", tmp_path / "auto_settings.json")
    monkeypatch.setattr(setup, "_cpu_flags", set)
    monkeypatch.setattr(setup, "cores", lambda: 8)
    (tmp_path / "auto_settings.json").write_text(json.dumps(MEASURED))


def settled(*words: str) -> tuple[str, str, int | None, str]:
    config = compose(["device=cpu", *words])
    settings, why = setup.resolve_auto(factory.runtime_settings(config), config.model.name)
    return settings.precision, settings.jit, settings.threads, why


@pytest.mark.usefixtures("a_processor")
def test_auto_follows_the_table():
    assert settled("model=vgg16") == ("mixed_bfloat16", "on", 4, " (auto: measured 7.00x faster)")
    assert settled("model=vgg16", "jit=off", "threads=3") == (
        "mixed_bfloat16",
        "off",
        3,
        " (auto: measured 7.00x faster)",
    )
    assert settled("model=vgg16", "precision=float32", "jit=off", "threads=3") == ("float32", "off", 3, "")


@pytest.mark.usefixtures("a_processor")
def test_unmeasured_model_uses_the_defaults_and_says_so():
    assert settled("model=inception_v1") == ("float32", "off", 8, " (auto: default for cpu, not measured)")


def test_tf32_is_noted():
    assert setup.tf32_note("gpu_bfloat16", "float32")[0].startswith(
        "note: on this GPU float32 matrix products use TF32"
    )
    assert setup.tf32_note("gpu_bfloat16", "mixed_bfloat16") == setup.tf32_note("gpu", "float32") == []


def test_table_has_only_valid_settings():
    table = json.loads(setup.AUTO_SETTINGS.read_text())
    assert set(table["cpu_bfloat16"]) == set(MIN_IMAGE_SIZE)
    for rows in table.values():
        for model, row in rows.items():
            compose([f"model={model}", f"precision={row['precision']}", f"jit={row['jit']}"])
            assert 0 < row["cores"] <= 1
            assert row["why"]


def test_hidden_modules_come_back():
    script = (
        "import sys; from train.runtime.setup import hide_modules; import numpy\n"
        "with hide_modules('numpy', 'sklearn'):\n"
        "    import numpy.linalg\n"
        "    try: import sklearn\n"
        "    except ImportError as fault: print(fault)\n"
        "import sklearn.base; print('there')"
    )
    assert run_command(sys.executable, "-c", script).out.splitlines()[1:] == ["there"]


@pytest.mark.parametrize(
    ("module", "words", "may"),
    [
        ("train", ["--check"], set()),
        ("train", ["-m", "seed=0,1", "sweep.dry_run=true"], set()),
        pytest.param("train.cost", ["model=vgg16"], {"tensorflow", "keras"}, marks=pytest.mark.slow),
        pytest.param(
            "train",
            ["model=vgg16", "model.width=0.05", "epochs=1", "steps_per_epoch=1", *NO_EVIDENCE],
            {"tensorflow", "keras", "tensorflow_datasets"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["check", "sweep", "cost", "train"],
)
def test_commands_import_only_what_they_need(module: str, words: list[str], may: set[str], tmp_path: Path):
    """Imports are seconds that every user of a command waits."""
    if "epochs=1" in words:
        words = [*words, f"run_dir={tmp_path / 'run'}", f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"]
    script = tmp_path / "loaded.py"
    script.write_text(
        f"import atexit, runpy, sys\nsys.argv[1:] = {words!r}\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"atexit.register(lambda: print('loaded:', *sorted({LARGE!r} & set(sys.modules)), flush=True))\n"
        f"runpy.run_module({module!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split()[1:] == sorted(may)


def test_cores_are_at_most_those_of_the_machine():
    assert 1 <= setup.cores() <= (os.cpu_count() or 1)
