"""Equal images in two splits or with two labels, near duplicates, and the options of data.on_leak."""

import hashlib
import itertools
import shutil

import numpy as np
import pytest
from PIL import Image

from support.commands import message
from support.image_folders import load_dataset
from train.data.ingestion import duplicates, example_index
from train.data.ingestion.validation import perceptual_hash

SPLITS = ("train", "validation", "test")
DROP = "set data.on_leak=drop to leave them out"
REFUSED = "data leakage:"
CONFLICTING = "conflicting labels:"
MEND = "remove the duplicates, or set data.on_leak=drop"


def write_noise(path, value=0, side=6, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def root(tmp_path):
    """Given splits of 24, 8 and 8 different images, half cats and half dogs."""
    for number, (part, count) in enumerate(zip(SPLITS, (12, 4, 4), strict=True)):
        for label, name in enumerate(("cat", "dog")):
            for image in range(count):
                path = tmp_path / "root" / part / name / f"{image}.png"
                write_noise(path, value=1000 * number + 100 * label + image)
    return tmp_path / "root"


def share(root, one, *others):
    for other in others:
        shutil.copy(root / one, root / other)


def load(root, on_leak="warn", **options):
    options = {"image_size": 4, "channels": 3} | options
    return load_dataset("folder", str(root.parent / "data"), root=str(root), on_leak=on_leak, **options)


def ids(split):
    return {split.example_id(index) for index in range(len(split))}


def contents(loaded):
    return {name: set(split.sha256.tolist()) for name, split in loaded.splits.items()}


def leak_counts(**counts):
    return {"shared": 0, "conflicts": 0, "alike": 0} | counts


# ------------------------------------------------------------------------------------------------ equal in two splits


@pytest.mark.parametrize("on_leak", ["warn", "drop", "raise"])
def test_data_without_leaks_gives_no_message(root, on_leak):
    loaded = load(root, on_leak)
    assert loaded.split_sizes == {"train": 24, "validation": 8, "test": 8}
    assert loaded.notes == ()
    assert loaded.leak_counts == leak_counts()


def test_image_in_two_splits_is_named(root):
    share(root, "train/cat/3.png", "test/cat/again.png")
    sentence = "1 image is in two splits (train/cat/3.png in train and test/cat/again.png in test)"
    assert message(load, root, "raise") == f"{REFUSED} {sentence}; {MEND}"
    warned = load(root, "warn")
    assert warned.notes == (f"warning: {sentence}; {DROP}",)
    assert warned.leak_counts == leak_counts(shared=1)
    assert warned.split_sizes == {"train": 24, "validation": 8, "test": 9}
    dropped = load(root, "drop")
    assert dropped.notes == (f"dropped 1 from train: {sentence}",)
    assert dropped.leak_counts == leak_counts(shared=1)
    assert dropped.split_sizes == {"train": 23, "validation": 8, "test": 9}
    assert ids(warned.train) - ids(dropped.train) == {"train/cat/3.png"}
    assert ids(warned.test) == ids(dropped.test)


@pytest.mark.parametrize(("on_leak", "apart"), [("drop", True), ("warn", False)])
def test_only_dropping_keeps_the_splits_apart(root, on_leak, apart):
    share(root, "train/cat/3.png", "test/cat/again.png", "validation/cat/again.png")
    found = contents(load(root, on_leak))
    shared = hashlib.sha256((root / "train/cat/3.png").read_bytes()).hexdigest().encode()
    assert [shared in found[split] for split in SPLITS] == ([False, False, True] if apart else [True, True, True])
    for one, other in itertools.combinations(SPLITS, 2):
        assert (not found[one] & found[other]) == apart


def test_image_in_all_three_splits_stays_in_test_only(root):
    share(root, "train/dog/5.png", "validation/dog/same.png", "test/dog/same.png")
    share(root, "train/cat/7.png", "validation/cat/same.png")
    sentence = (
        "3 images are in two splits (train/dog/5.png in train and test/dog/same.png in test; "
        "validation/dog/same.png in validation and test/dog/same.png in test; "
        "train/cat/7.png in train and validation/cat/same.png in validation)"
    )
    error = message(load, root, "raise")
    assert sorted(parts_of(error)) == sorted(parts_of(sentence))
    loaded = load(root, "drop")
    assert loaded.notes[0].startswith("dropped 2 from train and 1 from validation: 3 images are in two splits (")
    assert loaded.split_sizes == {"train": 22, "validation": 9, "test": 9}
    assert "validation/cat/same.png" in ids(loaded.validation)
    assert loaded.leak_counts == leak_counts(shared=3)


def parts_of(sentence):
    """The groups of a message; they are ordered by their digests."""
    return sentence[sentence.index("(") + 1 : sentence.index(")")].split("; ")


def test_copies_within_a_split_are_no_leak(root):
    share(root, "train/cat/3.png", "train/cat/same.png")
    loaded = load(root, "raise")
    assert loaded.notes == ()
    assert loaded.split_sizes["train"] == 25
    share(root, "train/cat/3.png", "test/cat/same.png")
    assert load(root).leak_counts == leak_counts(shared=2)
    assert load(root, "drop").split_sizes == {"train": 23, "validation": 8, "test": 9}


def test_three_leaks_are_named_and_all_are_counted(root):
    for number in range(5):
        share(root, f"train/cat/{number}.png", f"validation/cat/x{number}.png")
    [note] = load(root).notes
    assert note.startswith("warning: 5 images are in two splits (train/cat/")
    assert note.endswith(f"; ...); {DROP}")
    assert note.count(" in train and validation/cat/x") == 3


def test_split_emptied_by_dropping_is_rejected(root):
    for path in sorted((root / "validation").rglob("*.png")):
        share(root, path.relative_to(root), f"test/{path.parent.name}/v{path.name}")
    assert load(root).split_sizes == {"train": 24, "validation": 8, "test": 16}
    assert message(load, root, "drop").startswith("the validation split is empty (0 of 48 examples); ")


def test_leaks_change_the_fingerprint_only_by_what_is_dropped(root, tmp_path):
    clean = load(root).fingerprint
    other = shutil.copytree(root, tmp_path / "other" / "root")
    share(other, "test/dog/2.png", "train/dog/more.png")
    assert load(other, "drop").fingerprint == clean
    assert load(other, "warn").fingerprint != clean


# -------------------------------------------------------------------------------------------------- conflicting labels


def test_image_with_two_labels_is_named(root):
    share(root, "train/cat/3.png", "train/dog/same.png")
    sentence = "1 image has several labels (train/cat/3.png in train as cat and train/dog/same.png in train as dog)"
    assert message(load, root, "raise") == f"{CONFLICTING} {sentence}; {MEND}"
    warned = load(root)
    assert warned.notes == (f"warning: {sentence}; {DROP}",)
    assert warned.leak_counts == leak_counts(conflicts=1)
    assert warned.split_sizes["train"] == 25
    dropped = load(root, "drop")
    assert dropped.notes == (f"dropped 2 from train: {sentence}",)
    assert ids(warned.train) - ids(dropped.train) == {"train/cat/3.png", "train/dog/same.png"}


def test_image_with_two_labels_in_two_splits_is_reported_as_both(root):
    share(root, "test/cat/3.png", "train/dog/same.png")
    error = message(load, root, "raise")
    assert error == (
        f"{REFUSED} 1 image is in two splits (train/dog/same.png in train and test/cat/3.png in test); 1 image has "
        "several labels (train/dog/same.png in train as dog and test/cat/3.png in test as cat); " + MEND
    )
    loaded = load(root, "drop")
    assert loaded.split_sizes == {"train": 24, "validation": 8, "test": 8}  # the test is left alone
    assert loaded.leak_counts == leak_counts(shared=1, conflicts=1)
    assert len(load(root).notes) == 2


def test_dropping_does_not_change_the_test_split(root):
    share(root, "test/cat/3.png", "test/dog/same.png")
    assert load(root, "drop").split_sizes == {"train": 24, "validation": 8, "test": 9}
    assert load(root).leak_counts == leak_counts(conflicts=1)


def test_image_with_two_labels_in_a_folder_without_splits_is_named(tmp_path):
    for label, name in enumerate(("cat", "dog")):
        for number in range(20):
            write_noise(tmp_path / "root" / name / f"{number}.png", value=100 * label + number)
    root = tmp_path / "root"
    whole = load(root, "raise")
    share(root, "cat/3.png", "dog/same.png")
    split = next(name for name, found in whole.splits.items() if "cat/3.png" in ids(found))
    sentence = f"1 image has several labels (cat/3.png in {split} as cat and dog/same.png in {split} as dog)"
    assert message(load, root, "raise") == f"{CONFLICTING} {sentence}; {MEND}"  # one content, one split: no other fault
    assert load(root).notes[0] == f"warning: {sentence}; {DROP}"


# ------------------------------------------------------------------------------------------------------ near duplicates


def picture(seed, side=128):
    """Soft shapes: eight by eight random colours, blended."""
    corners = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((side, side), Image.Resampling.BICUBIC)


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def alike(*pairs):
    many = len(pairs) > 1
    count = f"{len(pairs)} {'pairs' if many else 'pair'} of images in two splits {'look' if many else 'looks'} alike"
    return f"warning: {count} ({'; '.join(pairs)})"


def test_reencoded_or_resized_image_is_a_near_duplicate(root):
    for number in range(6):
        save(picture(number), root / "train" / "cat" / f"p{number}.png")
    save(picture(3), root / "test" / "cat" / "again.jpg", quality=80)
    save(picture(5).resize((120, 120)), root / "validation" / "cat" / "smaller.png")
    loaded = load(root, "raise")  # nothing is certain
    assert loaded.leak_counts == leak_counts(alike=2)
    assert loaded.notes == (
        alike(
            "train/cat/p3.png in train and test/cat/again.jpg in test",
            "train/cat/p5.png in train and validation/cat/smaller.png in validation",
        ),
    )
    assert load(root, "drop").split_sizes == loaded.split_sizes == {"train": 30, "validation": 9, "test": 9}


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.point(lambda value: min(value + 10, 255)),
        lambda image: image.resize((400, 300)),
        lambda image: image.convert("L"),
    ],
    ids=["brighter", "stretched", "grey"],
)
def test_common_edits_are_near_duplicates(change):
    one, other = (perceptual_hash(np.asarray(image.convert("RGB"))) for image in (picture(1), change(picture(1))))
    assert pairs_of([one, other]) == [(0, 1)]


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        lambda image: image.rotate(90),
        lambda _: picture(2),
        lambda image: Image.eval(image, lambda value: 255 - value),
    ],
    ids=["mirrored", "turned", "another", "inverted"],
)
def test_other_images_are_not_near_duplicates(change):
    one, other = (perceptual_hash(np.asarray(image.convert("RGB"))) for image in (picture(1), change(picture(1))))
    assert pairs_of([one, other]) == []


