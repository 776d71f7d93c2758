"""Lists image files in class folders."""

import os
import stat
from pathlib import Path

import numpy as np

from train.data.ingestion.example_index import index_path_for
from train.data.sources.folder_layout import class_names, list_entries, split_folders
from train.data.sources.listing import FileStore, Listing


def list_folder(root: str, data_dir: str) -> Listing:
    """Lists every entry of the class folders, sorted by class, then by name.

    Raises: ValueError for an invalid layout.
    """
    folders = split_folders(root)
    classes = class_names(folders["train"])
    names: list[str] = []
    splits: list[str] = []
    labels: list[int] = []
    for split, folder in folders.items():
        unknown = sorted(set(class_names(folder)) - set(classes))
        if unknown:
            raise ValueError(f"class folder {folder / unknown[0]} has no counterpart in train; rename or remove it")
        for label, name in enumerate(classes):
            if (folder / name).exists():
                prefix = (folder / name).relative_to(root).as_posix()
                entries = list_entries(folder / name)
                names += [f"{prefix}/{entry}" for entry in entries]
                splits += [split if len(folders) > 1 else ""] * len(entries)
                labels += [label] * len(entries)
    return list_files(Path(root), names, splits, labels, tuple(classes), index_path_for(data_dir, "folder", Path(root)))


def list_files(
    root: Path, names: list[str], splits: list[str], labels: list[int], classes: tuple[str, ...], index_path: Path
) -> Listing:
    """Lists files below `root`, each with its size and time, or the reason why it can't be used."""
    file_stats = np.zeros((len(names), 2), np.int64)
    problems: dict[int, str] = {}
    real_root = root.resolve()
    membership = _RootMembership(real_root)
    for row, name in enumerate(names):
        try:
            file_stats[row] = _file_stat(os.path.join(root, name), membership)  # noqa: PTH118 - a Path takes longer than stat
            name.encode()
        except UnicodeEncodeError:
            problems[row] = "the name is not UTF-8"
            names[row] = name.encode(errors="backslashreplace").decode()
        except OSError as error:
            problems[row] = error.strerror or str(error)
        except ValueError as error:
            problems[row] = str(error)
    return Listing(
        classes, names, splits, FileStore(root, names, labels), f"{root}/", index_path,
        identity=str(real_root), labels=labels, file_stats=file_stats, problems=problems,
    )  # fmt: skip


class _RootMembership(dict[str, bool]):
    """Caches whether a folder is below the root after following links."""

    def __init__(self, root: Path):
        super().__init__()
        self.root = root

    def __missing__(self, folder: str) -> bool:
        self[folder] = self.contains(folder)
        return self[folder]

    def contains(self, path: str) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self.root)  # Path.resolve raises for a link to itself


def _file_stat(path: str, membership: _RootMembership) -> tuple[int, int]:
    """Size in bytes and modification time in ns. Raises: OSError; ValueError for anything but a file below the root."""
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        inside = membership.contains(path)
        status = os.stat(path) if inside else status  # noqa: PTH116
    else:
        inside = membership[path.rpartition("/")[0]]
    if not inside:
        raise ValueError(f"is outside {membership.root}")
    if stat.S_ISDIR(status.st_mode):
        raise ValueError("a folder")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    return status.st_size, status.st_mtime_ns
