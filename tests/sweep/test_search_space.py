"""Search spaces: how overrides are parsed, which trials they give, and which are rejected before the first one."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.commands import message, run_train
from support.sweeps import SMALL
from train.sweep import search_space
from train.sweep.search_space import Axis


def axes_of(*overrides: str) -> list[Axis]:
    return search_space.parse_axes(overrides, None)[1]


def test_overrides_are_parsed_into_axes():
    common, axes = search_space.parse_axes(
        [
            "epochs=3", "model=vgg16,inception_v3", "seed=range(1,4)", "batch_size=choice(16,32)",
            "optimizer.learning_rate=tag(log,interval(1e-4,1e-1))", "model.width=interval(0.1,1)",
            "model.blocks=[conv,conv],[conv_bn,conv_bn]", "optimizer.nesterov=true,false", "data.root='a b','c,d'",
        ],
        None,
    )  # fmt: skip
    assert common == ["epochs=3"]
    assert {axis.key: axis.values for axis in axes if not axis.is_range} == {
        "model": ("vgg16", "inception_v3"), "seed": (1, 2, 3), "batch_size": (16, 32),
        "model.blocks": (["conv", "conv"], ["conv_bn", "conv_bn"]), "optimizer.nesterov": (True, False),
        "data.root": ("a b", "c,d"),
    }  # fmt: skip
    assert {axis.key: (axis.low, axis.high, axis.log) for axis in axes if axis.is_range} == {
        "optimizer.learning_rate": (1e-4, 0.1, True), "model.width": (0.1, 1.0, False),
    }  # fmt: skip
    assert [axis.key for axis in axes if axis.is_config_group] == ["model"]
    assert search_space.config_group_choices(axes) == [["model=vgg16"], ["model=inception_v3"]]


def test_grid_varies_the_last_axis_fastest():
    points = list(search_space.grid_points(axes_of("model=vgg16,inception_v3", "seed=0,1")))
    assert [(point["model"], point["seed"]) for point in points] == [
        ("vgg16", 0), ("vgg16", 1), ("inception_v3", 0), ("inception_v3", 1),
    ]  # fmt: skip


def test_boundary_points_cover_every_value_and_both_ends_of_a_range():
    axes = axes_of("model=vgg16,inception_v3", "batch_size=8,16,32", "model.width=interval(0.1,1)")
    points = list(search_space.boundary_points(axes))
    assert len(points) == 6
    for model in ("vgg16", "inception_v3"):
        of_model = [point for point in points if point["model"] == model]
        assert {point["batch_size"] for point in of_model} == {8, 16, 32}
        assert {point["model.width"] for point in of_model} == {0.1, 1.0}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "model.width=interval(1,0.5)",
            "model.width must be a range from low to high, got model.width=interval(1,0.5); use e.g. "
            "model.width=interval(0.1,1)",
        ),
        (
            "model.width=tag(log,interval(0,1))",
            "model.width must be a range from low to high, above 0, got model.width=tag(log,interval(0,1)); use e.g. "
            "model.width=interval(0.1,1)",
        ),
    ],
)
def test_invalid_range_is_rejected(override: str, expected: str):
    assert message(axes_of, override) == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["epochz=1,2"], 'unknown key "epochz"; did you mean epochs?'),
        (["epochs=1,0"], "epochs must be at least 1, got 0; use e.g. epochs=12"),
        (["epochs=1,two"], "epochs must be a whole number, got two; use e.g. epochs=12"),
        (["model=vgg16,vgg"], "model must be one of "),
        (["model=vgg16,inception_v3", "data.image_size=32"], "data.image_size must be at least 75 for inception_v3"),
        (["epochs=1"], "nothing to sweep: every key has one value; use e.g. seed=0,1,2"),
        (["seed=range(10000)"], "10,000 trials exceed sweep.most=200; raise it to continue"),
        (["seed=0,1", "sweep.seeds=2"], "seed has several values and sweep.seeds is above 1; use one of the two"),
        (["model.width=interval(0.1,1)"], "model.width is a range, which sweep.search=grid cannot enumerate; use"),
        (["model.width=interval(0.1,9)", "sweep.search=tpe"], "model.width must be above 0 and at most 4, got 9"),
        (["batch_size=interval(1.5,8)", "sweep.search=random"], "batch_size must be a whole number, got interval("),
        (["epochs=4,8", "sweep.search=asha"], "epochs must be a single number with sweep.search=asha, got several"),
        (["seed=0,1", "sweep.parallel=0"], "sweep.parallel must be at least 1, got 0"),
        (["model.weights=null,/no/such.h5"], "model.weights=/no/such.h5 is not a file"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_every_trial_is_validated_before_the_first_one_starts(overrides: list[str], expected: str, tmp_path: Path):
    done = run_train("-m", *overrides, f"run_dir={tmp_path / 'sweep'}")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {expected}")
    assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_duplicate_trial_runs_once():
    done = run_train("-m", *SMALL, "seed=0,1,0", "sweep.dry_run=true")
    assert done.out == "duplicate trial, run only once: seed=0\n1: seed=0\n2: seed=1\nthe config is valid\n"


def test_overrides_take_precedence_over_a_search_space_file():
    done = run_train("-m", "sweep=rates", "sweep.search=random", "epochs=3", "sweep.dry_run=true")
    assert (done.code, done.out) == (0, "the config is valid\n")  # a search lists no trials in advance
    done = run_train(
        "-m", "sweep=rates", "optimizer.learning_rate=0.1,0.01", "label_smoothing=0.1", "sweep.dry_run=true"
    )
    assert done.out.splitlines() == [
        f"{number}: optimizer.learning_rate={rate} schedule.warmup_epochs={epochs}"
        for number, (rate, epochs) in enumerate(((r, e) for r in (0.1, 0.01) for e in (0, 1, 2)), 1)
    ] + ["the config is valid"]


def test_shipped_search_space_composes():
    done = run_train("-m", "sweep=blocks", "sweep.dry_run=true")
    assert done.out.count("\n") == 16
    assert "15: model.blocks=[conv_bn,conv_bn,inception_v3,conv_bn,inception_v3] seed=2\n" in done.out