def test_unrelated_images_are_not_near_duplicates(root):
    for part, seeds in (("train", range(60)), ("validation", range(100, 130)), ("test", range(200, 230))):
        for seed in seeds:
            write_noise(root / part / "cat" / f"n{seed}.png", value=seed, side=96)
    loaded = load(root)
    [note] = loaded.notes
    assert note.startswith("class imbalance in train: 12 (dog) to 72 (cat) examples; ")
    assert loaded.leak_counts == leak_counts()


def test_small_images_are_not_compared(root):
    for side, name in ((63, "small"), (64, "large")):
        save(picture(1, side), root / "train" / "cat" / f"{name}.png")
        save(picture(1, side), root / "test" / "cat" / f"{name}.webp", lossless=True)
    loaded = load(root)
    assert loaded.leak_counts == leak_counts(alike=1)
    assert loaded.notes == (alike("train/cat/large.png in train and test/cat/large.webp in test"),)


def test_equal_bytes_are_not_reported_twice(root):
    save(picture(1), root / "train" / "cat" / "one.png")
    share(root, "train/cat/one.png", "test/cat/other.png")
    assert load(root).leak_counts == leak_counts(shared=1)
    save(picture(1), root / "test" / "cat" / "another.jpg", quality=80)
    assert load(root).leak_counts == leak_counts(shared=1, alike=1)


