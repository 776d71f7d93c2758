"""A data set cut into train, validation and test."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from train.data.decode import ImageSpec, decode, decode_and_resize, decode_jpeg
from train.data.fingerprint import digest, fingerprint
from train.data.ingestion.duplicates import Duplicates, describe, find_duplicates, remove_duplicates
from train.data.ingestion.example_index import ExampleIndex, TextColumn
from train.data.ingestion.validation import Limits, ingest
from train.data.sources.folder import list_folder
from train.data.sources.listing import SPLITS, FileStore, Listing, Store
from train.data.sources.manifest import list_manifest
from train.data.sources.tfds import list_tfds

MAX_NAMED = 3
CHUNK = 10_000  # rows that are taken out of the table at once
IMBALANCE_RATIO = 3  # from which ratio of the largest to the smallest class on it is worth a sentence


@dataclass(frozen=True, eq=False)
class Split:
    """Examples 0..N-1 of one part.

    store, verdicts: of the whole set, by row. rows: int64 [N], the examples' rows. labels: int32 [N]. origin: what an
    error puts before a name. folder: where decoded pixels may be kept. pixels: where they are (train.data.pixel_cache).
    """

    name: str
    store: Store
    example_index: ExampleIndex
    indices: np.ndarray
    labels: np.ndarray
    image_spec: ImageSpec
    error_prefix: str
    cache_dir: Path
    cache_mode: str = "memory"

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def sha256(self) -> np.ndarray:
        """S64 [N], hexadecimal, of the encoded bytes."""
        return self.example_index.sha256[self.indices]

    @cached_property
    def digest(self) -> str:
        """Over every (id, content, label), in whatever order."""
        return digest(chain.from_iterable(map(self._digest_entries, range(0, len(self), CHUNK))))

    def _digest_entries(self, start: int) -> Iterator[tuple[str, bytes, int]]:
        """(id, content, label) of some examples."""
        rows, labels = self.indices[start : start + CHUNK], self.labels[start : start + CHUNK]
        return zip(
            self.example_index.texts_at("path", rows),
            self.example_index.sha256[rows].tolist(),
            labels.tolist(),
            strict=True,
        )

    def example_id(self, index: int) -> str:
        """TFDS part and number, or the path relative to the root."""
        return self.example_index.text_at("path", self.indices[index])

    def read(self, indices: Iterable[int]) -> list[bytes]:
        """The encoded bytes of several examples.

        Raises: ValueError that names the example which can't be read or is not what was looked at.
        """
        indices = list(indices)
        rows = [int(self.indices[index]) for index in indices]
        try:
            encoded = self.store.read(rows)
        except OSError:
            encoded = [self._read_one(index) for index in indices]
        contents = self.example_index.sha256
        for index, row, data in zip(indices, rows, encoded, strict=True):
            if hashlib.sha256(data).hexdigest().encode() != contents[row]:
                raise self._unreadable_error(index, "changed since the data set was opened")
        return encoded

    def load_example(self, index: int) -> np.ndarray:
        """Decoded example, uint8 [image_size, image_size, channels] in 0..255. Raises: ValueError as `read`."""
        return self.decode(index, self.read([index])[0])

    def is_fast_jpeg(self, index: int) -> bool:
        """Whether `decode_plain` decodes it to the same picture as `decode_whole`."""
        return self.image_spec.channels == 3 and bool(self.example_index.numeric_column("plain")[self.indices[index]])

    def stored_size(self, index: int) -> tuple[int, int]:
        """Height and width as stored, before turning."""
        row = self.indices[index]
        return self.example_index.numeric_column("height")[row], self.example_index.numeric_column("width")[row]

    def decode(self, index: int, data: bytes) -> np.ndarray:
        """Its bytes as the view wants them. Raises: ValueError that names the example."""
        return self._decode_or_raise(index, lambda: decode_and_resize(data, self.image_spec))

    def decode_full(self, index: int, data: bytes) -> np.ndarray:
        """Its bytes as uint8 [H, W, channels], in its own size. Raises: ValueError that names the example."""
        return self._decode_or_raise(
            index, lambda: decode(data, self.image_spec.channels, self.image_spec.background, max_pixels=None)
        )

    def decode_jpeg_scaled(self, index: int, data: bytes, scale_denom: int) -> np.ndarray:
        """Its bytes, a plain JPEG's, as uint8 [H, W, 3] at 1/part of its size. Raises: ValueError that names it."""
        return self._decode_or_raise(index, lambda: decode_jpeg(data, scale_denom))

    def _decode_or_raise(self, index: int, decoder: Callable[[], np.ndarray]) -> np.ndarray:
        try:
            return decoder()
        except ValueError as error:
            raise self._unreadable_error(index, str(error)) from error

    def _read_one(self, index: int) -> bytes:
        try:
            return self.store.read([int(self.indices[index])])[0]
        except OSError as error:
            raise self._unreadable_error(index, error.strerror or str(error)) from error

    def _unreadable_error(self, index: int, reason: str) -> ValueError:
        place = f"{self.error_prefix}{self.example_id(index)}"
        return ValueError(f"every example must be readable, got {place} ({reason}); use the data as it was")


