"""What the bits of a run stand on (its config, data, code, versions, processor), and what of it may differ.

A ground is a flat dict, dotted name to value. A run goes on only where its ground is the same; what differs is told by
name and has to be accepted by name.
"""

from __future__ import annotations

from typing import Any

from train.config.schema import ConfigError
from train.config.serialization import RENDEZVOUS_KEYS

# Keys that may differ from life to life: they change no bit, or a fingerprint of what they name stands for them.
IGNORED_KEYS = (
    "tracking.uri", "tracking.wait_seconds", "tracking.log_model", "checkpoint.keep", "run_dir",
    "data.root", "data.file", "data.manual_dir", "data.directory", "data.cache", "data.ram_budget",
    "data.fingerprint", "model.weights", "distill.teacher", "evaluate.test", "evaluate.report", "gpu_memory",
    *RENDEZVOUS_KEYS,
)  # fmt: skip


def differing_keys(previous: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Names of what is not as it was, the free ones left out."""
    return [
        name
        for name in sorted({*previous, *current})
        if previous.get(name) != current.get(name) and name not in IGNORED_KEYS
    ]


def unaccepted_changes(previous: dict[str, Any], current: dict[str, Any], accepted: frozenset[str]) -> list[str]:
    """What changed and was not accepted. More epochs need no acceptance: they only come after what there is."""
    longer = current["epochs"] > previous["epochs"]
    return [
        name for name in differing_keys(previous, current) if name not in accepted and not (name == "epochs" and longer)
    ]


def check_compatible(previous: dict[str, Any], current: dict[str, Any], accepted: frozenset[str]) -> None:
    """Raises: ConfigError naming every change that was not accepted, and the words that accept them."""
    unknown = sorted(accepted - {*previous, *current})
    if unknown:
        raise ConfigError(f"accept must name what may differ, got {unknown[0]}; use names like code or batch_size")
    waiting = unaccepted_changes(previous, current, accepted)
    if not waiting:
        return
    told = "; ".join(f"{name} was {previous.get(name)}, is {current.get(name)}" for name in waiting)
    words = ",".join(sorted({*waiting, *accepted}))
    raise ConfigError(f"a run goes on as it was, but {told}; put it back, or use make resume accept={words}")
