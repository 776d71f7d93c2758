"""Fixtures of several test modules: data folders, and data sets in them."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image

from support.batches import photo_image
from support.commands import WITH_SUPPORT
from support.image_folders import load_dataset, load_digits, make_folder
from train.data import decode
from train.data.ingestion import validation


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A data folder in which two processes prepared digits at once, with the leftovers of a killed one."""
    base = tmp_path_factory.mktemp("data")
    (base / "digits" / "incomplete.abc_1.0.0").mkdir(parents=True)
    code = (
        "import sys; from support.image_folders import load_digits; s = load_digits(sys.argv[1]);"
        "print(s.fingerprint, s.split_sizes)"
    )
    command = [sys.executable, "-c", code, str(base)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, env=WITH_SUPPORT, **pipes) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    (base / "said.json").write_text(json.dumps([out for out, _ in outputs]))
    return base


@pytest.fixture(scope="session")
def digits_8(data_dir):
    return load_digits(data_dir)


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "root")


@pytest.fixture
def inspected(monkeypatch):
    """The contents of all files that are inspected from now on."""
    seen, look = [], validation.inspect
    monkeypatch.setattr(validation, "inspect", lambda data, *others: seen.append(data) or look(data, *others))
    return seen


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """38 photo-like images of many sizes, some of which need more than the fast JPEG decoder."""
    base = tmp_path_factory.mktemp("photos")
    root = base / "root"
    for seed, part in enumerate(("train", "validation", "test")):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            photo_image(40, 50, 1000 + 10 * seed + (name == "dog")).save(root / part / name / f"{name}.png")
    for number in range(32):
        name = "dog" if number % 3 else "cat"
        size = 60 + 7 * number, 90 + 5 * (number % 7) * number
        photo_image(*size, number).save(root / "train" / name / f"{number}.jpg", quality=95)
    photo_image(90, 130, 100).convert("CMYK").save(root / "train" / "cat" / "cmyk.jpg", quality=95)
    turned = Image.Exif()
    turned[decode.ORIENTATION] = 6
    photo_image(90, 130, 101).save(root / "train" / "cat" / "turned.jpg", quality=95, exif=turned)
    photo_image(90, 130, 102).save(root / "train" / "dog" / "bitmap.png")
    photo_image(90, 130, 103).convert("L").save(root / "train" / "dog" / "grey.jpg", quality=95)
    loaded = load_dataset("folder", str(base / "data"), image_size=32, channels=3, root=str(root))
    return replace(loaded.train, cache_mode="files")
