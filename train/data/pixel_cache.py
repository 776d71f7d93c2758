"""Decoded pixels of a split: kept in memory, kept on disk, or decoded whenever they are asked for; the same bits."""

import contextlib
import hashlib
import math
import os
import platform
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO
from weakref import WeakKeyDictionary

import numpy as np

from train.data import decode, parallel_map
from train.data.dataset import Dataset, Split
from train.storage import checksummed

ALIGNMENT = 64  # bytes
CHUNK = 256  # examples that a thread decodes at once
MAX_DISK_FRACTION = 0.5  # of the free space; somebody else may want some, too
GIB = 2**30
INCOMPLETE_PREFIX = "incomplete-"
HELD: WeakKeyDictionary[Split, np.ndarray] = WeakKeyDictionary()
PROCESS_TOKEN = uuid.uuid4().hex  # of this process


def choose_cache(dataset: Dataset, cache: str, ram_budget: float, crops: bool) -> tuple[Dataset, str]:
    """Says where the pixels of every split are kept, and tells it in a sentence.

    cache: auto, memory, disk or none. ram_budget: GiB for all splits together. crops: whether training cuts its crops
    out of the encoded images, so that there are no pixels of its to keep.

    Raises: ValueError where they can't be kept as the user wants.
    """
    held = {name: split for name, split in dataset.splits.items() if not (crops and name == "train")}
    room = {"memory": ram_budget * GIB, "disk": _available_disk_bytes(dataset.train.cache_dir), "none": math.inf}
    placed: dict[str, Split] = {}
    told: dict[str, list[tuple[str, int]]] = {}
    for name, split in dataset.splits.items():
        size, where = decoded_bytes(split), "files"
        if name in held:
            there = cache_path(split).exists()
            where = _choose_mode(cache, size, room | ({"disk": math.inf} if there else {}), held, name)
            room[where] -= 0 if where == "disk" and there else size
        placed[name] = replace(split, cache_mode=where)
        told.setdefault(where, []).append((name, size))
    sentence = "; ".join(_cache_message(where, splits) for where, splits in told.items())
    return replace(dataset, **placed), f"pixels: {sentence}"  # type: ignore[arg-type]


def _cache_message(cache_mode: str, splits: list[tuple[str, int]]) -> str:
    names, size = ", ".join(name for name, _ in splits), sum(size for _, size in splits)
    return f"{names} {CACHE_DESCRIPTIONS[cache_mode]}" + (
        f" ({size / GIB:.2f} GiB)" if cache_mode in ("memory", "disk") else ""
    )


CACHE_DESCRIPTIONS = {
    "memory": "in memory",
    "disk": "on disk",
    "none": "decoded each time",
    "files": "cropped from the files",
}


def _choose_mode(
    cache: str, size: int, available_bytes: dict[str, float], cached_splits: dict[str, Split], name: str
) -> str:
    if cache == "auto":
        return next(where for where in ("memory", "disk", "none") if size <= available_bytes[where])
    if size <= available_bytes[cache]:
        return cache
    what = {"memory": "data.ram_budget", "disk": "half of the free disk"}[cache]
    needed = -(-sum(map(decoded_bytes, cached_splits.values())) // GIB)
    more = f", or data.ram_budget={needed}" if cache == "memory" else ""
    raise ValueError(
        f"data.cache must be one that has room, got {cache} with "
        f"{max(available_bytes[cache], 0) / GIB:.2f} GiB left of {what} and {size / GIB:.2f} GiB of {name}; "
        f"use data.cache=auto{more}"
    )


def _available_disk_bytes(folder: Path) -> float:
    """Bytes that may be taken; none where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(folder).free * MAX_DISK_FRACTION if os.access(folder, os.W_OK) else 0
    except OSError:
        return 0


def decoded_bytes(split: Split) -> int:
    """Size of all its examples as pixels."""
    return len(split) * int(np.prod(split.image_spec.shape))


# ------------------------------------------------------------------------------------------------- one of three ways


def make_reader(split: Split) -> Callable[[np.ndarray], np.ndarray]:
    """int [B] -> uint8 [B, image_size, image_size, channels]."""
    if split.cache_mode == "memory":
        return partial(gather, images(split))
    if split.cache_mode == "disk":
        return DiskCache(split).read
    return lambda indices: decode_examples(split, indices.tolist())


def decode_examples(split: Split, indices: Sequence[int]) -> np.ndarray:
    """Read and decoded now. Raises: ValueError that names the example."""
    pixels = [split.decode(index, data) for index, data in zip(indices, split.read(indices), strict=True)]
    return np.stack(pixels) if pixels else np.empty((0, *split.image_spec.shape), np.uint8)


def images(split: Split) -> np.ndarray:
    """As `in_memory`, which is called once for each split and holds its array as long as the split lives."""
    if split not in HELD:
        HELD[split] = load_into_memory(split)
    return HELD[split]


def load_into_memory(split: Split) -> np.ndarray:
    """All of them, uint8 [N, image_size, image_size, channels]; kept on disk, too, for the next start."""
    pixels = np.empty((len(split), *split.image_spec.shape), np.uint8)
    if cache_path(split).exists() or decoded_bytes(split) <= _available_disk_bytes(split.cache_dir):
        with contextlib.suppress(OSError):  # the next start takes longer, no more
            DiskCache(split).read_into(pixels)
            return pixels
    for start, some in _decode_chunks(split):
        pixels[start : start + len(some)] = some
    return pixels


def gather(pixels: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Some of the images. Not by tf.gather: a tensor in the graph of a stream is copied whenever an epoch begins."""
    found = empty_aligned((len(indices), *pixels.shape[1:]))
    return np.take(pixels, indices, axis=0, out=found, mode="clip")  # any other mode goes through a copy


def empty_aligned(shape: tuple[int, ...]) -> np.ndarray:
    """uint8 of any content. TensorFlow takes over an array whose memory begins at such a place, and copies others."""
    size = math.prod(shape)
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].reshape(shape)


