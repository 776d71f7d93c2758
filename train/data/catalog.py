"""The data sets that can be selected by name, and how their official splits map to train, validation and test."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One value of the key `data`.

    tfds_name: TFDS name (with its config); empty for `folder` and `manifest`.
    train, test: names of the official splits; with an empty `test`, the test split is taken from `train`. Validation is
        always taken from `train`.
    manual_files: files that `data.manual_dir` must contain when they are downloaded manually.
    requires_manual_download: True if the download requires an account.
    prepared_bytes: disk space of the prepared set without the downloads, from the TFDS catalogue.
    """

    tfds_name: str = ""
    train: str = "train"
    test: str = ""
    manual_files: tuple[str, ...] = ()
    requires_manual_download: bool = False
    prepared_bytes: int = 0


MIB = 2**20
IDX_FILES = tuple(
    f"{part}-idx{kind}-ubyte.gz"
    for part, kind in (("train-images", "3"), ("train-labels", "1"), ("t10k-images", "3"), ("t10k-labels", "1"))
)

# Results on ImageNet and Imagenette are published for the official split named validation (ImageNet's test labels are
# secret): it serves as the test split here, and validation is taken from the official training split.
SOURCES: dict[str, Source] = {
    "digits": Source("digits", prepared_bytes=MIB),
    "mnist": Source("mnist", test="test", manual_files=IDX_FILES, prepared_bytes=22 * MIB),
    "fashion_mnist": Source("fashion_mnist", test="test", manual_files=IDX_FILES, prepared_bytes=37 * MIB),
    "cifar10": Source("cifar10", test="test", manual_files=("cifar-10-binary.tar.gz",), prepared_bytes=133 * MIB),
    "imagenette": Source(
        "imagenette/160px-v2", test="validation", manual_files=("imagenette2-160.tgz",), prepared_bytes=125 * MIB
    ),
    "tf_flowers": Source("tf_flowers", manual_files=("flower_photos.tgz",), prepared_bytes=222 * MIB),
    "imagenet2012": Source(
        "imagenet2012",
        test="validation",
        manual_files=("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"),
        requires_manual_download=True,
        prepared_bytes=160_000 * MIB,
    ),
    "folder": Source(),
    "manifest": Source(),
}


def get_source(name: str) -> Source:
    """Returns the `Source` with this name. Raises: ValueError that lists the valid names."""
    if name not in SOURCES:
        raise ValueError(f"data must be one of {', '.join(SOURCES)}, got {name}; use data=digits")
    return SOURCES[name]
