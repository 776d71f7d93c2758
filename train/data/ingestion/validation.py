"""Validates every example once, under limits; results are stored, and only changed examples are validated again."""

import hashlib
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from train.data import parallel_map
from train.data.decode import Header, decode, decode_jpeg, is_upright, read_header
from train.data.ingestion import example_index
from train.data.ingestion.example_index import ExampleIndex, ExampleIndexBuilder
from train.data.sources.listing import Listing
from train.runtime.setup import cores
from train.storage import checksummed

CHUNK = 64  # examples that a thread inspects per task
MAX_NAMED = 10  # how many broken examples an error names; it counts them all
MIN_HASHED_SIDE = 64  # the hashes of smaller images say too little
WHITE = (255, 255, 255)  # behind transparent pixels of an image that is only inspected
MIN_HASH_BITS = 8  # a difference hash with fewer bits set, or unset, belongs to a nearly uniform image


@dataclass(frozen=True)
class Limits:
    """max_bytes: encoded; max_pixels: width times height. on_error: `raise`, or `skip` for up to `max_skipped`."""

    max_bytes: int
    max_pixels: int
    on_error: str
    max_skipped: int


@dataclass(frozen=True)
class ExampleInfo:
    """The properties of one example that come from its bytes: columns of the example index."""

    size: int
    label: int = -1
    sha256: bytes = b"0" * 64
    format: str = ""
    width: int = 0
    height: int = 0
    plain: bool = False
    likeness: int = 0
    thumbnail: bytes = bytes(64)
    problem: str = ""


def ingest(listing: Listing, limits: Limits) -> ExampleIndex:
    """Returns the index of all examples in the listing; reuses stored results for what has not changed.

    Raises: ValueError that names the first broken examples and counts them all, unless they may be skipped.
    """
    identity = _index_identity(listing, limits)
    index = example_index.read(listing.index_path)
    if index is None or not _is_up_to_date(index, listing, identity):
        with checksummed.exclusive(listing.index_path):
            index = example_index.read(listing.index_path)  # another process may have written it in the meantime
            if index is None or not _is_up_to_date(index, listing, identity):
                new_index = _build_index(listing, limits, identity, index)
                if index is None or not new_index.table.equals(index.table, check_metadata=True):
                    index = example_index.write(listing.index_path, new_index)
    check_readable(index, listing, limits)
    return index


def _is_up_to_date(index: ExampleIndex, listing: Listing, identity: str) -> bool:
    return _matches_listing(index, listing, identity) and not _may_be_repaired(index, listing)


def check_readable(index: ExampleIndex, listing: Listing, limits: Limits) -> None:
    """Checks that no example is broken, or that few enough are to skip them. Raises: ValueError, see `ingest`."""
    broken = index.problems()
    if not broken or (limits.on_error == "skip" and len(broken) <= limits.max_skipped):
        return
    named = "; ".join(
        f"{listing.error_prefix}{index.text_at('path', row)} ({reason})" for row, reason in broken[:MAX_NAMED]
    )
    more = f" and {len(broken) - MAX_NAMED} more" if len(broken) > MAX_NAMED else ""
    settings = f"data.max_skipped={len(broken)} to leave them out"
    if limits.on_error == "raise":
        settings = f"data.on_error=skip {settings}"
    raise ValueError(
        f"{len(broken)} of {len(index)} images cannot be read: {named}{more}; fix or remove them, or set {settings}"
    )


def inspect(data: bytes, label: int, limits: Limits) -> ExampleInfo:
    """Inspects one example; never raises, whatever its bytes are."""
    sha256 = hashlib.sha256(data).hexdigest().encode()
    if len(data) > limits.max_bytes:
        return ExampleInfo(len(data), label, sha256, problem=_too_large_message(len(data), limits))
    try:
        header = read_header(data, limits.max_pixels)
        properties = (len(data), label, sha256, header.format, header.width, header.height)
    except ValueError as error:
        return ExampleInfo(len(data), label, sha256, problem=str(error))
    try:
        pixels = decode(data, 3, WHITE, limits.max_pixels)
    except ValueError as error:
        return ExampleInfo(*properties, problem=str(error))
    return ExampleInfo(*properties, _is_fast_jpeg(header, data, pixels), *perceptual_hash(pixels))


def _is_fast_jpeg(header: Header, data: bytes, pixels: np.ndarray) -> bool:
    if header.format != "JPEG" or header.mode not in ("L", "RGB") or not is_upright(data):
        return False
    try:
        return np.array_equal(pixels, decode_jpeg(data))
    except ValueError:
        return False


