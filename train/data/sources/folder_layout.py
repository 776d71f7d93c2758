"""Layout of an image folder. Standard library only, so that it can be checked before TensorFlow is imported.

root/CLASS/image                                   flat; splits are assigned by content
root/{train,validation|val,test}/CLASS/image       predefined splits; missing ones are taken from train
"""

import os
from pathlib import Path

SPLIT_ALIASES = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
IGNORED = ("thumbs.db", "desktop.ini")  # files of file managers; hidden files are ignored, too
IMAGE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM")

ROOT_ADVICE = "use data.root=PATH, a folder with one sub-folder of images per class"


def check_root(root: str | None) -> None:
    """Checks that a root has at least two classes, each with an image. Raises: ValueError in one line."""
    for folder in split_folders(root).values():
        for name in class_names(folder):
            if not any(_looks_like_image(folder / name / entry) for entry in list_entries(folder / name)):
                raise ValueError(f"class folder {folder / name} holds no images; add some, or remove the folder")


def split_folders(root: str | None) -> dict[str, Path]:
    """Returns the parent folders of the class folders by split: only `train` for a flat layout."""
    if root is None:
        raise ValueError(f"data.root is missing; {ROOT_ADVICE}")
    if not Path(root).is_dir():
        raise ValueError(f"data.root={root} is not a folder; {ROOT_ADVICE}")
    names = _sub_folders(Path(root))
    if (
        "train" not in names
        or not set(names) <= set(SPLIT_ALIASES)
        or not _sub_folders(Path(root) / "train", strict=False)
    ):
        return {"train": Path(root)}
    if {"val", "validation"} <= set(names):
        raise ValueError(f"both val and validation exist in {root}; merge them, or remove one of them")
    return {SPLIT_ALIASES[name]: Path(root) / name for name in names}


def class_names(folder: Path) -> list[str]:
    """Returns the sorted names of the class folders. Raises: ValueError for fewer than two, or files beside them."""
    names = _sub_folders(folder)
    if not names:
        raise ValueError(f"{folder} has no class folders; {ROOT_ADVICE}")
    if len(names) == 1:
        raise ValueError(f"{folder} has only one class folder, {names[0]}; a classifier needs at least two")
    return names


def list_entries(class_folder: Path) -> list[str]:
    """Returns the sorted names of all entries of a class folder, without ignored and hidden files."""
    return [entry.name for entry in _scan_entries(class_folder)]


def _sub_folders(folder: Path, strict: bool = True) -> list[str]:
    entries = [(entry, os.path.isdir(entry.path)) for entry in _scan_entries(folder)]  # noqa: PTH112 - never raises
    stray = [entry.path for entry, is_folder in entries if not is_folder]
    if stray and strict:
        raise ValueError(f"{stray[0]} is not in a class folder; move it into one, or remove it")
    return [entry.name for entry, is_folder in entries if is_folder]


def _scan_entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not _is_ignored(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(
            f"cannot read {folder} ({error.strerror}); make it readable, or use another data.root"
        ) from error


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name.lower() in IGNORED


def _looks_like_image(path: Path) -> bool:
    try:
        if not path.is_file():  # opening a pipe would block
            return False
        with path.open("rb") as file:
            head = file.read(12)
    except OSError:
        return True  # validation reports it later, with the reason
    return head.startswith(IMAGE_SIGNATURES) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")
