"""Every example opened once, under limits; the verdicts are kept, and only what changed is looked at again."""

import hashlib
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from train.data import parallel_map
from train.data.decode import MAX_PIXELS, Header, decode, decode_jpeg, is_upright, read_header
from train.data.ingestion import example_index
from train.data.ingestion.example_index import ExampleIndex, ExampleIndexBuilder
from train.data.sources.listing import Listing
from train.runtime.setup import cores
from train.storage import checksummed

CHUNK = 64  # examples that a thread looks at before it reports
MAX_NAMED = 10  # how many broken examples an error names; it counts them all
MIN_HASHED_SIDE = 64  # smaller pictures of different things look alike
MIN_HASH_BITS = 8  # a difference hash with fewer bits set, or unset, is that of a flat picture


@dataclass(frozen=True)
class Limits:
    """max_bytes: encoded; max_pixels: width times height. on_error: `raise`, or `skip` at most `max_skipped`."""

    max_bytes: int = 2**26
    max_pixels: int = MAX_PIXELS
    on_error: str = "raise"
    max_skipped: int = 100


@dataclass(frozen=True)
class ExampleInfo:
    """What is known of one example after a look at its bytes; the columns of verdicts.py that come from them."""

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
    """Verdicts over every row of the listing, from the last look where nothing has changed since.

    Raises: ValueError that names the first broken examples, and counts them all, unless they are to be skipped.
    """
    identity = _index_identity(listing, limits)
    found = example_index.read(listing.index_path)
    if found is None or not _is_up_to_date(found, listing, identity):
        with checksummed.exclusive(listing.index_path):
            found = example_index.read(listing.index_path)  # of another process, perhaps, for which this one waited
            if found is None or not _is_up_to_date(found, listing, identity):
                now = _build_index(listing, limits, identity, found)
                if found is None or not now.table.equals(found.table, check_metadata=True):
                    found = example_index.write(listing.index_path, now)
    check_readable(found, listing, limits)
    return found


def _is_up_to_date(index: ExampleIndex, listing: Listing, identity: str) -> bool:
    return _matches_listing(index, listing, identity) and not _may_be_repaired(index, listing)


def check_readable(index: ExampleIndex, listing: Listing, limits: Limits) -> None:
    """Raises: ValueError, as `ingest`."""
    broken = index.problems()
    if not broken or (limits.on_error == "skip" and len(broken) <= limits.max_skipped):
        return
    named = "; ".join(f"{listing.error_prefix}{index.text_at('path', row)} ({why})" for row, why in broken[:MAX_NAMED])
    more = f" and {len(broken) - MAX_NAMED} more" if len(broken) > MAX_NAMED else ""
    way = (
        f"use data.on_error=skip data.max_skipped={len(broken)} to leave them out"
        if limits.on_error == "raise"
        else f"data.max_skipped={len(broken)} would leave them all out"
    )
    raise ValueError(
        f"the data must be readable images, got {len(broken)} of {len(index)} that are not: {named}{more}; "
        f"mend or remove them, or {way}"
    )


def inspect(data: bytes, label: int, limits: Limits) -> ExampleInfo:
    """One example, whatever its bytes are; never raises."""
    content = hashlib.sha256(data).hexdigest().encode()
    if len(data) > limits.max_bytes:
        return ExampleInfo(len(data), label, content, problem=_too_large_message(len(data), limits))
    try:
        header = read_header(data, limits.max_pixels)
        known = (len(data), label, content, header.format, header.width, header.height)
    except ValueError as error:
        return ExampleInfo(len(data), label, content, problem=str(error))
    try:
        pixels = decode(data, 3, max_pixels=limits.max_pixels)
    except ValueError as error:
        return ExampleInfo(*known, problem=str(error))
    return ExampleInfo(*known, _is_fast_jpeg(header, data, pixels), *perceptual_hash(pixels))


def _is_fast_jpeg(header: Header, data: bytes, pixels: np.ndarray) -> bool:
    if header.format != "JPEG" or header.mode not in ("L", "RGB") or not is_upright(data):
        return False
    try:
        return np.array_equal(pixels, decode_jpeg(data))
    except ValueError:
        return False


