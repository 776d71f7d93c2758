"""TFDS sets: prepared once as ArrayRecord, then read by index."""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from train.data.catalog import MIB, Source, get_source
from train.data.ingestion.example_index import index_path_for
from train.data.sources.listing import LazySequence, Listing, Store
from train.data.sources.record_readers import ArrayRecords, TfRecords, load_or_build_index, short_message

TIMEOUT_SECONDS = 5


def list_tfds(name: str, data_dir: str, manual_dir: str | None) -> Listing:
    """The official parts that serve as train and test; prepares the set the first time.

    Raises: ValueError in one line: no network (and where to put the files), no space, wrong files.
    """
    chosen = get_source(name)
    builder = _make_builder(name, chosen, data_dir)
    if not _is_prepared(builder):
        with _lock(name, data_dir):
            _prepare(name, chosen, builder, data_dir, manual_dir)
        builder = _make_builder(name, chosen, data_dir)  # one that knows what was prepared, by whichever process
    official = {"train": chosen.train} | ({"test": chosen.test} if chosen.test else {})
    folder = Path(builder.data_dir)
    try:
        store = _open_store(builder, list(official.values()), data_dir)
    except (NotImplementedError, RuntimeError, OSError) as error:  # damaged; not readable
        raise ValueError(
            f"data={name} must be readable in {folder}, got: {short_message(error)}; "
            "use a new copy: remove that folder and it is prepared again"
        ) from error
    counts = {ours: builder.info.splits[theirs].num_examples for ours, theirs in official.items()}
    return Listing(
        classes=tuple(builder.info.features["label"].names),
        names=LazySequence(counts, lambda part, row: f"{official[part]}/{row}"),
        splits=LazySequence(counts, lambda part, _: part if len(official) > 1 else ""),
        store=store,
        error_prefix=f"{name} ",
        index_path=index_path_for(data_dir, name, folder),
        identity=" ".join(_file_identities(folder)),
    )


def _open_store(builder: Any, split_names: list[str], data_dir: str) -> Store:
    import tensorflow_datasets as tfds

    shards = [Path(path) for part in split_names for path in builder.info.splits[part].filepaths]
    if builder.info.file_format == tfds.core.file_adapters.FileFormat.TFRECORD:
        version = hashlib.sha256(" ".join(_file_identities(Path(builder.data_dir))).encode()).hexdigest()[:16]
        count = sum(builder.info.splits[part].num_examples for part in split_names)
        return TfRecords(
            shards, load_or_build_index(shards, count, Path(data_dir) / ".index" / f"records-{version}.npy")
        )
    skip = {"image": tfds.decode.SkipDecoding()}
    return ArrayRecords([builder.as_data_source(split=part, decoders=skip) for part in split_names])


def _make_builder(name: str, tfds_source: Source, data_dir: str) -> Any:
    """Of what is there, in whichever format; what is not there will be ArrayRecord."""
    import tensorflow_datasets as tfds

    def make(**words: Any) -> Any:
        if name == "digits":
            from train.data.digits.digits_dataset_builder import Builder

            return Builder(data_dir=data_dir, **words)
        return tfds.builder(tfds_source.tfds_name, data_dir=data_dir, **words)

    found = make()
    return found if _is_prepared(found) else make(file_format="array_record")


# ------------------------------------------------------------------------------------------------------ preparing


@contextlib.contextmanager
def _lock(name: str, data_dir: str) -> Iterator[None]:
    """One process prepares, the others wait. The kernel lets go of the lock when its holder dies."""
    place = Path(data_dir) / f".{name}.lock"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        file = place.open("w")
    except OSError as error:
        raise ValueError(f"the data folder must be writable, got {data_dir} ({error.strerror}); use another") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _prepare(name: str, tfds_source: Source, builder: Any, data_dir: str, manual_dir: str | None) -> None:
    if _is_prepared(builder):
        return  # another process did it while this one waited
    downloads = Path(data_dir) / "downloads" / name  # its own: TFDS tells unpacked files by name, not by content
    _remove_leftovers(tfds_source, data_dir, downloads)
    urls = {} if manual_dir else _missing_downloads(tfds_source, builder, downloads)
    needed = tfds_source.prepared_bytes + 2 * sum(urls.values())  # downloaded, then unpacked
    _check_space(name, needed, data_dir)
    _check_network(name, tfds_source, list(urls))
    try:
        _download_and_prepare(builder, downloads, manual_dir)
    except Exception as error:  # TFDS and what it downloads with raise many kinds
        raise _preparation_error(name, tfds_source, error, needed, data_dir, manual_dir) from error
    finally:
        _remove_leftovers(tfds_source, data_dir, downloads)