def test_near_duplicates_within_a_split_are_allowed(root):
    save(picture(1), root / "train" / "cat" / "one.png")
    save(picture(1), root / "train" / "cat" / "other.jpg", quality=80)
    assert load(root).leak_counts == leak_counts()


# -------------------------------------------------------------------------------------------------------- definitions


def test_perceptual_hash_matches_its_definition():
    """The hash of nine by eight blocks of 8x8 pixels: which block is darker than its right neighbour."""
    places = np.random.default_rng(0).integers(0, 256, (8, 9), dtype=np.uint8)
    pixels = places.repeat(8, axis=0).repeat(8, axis=1)[..., None].repeat(3, axis=2)
    bits = "".join(str(int(left < right)) for row in places for left, right in itertools.pairwise(row))
    hashed, thumbnail = perceptual_hash(pixels)
    assert hashed == int(bits, 2)
    means = pixels[..., 0].reshape(8, 8, 8, 9).mean(axis=(1, 3))
    assert np.abs(np.frombuffer(thumbnail, np.uint8).reshape(8, 8) - means).max() <= 0.5 + 1e-6
    assert perceptual_hash(pixels[:63]) == perceptual_hash(pixels[:, :63]) == (0, bytes(64))


def test_flat_images_have_no_perceptual_hash():
    for flat in (np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 200, np.uint8)):
        assert perceptual_hash(flat)[0] == 0
    slope = np.broadcast_to(np.arange(72, dtype=np.uint8)[:, None], (64, 72, 3))
    assert perceptual_hash(np.ascontiguousarray(slope))[0] == 0  # every place is darker than its right neighbour
    assert perceptual_hash(np.asarray(picture(1)))[0] != 0


