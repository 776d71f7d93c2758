"""Checks of data settings that need no TensorFlow. Standard library only."""

from pathlib import Path

from train.data.catalog import Source, get_source
from train.data.sources.folder_layout import check_root

TABLE_SUFFIXES = (".csv", ".jsonl", ".ndjson")


def check(
    name: str,
    *,
    data_dir: str,
    root: str | None = None,
    manual_dir: str | None = None,
    file: str | None = None,
) -> None:
    """Rejects unusable settings: an unknown name; a missing, empty or misplaced root, table or manual folder.

    Reads only folder listings and the first bytes of one file per class.
    Raises: ValueError in one line.
    """
    source = get_source(name)
    if name == "folder":
        _check_no_manual_dir(name, manual_dir)
        check_root(root)
        return
    if name == "manifest":
        _check_no_manual_dir(name, manual_dir)
        _check_table(file, root)
        return
    if root is not None:
        raise ValueError(f"data.root must be left out for data={name}, got {root}; use data=folder data.root={root}")
    if not source.manual_files:
        _check_no_manual_dir(name, manual_dir)
    else:
        _check_manual_dir(name, source, manual_dir, is_prepared(source, data_dir))


def _check_table(file: str | None, root: str | None) -> None:
    if file is None or not Path(file).is_file():
        got = "none" if file is None else f"{file}, which is not a file"
        raise ValueError(f"data.file must be a CSV or JSON lines file of path and label, got {got}; use data.file=PATH")
    if Path(file).suffix.lower() not in TABLE_SUFFIXES:
        raise ValueError(
            f"data.file must end in {', '.join(TABLE_SUFFIXES)}, got {file}; use a table of one of these kinds"
        )
    if root is not None and not Path(root).is_dir():
        raise ValueError(f"data.root must be the folder that paths are relative to, got {root}; use data.root=PATH")


def is_prepared(tfds_source: Source, data_dir: str) -> bool:
    """Whether the data set has been prepared. TFDS renames its folder to this name once it is complete."""
    return any((Path(data_dir) / tfds_source.tfds_name).glob("*/dataset_info.json"))


def _check_no_manual_dir(name: str, manual_dir: str | None) -> None:
    if manual_dir is not None:
        raise ValueError(
            f"data.manual_dir must be left out for data={name}, got {manual_dir}; use data.manual_dir=null"
        )


def _check_manual_dir(name: str, tfds_source: Source, manual_dir: str | None, prepared: bool) -> None:
    needed = f"data.manual_dir must be a folder with {', '.join(tfds_source.manual_files)} for data={name}"
    if manual_dir is None:
        if tfds_source.requires_manual_download and not prepared:
            raise ValueError(f"{needed}, got none; use data.manual_dir=PATH, the download requires an account")
        return
    if not Path(manual_dir).is_dir():
        raise ValueError(f"{needed}, got {manual_dir}, which is not a folder; use data.manual_dir=PATH")
    missing = [file for file in tfds_source.manual_files if not (Path(manual_dir) / file).is_file()]
    if missing and not prepared:
        raise ValueError(f"{needed}, got {manual_dir} without {', '.join(missing)}; use a folder that holds them all")
