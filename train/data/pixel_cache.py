"""Cache of a split's decoded pixels: in memory, on disk, or none (decoded on every access); the bits are the same."""

import contextlib
import hashlib
import math
import os
import platform
import shlex
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np

from train.data import decode, parallel_map
from train.data.dataset import Dataset, Split
from train.storage import checksummed
from train.storage.atomic import atomic_folder

ALIGNMENT = 64  # bytes
CHUNK = 256  # examples that a thread decodes per task
MAX_DISK_FRACTION = 0.5  # of the free space, so that others can write, too
GIB = 2**30
INCOMPLETE_PREFIX = "incomplete-"
HELD: WeakKeyDictionary[Split, np.ndarray] = WeakKeyDictionary()
PROCESS_TOKEN = uuid.uuid4().hex  # tells this process from others with the same number


def choose_cache(dataset: Dataset, cache: str, ram_budget: float, crops: bool) -> tuple[Dataset, str]:
    """Chooses the cache mode of each split; returns the data set with these modes, and a message for the user.

    cache: auto, memory, disk or none. ram_budget: GiB for all splits together. crops: whether training decodes crops
    of the encoded images, so that the train split has no pixels to cache.

    Raises: ValueError if the pixels don't fit into the cache that the user requested.
    """
    cached = {name: split for name, split in dataset.splits.items() if not (crops and name == "train")}
    available = {"memory": ram_budget * GIB, "disk": _available_disk_bytes(dataset.train.cache_dir), "none": math.inf}
    splits: dict[str, Split] = {}
    sizes_by_mode: dict[str, list[tuple[str, int]]] = {}
    for name, split in dataset.splits.items():
        size = decoded_bytes(split)
        mode = "files"
        if name in cached:
            on_disk = cache_path(split).exists()
            mode = _choose_mode(cache, size, available | ({"disk": math.inf} if on_disk else {}), cached, name)
            available[mode] -= 0 if mode == "disk" and on_disk else size
        splits[name] = replace(split, cache_mode=mode)
        sizes_by_mode.setdefault(mode, []).append((name, size))
    sentence = "; ".join(_cache_message(mode, sizes) for mode, sizes in sizes_by_mode.items())
    chosen = replace(dataset, train=splits["train"], validation=splits["validation"], test=splits["test"])
    return chosen, f"pixel cache: {sentence}"


def _cache_message(cache_mode: str, sizes: list[tuple[str, int]]) -> str:
    names = ", ".join(name for name, _ in sizes)
    total = sum(size for _, size in sizes)
    suffix = f" ({total / GIB:.2f} GiB)" if cache_mode in ("memory", "disk") else ""
    return f"{names} {CACHE_DESCRIPTIONS[cache_mode]}{suffix}"


CACHE_DESCRIPTIONS = {
    "memory": "in memory",
    "disk": "on disk",
    "none": "not cached (decoded every epoch)",
    "files": "not cached (cropped from the files every epoch)",
}


