"""The claims as one picture: every expectation's difference over seeds, beside the margin that it was held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from train.evaluation.plots.style import BLUE, GREY, ORANGE, RED, make_figure

COLOURS = {"supported": BLUE, "not supported": RED, "undecided at this size": ORANGE}
MARKS = {"supported": "o", "not supported": "X", "undecided at this size": "D"}
LINE_INCHES = 0.21


def picture(claims: Sequence[tuple[str, str, list[Any]]]) -> Figure:
    """claims: name, verdict and answers (of scripts/claims/claims.py) of each.

    Accuracies share the axis. What has another unit stands there in words.
    """
    lines = sum(2 + len(answers) for _, _, answers in claims)
    made, ((axes,),) = make_figure(9, 0.9 + LINE_INCHES * lines)
    line, labels = 0, []
    for name, verdict, answers in claims:
        axes.text(
            0, line, f"{name}: {verdict}", color=COLOURS[verdict], weight="bold", va="center",
            transform=axes.get_yaxis_transform(),
        )  # fmt: skip
        for answer in answers:
            line += 1
            labels.append((line, f"{what(answer)} ({answer.setting})"))
            (_difference if on_axis(answer) else _words)(axes, line, answer)
        line += 2
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_ylim(line - 1, -1)
    axes.set_yticks([place for place, _ in labels], [text for _, text in labels], fontsize=7)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("difference in accuracy (dots: seeds; bar: 95 % interval; shaded: margin)")
    return made


def what(answer: Any) -> str:
    expected = answer.expectation
    joined = "/" if expected.expect == "ratio" else "-"
    return f"{expected.metric.replace('_', ' ')}: {expected.variant} {joined} {expected.against}"


def on_axis(answer: Any) -> bool:
    return answer.expectation.metric.endswith("accuracy") and answer.expectation.expect != "ratio"


def _difference(axes: Any, line: int, answer: Any) -> None:
    expected, found, colour = answer.expectation, answer.difference, COLOURS[answer.verdict]
    side = 1 if expected.expect == "higher" else -1
    axes.fill_betweenx([line - 0.45, line + 0.45], 0, side * expected.margin, color=GREY, alpha=0.25, linewidth=0)
    if found is None:
        return
    axes.plot(answer.pairs, [line] * found.n, ".", color="black", markersize=4, alpha=0.5, zorder=3)
    if found.n > 1:
        axes.plot([found.low, found.high], [line, line], color=colour, linewidth=2)
    axes.plot(found.mean, line, MARKS[answer.verdict], color=colour, markersize=5)


def _words(axes: Any, line: int, answer: Any) -> None:
    expected, found = answer.expectation, answer.difference
    if expected.expect == "ratio":
        claimed = f"claimed: {expected.least:g} to {expected.most:g}"
        told = "not run" if answer.ratio is None else f"{answer.ratio:.3g}, {claimed}"
    else:
        told = "not run" if found is None else f"{found.mean:+.3g} ({found.low:+.3g} to {found.high:+.3g})"
    axes.text(
        0.55, line, told, fontsize=7, color=COLOURS[answer.verdict], va="center",
        transform=axes.get_yaxis_transform(),
    )  # fmt: skip
