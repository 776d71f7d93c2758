"""Manifests in CSV and JSON lines: splits, permitted values, and messages about faulty lines."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

import train.data
from support.commands import message
from support.image_folders import load_dataset
from train.data.ingestion import validation


def write_image(path, value=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def root(tmp_path):
    """Forty images in one folder."""
    for number in range(40):
        write_image(tmp_path / "root" / "images" / f"{number}.png", value=number)
    return tmp_path / "root"


@pytest.fixture
def looked(monkeypatch):
    """The contents of all files that are inspected from now on."""
    seen, look = [], validation.inspect
    monkeypatch.setattr(validation, "inspect", lambda data, *others: seen.append(data) or look(data, *others))
    return seen


def lines_of(count=40, split=None):
    """(path, label) or (path, label, split) of every image: cats and dogs alternate."""
    pairs = [(f"images/{number}.png", ("cat", "dog")[number % 2]) for number in range(count)]
    return pairs if split is None else [(*pair, split(number)) for number, pair in enumerate(pairs)]


def thirds(number):
    return ("train", "train", "validation", "test")[number // 2 % 4]


def write_csv(manifest, lines, head="path,label,split"):
    columns = len(lines[0])
    text = [",".join(head.split(",")[:columns]), *(",".join(line) for line in lines)]
    manifest.write_text("\n".join(text) + "\n", encoding="utf-8")
    return manifest


def write_jsonl(manifest, lines):
    names = ("path", "label", "split")
    entries = [dict(zip(names, line, strict=False)) for line in lines]
    manifest.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return manifest


def write_table(manifest, lines):
    return write_csv(manifest, lines) if manifest.suffix == ".csv" else write_jsonl(manifest, lines)


def load(manifest, root=None, **options):
    data_dir = (root or manifest.parent).parent / "data"
    return load_dataset(
        "manifest",
        str(data_dir),
        image_size=4,
        channels=3,
        file=str(manifest),
        root=str(root) if root else None,
        **options,
    )


def ids(split):
    return [split.example_id(index) for index in range(len(split))]


def where(loaded):
    """id -> split."""
    return {name: split.name for split in loaded.splits.values() for name in ids(split)}


# --------------------------------------------------------------------------------------------- checks before any import


def test_manifest_is_checked_before_any_import(tmp_path):
    def check(file, **options):
        return message(train.data.check, "manifest", data_dir="data", file=file, **options)

    use = "use data.file=PATH, a CSV or JSON lines file of path and label"
    assert check(None) == f"data.file is missing; {use}"
    for nowhere in (str(tmp_path), f"{tmp_path}/none.csv"):
        assert check(nowhere) == f"data.file={nowhere} is not a file; {use}"
    (tmp_path / "table.xlsx").touch()
    assert check(f"{tmp_path}/table.xlsx") == (
        f"data.file must end in .csv, .jsonl, .ndjson, got {tmp_path}/table.xlsx; convert it to one of these formats"
    )
    for name in ("table.csv", "table.jsonl", "table.ndjson", "TABLE.CSV"):
        (tmp_path / name).touch()
        train.data.check("manifest", data_dir="data", file=f"{tmp_path}/{name}", root=str(tmp_path))
    assert check(f"{tmp_path}/table.csv", root=f"{tmp_path}/none") == (
        f"data.root={tmp_path}/none is not a folder; use the folder that the table's paths are relative to"
    )
    assert check(f"{tmp_path}/table.csv", manual_dir=str(tmp_path)) == (
        f"data=manifest needs no manually downloaded files, got data.manual_dir={tmp_path}; omit it"
    )


# ------------------------------------------------------------------------------------------------------------- contents


@pytest.mark.parametrize("name", ["table.csv", "TABLE.CSV", "table.jsonl", "table.ndjson"])
def test_manifest_without_splits_is_split_by_content(root, name):
    loaded = load(write_table(root / name, lines_of()) if name != "TABLE.CSV" else write_csv(root / name, lines_of()))
    assert loaded.name == "manifest"
    assert loaded.classes == ("cat", "dog")
    assert set(where(loaded)) == {path for path, _ in lines_of()}
    labels = dict(lines_of())
    for split in loaded.splits.values():
        assert [loaded.classes[label] for label in split.labels] == [labels[path] for path in ids(split)]
        data = (root / split.example_id(0)).read_bytes()
        assert split.sha256[0] == hashlib.sha256(data).hexdigest().encode()
        assert split.read([0]) == [data]


@pytest.mark.parametrize("name", ["table.csv", "table.jsonl"])
def test_splits_of_the_manifest_are_used(root, name):
    lines = lines_of(split=thirds)
    loaded = load(write_table(root / name, lines))
    assert where(loaded) == {path: split for path, _, split in lines}
    assert loaded.split_sizes == {"train": 20, "validation": 10, "test": 10}
    assert ids(loaded.validation) == [path for path, _, split in lines if split == "validation"]  # in the table's order


def test_val_is_an_alias_of_validation(root):
    lines = lines_of(split=thirds)
    short = [(path, label, "val" if split == "validation" else split) for path, label, split in lines]
    assert where(load(write_csv(root / "table.csv", short))) == {path: split for path, _, split in lines}


def test_lines_without_a_split_are_for_training(root):
    lines = lines_of(split=lambda number: "test" if number < 6 else "")
    error = message(load, write_csv(root / "table.csv", lines))
    assert error == (f"no line of data.file={root}/table.csv is in split train; write train into the column split")
    lines[6:7] = [(*lines[6][:2], "train")]
    for name in ("table.csv", "table.jsonl"):
        loaded = load(write_table(root / name, lines))
        assert ids(loaded.test) == [f"images/{number}.png" for number in range(6)]
        assert (
            loaded.split_sizes["train"] + loaded.split_sizes["validation"] == 34
        )  # this part is missing: cut from train


def test_every_format_of_a_manifest_gives_the_same_data_set(root):
    lines = lines_of(split=thirds)
    first = load(write_csv(root / "table.csv", lines)).fingerprint
    assert load(write_jsonl(root / "table.jsonl", lines)).fingerprint == first
    backwards = [line[::-1] for line in lines[::-1]]
    assert load(write_csv(root / "other.csv", backwards, head="split,label,path")).fingerprint == first
    elsewhere = shutil.copytree(root, root.parent / "elsewhere")
    assert load(elsewhere / "table.csv").fingerprint == first


def test_fingerprint_of_a_manifest_depends_on_label_split_name_and_content(root):
    lines = lines_of(split=thirds)
    found = [load(write_csv(root / "table.csv", lines)).fingerprint]
    for changed in (("images/2.png", "dog", "train"), ("images/2.png", "cat", "test")):
        found.append(load(write_csv(root / "table.csv", [lines[0], lines[1], changed, *lines[3:]])).fingerprint)
    shutil.copy(root / "images" / "2.png", root / "images" / "again.png")
    renamed = [(path.replace("/2.png", "/again.png"), *others) for path, *others in lines]
    found.append(load(write_csv(root / "table.csv", renamed)).fingerprint)
    write_image(root / "images" / "2.png", value=500)
    found.append(load(write_csv(root / "table.csv", lines)).fingerprint)
    assert len(set(found)) == 5


# ----------------------------------------------------------------------------------------------------- permitted values


ODD_NAMES = ["a b.png", "a,b.png", 'a"b.png', "ä ö/ü.png", "日本.png", " lead.png", "#1.png", "a\\b.png", "%20.png"]


@pytest.mark.parametrize("name", ["table.csv", "table.jsonl"])
def test_names_may_hold_quotes_commas_spaces_and_other_scripts(root, name):
    lines = lines_of(split=thirds)
    for number, odd in enumerate(ODD_NAMES):
        write_image(root / odd, value=900 + number)
        lines.append((odd, ("a, cat", 'the "dog"')[number % 2], "train"))
    if name == "table.csv":
        quoted = [tuple('"' + field.replace('"', '""') + '"' for field in line) for line in lines]
        manifest = write_csv(root / name, quoted)
    else:
        manifest = write_jsonl(root / name, lines)
    loaded = load(manifest)
    assert loaded.classes == ("a, cat", "cat", "dog", 'the "dog"')
    assert where(loaded) == {path: split for path, _, split in lines}
    split = loaded.train
    assert split.read([ids(split).index('a"b.png')]) == [(root / 'a"b.png').read_bytes()]


@pytest.mark.parametrize("name", ["table.csv", "table.jsonl"])
def test_additions_of_editors_are_ignored(root, name):
    manifest = write_table(root / name, lines_of(split=thirds))
    plain = load(manifest).fingerprint
    text = manifest.read_text().replace("\n", "\r\n").replace("\r\n", "\r\n\r\n", 1)  # and an empty line
    manifest.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    assert load(manifest).fingerprint == plain


def test_labels_may_be_numbers(root):
    entries = [{"path": path, "label": number % 3} for number, (path, _) in enumerate(lines_of())]
    manifest = root / "table.jsonl"
    manifest.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert load(manifest).classes == ("0", "1", "2")


def test_paths_are_relative_to_the_root(root, tmp_path):
    manifest = write_csv(tmp_path / "table.csv", lines_of(split=thirds))
    assert load(manifest, root).fingerprint == load(write_csv(root / "table.csv", lines_of(split=thirds))).fingerprint
    error = message(load, manifest)
    first = f"{tmp_path}/images/0.png (No such file or directory)"
    assert error.startswith(f"40 of 40 images cannot be read: {first}; ")


def test_another_root_gives_another_data_set(tmp_path):
    """Equal names, sizes and times, different images."""
    lines = [(path.replace(".png", ".bmp"), *others) for path, *others in lines_of(split=thirds)]
    manifest = write_csv(tmp_path / "table.csv", lines)
    for number, (path, *_) in enumerate(lines):
        for folder in ("one", "other"):
            write_image(tmp_path / folder / path, value=number + 100 * len(folder))
            os.utime(tmp_path / folder / path, ns=(1, 1))
    one, other = (load(manifest, tmp_path / folder) for folder in ("one", "other"))
    assert one.fingerprint != other.fingerprint
    for folder, loaded in (("one", one), ("other", other)):
        assert loaded.train.read([0]) == [(tmp_path / folder / loaded.train.example_id(0)).read_bytes()]


# ----------------------------------------------------------------------------------------------------- faulty manifests


USE_LABEL, USE_PATH = "give every line a label", "give every line a path"
USE_COLUMNS, USE_SPLIT = "use the columns path, label, split", "use one of train, validation, val, test"
USE_CSV, USE_JSON = "use CSV with a header line path,label", 'use lines like {"path": "a.jpg", "label": "cat"}'

FAULTS = {  # name of the file: what is in it, the line that is named, what it says
    "empty label.csv": ("path,label\na.png,cat\na.png,\n", 3, "no label", USE_LABEL),
    "empty path.csv": ("path,label\n,cat\n", 2, "no path", USE_PATH),
    "short line.csv": ("path,label\n\na.png\n", 3, "no label", USE_LABEL),
    "no column label.csv": ("path\na.png\n", 2, "no label", USE_LABEL),
    "another column.csv": ("path,label,size\na.png,cat,7\n", 1, 'unknown column "size"', USE_COLUMNS),
    "unknown split.csv": ("path,label,split\na.png,cat,dev\n", 2, 'unknown split "dev"', USE_SPLIT),
    "twice.csv": ("path,label\na,cat\nb,dog\na,dog\n", 4, "a is already in line 2", "list each path once"),
    "over two lines.csv": ('path,label\n"a\nb",cat\nc,\n', 4, "no label", USE_LABEL),
    "text after a quote.csv": ('path,label\na,cat\n"b"c,cat\n', 3, "',' expected after '\"'", USE_CSV),
    "open quote.csv": ('path,label\na.png,cat\n"b.png,cat\n', 3, "unexpected end of data", USE_CSV),
    "no label.jsonl": ('{"path": "a", "label": "cat"}\n\n{"path": "a.png"}\n', 3, "no label", USE_LABEL),
    "empty path.jsonl": ('{"path": "", "label": "cat"}\n', 1, "no path", USE_PATH),
    "null.jsonl": ('{"path": "a.png", "label": null}\n', 1, "no label", USE_LABEL),
    "another key.jsonl": ('{"path": "a", "label": "b", "size": 7}\n', 1, 'unknown column "size"', USE_COLUMNS),
    "unknown split.jsonl": ('{"path": "a", "label": "b", "split": "x"}\n', 1, 'unknown split "x"', USE_SPLIT),
    "twice.jsonl": (2 * '{"path": "a", "label": "b"}\n', 2, "a is already in line 1", "list each path once"),
    "csv.jsonl": ("path,label\n", 1, "not a JSON object: path,label", USE_JSON),
    "list.jsonl": ("\n[1, 2]\n", 2, "not a JSON object: [1, 2]", USE_JSON),
    "long.jsonl": ("{" + 60 * "a", 1, "not a JSON object: {" + 39 * "a", USE_JSON),
    "deep.jsonl": (100_000 * "[", 1, "not a JSON object: " + 40 * "[", USE_JSON),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faulty_line_is_named(tmp_path, name):
    text, line, problem, advice = FAULTS[name]
    (tmp_path / name).write_text(text)
    assert message(load, tmp_path / name) == f"{tmp_path}/{name}:{line}: {problem}; {advice}"


def test_line_with_too_many_fields_is_named(tmp_path):
    (tmp_path / "table.csv").write_text("path,label,split\na.png,cat,train\nb, c.png,dog,train\n")
    assert message(load, tmp_path / "table.csv") == (
        f'{tmp_path}/table.csv:3: "train" is after the last column; use as many fields as the header line has'
    )


def test_missing_header_line_is_named(tmp_path):
    (tmp_path / "table.csv").write_text("a.png,cat\nb.png,dog\n")
    error = message(load, tmp_path / "table.csv")
    assert error == f'{tmp_path}/table.csv:1: unknown column "a.png"; use the columns path, label, split'


def test_manifest_that_is_not_utf8_is_rejected(tmp_path):
    for name in ("table.csv", "table.jsonl"):
        (tmp_path / name).write_bytes('{"path": "ä.png", "label": "cat"}\n'.encode("latin-1"))
        assert message(load, tmp_path / name) == (
            f"cannot read data.file={tmp_path}/{name} (not UTF-8); fix it, or use another file"
        )


@pytest.mark.parametrize(("text", "labels"), [("", 0), ("path,label\n", 0), ("path,label\na.png,cat\nb.png,cat\n", 1)])
def test_single_label_is_rejected(tmp_path, text, labels):
    (tmp_path / "table.csv").write_text(text)
    assert message(load, tmp_path / "table.csv") == (
        f"data.file={tmp_path}/table.csv has only {labels} different labels; a classifier needs at least two, "
        "so add images of other classes"
    )


# -------------------------------------------------------------------------------------------------- files of a manifest


def broken(count, total, named):
    return (
        f"{count} of {total} images cannot be read: {named}; fix or remove them, or set "
        f"data.on_error=skip data.max_skipped={count} to leave them out"
    )


def test_missing_files_are_named_with_the_reason(root):
    more = [("images/none.png", "cat"), ("images", "dog"), ("no\0name.png", "cat")]
    (root / "images" / "notes.txt").write_text("no image")
    manifest = write_jsonl(root / "table.jsonl", [*lines_of(), *more, ("images/notes.txt", "dog")])
    error = message(load, manifest)
    assert error.startswith(
        f"4 of 44 images cannot be read: {root}/images/none.png (No such file or directory); {root}/images (a folder); "
    )
    assert f"{root}/images/notes.txt (not an image in a supported format (JPEG, PNG, GIF, BMP, WEBP))" in error
    loaded = load(manifest, on_error="skip")
    assert sum(loaded.split_sizes.values()) == 40
    assert [name for name, _ in loaded.skipped] == ["images/none.png", "images", "no\0name.png", "images/notes.txt"]
    assert loaded.fingerprint == load(write_jsonl(root / "sound.jsonl", lines_of())).fingerprint


def test_paths_out_of_the_root_are_rejected(root, tmp_path):
    write_image(tmp_path / "out.png", value=500)
    reason = f"is outside {root}"
    for leaving in ("../out.png", "images/../../out.png", str(tmp_path / "out.png")):
        manifest = write_csv(root / "table.csv", [*lines_of(), (leaving, "cat")])
        assert message(load, manifest) == broken(1, 41, f"{root}/{leaving} ({reason})")
    (root / "link.png").symlink_to("../out.png")
    manifest = write_csv(root / "table.csv", [*lines_of(), ("link.png", "cat")])
    assert message(load, manifest) == broken(1, 41, f"{root}/link.png ({reason})")
    lines = [(f"root/{path}", label) for path, label in lines_of()]
    loaded = load(write_csv(tmp_path / "table.csv", [*lines, ("out.png", "cat")]))
    assert sum(loaded.split_sizes.values()) == 41  # nothing is wrong with the file itself


def test_paths_that_return_to_the_root_are_accepted(root):
    lines = lines_of()
    for staying in ("images/../images/3.png", "../root/images/3.png", f"{root}/images/3.png"):
        found = where(load(write_csv(root / "table.csv", [*lines[:3], *lines[4:], (staying, "dog")])))
        assert len(found) == 40
        assert found[staying] == where(load(write_csv(root / "table.csv", lines)))["images/3.png"]


def test_file_changed_after_opening_is_named(root):
    split = load(write_csv(root / "table.csv", lines_of(split=thirds))).train
    path = root / split.example_id(2)
    write_image(path, value=4321)
    assert message(split.load_example, 2) == (f"cannot read {path}: changed since it was indexed; restore the file")


def test_only_changed_files_are_inspected(root, inspected):
    manifest = write_csv(root / "table.csv", lines_of(split=thirds))
    first = load(manifest)
    assert len(inspected) == 40
    inspected.clear()
    load(manifest)
    assert inspected == []
    write_image(root / "images" / "3.png", value=500)
    load(manifest)
    assert inspected == [(root / "images" / "3.png").read_bytes()]
    inspected.clear()
    lines = lines_of(split=thirds)
    write_image(root / "images" / "new.png", value=501)
    load(write_csv(manifest, [*lines[1:], ("images/new.png", "cat", "test")]))
    assert inspected == [(root / "images" / "new.png").read_bytes()]
    inspected.clear()
    write_image(root / "images" / "3.png", value=3)
    again = load(write_csv(manifest, lines))
    assert len(inspected) == 2  # the one that is back in the table, and the one that is as it was
    assert again.fingerprint == first.fingerprint


def test_changed_label_or_split_causes_no_inspection(root, inspected):
    lines = lines_of(split=thirds)
    load(write_csv(root / "table.csv", lines))
    inspected.clear()
    other = [(path, "dog" if label == "cat" else "bird", "train" if split == "test" else split)
             for path, label, split in lines]  # fmt: skip
    other[-1] = (*other[-1][:2], "test")
    loaded = load(write_csv(root / "table.csv", other))
    assert inspected == []
    assert loaded.classes == ("bird", "dog")
    assert where(loaded) == {path: split for path, _, split in other}
    labels = {path: label for path, label, _ in other}
    for split in loaded.splits.values():
        assert [loaded.classes[label] for label in split.labels] == [labels[path] for path in ids(split)]
