"""Decides whether a run can be resumed: whether what its bits depend on (its provenance) is still the same.

A provenance is a flat dict, dotted name to value: config, data, code, versions, processor. A run is resumed only with
the same provenance; each difference is reported by name and has to be accepted by name.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from train.config.schema import ConfigError
from train.config.serialization import RENDEZVOUS_KEYS
from train.storage.json_types import JsonObject

# Keys that may differ between attempts: they change no bit, or a fingerprint of what they name is compared instead.
IGNORED_KEYS = (
    "tracking.uri", "tracking.wait_seconds", "tracking.log_model", "checkpoint.keep", "run_dir",
    "data.root", "data.file", "data.manual_dir", "data.directory", "data.cache", "data.ram_budget",
    "data.fingerprint", "model.weights", "distill.teacher", "evaluate.test", "evaluate.report", "gpu_memory",
    *RENDEZVOUS_KEYS,
)  # fmt: skip


def differing_keys(previous: JsonObject, current: JsonObject) -> list[str]:
    """Names of the differing values, without IGNORED_KEYS."""
    return [
        name
        for name in sorted({*previous, *current})
        if previous.get(name) != current.get(name) and name not in IGNORED_KEYS
    ]


def unaccepted_changes(previous: JsonObject, current: JsonObject, accepted: frozenset[str]) -> list[str]:
    """Names of the changes that were not accepted. More epochs need no acceptance: they follow those already done."""
    longer = current["epochs"] > previous["epochs"]
    return [
        name for name in differing_keys(previous, current) if name not in accepted and not (name == "epochs" and longer)
    ]


def check_compatible(previous: JsonObject, current: JsonObject, accepted: frozenset[str], run_dir: Path) -> None:
    """Raises: ConfigError naming every change that was not accepted, and the argument that accepts them."""
    unknown = sorted(accepted - {*previous, *current})
    if unknown:
        raise ConfigError(
            f'unknown name "{unknown[0]}" in accept; use the names of changed settings, e.g. accept=code,batch_size'
        )
    unaccepted = unaccepted_changes(previous, current, accepted)
    if not unaccepted:
        return
    changes = "; ".join(f"{name} changed from {previous.get(name)} to {current.get(name)}" for name in unaccepted)
    it, the_change = ("it", "the change") if len(unaccepted) == 1 else ("them", "the changes")
    names = ",".join(sorted({*unaccepted, *accepted}))
    command = f"make resume run={shlex.quote(str(run_dir))} accept={names}"
    raise ConfigError(f"cannot resume: {changes}; restore {it}, or allow {the_change}: {command}")