def table(digests, found):
    """An index of examples with these digests, hashes and thumbnails."""
    draft = example_index.ExampleIndexBuilder(len(digests))
    for row, (content, (hashed, thumbnail)) in enumerate(zip(digests, found, strict=True)):
        draft.set_row(row, sha256=content, likeness=hashed, thumbnail=thumbnail)
    names = [str(row) for row in range(len(digests))]
    return draft.build("", names, [""] * len(names))


def digest(number):
    return hashlib.sha256(str(number).encode()).hexdigest().encode()


def pairs_of(found):
    """The near duplicates of the first one, in train, among the others, in test; one more resembles nothing."""
    rows = np.arange(len(found))
    splits = {"train": rows[:1], "validation": rows[:0], "test": rows[1:]}
    index = table([digest(row) for row in rows], found)
    return duplicates.find_duplicates(splits, index, np.zeros(len(found), np.int32)).alike


@pytest.mark.parametrize(
    ("flipped", "close"), [((), True), ((0, 17, 34), True), ((5, 6, 7), True), ((0, 17, 34, 51), False)]
)
def test_hashes_may_differ_in_three_bits(flipped, close):
    base = 0x0F1E2D3C4B5A6978
    other = base
    for bit in flipped:
        other ^= 1 << bit
    assert pairs_of([(base, bytes(64)), (other, bytes(64))]) == ([(0, 1)] if close else [])


@pytest.mark.parametrize(("added", "close"), [(0, True), (100, True)])
def test_thumbnails_may_be_brighter_as_a_whole(added, close):
    base = np.random.default_rng(0).integers(0, 150, 64, dtype=np.uint8)
    found = [(0x0F1E2D3C4B5A6978, (base + np.uint8(more)).tobytes()) for more in (0, added)]
    assert pairs_of(found) == ([(0, 1)] if close else [])


@pytest.mark.parametrize(("step", "close"), [(16, True), (17, False)])
def test_thumbnails_may_differ_by_sixteen_greys_anywhere(step, close):
    base = np.full(64, 100, np.uint8)
    other = base.copy()
    other[:32] += np.uint8(step)
    other[32:] -= np.uint8(step)
    found = [(0x0F1E2D3C4B5A6978, thumbnail.tobytes()) for thumbnail in (base, other)]
    assert pairs_of(found) == ([(0, 1)] if close else [])


@pytest.mark.parametrize("seed", range(5))
def test_near_duplicates_match_a_comparison_of_every_pair(seed):
    rng = np.random.default_rng(seed)
    count = 150
    numbers = rng.integers(0, 120, count)
    bases = rng.integers(1, 2**63, 12, dtype=np.uint64)
    hashes = [int(bases[rng.integers(12)]) for _ in range(count)]
    for row in range(count):
        for bit in rng.integers(0, 64, rng.integers(0, 6)):
            hashes[row] ^= 1 << int(bit)
    hashes = [0 if rng.random() < 0.1 else value for value in hashes]
    labels = rng.integers(0, 2, count).astype(np.int32)
    split_of = rng.integers(0, 3, count)
    splits = {name: np.flatnonzero(split_of == number) for number, name in enumerate(SPLITS)}
    index = table([digest(number) for number in numbers], [(value, bytes(64)) for value in hashes])

    found = duplicates.find_duplicates(splits, index, labels)

    alike, shared, conflicts = set(), set(), set()
    for one, other in itertools.permutations(range(count), 2):
        if numbers[one] == numbers[other]:
            shared |= {one} if split_of[one] < split_of[other] else set()
            conflicts |= {numbers[one]} if labels[one] != labels[other] else set()
        elif split_of[one] < split_of[other] and hashes[one] and hashes[other]:
            alike |= {(one, other)} if (hashes[one] ^ hashes[other]).bit_count() <= 3 else set()
    assert len(alike) > 20
    assert len(shared) > 20
    assert len(conflicts) > 10
    assert set(found.alike) == alike
    assert len(found.alike) == len(alike)
    assert {one for one, _ in found.shared} == shared
    assert all(numbers[one] == numbers[kept] and split_of[kept] > split_of[one] for one, kept in found.shared)
    assert sorted(numbers[group[0]] for group in found.conflicts) == sorted(conflicts)

    kept = duplicates.remove_duplicates(splits, found)
    np.testing.assert_array_equal(kept["test"], splits["test"])
    gone = set(range(count)) - {row for rows in kept.values() for row in rows.tolist()}
    assert gone == shared | {row for row in range(count) if numbers[row] in conflicts and split_of[row] < 2}