def _choose_mode(
    cache: str, size: int, available_bytes: dict[str, float], cached_splits: dict[str, Split], name: str
) -> str:
    if cache == "auto":
        return next(mode for mode in ("memory", "disk", "none") if size <= available_bytes[mode])
    if size <= available_bytes[cache]:
        return cache
    limit = {"memory": "data.ram_budget", "disk": "half of the free disk"}[cache]
    needed = -(-sum(map(decoded_bytes, cached_splits.values())) // GIB)
    alternative = f", or data.ram_budget={needed}" if cache == "memory" else ""
    raise ValueError(
        f"data.cache={cache} is too small for the {name} split: it needs {size / GIB:.2f} GiB, "
        f"{max(available_bytes[cache], 0) / GIB:.2f} GiB of {limit} are left; use data.cache=auto{alternative}"
    )


def _available_disk_bytes(folder: Path) -> float:
    """Bytes that the cache may take in a folder; 0 if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(folder).free * MAX_DISK_FRACTION if os.access(folder, os.W_OK) else 0
    except OSError:
        return 0


def decoded_bytes(split: Split) -> int:
    """Size of all examples as pixels."""
    return len(split) * int(np.prod(split.image_spec.shape))


# ---------------------------------------------------------------------------------------------------------- readers


def make_reader(split: Split) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a reader by the split's cache mode: indices int [B] -> uint8 [B, image_size, image_size, channels]."""
    if split.cache_mode == "memory":
        return partial(gather, images(split))
    if split.cache_mode == "disk":
        return DiskCache(split).read
    return lambda indices: decode_examples(split, indices.tolist())


def decode_examples(split: Split, indices: Sequence[int]) -> np.ndarray:
    """Reads and decodes examples without a cache. Raises: ExampleError."""
    pixels = [split.decode(index, data) for index, data in zip(indices, split.read(indices), strict=True)]
    return np.stack(pixels) if pixels else np.empty((0, *split.image_spec.shape), np.uint8)


def images(split: Split) -> np.ndarray:
    """Calls `load_into_memory` once per split and keeps the array as long as the split lives."""
    if split not in HELD:
        HELD[split] = load_into_memory(split)
    return HELD[split]


def load_into_memory(split: Split) -> np.ndarray:
    """Loads all images, uint8 [N, image_size, image_size, channels]; also writes a disk cache for the next start."""
    pixels = np.empty((len(split), *split.image_spec.shape), np.uint8)
    if cache_path(split).exists() or decoded_bytes(split) <= _available_disk_bytes(split.cache_dir):
        with contextlib.suppress(OSError):  # without a disk cache, the next start just takes longer
            DiskCache(split).read_into(pixels)
            return pixels
    for start, chunk in _decode_chunks(split):
        pixels[start : start + len(chunk)] = chunk
    return pixels


def gather(pixels: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Gathers images by index. Not with tf.gather: a tensor in a stream's graph is copied whenever an epoch starts."""
    batch = empty_aligned((len(indices), *pixels.shape[1:]))
    return np.take(pixels, indices, axis=0, out=batch, mode="clip")  # any other mode makes a temporary copy


def empty_aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Uninitialised uint8 array, aligned so that TensorFlow uses its memory instead of copying it."""
    size = math.prod(shape)
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].reshape(shape)


class DiskCache:
    """Decoded pixels of a split on disk; each image has a checksum, verified on every read."""

    def __init__(self, split: Split):
        """Decodes and writes all images the first time.

        Raises: OSError if they can't be written; ExampleError; ValueError if the cache is truncated.
        """
        self._split = split
        folder = cache_path(split)
        if not folder.exists():
            with checksummed.exclusive(folder):
                if not folder.exists():
                    _write_cache(split, folder)
        try:
            self._pixels = np.load(folder / "pixels.npy", mmap_mode="r", allow_pickle=False)
            self._checksums = np.load(folder / "sums.npy", allow_pickle=False)
        except (EOFError, ValueError) as error:
            raise ValueError(
                f"pixel cache {folder} of the {split.name} split is truncated; {_rebuild_advice(folder)}"
            ) from error

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Reads images by index. Raises: ExampleError if a checksum does not match."""
        images = self._pixels[indices]
        self._verify_checksums(indices.tolist(), images)
        return images

    def read_into(self, pixels: np.ndarray) -> None:
        """Reads all images into uint8 [N, ...], without the memory map, which would hold a copy. Raises: see `read`."""
        with (cache_path(self._split) / "pixels.npy").open("rb") as file:
            file.seek(self._pixels.offset)
            file.readinto(pixels.reshape(-1).data)
        self._verify_checksums(range(len(pixels)), pixels)

    def _verify_checksums(self, indices: Iterable[int], images: np.ndarray) -> None:
        for index, pixels in zip(indices, images, strict=True):
            if zlib.crc32(pixels) != self._checksums[index]:
                folder = cache_path(self._split)
                raise self._split.error(index, f"pixel cache {folder} is damaged", _rebuild_advice(folder))


def _rebuild_advice(folder: Path) -> str:
    return f"to rebuild it: rm -r {shlex.quote(str(folder))}"


def cache_path(split: Split) -> Path:
    """Path of a split's disk cache; depends on examples, their order, image spec, decoder and version of Pillow."""
    key = hashlib.sha256(
        Path(decode.__file__).read_bytes() + version("pillow").encode() + repr(split.image_spec).encode()
    )
    for start in range(0, len(split), CHUNK):
        key.update(split.example_index.sha256[split.indices[start : start + CHUNK]].tobytes())
    return split.cache_dir / key.hexdigest()[:32]


def _write_cache(split: Split, folder: Path) -> None:
    """Writes the cache atomically; if two processes do it at the same time, the first one wins."""
    temporary = folder.with_name(f"{_temporary_prefix()}{os.getpid()}-{PROCESS_TOKEN}-{uuid.uuid4().hex}")
    _remove_leftovers(folder.parent)
    try:
        with atomic_folder(folder, temporary):
            shape = (len(split), *split.image_spec.shape)
            checksums = np.empty(len(split), np.uint32)
            with (temporary / "pixels.npy").open("wb") as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                for start, chunk in _decode_chunks(split):
                    checksums[start : start + len(chunk)] = [zlib.crc32(pixels) for pixels in chunk]
                    file.write(chunk.data)
            np.save(temporary / "sums.npy", checksums)
    except OSError:
        if not folder.exists():  # no other process was faster
            raise


def _remove_leftovers(folder: Path) -> None:
    """Removes what killed processes of this machine left behind; running ones may be writing to the same folder."""
    for leftover in folder.glob(f"{_temporary_prefix()}*"):
        pid, _, suffix = leftover.name.removeprefix(_temporary_prefix()).partition("-")
        if not _is_process_alive(int(pid), suffix):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_process_alive(pid: int, suffix: str) -> bool:
    if pid == os.getpid():  # in containers, the first process always has the same number
        return suffix.startswith(PROCESS_TOKEN)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to another user
        return True
    return True


def _temporary_prefix() -> str:
    return f"{INCOMPLETE_PREFIX}{platform.node()}-"


def _decode_chunks(split: Split) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first index, pixels) in order, decoded in threads."""
    starts = range(0, len(split), CHUNK)
    chunks = [range(start, min(start + CHUNK, len(split))) for start in starts]
    workers = parallel_map.decoder_threads(split.example_index.numeric_column("size")[split.indices[0]])
    return zip(starts, parallel_map.map_in_order(partial(decode_examples, split), chunks, workers), strict=True)
