"""Lists images from a table of paths and labels: CSV with a header line, or JSON lines.

    path,label,split
    cats/one.jpg,cat,train

`split` is optional, for the whole table or in single lines: train, validation (or val), test. Paths are relative to
`data.root`, by default the folder of the table.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from train.data.ingestion.example_index import index_path_for
from train.data.sources.folder import list_files
from train.data.sources.folder_layout import SPLIT_ALIASES
from train.data.sources.listing import Listing

COLUMNS = ("path", "label", "split")


def list_manifest(file: str, root: str | None, data_dir: str) -> Listing:
    """Lists every line in the order of the table; classes are the sorted labels.

    Raises: ValueError that names the line of the table.
    """
    path = Path(file)
    try:
        lines = list(_parse_lines(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read data.file={file} ({_reason(error)}); fix it, or use another file") from error
    seen: dict[str, int] = {}
    for number, name, _, _ in lines:
        if name in seen:
            raise _manifest_error(path, number, f"{name} is already in line {seen[name]}", "list each path once")
        seen[name] = number
    classes = tuple(sorted({label for _, _, label, _ in lines}))
    if len(classes) < 2:
        raise ValueError(
            f"data.file={file} has only {len(classes)} different labels; a classifier needs at least two, "
            "so add images of other classes"
        )
    splits = [split for _, _, _, split in lines]
    if any(splits) and "train" not in splits:
        raise ValueError(f"no line of data.file={file} is in split train; write train into the column split")
    label_of = {name: label for label, name in enumerate(classes)}
    return list_files(
        Path(root) if root else path.parent,
        [name for _, name, _, _ in lines],
        [split or ("train" if any(splits) else "") for split in splits],
        [label_of[label] for _, _, label, _ in lines],
        classes,
        index_path_for(data_dir, "manifest", path),
    )


def _parse_lines(path: Path) -> Iterator[tuple[int, str, str, str]]:
    """Yields (line number, path, label, split or "")."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, entry in _parse_csv(path, file) if path.suffix.lower() == ".csv" else _parse_json(path, file):
            _check_columns(path, number, entry)
            for name in ("path", "label"):
                if entry.get(name) in (None, ""):
                    raise _manifest_error(path, number, f"no {name}", f"give every line a {name}")
            split = str(entry.get("split") or "")
            if split and split not in SPLIT_ALIASES:
                raise _manifest_error(
                    path, number, f'unknown split "{split}"', f"use one of {', '.join(SPLIT_ALIASES)}"
                )
            yield number, str(entry["path"]), str(entry["label"]), SPLIT_ALIASES.get(split, "")


def _parse_csv(path: Path, file: Iterator[str]) -> Iterator[tuple[int, Mapping[str, object]]]:
    lines = csv.reader(file, strict=True)
    try:
        header = next(lines, [])
        _check_columns(path, 1, header)
        for entry in filter(None, lines):
            if len(entry) > len(header):
                surplus = f'"{entry[len(header)]}" is after the last column'
                raise _manifest_error(path, lines.line_num, surplus, "use as many fields as the header line has")
            yield lines.line_num, dict(zip(header, entry, strict=False))
    except csv.Error as error:
        raise _manifest_error(path, lines.line_num, str(error), "use CSV with a header line path,label") from error


def _parse_json(path: Path, file: Iterator[str]) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict):
            raise _manifest_error(
                path,
                number,
                f"not a JSON object: {line.strip()[:40]}",
                'use lines like {"path": "a.jpg", "label": "cat"}',
            )
        yield number, entry


def _check_columns(path: Path, line_number: int, names: Iterable[str]) -> None:
    unknown = sorted(set(names) - set(COLUMNS))
    if unknown:
        raise _manifest_error(
            path, line_number, f'unknown column "{unknown[0]}"', f"use the columns {', '.join(COLUMNS)}"
        )


def _manifest_error(path: Path, line_number: int, problem: str, advice: str) -> ValueError:
    return ValueError(f"{path}:{line_number}: {problem}; {advice}")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or "not UTF-8"
