"""scripts/benchmarks/training.py and its baselines: what can be tested without PyTorch, JAX and a quiet machine."""

import ast
import json
from pathlib import Path

import pytest

from support.commands import ROOT, message
from support.scripts import load_script
from train import models


def kinds_of_torch() -> set[str]:
    """The layers that the PyTorch baseline supports, read from its source."""
    tree = ast.parse((ROOT / "scripts/benchmarks/baselines/torch_steps.py").read_text())
    [table] = [node.value for node in tree.body if isinstance(node, ast.AnnAssign) and node.target.id == "KINDS"]
    return {ast.literal_eval(key) for key in table.keys}


@pytest.mark.parametrize("name", ["vgg16", "vgg16_inception", "inception_v3"])
def test_baseline_supports_every_layer_of_the_networks(name: str):
    side = models.MIN_IMAGE_SIZE[name]
    model = models.build(name, (side, side, 1), 10, width=0.05)
    description = json.loads(json.dumps(load_script("benchmarks/baselines/export_network.py").description(model)))
    assert {layer["kind"] for layer in description["layers"]} - {"InputLayer"} <= kinds_of_torch()
    names = [layer["name"] for layer in description["layers"]]
    for number, layer in enumerate(description["layers"]):
        assert set(layer["inputs"]) <= set(names[:number])
    assert set(description["outputs"]) == {"main", "aux"}
    assert set(description["outputs"].values()) <= set(names)


@pytest.mark.parametrize(("now", "code"), [(2.0, 0), (1.81, 0), (1.79, 1)])
def test_guard_tolerates_only_noise(now: float, code: int, tmp_path: Path, capsys: pytest.CaptureFixture):
    bench = load_script("benchmarks/training.py")

    def figures(ratio: float) -> dict:
        model, name = bench.GUARDED
        return {"networks": [{"model": model, "ratios": {name: {"median": ratio}}}]}

    (tmp_path / "speed.json").write_text(json.dumps(figures(2.0)))
    assert bench.guard(figures(now), tmp_path / "speed.json") == code
    assert capsys.readouterr().out.startswith(f"vgg16_inception / Keras fit, float32: {now:.2f}, stored 2.00: ")


def test_guard_rejects_the_results_of_another_kind_of_device():
    bench = load_script("benchmarks/training.py")
    bench.check_comparable({"capability": "cpu_bfloat16"}, bench.FIGURES)
    assert message(bench.check_comparable, {"capability": "cpu"}, bench.FIGURES) == (
        f"{bench.FIGURES} was measured on cpu_bfloat16, this is cpu; measure the earlier commit here with "
        '--models vgg16_inception --only "Keras fit, float32" --report before.json, '
        "and use --guard --against before.json"
    )


@pytest.mark.slow
def test_missing_baseline_is_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    bench = load_script("benchmarks/training.py")
    none = tmp_path / "python"
    none.write_text("#!/bin/sh\nexit 1\n")
    none.chmod(0o755)
    available = bench.interpreters(str(none), str(none))
    assert set(available) == {"keras"}
    assert capsys.readouterr().out.splitlines() == [
        f"skipped: {name} is not installed for {none}; use --{name} PYTHON" for name in ("torch", "jax")
    ]
    remaining = bench.installed_contestants(list(bench.CONTESTANTS), available)
    assert [name for name in remaining if name.startswith(("PyTorch", "Keras on"))] == []
    assert len(remaining) == 4


def test_baseline_uses_the_precision_of_the_run():
    bench = load_script("benchmarks/training.py")

    def rounds(precision: str, *speeds: float) -> list[dict]:
        return [{"precision": precision, "images_per_second": speed} for speed in speeds]

    peers = {
        "Keras fit, float32": rounds("float32", 100.0, 100.0),
        "Keras fit, mixed_bfloat16": rounds("mixed_bfloat16", 200.0, 160.0),
    }
    ratios = bench.ratios({"make train": rounds("mixed_bfloat16", 400.0, 240.0), **peers})
    assert ratios[bench.SAME] == {"median": 1.75, "least": 1.5, "most": 2.0}
    assert ratios["Keras fit, float32"] == {"median": 3.2, "least": 2.4, "most": 4.0}
    ratios = bench.ratios({"make train": rounds("float32", 150.0, 150.0), **peers})
    assert ratios[bench.SAME] == {"median": 1.5, "least": 1.5, "most": 1.5}
    assert set(ratios) == {bench.SAME, "Keras fit, float32"}
    assert bench.SAME not in bench.ratios({"make train": rounds("mixed_float16", 150.0, 150.0), **peers})


def test_contestants_alternate_in_reversing_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    bench, order = load_script("benchmarks/training.py"), []

    def contestant(name: str):
        def measure(_: object) -> dict:
            order.append(name)
            return {"precision": "float32", "images_per_second": float(len(order)), "peak_memory_bytes": 2**20}

        return measure

    monkeypatch.setattr(bench, "CONTESTANTS", {name: contestant(name) for name in ("make train", "Keras fit, float32")})
    (tmp_path / "network.json").write_text('{"macs": 100}')
    task = bench.CPU_TASKS[0]
    context = bench.TaskContext(task, tmp_path, tmp_path, {})
    measured = bench.measure(task, context, list(bench.CONTESTANTS), 2, {"float32": 1500.0})
    assert order == ["make train", "Keras fit, float32", "Keras fit, float32", "make train"]
    ours, theirs = measured["rows"]
    assert ours["images_per_second"] == {"median": 2.5, "least": 1.0, "most": 4.0}
    assert ours["share_of_rate"] == 3 * 100 * 2.5 / 1500
    assert theirs["step_seconds"] == task.batch / 2.5
    assert measured["ratios"]["Keras fit, float32"] == {"median": (0.5 + 4 / 3) / 2, "least": 0.5, "most": 4 / 3}
    assert "% of the matrix rate" in bench.table({"networks": [measured]})
