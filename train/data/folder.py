"""Own images: class folders on disk."""

import os
from pathlib import Path

import numpy as np

from train.data.layout import class_names, entries, part_folders
from train.data.parts import FileStore, Listing
from train.data.verdicts import place_of


def list_folder(root: str, data_dir: str) -> Listing:
    """Every entry of the class folders, by class, then by name; classes sorted.

    Raises: ValueError where the layout is not one.
    """
    folders = part_folders(root)
    classes = class_names(folders["train"])
    found: list[tuple[Path, str, int]] = []
    for part, folder in folders.items():
        unknown = sorted(set(class_names(folder)) - set(classes))
        if unknown:
            raise ValueError(
                f"data.root must have the classes of train in every part, got {folder / unknown[0]}; use those"
            )
        for label, name in enumerate(classes):
            if (folder / name).exists():
                found += [(path, part if len(folders) > 1 else "", label) for path in entries(folder / name)]
    return list_files(
        Path(root),
        [path.relative_to(root).as_posix() for path, _, _ in found],
        [split for _, split, _ in found],
        [label for _, _, label in found],
        tuple(classes),
        place_of(data_dir, "folder", Path(root)),
    )


def list_files(
    root: Path, names: list[str], splits: list[str], labels: list[int], classes: tuple[str, ...], index: Path
) -> Listing:
    """Files below `root`, each with its size and time, or the reason why it will not be opened."""
    stamps, problems = np.zeros((len(names), 2), np.int64), {}
    real_root = root.resolve()
    for row, name in enumerate(names):
        try:
            stamps[row] = _stamp(root / name, real_root)
            name.encode()
        except UnicodeEncodeError:
            problems[row], names[row] = "the name is no UTF-8", name.encode(errors="backslashreplace").decode()
        except OSError as error:
            problems[row] = error.strerror or str(error)
        except ValueError as error:
            problems[row] = str(error)
    return Listing(
        classes, names, splits, FileStore(root, names, labels), f"{root}/", index,
        identity=str(real_root), labels=labels, stamps=stamps, problems=problems,
    )  # fmt: skip


def _stamp(path: Path, root: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns. Raises: OSError; ValueError for what is no file of the root."""
    if not Path(os.path.realpath(path)).is_relative_to(root):  # Path.resolve raises its own for a link to itself
        raise ValueError(f"a link that leaves {root}")
    if path.is_dir():
        raise ValueError("a folder")
    status = path.stat()
    if not path.is_file():
        raise ValueError("no regular file")
    return status.st_size, status.st_mtime_ns
