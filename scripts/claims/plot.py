"""Plots the claims: the difference over seeds of every expectation, with the margin it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from train.evaluation.plots.style import BLUE, GREY, ORANGE, RED, make_figure

COLOURS = {"supported": BLUE, "not supported": RED, "undecided at this size": ORANGE}
MARKS = {"supported": "o", "not supported": "X", "undecided at this size": "D"}
LINE_INCHES = 0.21


def plot_claims(claims: Sequence[tuple[str, str, list[Any]]]) -> Figure:
    """Plots all claims. claims: name, verdict and answers (verdicts.py) of each.

    Differences of accuracies share the axis; other measures are printed as text.
    """
    lines = sum(2 + len(answers) for _, _, answers in claims)
    figure, ((axes,),) = make_figure(9, 0.9 + LINE_INCHES * lines)
    line = 0
    labels = []
    for name, verdict, answers in claims:
        axes.text(
            0, line, f"{name}: {verdict}", color=COLOURS[verdict], weight="bold", va="center",
            transform=axes.get_yaxis_transform(),
        )  # fmt: skip
        for answer in answers:
            line += 1
            labels.append((line, f"{comparison(answer)} ({answer.setting})"))
            (_draw_difference if is_on_axis(answer) else _draw_text)(axes, line, answer)
        line += 2
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_ylim(line - 1, -1)
    axes.set_yticks([position for position, _ in labels], [text for _, text in labels], fontsize=7)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("difference in accuracy (dots: seeds; bar: 95 % interval; shaded: margin)")
    return figure


def comparison(answer: Any) -> str:
    expected = answer.expectation
    operator = "/" if expected.expect == "ratio" else "-"
    return f"{expected.metric.replace('_', ' ')}: {expected.variant} {operator} {expected.against}"


def is_on_axis(answer: Any) -> bool:
    return answer.expectation.metric.endswith("accuracy") and answer.expectation.expect != "ratio"


def _draw_difference(axes: Any, line: int, answer: Any) -> None:
    expected = answer.expectation
    difference = answer.difference
    colour = COLOURS[answer.verdict]
    side = 1 if expected.expect == "higher" else -1
    axes.fill_betweenx([line - 0.45, line + 0.45], 0, side * expected.margin, color=GREY, alpha=0.25, linewidth=0)
    if difference is None:
        return
    axes.plot(answer.pairs, [line] * difference.n, ".", color="black", markersize=4, alpha=0.5, zorder=3)
    if difference.n > 1:
        axes.plot([difference.low, difference.high], [line, line], color=colour, linewidth=2)
    axes.plot(difference.mean, line, MARKS[answer.verdict], color=colour, markersize=5)


def _draw_text(axes: Any, line: int, answer: Any) -> None:
    expected = answer.expectation
    d = answer.difference
    if expected.expect == "ratio":
        claimed = f"claimed: {expected.least:g} to {expected.most:g}"
        text = "not run" if answer.ratio is None else f"{answer.ratio:.3g}, {claimed}"
    else:
        text = "not run" if d is None else f"{d.mean:+.3g} ({d.low:+.3g} to {d.high:+.3g})"
    axes.text(
        0.55, line, text, fontsize=7, color=COLOURS[answer.verdict], va="center",
        transform=axes.get_yaxis_transform(),
    )  # fmt: skip
