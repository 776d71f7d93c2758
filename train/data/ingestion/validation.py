"""Every example opened once, under limits; the verdicts are kept, and only what changed is looked at again."""

import hashlib
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from train.data import parallel_map
from train.data.decode import MAX_PIXELS, Header, decode, decode_jpeg, is_upright, read_header
from train.data.ingestion import example_index
from train.data.ingestion.example_index import Draft, Verdicts
from train.data.sources.listing import Listing
from train.runtime.setup import cores
from train.storage import checksummed

CHUNK = 64  # examples that a thread looks at before it reports
NAMED = 10  # how many broken examples an error names; it counts them all
ALIKE_PIXELS = 64  # smaller pictures of different things look alike
BITS = 8  # a difference hash with fewer bits set, or unset, is that of a flat picture


@dataclass(frozen=True)
class Limits:
    """max_bytes: encoded; max_pixels: width times height. on_error: `raise`, or `skip` at most `max_skipped`."""

    max_bytes: int = 2**26
    max_pixels: int = MAX_PIXELS
    on_error: str = "raise"
    max_skipped: int = 100


@dataclass(frozen=True)
class Look:
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


def ingest(listing: Listing, limits: Limits) -> Verdicts:
    """Verdicts over every row of the listing, from the last look where nothing has changed since.

    Raises: ValueError that names the first broken examples, and counts them all, unless they are to be skipped.
    """
    identity = _identity(listing, limits)
    found = example_index.read(listing.index)
    if found is None or not _is_fresh(found, listing, identity):
        with checksummed.alone(listing.index):
            found = example_index.read(listing.index)  # of another process, perhaps, for which this one waited
            if found is None or not _is_fresh(found, listing, identity):
                now = _look_at_all(listing, limits, identity, found)
                if found is None or not now.table.equals(found.table, check_metadata=True):
                    found = example_index.write(listing.index, now)
    refuse_broken(found, listing, limits)
    return found


def _is_fresh(found: Verdicts, listing: Listing, identity: str) -> bool:
    return _covers(found, listing, identity) and not _may_be_mended(found, listing)


def refuse_broken(found: Verdicts, listing: Listing, limits: Limits) -> None:
    """Raises: ValueError, as `ingest`."""
    broken = found.problems()
    if not broken or (limits.on_error == "skip" and len(broken) <= limits.max_skipped):
        return
    named = "; ".join(f"{listing.origin}{found.text('path', row)} ({why})" for row, why in broken[:NAMED])
    more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
    way = (
        f"use data.on_error=skip data.max_skipped={len(broken)} to leave them out"
        if limits.on_error == "raise"
        else f"data.max_skipped={len(broken)} would leave them all out"
    )
    raise ValueError(
        f"the data must be readable images, got {len(broken)} of {len(found)} that are not: {named}{more}; "
        f"mend or remove them, or {way}"
    )


def look(data: bytes, label: int, limits: Limits) -> Look:
    """One example, whatever its bytes are; never raises."""
    content = hashlib.sha256(data).hexdigest().encode()
    if len(data) > limits.max_bytes:
        return Look(len(data), label, content, problem=_too_large(len(data), limits))
    try:
        header = read_header(data, limits.max_pixels)
        known = (len(data), label, content, header.format, header.width, header.height)
    except ValueError as error:
        return Look(len(data), label, content, problem=str(error))
    try:
        pixels = decode(data, 3, max_pixels=limits.max_pixels)
    except ValueError as error:
        return Look(*known, problem=str(error))
    return Look(*known, _is_plain(header, data, pixels), *likeness(pixels))


def _is_plain(header: Header, data: bytes, pixels: np.ndarray) -> bool:
    if header.format != "JPEG" or header.mode not in ("L", "RGB") or not is_upright(data):
        return False
    try:
        return np.array_equal(pixels, decode_jpeg(data))
    except ValueError:
        return False


