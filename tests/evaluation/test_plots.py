"""train/evaluation/plots/: from two classes to a thousand, and what the plots show."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from PIL import Image

from train import models
from train.evaluation.metrics import ClassificationResult, compute_metrics
from train.evaluation.plots import classification, comparison, image_grids, learning_curves, style
from train.models.grad_cam import first_conv_kernel, grad_cam, grad_cam_layer


def pixels(figure: Any) -> np.ndarray:
    """uint8 [H, W, 4]."""
    return np.asarray(Image.open(io.BytesIO(style.to_png(figure))))


def said(classes: int, examples: int = 400) -> tuple[ClassificationResult, dict[str, Any]]:
    draw = np.random.default_rng(0)
    truth = draw.integers(0, classes, examples)
    logits = draw.normal(size=(examples, classes)) + 2 * np.eye(classes)[truth]
    result = ClassificationResult(
        logits, truth, [f"class $x_{number}$ with a long name <b>" for number in range(classes)]
    )
    return result, compute_metrics(result)


@pytest.mark.parametrize("classes", [2, 10, 30, 200, 1000])
def test_plots_of_any_number_of_classes_fit_on_a_page(classes: int):
    result, numbers = said(classes)
    for figure in (
        classification.plot_confusion_matrix(numbers["confusion"], list(result.classes)),
        classification.plot_reliability_diagram(numbers["calibration"], numbers["ece"]),
        classification.plot_per_class_f1(numbers["classes"]),
    ):
        height, width = pixels(figure).shape[:2]
        assert 180 < height < 1800
        assert 300 < width < 1800


def test_confusion_matrix_shows_its_counts():
    figure = classification.plot_confusion_matrix([[5, 0], [2, 731]], ["a", "b"])
    assert {text.get_text() for text in figure.axes[0].texts} == {"5", "2", "731"}
    matrix, names = np.diag(range(50)), [f"c{n}" for n in range(50)]
    matrix[49, 48:] = 7, 3
    large = classification.plot_confusion_matrix(matrix.tolist(), names)
    assert [label.get_text() for label in large.axes[1].get_yticklabels()] == ["c49 → c48"]


def test_a_class_without_examples_has_no_bar():
    _, numbers = said(3)
    numbers["classes"][1] |= {"f1": None}
    figure = classification.plot_per_class_f1(numbers["classes"])
    assert len(figure.axes[0].patches) == 2


def line(epoch: int, step: int, **values: float) -> dict[str, Any]:
    return {"epoch": epoch, "step": step, "values": {name.replace("__", "/"): value for name, value in values.items()}}


def test_curves_show_all_losses_and_the_learning_rate():
    lines = [
        line(0, 5, train__loss=3.0, learning_rate=0.1),
        line(0, 10, train__total_loss=2.9, train__loss=2.0, train__aux_loss=3.0, validation__loss=1.5,
             validation__accuracy=0.5, train__accuracy=0.4, learning_rate=0.2),
        line(1, 20, train__total_loss=1.9, train__loss=1.0, train__aux_loss=2.0, validation__loss=0.5,
             validation__accuracy=0.7, train__accuracy=0.8, learning_rate=0.0),
    ]  # fmt: skip
    loss, accuracy, rate = (figure.axes[0] for figure in learning_curves.plot_learning_curves(lines, 2).values())
    drawn = {one.get_label(): one.get_xydata().tolist() for one in loss.lines}
    assert drawn["train"] == [[1, 2.0], [2, 1.0]]
    assert drawn["validation"] == [[1, 1.5], [2, 0.5]]
    assert drawn["train/aux"] == [[1, 3.0], [2, 2.0]]
    assert [[1, 2.9], [2, 1.9]] not in drawn.values()  # the total loss is not drawn
    assert {"train", "validation"} <= {one.get_label() for one in accuracy.lines}
    assert rate.lines[0].get_xydata().tolist() == [[0.5, 0.1], [1, 0.2], [2, 0.0]]
    assert [text.get_text() for text in accuracy.texts] == ["best: 2"]


def test_plot_without_errors_says_so():
    figure = image_grids.plot_top_errors(np.zeros((0, 8, 8, 3), np.uint8), [], [], [])
    assert "no errors" in figure.axes[0].texts[0].get_text()


def test_errors_and_filters_are_drawn_for_any_number_of_channels():
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 1), dtype=np.uint8)
    figure = image_grids.plot_top_errors(images, ["a"] * 7, [("b", 0.9)] * 7, ["name"] * 7)
    assert sum(bool(axes.images) for axes in figure.axes) == 7
    for channels in (1, 3, 5):
        kernel = np.random.default_rng(0).normal(size=(3, 3, channels, 70))
        assert (
            sum(bool(axes.images) for axes in image_grids.plot_filters(kernel, "conv").axes) == image_grids.MAX_FILTERS
        )


# --------------------------------------------------------------------------------------------------------- Grad-CAM


def corner_network() -> keras.Model:
    """A network whose class 0 responds to the upper left corner and class 1 to the lower right."""
    inputs = keras.Input((16, 16, 1))
    x = keras.layers.Conv2D(2, 1, use_bias=False, name="maps")(inputs)
    x = keras.layers.AveragePooling2D(4, name="coarse")(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="logits")(keras.layers.Flatten()(x)))
    weights = np.zeros((4, 4, 2, 2), np.float32)
    weights[:2, :2, :, 0] = weights[2:, 2:, :, 1] = 1.0
    model.get_layer("maps").set_weights([np.ones((1, 1, 1, 2), np.float32)])
    model.get_layer("logits").set_weights([weights.reshape(32, 2), np.zeros(2, np.float32)])
    return model


def test_grad_cam_highlights_the_evidence():
    images = np.zeros((2, 16, 16, 1), np.uint8)
    images[0, 2:6, 2:6], images[1, 10:14, 10:14] = 200, 200
    maps, layer = grad_cam(corner_network(), images, np.array([0, 1]))
    assert layer == "coarse"
    assert (maps.shape, maps.dtype, maps.max()) == ((2, 16, 16), np.float32, 1.0)
    assert maps[0, :8, :8].mean() > 10 * maps[0, 8:, 8:].mean()
    assert maps[1, 8:, 8:].mean() > 10 * maps[1, :8, :8].mean()


def test_grad_cam_is_zero_without_evidence():
    maps, _ = grad_cam(corner_network(), np.zeros((1, 16, 16, 1), np.uint8), np.array([0]))
    assert maps.max() == 0


@pytest.mark.parametrize(("name", "side"), [("vgg16", 64), ("vgg16_inception", 64), ("inception_v3", 139)])
def test_grad_cam_layer_lies_on_every_path(name: str, side: int):
    model = models.inference_model(models.build(name, (side, side, 1), 3, width=0.05))
    layer = grad_cam_layer(model)
    assert min(layer.output.shape[1:3]) >= 4
    # Without the output of that layer the logits do not depend on the images.
    behind = keras.Model(layer.output, model.outputs[0])
    image = np.random.default_rng(0).integers(0, 256, (1, side, side, 1)).astype(np.float32)
    before = keras.Model(model.inputs, layer.output)(image)
    np.testing.assert_allclose(behind(before), model(image), rtol=1e-4, atol=1e-5)


def test_first_filters_belong_to_the_first_convolution():
    model = models.inference_model(models.build("vgg16", (32, 32, 1), 3, width=0.05))
    kernel, name = first_conv_kernel(model)
    assert (name, kernel.shape) == ("block1_conv1", (3, 3, 1, 3))


# ------------------------------------------------------------------------------------------------------- comparisons


def test_comparison_plots_are_drawn_for_one_seed_and_several():
    from train.compare import Row
    from train.evaluation.statistics import mean_accuracy

    def row(label: str, values: list[float], macs: float, *, best: bool) -> Row:
        figures = {"parameters": 1.0, "macs": macs, "images_per_second": 1.0, "memory": 1.0}
        return Row(label, {}, dict(enumerate(values)), figures, mean_accuracy(values), on_pareto_front=best)

    shown = [
        row("a", [0.9, 0.95, 0.92], 1e8, best=True),
        row("b", [0.99], 9e8, best=True),
        row("c", [0.5], 2e8, best=False),
    ]
    axes = comparison.plot_pareto_front(shown, "test/accuracy").axes[0]
    assert axes.get_xscale() == "log"
    assert {text.get_text() for text in axes.texts} == {"a", "b", "c"}
    wide = comparison.plot_seeds([row("d", [0.2, 0.6], 1e8, best=True)], "test/accuracy").axes[0].lines[1].get_xdata()
    assert (wide[0], wide[1]) == pytest.approx((0.0058, 0.9870), abs=1e-4)  # within [0, 1]
    many = comparison.plot_seeds(shown * 40, "test/accuracy")
    assert "the first 60 of 120" in many.axes[0].get_title(loc="left")
    unknown = [row("a", [0.9], float("nan"), best=False)]
    assert "no run has multiply-accumulates" in comparison.plot_pareto_front(unknown, "x").axes[0].texts[0].get_text()


def test_plots_need_no_display(tmp_path: Path):
    (tmp_path / "picture.png").write_bytes(style.to_png(image_grids.plot_filters(np.ones((3, 3, 1, 2)), "conv")))
    assert Image.open(tmp_path / "picture.png").format == "PNG"
