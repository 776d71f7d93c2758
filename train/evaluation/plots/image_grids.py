"""Grids of images: top errors, Grad-CAM maps, filters of the first layer."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from train.evaluation.plots.style import draw_image, make_figure, shorten

GRID_COLUMNS = 6
IMAGE_INCHES = 1.75  # side of an image
MAX_FILTERS = 64


def plot_top_errors(
    images: np.ndarray, true_classes: list[str], predictions: list[tuple[str, float]], example_names: list[str]
) -> Figure:
    """Draws errors in the given order. images: uint8 [N, H, W, C]; predictions: class and its probability."""
    if not len(images):
        figure, ((axes,),) = make_figure(5, 1)
        axes.axis("off")
        axes.text(0, 0.5, "no errors: every example of the split was classified correctly", va="center")
        return figure
    rows = -(-len(images) // GRID_COLUMNS)
    figure, grid = make_figure(GRID_COLUMNS * IMAGE_INCHES, rows * (IMAGE_INCHES + 0.45), rows, GRID_COLUMNS)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, true_class, (predicted, probability), name in zip(
        grid.flat, images, true_classes, predictions, example_names, strict=False
    ):
        title = f"{shorten(predicted)} ({probability:.2f})\nis {shorten(true_class)}\n{shorten(name, 26)}"
        draw_image(axes, image, title)
    figure.suptitle("most confident errors: predicted (probability), true, name", x=0.01, ha="left", fontsize=10)
    return figure


def plot_grad_cam(images: np.ndarray, heatmaps: np.ndarray, titles: list[str], layer: str) -> Figure:
    """Draws each image and, beside it, the same image under its Grad-CAM heat map.

    images: uint8 [N, H, W, C]; heatmaps: float [N, H, W] in 0..1; layer: the name of the layer they come from.
    """
    columns = 4
    rows = -(-len(images) // columns)
    figure, grid = make_figure(columns * 2 * IMAGE_INCHES, rows * (IMAGE_INCHES + 0.3), rows, 2 * columns)
    for axes in grid.flat:
        axes.axis("off")
    for number, (image, heat, title) in enumerate(zip(images, heatmaps, titles, strict=True)):
        row, column = divmod(number, columns)
        plain, overlaid = grid[row, 2 * column : 2 * column + 2]
        draw_image(plain, image, title)
        draw_image(overlaid, image)
        overlaid.imshow(heat, cmap="inferno", alpha=0.55, vmin=0, vmax=1)
    figure.suptitle(
        f"Grad-CAM of the predicted class, at {layer} ({heatmaps.shape[1]} px)", x=0.01, ha="left", fontsize=10
    )
    return figure


def plot_filters(kernel: np.ndarray, layer: str) -> Figure:
    """Draws the filters of a kernel [height, width, channels, filters], each scaled to its own range."""
    shown = min(kernel.shape[-1], MAX_FILTERS)
    columns = min(16, shown)
    rows = -(-shown // columns)
    figure, grid = make_figure(columns * 0.6, rows * 0.6 + 0.5, rows, columns)
    for axes in grid.flat:
        axes.axis("off")
    for number, axes in zip(range(shown), grid.flat, strict=False):
        weights = kernel[..., number]
        low = weights.min()
        high = weights.max()
        is_displayable = weights.shape[-1] in (1, 3)
        scaled = (weights - low) / (high - low or 1.0) * 255
        draw_image(axes, (scaled if is_displayable else scaled.mean(-1, keepdims=True)).astype(np.uint8))
    truncation = f" (the first {shown} of {kernel.shape[-1]})" if shown < kernel.shape[-1] else ""
    figure.suptitle(f"filters of {layer}{truncation}", x=0.01, ha="left", fontsize=10)
    return figure
