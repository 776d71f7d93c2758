"""Own images: class folders on disk."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from train.data.decode import decode
from train.data.fingerprint import index_path, read_index, sha256, write_index
from train.data.layout import class_names, files, part_folders
from train.data.parts import Part
from train.runtime import cores

NAMED = 10  # how many broken files an error names; it counts them all


class FolderStore:
    """Images under a root by their relative path."""

    def __init__(self, root: Path, paths: Sequence[str]):
        self.root, self.paths = root, tuple(paths)

    def name(self, row: int) -> str:
        return self.paths[row]

    def where(self, row: int) -> str:
        return str(self.root / self.paths[row])

    def read(self, row: int) -> bytes:
        return (self.root / self.paths[row]).read_bytes()

    def read_many(self, rows: Sequence[int]) -> list[bytes]:
        return [self.read(row) for row in rows]


def load_folder(root: str, data_dir: str) -> tuple[tuple[str, ...], dict[str, Part]]:
    """Class names (sorted) and the parts that the layout has; every new or changed file is read and decoded once.

    Raises: ValueError that names what can't be read.
    """
    folders = part_folders(root)
    classes = class_names(folders["train"])
    listed = {part: _list(Path(root), folder, classes) for part, folder in folders.items()}
    digests = _digests(Path(root), [path for paths, _ in listed.values() for path in paths], data_dir)
    return tuple(classes), {part: _part(Path(root), paths, labels, digests) for part, (paths, labels) in listed.items()}


def _list(root: Path, folder: Path, classes: list[str]) -> tuple[list[str], list[int]]:
    unknown = sorted(set(class_names(folder)) - set(classes))
    if unknown:
        raise ValueError(
            f"data.root must have the classes of train in every part, got {folder / unknown[0]}; use those"
        )
    found = [
        (path, label) for label, name in enumerate(classes) if (folder / name).exists() for path in files(folder / name)
    ]
    return [path.relative_to(root).as_posix() for path, _ in found], [label for _, label in found]


def _part(root: Path, paths: list[str], labels: list[int], digests: dict[str, bytes]) -> Part:
    contents = np.array([digests[path] for path in paths], dtype="S64")
    return Part(FolderStore(root, paths), np.array(labels, dtype=np.int32), contents)


def _digests(root: Path, paths: list[str], data_dir: str) -> dict[str, bytes]:
    """SHA-256 by path. A file that has the size and time of the last look is not read again."""
    stamps = {path: _stamp(root / path) for path in paths}
    place = index_path(data_dir, "folder", root)
    known = _known(place, stamps)
    fresh = [path for path in paths if path not in known]
    with ThreadPoolExecutor(cores()) as pool:
        looked = dict(zip(fresh, pool.map(lambda path: _look(root / path), fresh), strict=True))
    known.update({path: digest for path, (digest, _) in looked.items() if digest})
    if fresh:
        _remember(place, known, stamps)
    _refuse_broken(root, {path: reason for path, (digest, reason) in looked.items() if not digest})
    return known


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _look(path: Path) -> tuple[bytes, str]:
    """(SHA-256, "") of an image that decodes, else (b"", reason)."""
    try:
        data = path.read_bytes()
        decode(data, 3)
    except OSError as error:
        return b"", error.strerror or str(error)
    except ValueError as error:
        return b"", str(error)
    return sha256(data), ""


def _known(place: Path, stamps: dict[str, tuple[int, int]]) -> dict[str, bytes]:
    stored = read_index(place)
    if stored is None:
        return {}
    rows = zip(*(stored[key].tolist() for key in ("path", "size", "time", "sha256")), strict=True)
    return {path: digest for path, size, time, digest in rows if stamps.get(path) == (size, time)}


def _remember(place: Path, known: dict[str, bytes], stamps: dict[str, tuple[int, int]]) -> None:
    sizes, times = zip(*(stamps[path] for path in known), strict=True) if known else ((), ())
    write_index(
        place,
        {
            "path": np.array(list(known), dtype=np.str_),
            "size": np.array(sizes, dtype=np.int64),
            "time": np.array(times, dtype=np.int64),
            "sha256": np.array(list(known.values()), dtype="S64"),
        },
    )


def _refuse_broken(root: Path, broken: dict[str, str]) -> None:
    if broken:
        named = "; ".join(f"{root / path} ({reason})" for path, reason in list(broken.items())[:NAMED])
        more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        raise ValueError(
            f"data.root must hold only readable images, got {len(broken)} broken: {named}{more}; "
            "use data.root without them"
        )
