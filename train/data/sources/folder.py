"""Own images: class folders on disk."""

import os
import stat
from pathlib import Path

import numpy as np

from train.data.ingestion.example_index import index_path_for
from train.data.sources.folder_layout import class_names, list_entries, split_folders
from train.data.sources.listing import FileStore, Listing


def list_folder(root: str, data_dir: str) -> Listing:
    """Every entry of the class folders, by class, then by name; classes sorted.

    Raises: ValueError where the layout is not one.
    """
    folders = split_folders(root)
    classes = class_names(folders["train"])
    names: list[str] = []
    splits: list[str] = []
    labels: list[int] = []
    for part, folder in folders.items():
        unknown = sorted(set(class_names(folder)) - set(classes))
        if unknown:
            raise ValueError(
                f"data.root must have the classes of train in every part, got {folder / unknown[0]}; use those"
            )
        for label, name in enumerate(classes):
            if (folder / name).exists():
                inner, found = (folder / name).relative_to(root).as_posix(), list_entries(folder / name)
                names += [f"{inner}/{entry}" for entry in found]
                splits += [part if len(folders) > 1 else ""] * len(found)
                labels += [label] * len(found)
    return list_files(Path(root), names, splits, labels, tuple(classes), index_path_for(data_dir, "folder", Path(root)))


def list_files(
    root: Path, names: list[str], splits: list[str], labels: list[int], classes: tuple[str, ...], index_path: Path
) -> Listing:
    """Files below `root`, each with its size and time, or the reason why it will not be opened."""
    stamps, problems = np.zeros((len(names), 2), np.int64), {}
    real_root, inside = root.resolve(), _RootMembership(root.resolve())
    for row, name in enumerate(names):
        try:
            stamps[row] = _file_stat(os.path.join(root, name), inside)  # noqa: PTH118 - a Path takes longer than the stamp
            name.encode()
        except UnicodeEncodeError:
            problems[row], names[row] = "the name is no UTF-8", name.encode(errors="backslashreplace").decode()
        except OSError as error:
            problems[row] = error.strerror or str(error)
        except ValueError as error:
            problems[row] = str(error)
    return Listing(
        classes, names, splits, FileStore(root, names, labels), f"{root}/", index_path,
        identity=str(real_root), labels=labels, file_stats=stamps, problems=problems,
    )  # fmt: skip


class _RootMembership(dict[str, bool]):
    """Whether a folder lies below the root, links followed; asked once for each."""

    def __init__(self, root: Path):
        super().__init__()
        self.root = root

    def __missing__(self, folder: str) -> bool:
        self[folder] = self.contains(folder)
        return self[folder]

    def contains(self, path: str) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self.root)  # Path.resolve raises for a link to itself


def _file_stat(path: str, membership: _RootMembership) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns. Raises: OSError; ValueError for what is no file of the root."""
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        within = membership.contains(path)
        status = os.stat(path) if within else status  # noqa: PTH116
    else:
        within = membership[path.rpartition("/")[0]]
    if not within:
        raise ValueError(f"leads out of {membership.root}")
    if stat.S_ISDIR(status.st_mode):
        raise ValueError("a folder")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("no regular file")
    return status.st_size, status.st_mtime_ns
