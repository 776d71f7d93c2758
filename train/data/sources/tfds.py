"""Lists TFDS data sets: prepared once as ArrayRecord, then read by index."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from train.data.catalog import MIB, Source, get_source
from train.data.ingestion.example_index import index_path_for
from train.data.sources.listing import LazySequence, Listing, Store
from train.data.sources.record_readers import ArrayRecords, TfRecords, load_or_build_index, short_message
from train.storage import locks

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder

TIMEOUT_SECONDS = 5


def list_tfds(name: str, data_dir: str, manual_dir: str | None) -> Listing:
    """Lists the official splits that serve as train and test; prepares the data set the first time.

    Raises: ValueError in one line: no network (and where to put the files), no space, wrong files.
    """
    source = get_source(name)
    builder = _make_builder(name, source, data_dir)
    if not _is_prepared(builder):
        with _lock(name, data_dir):
            _prepare(name, source, builder, data_dir, manual_dir)
        builder = _make_builder(name, source, data_dir)  # a new one, which reads the metadata of the prepared data
    official = {"train": source.train} | ({"test": source.test} if source.test else {})
    folder = Path(builder.data_dir)
    try:
        store = _open_store(builder, list(official.values()), data_dir)
    except (NotImplementedError, RuntimeError, OSError) as error:  # damaged or unreadable
        raise ValueError(
            f"cannot read data={name} in {folder}: {short_message(error)}; remove that folder to prepare it again"
        ) from error
    counts = {split: builder.info.splits[tfds_split].num_examples for split, tfds_split in official.items()}
    return Listing(
        classes=tuple(builder.info.features["label"].names),
        names=LazySequence(counts, lambda split, row: f"{official[split]}/{row}"),
        splits=LazySequence(counts, lambda split, _: split if len(official) > 1 else ""),
        store=store,
        error_prefix=f"{name} ",
        index_path=index_path_for(data_dir, name, folder),
        identity=" ".join(_file_identities(folder)),
    )


def _open_store(builder: DatasetBuilder, split_names: list[str], data_dir: str) -> Store:
    import tensorflow_datasets as tfds

    shards = [Path(path) for split in split_names for path in builder.info.splits[split].filepaths]
    if builder.info.file_format == tfds.core.file_adapters.FileFormat.TFRECORD:
        version = hashlib.sha256(" ".join(_file_identities(Path(builder.data_dir))).encode()).hexdigest()[:16]
        count = sum(builder.info.splits[split].num_examples for split in split_names)
        index_path = Path(data_dir) / ".index" / f"records-{version}.npy"
        return TfRecords(shards, load_or_build_index(shards, count, index_path))
    skip = {"image": tfds.decode.SkipDecoding()}
    # A decorator of TFDS's hides the parameters of its methods.
    return ArrayRecords([builder.as_data_source(split=split, decoders=skip) for split in split_names])  # type: ignore[arg-type]


def _make_builder(name: str, tfds_source: Source, data_dir: str) -> DatasetBuilder:
    """Returns a builder of the prepared data in its file format, or one that will prepare ArrayRecord."""
    import tensorflow_datasets as tfds

    def make(**options: str) -> DatasetBuilder:
        if name == "digits":
            from train.data.digits.digits_dataset_builder import Builder

            return Builder(data_dir=data_dir, **options)
        return tfds.builder(tfds_source.tfds_name, data_dir=data_dir, **options)

    builder = make()
    return builder if _is_prepared(builder) else make(file_format="array_record")


# ------------------------------------------------------------------------------------------------------ preparing


@contextlib.contextmanager
def _lock(name: str, data_dir: str) -> Iterator[None]:
    """Lets one process prepare while others wait. The kernel releases the lock when its holder dies."""
    path = Path(data_dir) / f".{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = locks.acquire(path)
    except locks.LocksUnsupportedError as error:
        raise ValueError(
            f"cannot lock files in {data_dir} ({error.strerror}); use a data.directory on storage with file locks"
        ) from error
    except OSError as error:
        raise ValueError(
            f"cannot write to {data_dir} ({error.strerror}); make it writable, or use another data.directory"
        ) from error
    with lock:
        yield


def _prepare(name: str, tfds_source: Source, builder: DatasetBuilder, data_dir: str, manual_dir: str | None) -> None:
    if _is_prepared(builder):
        return  # another process did it while this one waited
    # One folder per data set, because TFDS identifies unpacked files by name, not by content.
    downloads = Path(data_dir) / "downloads" / name
    _remove_leftovers(tfds_source, data_dir, downloads)
    urls = {} if manual_dir else _missing_downloads(tfds_source, builder, downloads)
    needed = tfds_source.prepared_bytes + 2 * sum(urls.values())  # downloaded, then unpacked
    _check_space(name, needed, data_dir)
    _check_network(name, tfds_source, list(urls))
    try:
        _download_and_prepare(builder, downloads, manual_dir)
    except Exception as error:  # TFDS and its download libraries raise many types
        raise _preparation_error(name, tfds_source, error, needed, data_dir, manual_dir) from error
    finally:
        _remove_leftovers(tfds_source, data_dir, downloads)


def _is_prepared(builder: DatasetBuilder) -> bool:
    # TFDS renames the folder to this name once it is complete.
    return (Path(builder.data_dir) / "dataset_info.json").is_file()


def _remove_leftovers(tfds_source: Source, data_dir: str, downloads: Path) -> None:
    """Removes unpacked files and what a killed process left behind (the lock is held, so nobody is using it)."""
    incomplete = [*(Path(data_dir) / tfds_source.tfds_name).glob("incomplete.*"), *downloads.glob("**/*.tmp.*")]
    for path in (*incomplete, downloads / "extracted"):
        shutil.rmtree(path, ignore_errors=True)


def _preparation_error(
    name: str, tfds_source: Source, error: Exception, needed: int, data_dir: str, manual_dir: str | None
) -> ValueError:
    if _is_no_space(error):
        return _no_space_error(name, needed, data_dir)
    if not tfds_source.manual_files:
        return ValueError(
            f"cannot prepare data={name} in {data_dir}: {short_message(error)}; use another data.directory"
        )
    files = ", ".join(tfds_source.manual_files)
    if manual_dir:
        return ValueError(
            f"cannot prepare data={name} from data.manual_dir={manual_dir}: {short_message(error)}; "
            f"use the original files {files}"
        )
    return ValueError(
        f"cannot prepare data={name}: {short_message(error)}; retry, or download {files} yourself and use "
        "data.manual_dir=PATH"
    )


def _download_and_prepare(builder: DatasetBuilder, downloads: Path, manual_dir: str | None) -> None:
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(manual_dir=manual_dir)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints sizes even when they are unknown
        builder.download_and_prepare(download_dir=str(downloads), download_config=config)  # type: ignore[arg-type]


def _missing_downloads(tfds_source: Source, builder: DatasetBuilder, downloads: Path) -> dict[str, int]:
    """Returns the URLs that have not been downloaded, with sizes in bytes."""
    fetched = {url for info in downloads.glob("**/*.INFO") for url in _downloaded_urls(info)}
    url_infos = builder.url_infos or {}
    needed = {url: int(info.size) for url, info in url_infos.items() if info.filename in tfds_source.manual_files}
    return {url: size for url, size in needed.items() if url not in fetched}


def _downloaded_urls(info: Path) -> list[str]:
    try:
        return list(json.loads(info.read_text()).get("urls", []))
    except (OSError, ValueError):
        return []


def _check_network(name: str, tfds_source: Source, urls: Sequence[str]) -> None:
    """Sends one quick request first, because TFDS retries ten times with growing delays."""
    if not urls:
        return
    try:
        urllib.request.urlopen(urllib.request.Request(urls[0], method="HEAD"), timeout=TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
        return  # the server is reachable; the download reports its own errors
    except OSError as error:
        reason = f"{urlsplit(urls[0]).hostname} is unreachable: {getattr(error, 'reason', error)}"
        origins = dict.fromkeys(url.rpartition("/")[0] for url in urls)
        raise ValueError(
            f"cannot download data={name} ({reason}); download {', '.join(tfds_source.manual_files)} from "
            f"{' and '.join(origins)} on another machine, then use data.manual_dir=PATH"
        ) from error


# ---------------------------------------------------------------------------------------------------------- space


def _check_space(name: str, needed: int, data_dir: str) -> None:
    if shutil.disk_usage(data_dir).free < needed:
        raise _no_space_error(name, needed, data_dir)


def _no_space_error(name: str, needed: int, data_dir: str) -> ValueError:
    free = shutil.disk_usage(data_dir).free
    return ValueError(
        f"data={name} needs about {-(-needed // MIB)} MiB of free space in {Path(data_dir).resolve()}, "
        f"only {free // MIB} MiB are free; free some space or use a larger disk"
    )


def _is_no_space(error: BaseException) -> bool:
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def _file_identities(folder: Path) -> list[str]:
    """Returns name, size and time of each prepared file, to detect changes."""
    stats = sorted((path.name, path.stat()) for path in folder.iterdir())
    return [f"{name} {status.st_size} {status.st_mtime_ns}" for name, status in stats]