@dataclass(frozen=True, eq=False)
class Dataset:
    """classes: names in the order of the labels. fingerprint: hexadecimal, over every (split, id, content, label).

    notes: what somebody who trains on it should hear. skipped: (id, reason) of what was left out.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    fingerprint: str
    notes: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    leak_counts: dict[str, int] = field(default_factory=dict)

    @property
    def splits(self) -> dict[str, Split]:
        return {split.name: split for split in (self.train, self.validation, self.test)}

    @property
    def split_sizes(self) -> dict[str, int]:
        """Examples per split."""
        return {name: len(split) for name, split in self.splits.items()}

    @property
    def class_counts(self) -> dict[str, list[int]]:
        """Examples of every class per split."""
        return {
            name: np.bincount(split.labels, minlength=len(self.classes)).tolist() for name, split in self.splits.items()
        }


def open_dataset(
    name: str,
    data_dir: str,
    image_spec: ImageSpec,
    limits: Limits,
    on_leak: str,
    fractions: dict[str, float],
    root: str | None,
    manual_dir: str | None,
    file: str | None,
    train_per_class: int | None,
) -> Dataset:
    """`train.data.load` behind its checks."""
    validation, test = fractions["validation"], fractions["test"]
    if not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
        raise ValueError(
            f"validation and test fraction must be above 0 and below 1 together, got {validation} and {test}; "
            "use 0.1 and 0.2"
        )
    if name == "folder":
        listing = list_folder(str(root), data_dir)
    elif name == "manifest":
        listing = list_manifest(str(file), root, data_dir)
    else:
        listing = list_tfds(name, data_dir, manual_dir)
    verdicts = ingest(listing, limits)
    labels = verdicts.numeric_column("label")
    rows = assign_splits(verdicts, fractions)
    leaks = find_duplicates(rows, verdicts, labels)
    rows, notes = _handle_duplicates(leaks, rows, listing, verdicts, on_leak)
    if train_per_class is not None:
        rows["train"] = limit_per_class(rows["train"], labels, verdicts.sha256, train_per_class, listing.classes)
        notes = [*notes, f"train: {train_per_class} examples of every class, by data.train_per_class"]
    skipped = tuple((verdicts.text_at("path", row), why) for row, why in verdicts.problems())
    store = listing.store
    if isinstance(store, FileStore):  # the table on disk has them, too
        store = FileStore(store.root, TextColumn(verdicts, "path"), labels)
    splits = {
        split: Split(
            split, store, verdicts, found, labels[found], image_spec, listing.error_prefix, Path(data_dir) / ".pixels"
        )
        for split, found in rows.items()
    }
    whole = fingerprint({split: found.digest for split, found in splits.items()})
    counts = {kind: len(getattr(leaks, kind)) for kind in ("shared", "conflicts", "alike")}
    return Dataset(
        name,
        listing.classes,
        **splits,
        fingerprint=whole,
        notes=(*_skipped_message(skipped), *notes, *_imbalance_message(labels[rows["train"]], listing.classes)),
        skipped=skipped,
        leak_counts=counts,
    )


def _handle_duplicates(
    duplicates: Duplicates, rows: dict[str, np.ndarray], listing: Listing, example_index: ExampleIndex, on_leak: str
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The splits, without what leaks where that is wanted, and what to tell.

    Raises: ValueError for anything certain, where that is wanted.
    """

    def named(row: int) -> str:
        return f"{example_index.text_at('path', row)} in {next(split for split, found in rows.items() if row in found)}"

    certain, likely = describe(
        duplicates, named, lambda row: listing.classes[example_index.numeric_column("label")[row]]
    )
    if certain and on_leak == "raise":
        raise ValueError(
            f"the data must hold every image in one split and with one label, got {'; '.join(certain)}; "
            "mend that, or use data.on_leak=drop or data.on_leak=warn"
        )
    warnings = [f"warning: {sentence}" for sentence in likely]
    if not certain or on_leak == "warn":
        return rows, [*(f"warning: {sentence}; data.on_leak=drop leaves them out" for sentence in certain), *warnings]
    kept = remove_duplicates(rows, duplicates)
    _check_not_empty(kept, len(example_index))
    gone = {split: len(found) - len(kept[split]) for split, found in rows.items()}
    told = " and ".join(f"{count} of {split}" for split, count in gone.items() if count)
    return kept, [f"left out {told}: {'; '.join(certain)}", *warnings]


