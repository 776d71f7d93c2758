"""Decides a claim from the table of runs, by the rule that was specified with the claim."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from train.config.schema import Claim, Expectation
from train.evaluation.statistics import Difference, Mean, mean_interval, paired_difference

MEASURES = (
    "test_accuracy", "test_loss", "mean_validation_accuracy", "gradient_norm", "parameters", "macs",
    "branch_5x5_macs", "images_per_second",
)  # fmt: skip
Rows = dict[str, dict[str, str]]  # the rows of the table by key


@dataclass(frozen=True)
class Trial:
    """A run that a claim needs. words: its overrides. key: the hash of its command."""

    claim: str
    setting: str
    variant: str
    seed: int
    words: tuple[str, ...]
    key: str
    command: str


SUPPORTED, REFUTED, OPEN = "supported", "not supported", "undecided at this size"


@dataclass(frozen=True)
class Answer:
    """The verdict on one expectation in one setting; difference and ratio are None if runs are missing.

    pairs: the differences by seed.
    """

    setting: str
    expectation: Expectation
    verdict: str
    difference: Difference | None = None
    ratio: float | None = None
    pairs: tuple[float, ...] = ()


def answer(expectation: Expectation, setting: str, one: dict[int, float], other: dict[int, float]) -> Answer:
    """Compares a metric of two variants. one, other: the metric by seed.

    The 95 % interval of the difference is compared with 0 and with the margin of irrelevance: `higher` is supported if
    the interval is above 0, and not supported if it is below the margin; `not lower` is supported if it is above minus
    the margin, and not supported if it is below. Otherwise the claim is undecided.
    """
    if expectation.expect == "ratio":
        if not one or not other:
            return Answer(setting, expectation, OPEN)
        ratio = statistics.fmean(one.values()) / statistics.fmean(other.values())
        inside = expectation.least <= ratio <= expectation.most
        return Answer(setting, expectation, SUPPORTED if inside else REFUTED, ratio=ratio)
    difference = paired_difference(one, other)
    if difference is None or difference.n == 1:
        return Answer(setting, expectation, OPEN, difference)
    low, high = difference.low, difference.high
    if expectation.expect == "lower":
        low, high = -high, -low
    if expectation.expect == "not lower":
        verdict = SUPPORTED if low > -expectation.margin else REFUTED if high < -expectation.margin else OPEN
    else:
        verdict = SUPPORTED if low > 0 else REFUTED if high < expectation.margin or high < 0 else OPEN
    pairs = tuple(one[seed] - other[seed] for seed in sorted(one.keys() & other.keys()))
    return Answer(setting, expectation, verdict, difference, pairs=pairs)


def answers(claim: Claim, trials: Sequence[Trial], rows: Rows) -> list[Answer]:
    """Returns the answer for every expectation in every setting."""
    return [
        answer(
            expected,
            setting,
            values(trials, rows, setting, expected.variant, expected.metric),
            values(trials, rows, setting, expected.against, expected.metric),
        )
        for setting in claim.settings
        for expected in claim.expectations
    ]


def values(trials: Sequence[Trial], rows: Rows, setting: str, variant: str, metric: str) -> dict[int, float]:
    """Returns a measure of a variant by seed, for the runs that are in the table."""
    return {
        trial.seed: float(rows[trial.key][metric])
        for trial in trials
        if (trial.setting, trial.variant) == (setting, variant) and trial.key in rows
    }


def means(claim: Claim, trials: Sequence[Trial], rows: Rows) -> Iterator[tuple[str, str, dict[str, Mean]]]:
    """Yields the means of all measures over seeds, for every setting and variant that was run."""
    for setting in claim.settings:
        for variant in claim.variants:
            measures = {metric: values(trials, rows, setting, variant, metric) for metric in MEASURES}
            if measures["test_accuracy"]:
                yield setting, variant, {name: mean_interval(list(seeds.values())) for name, seeds in measures.items()}


def verdict(answers: list[Answer]) -> str:
    """Returns the verdict on a claim: supported if every answer is, not supported if one is not."""
    verdicts = {answer.verdict for answer in answers}
    return REFUTED if REFUTED in verdicts else OPEN if OPEN in verdicts else SUPPORTED


def describe(answer: Answer) -> tuple[str, str, str]:
    """Describes the comparison, its result and the claimed result."""
    expected = answer.expectation
    d = answer.difference
    metric = expected.metric.replace("_", " ")
    if expected.expect == "ratio":
        result = "not run" if answer.ratio is None else f"{answer.ratio:.3g}"
        return f"{metric}, {expected.variant} / {expected.against}", result, f"{expected.least:g} to {expected.most:g}"
    margin = f", margin {expected.margin:g}" if expected.margin else ""
    result = "not run" if d is None else f"{d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f}), {d.n} seeds"
    return f"{metric}, {expected.variant} - {expected.against}", result, f"{expected.expect}{margin}"