def _is_prepared(builder: Any) -> bool:
    # The folder gets its name by a rename, when it is complete.
    return (Path(builder.data_dir) / "dataset_info.json").is_file()


def _remove_leftovers(tfds_source: Source, data_dir: str, downloads: Path) -> None:
    """What a killed process left (the lock says that nobody is at it), and unpacked files, needed only meanwhile."""
    half = [*(Path(data_dir) / tfds_source.tfds_name).glob("incomplete.*"), *downloads.glob("**/*.tmp.*")]
    for left in (*half, downloads / "extracted"):
        shutil.rmtree(left, ignore_errors=True)


def _preparation_error(
    name: str, tfds_source: Source, error: Exception, needed: int, data_dir: str, manual_dir: str | None
) -> ValueError:
    if _is_no_space(error):
        return _no_space_error(name, needed, data_dir)
    if not tfds_source.manual_files:
        return ValueError(
            f"data={name} must be preparable in {data_dir}, got: {short_message(error)}; use another data folder"
        )
    place = manual_dir or "none"
    advice = "use the original files" if manual_dir else "use data.manual_dir=PATH with the original files"
    return ValueError(f"{_manual_dir_message(name, tfds_source)}, got {place} ({short_message(error)}); {advice}")


def _download_and_prepare(builder: Any, downloads: Path, manual_dir: str | None) -> None:
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(manual_dir=manual_dir)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints sizes that it doesn't know
        builder.download_and_prepare(download_dir=str(downloads), download_config=config)


def _missing_downloads(tfds_source: Source, builder: Any, downloads: Path) -> dict[str, int]:
    """Addresses still to be fetched, with sizes in bytes."""
    fetched = {url for info in downloads.glob("**/*.INFO") for url in _downloaded_urls(info)}
    known = builder.url_infos or {}
    wanted = {url: int(info.size) for url, info in known.items() if info.filename in tfds_source.manual_files}
    return {url: size for url, size in wanted.items() if url not in fetched}


def _downloaded_urls(info: Path) -> list[str]:
    try:
        return list(json.loads(info.read_text()).get("urls", []))
    except (OSError, ValueError):
        return []


def _check_network(name: str, tfds_source: Source, urls: Sequence[str]) -> None:
    """One quick question first, because TFDS asks ten times with growing pauses."""
    if not urls:
        return
    try:
        urllib.request.urlopen(urllib.request.Request(urls[0], method="HEAD"), timeout=TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
        return  # somebody answered; what the download itself meets, it reports
    except OSError as error:
        reason = f"{urlsplit(urls[0]).hostname} is out of reach: {getattr(error, 'reason', error)}"
        raise ValueError(
            f"{_manual_dir_message(name, tfds_source)}, got none ({reason}); {_download_advice(urls)}"
        ) from error


def _manual_dir_message(name: str, tfds_source: Source) -> str:
    files = ", ".join(tfds_source.manual_files)
    return f"data.manual_dir must be a folder with {files} where data={name} can't be downloaded"


def _download_advice(urls: Iterable[str]) -> str:
    origins = dict.fromkeys(url.rpartition("/")[0] for url in urls)
    return f"use data.manual_dir=PATH with the files fetched from {' and '.join(origins)}"


# ---------------------------------------------------------------------------------------------------------- space


def _check_space(name: str, needed: int, data_dir: str) -> None:
    if shutil.disk_usage(data_dir).free < needed:
        raise _no_space_error(name, needed, data_dir)


def _no_space_error(name: str, needed: int, data_dir: str) -> ValueError:
    free = shutil.disk_usage(data_dir).free
    return ValueError(
        f"data={name} must have about {-(-needed // MIB)} MiB of free space in {Path(data_dir).resolve()}, "
        f"got {free // MIB} MiB; use a disk with more room or free some"
    )


def _is_no_space(error: BaseException) -> bool:
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def _file_identities(folder: Path) -> list[str]:
    """What changes when somebody touches the prepared files."""
    found = sorted((path.name, path.stat()) for path in folder.iterdir())
    return [f"{name} {status.st_size} {status.st_mtime_ns}" for name, status in found]