def _skipped_message(skipped: Sequence[tuple[str, str]]) -> list[str]:
    if not skipped:
        return []
    named = "; ".join(f"{name} ({why})" for name, why in skipped[:MAX_NAMED])
    return [
        f"warning: {len(skipped)} broken examples are left out: {named}{'; ...' if len(skipped) > MAX_NAMED else ''}"
    ]


def _imbalance_message(labels: np.ndarray, classes: Sequence[str]) -> list[str]:
    counts = np.bincount(labels, minlength=len(classes))
    least, most = int(counts.argmin()), int(counts.argmax())
    if counts[most] < IMBALANCE_RATIO * counts[least]:
        return []
    return [
        f"classes are uneven: {counts[least]:,} of {classes[least]} to {counts[most]:,} of {classes[most]} in train; "
        "data.class_weights=true weighs the loss, data.balanced=true draws them equally often"
    ]


# ------------------------------------------------------------------------------------------------------------ cutting


def assign_splits(example_index: ExampleIndex, fractions: dict[str, float]) -> dict[str, np.ndarray]:
    """Rows of every split: official parts as they are, missing ones cut from train by content.

    An example's place is a hash of its own bytes: adding examples moves no other, and equal images stay together.
    Raises: ValueError when a split would be empty.
    """
    parts = {split: example_index.rows_in_split(split) for split in SPLITS}
    pool = np.concatenate([parts.pop("train"), example_index.rows_in_split("")])
    place = content_hash_uniform(example_index.sha256, pool)
    rest, start = np.ones(len(pool), dtype=bool), 0.0
    found: dict[str, np.ndarray] = {}
    for split in ("test", "validation"):
        if example_index.has_split(split):
            found[split] = parts[split]
            continue
        taken = (place >= start) & (place < start + fractions[split])
        found[split], rest, start = pool[taken], rest & ~taken, start + fractions[split]
    found["train"] = pool[rest]
    _check_not_empty(found, len(example_index))
    return {split: found[split] for split in SPLITS}


def limit_per_class(
    rows: np.ndarray, labels: np.ndarray, content_hashes: np.ndarray, per_class: int, classes: Sequence[str]
) -> np.ndarray:
    """So many rows of every class, in their order: more of them are these and others.

    Raises: ValueError naming a class that has fewer.
    """
    if per_class < 1:
        raise ValueError(f"data.train_per_class must be at least 1, got {per_class}; use 1 or null")
    order = rows[np.argsort(content_hash_uniform(content_hashes, rows), kind="stable")]
    chosen = [order[labels[order] == label][:per_class] for label in range(len(classes))]
    for name, found in zip(classes, chosen, strict=True):
        if len(found) < per_class:
            raise ValueError(
                f"data.train_per_class must be at most what every class has in train, {len(found)} of {name}, "
                f"got {per_class}; use {len(found)} or null"
            )
    return np.sort(np.concatenate(chosen))


def content_hash_uniform(content_hashes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Where examples lie in [0, 1): float64 [rows] from SHA-256s (S64 [N]) by hashing once more."""
    heads = bytearray()
    for start in range(0, len(rows), CHUNK):
        found = bytes.fromhex(content_hashes[rows[start : start + CHUNK]].tobytes().decode())
        for place in range(0, len(found), 32):
            heads += hashlib.sha256(b"split" + found[place : place + 32]).digest()[:8]
    return np.frombuffer(heads, ">u8") / 2**64


def _check_not_empty(splits: dict[str, np.ndarray], count: int) -> None:
    for split, rows in splits.items():
        if not len(rows):
            raise ValueError(
                f"data.{split} must have at least one example, got none of {count}; use more images, "
                f"a larger fraction, or a folder {split}/ of your own above the classes"
            )
