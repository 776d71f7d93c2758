"""train/runtime.py: what `auto` means, and what is loaded for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.commands import ROOT, run_command
from train.config.composition import compose
from train.config.schema import MIN_IMAGE_SIZE
from train.runtime import setup

MEASURED = {"cpu": {"vgg16": {"precision": "mixed_bfloat16", "jit": "on", "cores": 0.5, "why": "7.00 times as fast"}}}
LARGE = {
    "tensorflow", "keras", "tensorflow_datasets", "mlflow", "sklearn", "scipy", "pandas", "matplotlib", "optuna",
    "sqlalchemy", "ray", "submitit",
}  # fmt: skip


NO_EVIDENCE = ["evaluate.test=false", "evaluate.report=false"]  # scores and pictures come after the last step


@pytest.fixture
def a_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bfloat16, of eight cores, with a table of its own."""
    monkeypatch.setattr(setup, "AUTO_SETTINGS", tmp_path / "auto_settings.json")
    monkeypatch.setattr(setup, "_cpu_flags", set)
    monkeypatch.setattr(setup, "cores", lambda: 8)
    (tmp_path / "auto_settings.json").write_text(json.dumps(MEASURED))


def settled(*words: str) -> tuple[str, str, int | None, str]:
    config, why = setup.resolve_auto(compose(["device=cpu", *words]))
    return config.precision, config.jit, config.threads, why


@pytest.mark.usefixtures("a_processor")
def test_auto_is_what_the_table_says():
    assert settled("model=vgg16") == ("mixed_bfloat16", "on", 4, " (auto: 7.00 times as fast)")
    assert settled("model=vgg16", "jit=off", "threads=3") == ("mixed_bfloat16", "off", 3, " (auto: 7.00 times as fast)")
    assert settled("model=vgg16", "precision=float32", "jit=off", "threads=3") == ("float32", "off", 3, "")


@pytest.mark.usefixtures("a_processor")
def test_where_nothing_was_measured_that_is_said():
    assert settled("model=inception_v1") == ("float32", "off", 8, " (auto: usual for cpu, not measured)")


def test_fewer_bits_than_asked_for_are_told():
    assert setup.tf32_note("gpu_bfloat16", "float32")[0].startswith("float32: this GPU multiplies in TF32")
    assert setup.tf32_note("gpu_bfloat16", "mixed_bfloat16") == setup.tf32_note("gpu", "float32") == []


def test_the_table_has_only_what_can_be_typed():
    table = json.loads(setup.AUTO_SETTINGS.read_text())
    assert set(table["cpu_bfloat16"]) == set(MIN_IMAGE_SIZE)
    for rows in table.values():
        for model, row in rows.items():
            compose([f"model={model}", f"precision={row['precision']}", f"jit={row['jit']}"])
            assert 0 < row["cores"] <= 1
            assert row["why"]


def test_what_is_absent_comes_back():
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
def test_what_a_command_loads(module: str, words: list[str], may: set[str], tmp_path: Path):
    """Seconds that everybody waits who types it."""
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