def likeness(pixels: np.ndarray) -> tuple[int, bytes]:
    """What a picture uint8 [H, W, 3] is compared by: a difference hash, and a thumbnail.

    The hash: 64 bits, whether each of 8x8 places is darker than its right neighbour; 0 for pictures that are too small
    or too flat to be told apart by it. The thumbnail: 8x8 mean greys.
    Source: N. Krawetz, "Kind of Like That" (2013).
    """
    if min(pixels.shape[:2]) < ALIKE_PIXELS:
        return 0, bytes(64)
    grey = Image.fromarray(pixels).convert("L")
    rows = np.asarray(grey.resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    bits = np.packbits(rows[:, 1:] > rows[:, :-1])
    flat = not BITS <= np.bitwise_count(bits).sum() <= 64 - BITS
    return 0 if flat else int.from_bytes(bits.tobytes(), "big"), grey.resize((8, 8), Image.Resampling.BOX).tobytes()


def _too_large(size: int, limits: Limits) -> str:
    return f"{size:,} bytes are more than the limit of {limits.max_bytes:,}"


# ---------------------------------------------------------------------------------------------------- all of a listing


def _identity(listing: Listing, limits: Limits) -> str:
    return f"{listing.identity} {limits.max_bytes} {limits.max_pixels}"


def _may_be_mended(found: Verdicts, listing: Listing) -> bool:
    """What can't be read today may be readable tomorrow, with the same size and time."""
    return listing.stamps is not None and not found.sound().all()


def _covers(found: Verdicts, listing: Listing, identity: str) -> bool:
    """Whether these are verdicts over just this listing as it is now."""
    if found.identity != identity or len(found) != len(listing):
        return False
    if listing.stamps is None:  # the identity stands for all
        return True
    import pyarrow as pa

    size, time = listing.stamps.T
    now = {"path": listing.names, "split": listing.splits, "label": listing.labels, "size": size, "time": time}
    return all(
        found.table[name].chunk(0).equals(pa.array(entries, found.table.schema.field(name).type))
        for name, entries in now.items()
    )


def _look_at_all(listing: Listing, limits: Limits, identity: str, before: Verdicts | None) -> Verdicts:
    draft = Draft(len(listing))
    rows, earlier = _unchanged(listing, before if before is not None and before.identity == identity else None)
    if before is not None:
        draft.copy(rows, before, earlier)
    for row, problem in listing.problems.items():
        draft.fill(row, problem=problem)
    fresh = np.setdiff1d(np.arange(len(listing)), [*rows, *listing.problems])
    if len(fresh):
        _look(listing, fresh, limits, draft)
    if listing.stamps is not None:
        draft.numbers["size"][:], draft.numbers["time"][:] = listing.stamps.T
    if listing.labels is not None:
        draft.numbers["label"][:] = listing.labels
    return draft.finish(identity, listing.names, listing.splits)


def _unchanged(listing: Listing, before: Verdicts | None) -> tuple[np.ndarray, np.ndarray]:
    """Rows of files that have the size and time of the last look, and their rows then. Broken ones are seen again."""
    if listing.stamps is None or before is None:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    then = {name: row for row, name in enumerate(before.table["path"].to_pylist())}
    pairs = np.array([(row, then[name]) for row, name in enumerate(listing.names) if name in then], np.int64)
    rows, earlier = pairs.reshape(-1, 2).T
    stamps = np.stack([before.numbers("size"), before.numbers("time")], axis=1)
    same = (listing.stamps[rows] == stamps[earlier]).all(axis=1) & before.sound()[earlier]
    same &= ~np.isin(rows, list(listing.problems))
    return rows[same], earlier[same]


def _look(listing: Listing, rows: np.ndarray, limits: Limits, draft: Draft) -> None:
    """In threads, with a bar on a terminal where it takes a while."""
    from rich.console import Console
    from rich.progress import Progress

    chunks = [rows[start : start + CHUNK].tolist() for start in range(0, len(rows), CHUNK)]
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("looking at the data, once", total=len(rows))
        for looks in parallel_map.in_order(partial(_look_at, listing, limits), chunks, _workers(listing, rows)):
            for row, found in looks:
                draft.fill(row, **vars(found))
            bar.advance(task, len(looks))


def _workers(listing: Listing, rows: np.ndarray) -> int:
    if listing.stamps is not None:
        return parallel_map.decoders(listing.stamps[rows[0], 0])
    try:
        return parallel_map.decoders(len(listing.store.read(rows[:1].tolist())[0]))
    except OSError:
        return cores()


def _look_at(listing: Listing, limits: Limits, rows: list[int]) -> list[tuple[int, Look]]:
    try:
        read = listing.store.read_labelled(rows) if not _any_large(listing, rows, limits) else None
    except OSError:
        read = None  # one by one then, to know which
    if read is not None:
        return [(row, look(data, label, limits)) for row, (data, label) in zip(rows, read, strict=True)]
    return [(row, _look_at_one(listing, row, limits)) for row in rows]


def _any_large(listing: Listing, rows: list[int], limits: Limits) -> bool:
    return listing.stamps is not None and bool((listing.stamps[rows, 0] > limits.max_bytes).any())


def _look_at_one(listing: Listing, row: int, limits: Limits) -> Look:
    if _any_large(listing, [row], limits):  # not even read
        assert listing.stamps is not None
        return Look(int(listing.stamps[row, 0]), problem=_too_large(int(listing.stamps[row, 0]), limits))
    try:
        [(data, label)] = listing.store.read_labelled([row])
    except OSError as error:
        return Look(0, problem=error.strerror or str(error))
    return look(data, label, limits)
