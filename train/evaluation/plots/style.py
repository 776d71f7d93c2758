"""The common style of all plots."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, "#000000", "#999999")
GREY = "#999999"
COLORMAP = "cividis"  # dark to light
DPI = 110
STYLE: dict[RcKeyType, object] = {
    "font.size": 9,
    "font.family": "DejaVu Sans",  # comes with matplotlib and covers most scripts
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "text.parse_math": False,  # a class name may contain $
    "figure.constrained_layout.use": True,
}


mpl.rcParams.update(STYLE)


def make_figure(
    width: float,
    height: float,
    rows: int = 1,
    columns: int = 1,
    *,
    height_ratios: Sequence[float] | None = None,
    sharex: bool = False,
) -> tuple[Figure, np.ndarray]:
    """Makes a figure, its size in inches, and its axes as an array [rows, columns]."""
    figure = Figure(figsize=(width, height), dpi=DPI)
    return figure, figure.subplots(rows, columns, squeeze=False, height_ratios=height_ratios, sharex=sharex)


def to_png(figure: Figure) -> bytes:
    """Encodes the figure as a PNG."""
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def shorten(name: str, max_length: int = 18) -> str:
    """Shortens a name so that it fits beside an axis."""
    return name if len(name) <= max_length else f"{name[: max_length - 1]}…"


def draw_image(axes: Axes, image: np.ndarray, title: str = "") -> None:
    """Draws an image [H, W, 1 or 3] in 0..255, unscaled and without axes."""
    grey = image.shape[-1] == 1
    axes.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None, vmin=0, vmax=255)
    axes.set_title(title, fontsize=7, loc="center")
    axes.axis("off")
