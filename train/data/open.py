"""Opens a data set: lists its examples, validates them, assigns them to splits and reports what is wrong with them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.data.dataset import Dataset, Split
from train.data.decode import ImageSpec
from train.data.fingerprint import fingerprint
from train.data.ingestion.duplicates import Duplicates, describe, find_duplicates, remove_duplicates
from train.data.ingestion.example_index import ExampleIndex, TextColumn
from train.data.ingestion.validation import Limits, ingest
from train.data.sources.folder import list_folder
from train.data.sources.listing import FileStore, Listing
from train.data.sources.manifest import list_manifest
from train.data.sources.tfds import list_tfds
from train.data.splits import assign_splits, check_not_empty, limit_per_class

MAX_NAMED = 3  # skipped examples that the warning names
IMBALANCE_RATIO = 3  # of the largest to the smallest class, from which on the imbalance is reported


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
    """Implements `train.data.load`, after its checks."""
    validation, test = fractions["validation"], fractions["test"]
    if not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
        raise ValueError(
            "data.validation_fraction and data.test_fraction must be above 0 and their sum below 1, "
            f"got {validation} and {test}; use e.g. 0.1 and 0.2"
        )
    if name == "folder":
        listing = list_folder(str(root), data_dir)
    elif name == "manifest":
        listing = list_manifest(str(file), root, data_dir)
    else:
        listing = list_tfds(name, data_dir, manual_dir)
    example_index = ingest(listing, limits)
    labels = example_index.numeric_column("label")
    rows_by_split = assign_splits(example_index, fractions)
    duplicates = find_duplicates(rows_by_split, example_index, labels)
    rows_by_split, notes = _handle_duplicates(duplicates, rows_by_split, listing, example_index, on_leak)
    if train_per_class is not None:
        rows_by_split["train"] = limit_per_class(
            rows_by_split["train"], labels, example_index.sha256, train_per_class, listing.classes
        )
        notes = [*notes, f"train: limited to {train_per_class} examples per class (data.train_per_class)"]
    skipped = tuple((example_index.text_at("path", row), reason) for row, reason in example_index.problems())
    store = listing.store
    if isinstance(store, FileStore):  # the index on disk has names and labels: do not hold them in memory, too
        store = FileStore(store.root, TextColumn(example_index, "path"), labels)
    cache_dir = Path(data_dir) / ".pixels"
    splits = {
        split: Split(split, store, example_index, rows, labels[rows], image_spec, listing.error_prefix, cache_dir)
        for split, rows in rows_by_split.items()
    }
    imbalance = _imbalance_message(labels[rows_by_split["train"]], listing.classes)
    return Dataset(
        name,
        listing.classes,
        **splits,
        fingerprint=fingerprint({name: split.digest for name, split in splits.items()}),
        notes=(*_skipped_message(skipped), *notes, *imbalance),
        skipped=skipped,
        leak_counts={kind: len(getattr(duplicates, kind)) for kind in ("shared", "conflicts", "alike")},
    )


def _handle_duplicates(
    duplicates: Duplicates,
    rows_by_split: dict[str, np.ndarray],
    listing: Listing,
    example_index: ExampleIndex,
    on_leak: str,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the splits (without duplicates for on_leak=drop) and messages for the user.

    Raises: ValueError for exact duplicates and label conflicts with on_leak=raise.
    """

    def name_and_split(row: int) -> str:
        split = next(split for split, rows in rows_by_split.items() if row in rows)
        return f"{example_index.text_at('path', row)} in {split}"

    labels = example_index.numeric_column("label")
    certain, likely = describe(duplicates, name_and_split, lambda row: listing.classes[labels[row]])
    if certain and on_leak == "raise":
        problem = "data leakage" if duplicates.shared else "conflicting labels"
        raise ValueError(f"{problem}: {'; '.join(certain)}; remove the duplicates, or set data.on_leak=drop")
    warnings = [f"warning: {sentence}" for sentence in likely]
    if not certain or on_leak == "warn":
        leaks = [f"warning: {sentence}; set data.on_leak=drop to leave them out" for sentence in certain]
        return rows_by_split, [*leaks, *warnings]
    kept = remove_duplicates(rows_by_split, duplicates)
    check_not_empty(kept, len(example_index))
    counts = {split: len(rows) - len(kept[split]) for split, rows in rows_by_split.items()}
    dropped = " and ".join(f"{count} from {split}" for split, count in counts.items() if count)
    return kept, [f"dropped {dropped}: {'; '.join(certain)}", *warnings]


def _skipped_message(skipped: Sequence[tuple[str, str]]) -> list[str]:
    if not skipped:
        return []
    named = "; ".join(f"{name} ({reason})" for name, reason in skipped[:MAX_NAMED])
    noun = "example" if len(skipped) == 1 else "examples"
    more = "; ..." if len(skipped) > MAX_NAMED else ""
    return [f"warning: skipped {len(skipped)} broken {noun}: {named}{more}"]


def _imbalance_message(labels: np.ndarray, classes: Sequence[str]) -> list[str]:
    counts = np.bincount(labels, minlength=len(classes))
    smallest, largest = int(counts.argmin()), int(counts.argmax())
    if counts[largest] < IMBALANCE_RATIO * counts[smallest]:
        return []
    return [
        f"class imbalance in train: {counts[smallest]:,} ({classes[smallest]}) to {counts[largest]:,} "
        f"({classes[largest]}) examples; consider data.class_weights=true or data.balanced=true"
    ]
