"""What of a config is written down, and what must not be; and which version of all that is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from train.config.schema import Config

RUN_FORMAT_VERSION = 2  # of a run folder; raised when older versions could no longer read it


class FormatVersionError(ValueError):
    """A run that a newer version of the project has written."""


def check_format_version(run_dir: Path, run_json: dict[str, Any]) -> None:
    """Raises: FormatVersionError for a folder that this version can't read."""
    version = format_version(run_json)
    if version > RUN_FORMAT_VERSION:
        raise FormatVersionError(
            f"run {run_dir} was written by a newer version of this project (run format {version}, this version reads "
            f"up to {RUN_FORMAT_VERSION}); upgrade, or use that version"
        )


def format_version(run_json: dict[str, Any]) -> int:
    """The format of a run folder, from its run.json."""
    return run_json.get("format_version", 1)


@dataclass(frozen=True)
class Redactor:
    """What must not be written down.

    `stored`: what stands in the config's place of a value that came from the environment, by key. `secrets`: texts and
    what is shown instead of them.
    """

    references: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)

    def redact(self, text: str) -> str:
        """The text without the secrets. Those of less than four characters are in every text and tell nothing."""
        for secret in sorted(self.secrets, key=len, reverse=True):
            text = text.replace(secret, self.secrets[secret]) if len(secret) > 3 else text
        return text


def extract_credentials(address: str) -> list[str]:
    """The parts of an address that are nobody's business, as written and as meant."""
    try:
        parts = urlsplit(address)
        found = [parts.password, parts.query]
    except ValueError:
        return []
    return [text for part in found if part for text in (part, unquote(part))]


def strip_credentials(uri: str) -> str:
    """The address without user, password, query and fragment, which is where secrets stand."""
    address = uri.partition("?")[0].partition("#")[0]
    scheme, separator, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


def to_dict(config: Config, redactor: Redactor) -> dict[str, Any]:
    """The config as it may be stored: environment references as they were typed, addresses without secrets."""
    content = dataclasses.asdict(config)
    del content["sweep"], content["claim"]  # no part of a run
    if config.tracking.uri is not None:
        content["tracking"]["uri"] = strip_credentials(config.tracking.uri)
    for name, reference in redactor.references.items():
        *parents, last = name.split(".")
        node = content
        for parent in parents:
            node = node[parent]
        node[last] = reference
    return content


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"model.width": 1.0, ...}`: every key with its dotted name."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def config_hash(config: Config, redactor: Redactor) -> str:
    """SHA-256 over all keys but `run_dir`, `tracking`, the data's fingerprint and MEETING; references as typed."""
    content = to_dict(config, redactor)
    flat = flatten({name: value for name, value in content.items() if name not in ("run_dir", "tracking")})
    for name in ("data.fingerprint", *RENDEZVOUS_KEYS):
        del flat[name]
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()


# How the processes of a run find each other, which may be another way in every life.
RENDEZVOUS_KEYS = ("distributed.coordinator", "distributed.index", "distributed.wait_seconds")

# What does not make another variant: a run's seed, where it and its data lie, what is done with it afterwards.
NOT_PART_OF_VARIANT = (
    "seed", "run_dir", "data.root", "data.file", "data.manual_dir", "data.directory", "data.fingerprint", "gpu_memory",
    "evaluate.test", "evaluate.report", *RENDEZVOUS_KEYS,
)  # fmt: skip


def variant_config(flat: dict[str, Any]) -> dict[str, Any]:
    """Of a flat config what runs have in common that are compared over seeds."""
    return {name: v for name, v in flat.items() if name not in NOT_PART_OF_VARIANT and not name.startswith("tracking.")}


def variant_id(flat: dict[str, Any]) -> str:
    """Twelve characters that stand for the variant."""
    return hashlib.sha256(json.dumps(variant_config(flat), sort_keys=True).encode()).hexdigest()[:12]
