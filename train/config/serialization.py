"""Stores a config without its secrets, hashes it, and holds the format version of run folders."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from train.config.schema import Config
from train.storage.json_types import JsonObject

RUN_FORMAT_VERSION = 2  # of a run folder; raised when older versions of the project can no longer read it


class FormatVersionError(ValueError):
    """The run was written by a newer version of the project."""


def check_format_version(run_dir: Path, run_json: JsonObject) -> None:
    """Raises: FormatVersionError if the folder was written in a newer format."""
    version = run_format_version(run_json)
    if version > RUN_FORMAT_VERSION:
        raise FormatVersionError(
            f"run {run_dir} was written by a newer version (format {version}, this version reads up to "
            f"{RUN_FORMAT_VERSION}); please upgrade"
        )


def run_format_version(run_json: JsonObject) -> int:
    """The format of a run folder, from its run.json."""
    return run_json.get("format_version", 1)


@dataclass(frozen=True)
class Redactor:
    """Keeps secrets out of what is written.

    `references`: by key, the reference that is stored instead of a value from the environment. `secrets`: each secret
    text and its replacement.
    """

    references: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)

    def redact(self, text: str) -> str:
        """Replaces the secrets in a text; those of fewer than four characters stay, as they occur in any text."""
        for secret in sorted(self.secrets, key=len, reverse=True):
            text = text.replace(secret, self.secrets[secret]) if len(secret) > 3 else text
        return text


def extract_credentials(address: str) -> list[str]:
    """The password and query of an address, both percent-encoded and decoded."""
    try:
        parts = urlsplit(address)
        credentials = [parts.password, parts.query]
    except ValueError:
        return []
    return [text for part in credentials if part for text in (part, unquote(part))]


def strip_credentials(uri: str) -> str:
    """The address without user, password, query and fragment, which may hold secrets."""
    address = uri.partition("?")[0].partition("#")[0]
    if "://" not in address:  # mistyped: what stands before the @ may be a password all the same
        return address.rpartition("@")[2]
    scheme, separator, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


def to_dict(config: Config, redactor: Redactor) -> JsonObject:
    """The config for storage: environment references as they were typed, addresses without secrets."""
    payload = dataclasses.asdict(config)
    del payload["sweep"], payload["claim"]  # not part of a run
    if config.tracking.uri is not None:
        payload["tracking"]["uri"] = strip_credentials(config.tracking.uri)
    for name, reference in redactor.references.items():
        *parents, last = name.split(".")
        node = payload
        for parent in parents:
            node = node[parent]
        node[last] = reference
    return payload


def flatten(nested: JsonObject, prefix: str = "") -> JsonObject:
    """Flattens nested dicts to dotted names: `{"model.width": 1.0, ...}`."""
    flat: JsonObject = {}
    for name, value in nested.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def config_hash(stored: JsonObject) -> str:
    """SHA-256 over all keys but `run_dir`, `tracking`, `data.fingerprint` and RENDEZVOUS_KEYS.

    stored: the config as `to_dict` returns it.
    """
    flat = flatten({name: value for name, value in stored.items() if name not in ("run_dir", "tracking")})
    for name in ("data.fingerprint", *RENDEZVOUS_KEYS):
        del flat[name]
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()


# How the processes of a run find each other, which may differ in every attempt.
RENDEZVOUS_KEYS = ("distributed.coordinator", "distributed.index", "distributed.wait_seconds")

# Keys that do not define a variant: the seed, the paths of a run and its data, what is done after training.
NOT_PART_OF_VARIANT = (
    "seed", "run_dir", "data.root", "data.file", "data.manual_dir", "data.directory", "data.fingerprint", "gpu_memory",
    "evaluate.test", "evaluate.report", *RENDEZVOUS_KEYS,
)  # fmt: skip


def variant_config(flat: JsonObject) -> JsonObject:
    """The part of a flat config that repeats of a run over seeds have in common."""
    return {name: v for name, v in flat.items() if name not in NOT_PART_OF_VARIANT and not name.startswith("tracking.")}


def variant_id(flat: JsonObject) -> str:
    """Twelve hexadecimal characters that identify a variant."""
    return hashlib.sha256(json.dumps(variant_config(flat), sort_keys=True).encode()).hexdigest()[:12]


def format_value(value: object) -> str:
    """Formats a value as it is typed in an override."""
    if isinstance(value, list):
        return "[" + ",".join(map(format_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{format_value(element)}" for name, element in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def quote_value(text: str) -> str:
    """Quotes a text for Hydra's override grammar, which gives some characters a meaning."""
    text = re.sub(r"(\\*)'", r"\1\1\'", text)
    return "'" + re.sub(r"(\\+)\Z", r"\1\1", text) + "'"


def format_override(name: str, value: object) -> str:
    """The override that sets the key to the value; a text is quoted, whatever it holds."""
    return f"{name}={quote_value(value) if isinstance(value, str) else format_value(value)}"
