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
        raise ValueError(
            f"data={name} has no data.root, got {root}; to use your own images: data=folder data.root={root}"
        )
    if not source.manual_files:
        _check_no_manual_dir(name, manual_dir)
    else:
        _check_manual_dir(name, source, manual_dir, is_prepared(source, data_dir))


def _check_table(file: str | None, root: str | None) -> None:
    if file is None or not Path(file).is_file():
        problem = "data.file is missing" if file is None else f"data.file={file} is not a file"
        raise ValueError(f"{problem}; use data.file=PATH, a CSV or JSON lines file of path and label")
    if Path(file).suffix.lower() not in TABLE_SUFFIXES:
        raise ValueError(
            f"data.file must end in {', '.join(TABLE_SUFFIXES)}, got {file}; convert it to one of these formats"
        )
    if root is not None and not Path(root).is_dir():
        raise ValueError(f"data.root={root} is not a folder; use the folder that the table's paths are relative to")


def is_prepared(tfds_source: Source, data_dir: str) -> bool:
    """Whether the data set has been prepared. TFDS renames its folder to this name once it is complete."""
    return any((Path(data_dir) / tfds_source.tfds_name).glob("*/dataset_info.json"))


def _check_no_manual_dir(name: str, manual_dir: str | None) -> None:
    if manual_dir is not None:
        raise ValueError(f"data={name} needs no manually downloaded files, got data.manual_dir={manual_dir}; omit it")


def _check_manual_dir(name: str, tfds_source: Source, manual_dir: str | None, prepared: bool) -> None:
    files = ", ".join(tfds_source.manual_files)
    if manual_dir is None:
        if tfds_source.requires_manual_download and not prepared:
            raise ValueError(
                f"data.manual_dir is missing: downloading data={name} requires an account; "
                f"download {files} yourself, then use data.manual_dir=PATH"
            )
        return
    if not Path(manual_dir).is_dir():
        raise ValueError(f"data.manual_dir={manual_dir} is not a folder; use the folder with {files}")
    missing = [file for file in tfds_source.manual_files if not (Path(manual_dir) / file).is_file()]
    if missing and not prepared:
        raise ValueError(f"data.manual_dir={manual_dir} lacks {', '.join(missing)}; add what is missing")
