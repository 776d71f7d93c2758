"""How a folder of images is laid out. Standard library only, so that it can be checked before TensorFlow is imported.

root/CLASS/image                                   flat; the parts are cut by content
root/{train,validation|val,test}/CLASS/image       parts already cut; those missing are cut from train
"""

import os
from pathlib import Path

SPLIT_ALIASES = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
IGNORED = ("thumbs.db", "desktop.ini")  # and hidden files: what file managers leave behind
IMAGE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM")

ROOT_ADVICE = "use data.root=PATH"
EXPECTED = "data.root must be a folder with one sub-folder of images per class"


def check_root(root: str | None) -> None:
    """Refuses a root without at least two classes that each hold an image. Raises: ValueError in one line."""
    for part in split_folders(root).values():
        for name in class_names(part):
            if not any(_looks_like_image(part / name / entry) for entry in list_entries(part / name)):
                raise ValueError(f"{EXPECTED}, got {part / name} with no images; {ROOT_ADVICE}")


def split_folders(root: str | None) -> dict[str, Path]:
    """The folders that hold the classes, by part: only `train` when the layout is flat."""
    if root is None:
        raise ValueError(f"{EXPECTED}, got none; {ROOT_ADVICE}")
    if not Path(root).is_dir():
        raise ValueError(f"{EXPECTED}, got {root}, which is no folder; {ROOT_ADVICE}")
    names = _sub_folders(Path(root))
    if (
        "train" not in names
        or not set(names) <= set(SPLIT_ALIASES)
        or not _sub_folders(Path(root) / "train", strict=False)
    ):
        return {"train": Path(root)}
    if {"val", "validation"} <= set(names):
        raise ValueError(f"data.root must have one of validation and val, got both in {root}; use one of them")
    return {SPLIT_ALIASES[name]: Path(root) / name for name in names}


def class_names(folder: Path) -> list[str]:
    """The sorted names of the class folders. Raises: ValueError when there are fewer than two, or files beside them."""
    names = _sub_folders(folder)
    if not names:
        raise ValueError(f"{EXPECTED}, got {folder}, which has no sub-folders; {ROOT_ADVICE}")
    if len(names) == 1:
        raise ValueError(f"{EXPECTED}, at least two, got only {names[0]} in {folder}; {ROOT_ADVICE}")
    return names


def list_entries(class_folder: Path) -> list[str]:
    """Names of whatever lies in a class folder, sorted; hidden files and those of file managers left out."""
    return [entry.name for entry in _scan_entries(class_folder)]


def _sub_folders(folder: Path, strict: bool = True) -> list[str]:
    entries = [(entry, os.path.isdir(entry.path)) for entry in _scan_entries(folder)]  # noqa: PTH112 - never raises
    stray = [entry.path for entry, is_folder in entries if not is_folder]
    if stray and strict:
        raise ValueError(
            f"data.root must hold only folders beside each other, got the file {stray[0]}; use a class folder"
        )
    return [entry.name for entry, is_folder in entries if is_folder]


def _scan_entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted((entry for entry in found if not _is_ignored(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"data.root must be readable, got {folder} ({error.strerror}); {ROOT_ADVICE}") from error


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name.lower() in IGNORED


def _looks_like_image(path: Path) -> bool:
    try:
        if not path.is_file():  # a pipe would be waited for
            return False
        with path.open("rb") as file:
            head = file.read(12)
    except OSError:
        return True  # the reading of all files names it, with the reason
    return head.startswith(IMAGE_SIGNATURES) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")
