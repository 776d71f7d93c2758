"""Checking a source: what is refused before anything is read, and by which message."""

import subprocess
import sys
from functools import partial

import pytest

import train.data
from support.commands import message
from support.image_folders import load_digits


def test_importing_and_checking_load_no_library(folder):
    code = (
        "import sys; before = set(sys.modules); import train.data as d;"
        "d.check('folder', data_dir='data', root=sys.argv[1]); d.check('digits', data_dir='data');"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(loaded - sys.stdlib_module_names))"
    )
    command = [sys.executable, "-c", code, str(folder)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output == "['train']\n"  # neither TensorFlow nor NumPy nor Pillow


def test_unknown_source_is_rejected():
    assert message(train.data.check, "digit", data_dir="data") == (
        "data must be one of digits, mnist, fashion_mnist, cifar10, imagenette, tf_flowers, imagenet2012, folder, "
        "manifest, got digit; use data=digits"
    )


def test_unusable_root_is_rejected(tmp_path, folder):
    check = partial(train.data.check, data_dir="data")
    use = "use data.root=PATH, a folder with one sub-folder of images per class"
    assert message(check, "folder") == f"data.root is missing; {use}"
    assert message(check, "folder", root="/nowhere") == f"data.root=/nowhere is not a folder; {use}"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert message(check, "folder", root=str(empty)) == f"{empty} has no class folders; {use}"
    (empty / "cat").mkdir()
    assert message(check, "folder", root=str(empty)) == (
        f"{empty} has only one class folder, cat; a classifier needs at least two"
    )
    (empty / "dog").mkdir()
    no_images = f"class folder {empty / 'cat'} holds no images; add some, or remove the folder"
    assert message(check, "folder", root=str(empty)) == no_images
    (empty / "cat" / "notes.jpg").write_text("no image, whatever it is called")
    assert message(check, "folder", root=str(empty)) == no_images
    assert message(check, "digits", root=str(folder)) == (
        f"data=digits has no data.root, got {folder}; to use your own images: data=folder data.root={folder}"
    )
    check("folder", root=str(folder))


def test_unusable_manual_dir_is_rejected(tmp_path):
    check = partial(train.data.check, data_dir=str(tmp_path))
    files = ", ".join(train.data.SOURCES["mnist"].manual_files)
    assert message(check, "mnist", manual_dir="/nowhere") == (
        f"data.manual_dir=/nowhere is not a folder; use the folder with {files}"
    )
    (tmp_path / "train-images-idx3-ubyte.gz").touch()
    assert message(check, "mnist", manual_dir=str(tmp_path)) == (
        f"data.manual_dir={tmp_path} lacks train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, "
        "t10k-labels-idx1-ubyte.gz; add what is missing"
    )
    assert message(check, "imagenet2012") == (
        "data.manual_dir is missing: downloading data=imagenet2012 requires an account; download "
        "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar yourself, then use data.manual_dir=PATH"
    )
    assert message(check, "digits", manual_dir=str(tmp_path)) == (
        f"data=digits needs no manually downloaded files, got data.manual_dir={tmp_path}; omit it"
    )
    done = tmp_path / "mnist" / "3.0.1"
    done.mkdir(parents=True)
    (done / "dataset_info.json").touch()
    check("mnist", manual_dir=str(tmp_path))  # prepared: the files are not needed any more


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"channels": 2}, "data.channels must be 1 or 3, got 2; use data.channels=1"),
        ({"image_size": 0}, "data.image_size must be at least 1 pixel, got 0; use data.image_size=32"),
        (
            {"validation_fraction": 0.5, "test_fraction": 0.5},
            "data.validation_fraction and data.test_fraction must be above 0 and their sum below 1, got 0.5 and 0.5; "
            "use e.g. 0.1 and 0.2",
        ),
    ],
)
def test_numbers_out_of_range_are_rejected(data_dir, options, expected):
    assert message(load_digits, data_dir, **options) == expected