def perceptual_hash(pixels: np.ndarray) -> tuple[int, bytes]:
    """Computes the difference hash and the thumbnail of an image uint8 [H, W, 3].

    Hash: 64 bits, one for each of 8x8 cells that is darker than its right neighbour; 0 for images that are too small
    or too uniform. Thumbnail: 8x8 mean grey levels.
    Source: N. Krawetz, "Kind of Like That" (2013).
    """
    if min(pixels.shape[:2]) < MIN_HASHED_SIDE:
        return 0, bytes(64)
    grey = Image.fromarray(pixels).convert("L")
    rows = np.asarray(grey.resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    bits = np.packbits(rows[:, 1:] > rows[:, :-1])
    uniform = not MIN_HASH_BITS <= np.bitwise_count(bits).sum() <= 64 - MIN_HASH_BITS
    return 0 if uniform else int.from_bytes(bits.tobytes(), "big"), grey.resize((8, 8), Image.Resampling.BOX).tobytes()


def _too_large_message(size: int, limits: Limits) -> str:
    return f"{size:,} bytes are more than the limit of {limits.max_bytes:,}"


# ------------------------------------------------------------------------------------------------------ whole listing


def _index_identity(listing: Listing, limits: Limits) -> str:
    return f"{listing.identity} {limits.max_bytes} {limits.max_pixels}"


def _may_be_repaired(index: ExampleIndex, listing: Listing) -> bool:
    """Whether broken files need another try: they may be readable now, with the same size and time."""
    return listing.file_stats is not None and not index.valid_mask().all()


def _matches_listing(index: ExampleIndex, listing: Listing, identity: str) -> bool:
    """Whether the index covers exactly this listing in its current state."""
    if index.identity != identity or len(index) != len(listing):
        return False
    if listing.file_stats is None:  # the identity covers everything
        return True
    import pyarrow as pa

    size, time = listing.file_stats.T
    expected = {"path": listing.names, "split": listing.splits, "label": listing.labels, "size": size, "time": time}
    return all(
        index.table[name].chunk(0).equals(pa.array(entries, index.table.schema.field(name).type))
        for name, entries in expected.items()
    )


def _build_index(listing: Listing, limits: Limits, identity: str, previous: ExampleIndex | None) -> ExampleIndex:
    builder = ExampleIndexBuilder(len(listing))
    reusable = previous if previous is not None and previous.identity == identity else None
    rows, previous_rows = _unchanged_rows(listing, reusable)
    if previous is not None:
        builder.copy_rows(rows, previous, previous_rows)
    for row, problem in listing.problems.items():
        builder.set_row(row, problem=problem)
    changed = np.setdiff1d(np.arange(len(listing)), [*rows, *listing.problems])
    if len(changed):
        _inspect_rows(listing, changed, limits, builder)
    if listing.file_stats is not None:
        builder.numeric_columns["size"][:], builder.numeric_columns["time"][:] = listing.file_stats.T
    if listing.labels is not None:
        builder.numeric_columns["label"][:] = listing.labels
    return builder.build(identity, listing.names, listing.splits)


def _unchanged_rows(listing: Listing, previous: ExampleIndex | None) -> tuple[np.ndarray, np.ndarray]:
    """Rows of valid files with unchanged size and time, and their rows in the previous index."""
    if listing.file_stats is None or previous is None:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    row_of = {name: row for row, name in enumerate(previous.table["path"].to_pylist())}
    pairs = np.array([(row, row_of[name]) for row, name in enumerate(listing.names) if name in row_of], np.int64)
    rows, previous_rows = pairs.reshape(-1, 2).T
    previous_stats = np.stack([previous.numeric_column("size"), previous.numeric_column("time")], axis=1)
    unchanged = (listing.file_stats[rows] == previous_stats[previous_rows]).all(axis=1)
    unchanged &= previous.valid_mask()[previous_rows]
    unchanged &= ~np.isin(rows, list(listing.problems))
    return rows[unchanged], previous_rows[unchanged]


def _inspect_rows(listing: Listing, rows: np.ndarray, limits: Limits, builder: ExampleIndexBuilder) -> None:
    """Inspects rows in threads, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    chunks = [rows[start : start + CHUNK].tolist() for start in range(0, len(rows), CHUNK)]
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("indexing images (first run only)", total=len(rows))
        inspect_chunk = partial(_inspect_chunk, listing, limits)
        for results in parallel_map.map_in_order(inspect_chunk, chunks, _num_workers(listing, rows)):
            for row, info in results:
                builder.set_row(row, **vars(info))
            bar.advance(task, len(results))


def _num_workers(listing: Listing, rows: np.ndarray) -> int:
    if listing.file_stats is not None:
        return parallel_map.decoder_threads(listing.file_stats[rows[0], 0])
    try:
        return parallel_map.decoder_threads(len(listing.store.read(rows[:1].tolist())[0]))
    except OSError:
        return cores()


def _inspect_chunk(listing: Listing, limits: Limits, rows: list[int]) -> list[tuple[int, ExampleInfo]]:
    try:
        examples = listing.store.read_labelled(rows) if not _any_too_large(listing, rows, limits) else None
    except OSError:
        examples = None  # read one by one below, to find out which one failed
    if examples is not None:
        return [(row, inspect(data, label, limits)) for row, (data, label) in zip(rows, examples, strict=True)]
    return [(row, _inspect_row(listing, row, limits)) for row in rows]


def _any_too_large(listing: Listing, rows: list[int], limits: Limits) -> bool:
    return listing.file_stats is not None and bool((listing.file_stats[rows, 0] > limits.max_bytes).any())


def _inspect_row(listing: Listing, row: int, limits: Limits) -> ExampleInfo:
    if _any_too_large(listing, [row], limits):  # do not even read it
        assert listing.file_stats is not None
        size = int(listing.file_stats[row, 0])
        return ExampleInfo(size, problem=_too_large_message(size, limits))
    try:
        [(data, label)] = listing.store.read_labelled([row])
    except OSError as error:
        return ExampleInfo(0, problem=error.strerror or str(error))
    return inspect(data, label, limits)
