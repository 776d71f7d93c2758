"""What the table of runs says of a claim, by the rule that was written down with it."""

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
Rows = dict[str, dict[str, str]]  # of the table, by key


@dataclass(frozen=True)
class Trial:
    """A run that a claim needs. key: the hash of its command."""

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
    """What the table says of one expectation in one setting; without difference and ratio where runs are missing.

    pairs: the differences, seed by seed.
    """

    setting: str
    expectation: Expectation
    verdict: str
    difference: Difference | None = None
    ratio: float | None = None
    pairs: tuple[float, ...] = ()


def answer(expectation: Expectation, setting: str, one: dict[int, float], other: dict[int, float]) -> Answer:
    """one, other: the metric by seed.

    A difference is held against 0, or against the margin that does not matter: `higher` is supported where the whole
    95 % interval lies above 0 and not supported where all of it lies below the margin; `not lower` where it lies above
    or below minus the margin. What the interval leaves open is undecided.
    """
    if expectation.expect == "ratio":
        if not one or not other:
            return Answer(setting, expectation, OPEN)
        ratio = statistics.fmean(one.values()) / statistics.fmean(other.values())
        inside = expectation.least <= ratio <= expectation.most
        return Answer(setting, expectation, SUPPORTED if inside else REFUTED, ratio=ratio)
    found = paired_difference(one, other)
    if found is None or found.n == 1:
        return Answer(setting, expectation, OPEN, found)
    low, high = (-found.high, -found.low) if expectation.expect == "lower" else (found.low, found.high)
    if expectation.expect == "not lower":
        verdict = SUPPORTED if low > -expectation.margin else REFUTED if high < -expectation.margin else OPEN
    else:
        verdict = SUPPORTED if low > 0 else REFUTED if high < expectation.margin or high < 0 else OPEN
    pairs = tuple(one[seed] - other[seed] for seed in sorted(one.keys() & other.keys()))
    return Answer(setting, expectation, verdict, found, pairs=pairs)


def answers(claim: Claim, trials: Sequence[Trial], rows: Rows) -> list[Answer]:
    """Of every expectation in every setting."""
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
    """A measure of a variant by seed, of the runs that are in the table."""
    return {
        trial.seed: float(rows[trial.key][metric])
        for trial in trials
        if (trial.setting, trial.variant) == (setting, variant) and trial.key in rows
    }


def means(claim: Claim, trials: Sequence[Trial], rows: Rows) -> Iterator[tuple[str, str, dict[str, Mean]]]:
    """For every setting and variant that was run the means of all measures over its seeds."""
    for setting in claim.settings:
        for variant in claim.variants:
            found = {metric: values(trials, rows, setting, variant, metric) for metric in MEASURES}
            if found["test_accuracy"]:
                yield setting, variant, {name: mean_interval(list(one.values())) for name, one in found.items()}


def verdict(found: list[Answer]) -> str:
    """Of a claim: supported where every expectation is, in every setting; not where one is not."""
    verdicts = {one.verdict for one in found}
    return REFUTED if REFUTED in verdicts else OPEN if OPEN in verdicts else SUPPORTED


def told(one: Answer) -> tuple[str, str, str]:
    """What was compared, what came of it, what was claimed."""
    expected, d = one.expectation, one.difference
    metric = expected.metric.replace("_", " ")
    if expected.expect == "ratio":
        found = "not run" if one.ratio is None else f"{one.ratio:.3g}"
        return f"{metric}, {expected.variant} / {expected.against}", found, f"{expected.least:g} to {expected.most:g}"
    margin = f", margin {expected.margin:g}" if expected.margin else ""
    found = "not run" if d is None else f"{d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f}), {d.n} seeds"
    return f"{metric}, {expected.variant} - {expected.against}", found, f"{expected.expect}{margin}"
