"""Pictures made of images: mistakes, what the network looked at, filters of the first layer."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from train.evaluation.plots.style import draw_image, make_figure, shorten

GRID_COLUMNS = 6
IMAGE_INCHES = 1.75  # inches of an image
MAX_FILTERS = 64  # at most


def plot_top_errors(
    images: np.ndarray, true_classes: list[str], predictions: list[tuple[str, float]], example_names: list[str]
) -> Figure:
    """As they come. images: uint8 [N, H, W, C]; said: class and its probability; names: of the examples."""
    if not len(images):
        made, ((axes,),) = make_figure(5, 1)
        axes.axis("off")
        axes.text(0, 0.5, "no mistakes: every example of the split was told right", va="center")
        return made
    rows = -(-len(images) // GRID_COLUMNS)
    made, places = make_figure(GRID_COLUMNS * IMAGE_INCHES, rows * (IMAGE_INCHES + 0.45), rows, GRID_COLUMNS)
    for axes in places.flat:
        axes.axis("off")
    for axes, image, truth, (word, sure), name in zip(
        places.flat, images, true_classes, predictions, example_names, strict=False
    ):
        told = f"{shorten(word)} ({sure:.2f})\nis {shorten(truth)}\n{shorten(name, 26)}"
        draw_image(axes, image, told)
    made.suptitle("the most confident mistakes: predicted (probability), true, name", x=0.01, ha="left", fontsize=10)
    return made


def plot_grad_cam(images: np.ndarray, heatmaps: np.ndarray, titles: list[str], layer: str) -> Figure:
    """Grad-CAM: each image, and beside it where the evidence for the predicted class lies.

    images: uint8 [N, H, W, C]; maps: float [N, H, W] in 0..1; layer: whose map it is.
    """
    columns = 4
    rows = -(-len(images) // columns)
    made, places = make_figure(columns * 2 * IMAGE_INCHES, rows * (IMAGE_INCHES + 0.3), rows, 2 * columns)
    for axes in places.flat:
        axes.axis("off")
    for number, (image, heat, title) in enumerate(zip(images, heatmaps, titles, strict=True)):
        row, column = divmod(number, columns)
        plain, lit = places[row, 2 * column : 2 * column + 2]
        draw_image(plain, image, title)
        draw_image(lit, image)
        lit.imshow(heat, cmap="inferno", alpha=0.55, vmin=0, vmax=1)
    made.suptitle(
        f"Grad-CAM of the predicted class, at {layer} ({heatmaps.shape[1]} px)", x=0.01, ha="left", fontsize=10
    )
    return made


def plot_filters(kernel: np.ndarray, layer: str) -> Figure:
    """The first layer's filters, each scaled to its own range. kernel: [height, width, channels, filters]."""
    shown = min(kernel.shape[-1], MAX_FILTERS)
    columns = min(16, shown)
    rows = -(-shown // columns)
    made, places = make_figure(columns * 0.6, rows * 0.6 + 0.5, rows, columns)
    for axes in places.flat:
        axes.axis("off")
    for number, axes in zip(range(shown), places.flat, strict=False):
        one = kernel[..., number]
        low, high = one.min(), one.max()
        grey = one.shape[-1] not in (1, 3)
        scaled = (one - low) / (high - low or 1.0) * 255
        draw_image(axes, (scaled.mean(-1, keepdims=True) if grey else scaled).astype(np.uint8))
    of = f" (the first {shown} of {kernel.shape[-1]})" if shown < kernel.shape[-1] else ""
    made.suptitle(f"filters of {layer}{of}", x=0.01, ha="left", fontsize=10)
    return made