class DiskCache:
    """Pixels on disk, each image with a checksum that is looked at whenever it is read."""

    def __init__(self, split: Split):
        """Decodes them all the first time. Raises: OSError where there is no room, ValueError naming an example."""
        self._split, folder = split, cache_path(split)
        if not folder.exists():
            with checksummed.exclusive(folder):
                if not folder.exists():
                    _write_cache(split, folder)
        try:
            self._pixels = np.load(folder / "pixels.npy", mmap_mode="r", allow_pickle=False)
            self._checksums = np.load(folder / "sums.npy", allow_pickle=False)
        except (EOFError, ValueError) as error:
            raise self._damaged_error(f"{split.name} cut short") from error

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Raises: ValueError if the disk gives other bytes than it was given."""
        found = self._pixels[indices]
        self._verify_checksums(indices.tolist(), found)
        return found

    def read_into(self, pixels: np.ndarray) -> None:
        """All of them, uint8 [N, ...], past the mapped memory, which would hold them once more. Raises: as `take`."""
        with (cache_path(self._split) / "pixels.npy").open("rb") as file:
            file.seek(self._pixels.offset)
            file.readinto(pixels.reshape(-1).data)
        self._verify_checksums(range(len(pixels)), pixels)

    def _verify_checksums(self, indices: Iterable[int], found: np.ndarray) -> None:
        for index, pixels in zip(indices, found, strict=True):
            if zlib.crc32(pixels) != self._checksums[index]:
                raise self._damaged_error(f"{self._split.error_prefix}{self._split.example_id(index)} damaged")

    def _damaged_error(self, what: str) -> ValueError:
        place = cache_path(self._split)
        return ValueError(f"every example must be readable, got {what} in {place}; use rm -r {place}, it is made again")


def cache_path(split: Split) -> Path:
    """Where they lie: another name for other examples, another order, view, decoder or version of Pillow."""
    what = hashlib.sha256(
        Path(decode.__file__).read_bytes() + version("pillow").encode() + repr(split.image_spec).encode()
    )
    for start in range(0, len(split), CHUNK):
        what.update(split.example_index.sha256[split.indices[start : start + CHUNK]].tobytes())
    return split.cache_dir / what.hexdigest()[:32]


def _write_cache(split: Split, folder: Path) -> None:
    """Whole or not at all; where two processes do it at once all the same, the first one's stays."""
    temporary = folder.with_name(f"{_temporary_prefix()}{os.getpid()}-{PROCESS_TOKEN}-{uuid.uuid4().hex}")
    _remove_leftovers(folder.parent)
    temporary.mkdir(parents=True)
    try:
        shape, sums = (len(split), *split.image_spec.shape), np.empty(len(split), np.uint32)
        with (temporary / "pixels.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for start, some in _decode_chunks(split):
                sums[start : start + len(some)] = [zlib.crc32(pixels) for pixels in some]
                file.write(some.data)
            _fsync(file)
        with (temporary / "sums.npy").open("wb") as file:
            np.save(file, sums)
            _fsync(file)
        with contextlib.suppress(OSError):  # somebody was quicker
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fsync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _remove_leftovers(folder: Path) -> None:
    """What processes of this machine that were killed have left; another one may be at work in the same folder."""
    for left in folder.glob(f"{_temporary_prefix()}*"):
        process, _, rest = left.name.removeprefix(_temporary_prefix()).partition("-")
        if not _is_process_alive(int(process), rest):
            shutil.rmtree(left, ignore_errors=True)


def _is_process_alive(pid: int, suffix: str) -> bool:
    if pid == os.getpid():  # of a container the first process has always the same number
        return suffix.startswith(PROCESS_TOKEN)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True


def _temporary_prefix() -> str:
    return f"{INCOMPLETE_PREFIX}{platform.node()}-"


def _decode_chunks(split: Split) -> Iterator[tuple[int, np.ndarray]]:
    """(first index, pixels) in order, decoded by threads."""
    starts = range(0, len(split), CHUNK)
    chunks = [range(start, min(start + CHUNK, len(split))) for start in starts]
    workers = parallel_map.decoder_threads(split.example_index.numeric_column("size")[split.indices[0]])
    return zip(starts, parallel_map.map_in_order(partial(decode_examples, split), chunks, workers), strict=True)