def perceptual_hash(pixels: np.ndarray) -> tuple[int, bytes]:
    """What a picture uint8 [H, W, 3] is compared by: a difference hash, and a thumbnail.

    The hash: 64 bits, whether each of 8x8 places is darker than its right neighbour; 0 for pictures that are too small
    or too flat to be told apart by it. The thumbnail: 8x8 mean greys.
    Source: N. Krawetz, "Kind of Like That" (2013).
    """
    if min(pixels.shape[:2]) < MIN_HASHED_SIDE:
        return 0, bytes(64)
    grey = Image.fromarray(pixels).convert("L")
    rows = np.asarray(grey.resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    bits = np.packbits(rows[:, 1:] > rows[:, :-1])
    flat = not MIN_HASH_BITS <= np.bitwise_count(bits).sum() <= 64 - MIN_HASH_BITS
    return 0 if flat else int.from_bytes(bits.tobytes(), "big"), grey.resize((8, 8), Image.Resampling.BOX).tobytes()


def _too_large_message(size: int, limits: Limits) -> str:
    return f"{size:,} bytes are more than the limit of {limits.max_bytes:,}"


# ---------------------------------------------------------------------------------------------------- all of a listing


def _index_identity(listing: Listing, limits: Limits) -> str:
    return f"{listing.identity} {limits.max_bytes} {limits.max_pixels}"


def _may_be_repaired(index: ExampleIndex, listing: Listing) -> bool:
    """What can't be read today may be readable tomorrow, with the same size and time."""
    return listing.file_stats is not None and not index.valid_mask().all()


def _matches_listing(index: ExampleIndex, listing: Listing, identity: str) -> bool:
    """Whether these are verdicts over just this listing as it is now."""
    if index.identity != identity or len(index) != len(listing):
        return False
    if listing.file_stats is None:  # the identity stands for all
        return True
    import pyarrow as pa

    size, time = listing.file_stats.T
    now = {"path": listing.names, "split": listing.splits, "label": listing.labels, "size": size, "time": time}
    return all(
        index.table[name].chunk(0).equals(pa.array(entries, index.table.schema.field(name).type))
        for name, entries in now.items()
    )


def _build_index(listing: Listing, limits: Limits, identity: str, previous: ExampleIndex | None) -> ExampleIndex:
    draft = ExampleIndexBuilder(len(listing))
    rows, earlier = _unchanged_rows(
        listing, previous if previous is not None and previous.identity == identity else None
    )
    if previous is not None:
        draft.copy_rows(rows, previous, earlier)
    for row, problem in listing.problems.items():
        draft.set_row(row, problem=problem)
    fresh = np.setdiff1d(np.arange(len(listing)), [*rows, *listing.problems])
    if len(fresh):
        _inspect_rows(listing, fresh, limits, draft)
    if listing.file_stats is not None:
        draft.numeric_columns["size"][:], draft.numeric_columns["time"][:] = listing.file_stats.T
    if listing.labels is not None:
        draft.numeric_columns["label"][:] = listing.labels
    return draft.build(identity, listing.names, listing.splits)


def _unchanged_rows(listing: Listing, previous: ExampleIndex | None) -> tuple[np.ndarray, np.ndarray]:
    """Rows of files that have the size and time of the last look, and their rows then. Broken ones are seen again."""
    if listing.file_stats is None or previous is None:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    then = {name: row for row, name in enumerate(previous.table["path"].to_pylist())}
    pairs = np.array([(row, then[name]) for row, name in enumerate(listing.names) if name in then], np.int64)
    rows, earlier = pairs.reshape(-1, 2).T
    stamps = np.stack([previous.numeric_column("size"), previous.numeric_column("time")], axis=1)
    same = (listing.file_stats[rows] == stamps[earlier]).all(axis=1) & previous.valid_mask()[earlier]
    same &= ~np.isin(rows, list(listing.problems))
    return rows[same], earlier[same]


def _inspect_rows(listing: Listing, rows: np.ndarray, limits: Limits, builder: ExampleIndexBuilder) -> None:
    """In threads, with a bar on a terminal where it takes a while."""
    from rich.console import Console
    from rich.progress import Progress

    chunks = [rows[start : start + CHUNK].tolist() for start in range(0, len(rows), CHUNK)]
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("looking at the data, once", total=len(rows))
        for looks in parallel_map.map_in_order(
            partial(_inspect_chunk, listing, limits), chunks, _num_workers(listing, rows)
        ):
            for row, found in looks:
                builder.set_row(row, **vars(found))
            bar.advance(task, len(looks))


def _num_workers(listing: Listing, rows: np.ndarray) -> int:
    if listing.file_stats is not None:
        return parallel_map.decoder_threads(listing.file_stats[rows[0], 0])
    try:
        return parallel_map.decoder_threads(len(listing.store.read(rows[:1].tolist())[0]))
    except OSError:
        return cores()


def _inspect_chunk(listing: Listing, limits: Limits, rows: list[int]) -> list[tuple[int, ExampleInfo]]:
    try:
        read = listing.store.read_labelled(rows) if not _any_too_large(listing, rows, limits) else None
    except OSError:
        read = None  # one by one then, to know which
    if read is not None:
        return [(row, inspect(data, label, limits)) for row, (data, label) in zip(rows, read, strict=True)]
    return [(row, _inspect_row(listing, row, limits)) for row in rows]


def _any_too_large(listing: Listing, rows: list[int], limits: Limits) -> bool:
    return listing.file_stats is not None and bool((listing.file_stats[rows, 0] > limits.max_bytes).any())


def _inspect_row(listing: Listing, row: int, limits: Limits) -> ExampleInfo:
    if _any_too_large(listing, [row], limits):  # not even read
        assert listing.file_stats is not None
        return ExampleInfo(
            int(listing.file_stats[row, 0]), problem=_too_large_message(int(listing.file_stats[row, 0]), limits)
        )
    try:
        [(data, label)] = listing.store.read_labelled([row])
    except OSError as error:
        return ExampleInfo(0, problem=error.strerror or str(error))
    return inspect(data, label, limits)
