"""The data sets that can be chosen by name, and how their official parts become train, validation and test."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One choice of `data`.

    tfds: TFDS name (with its config); empty for `folder` and `manifest`.
    train, test: names of the official parts; an empty `test` means that it is cut from `train`. Validation is always
        cut from `train`.
    files: what `data.manual_dir` has to hold when the files are fetched by hand.
    by_hand: True where nobody may download the files without an account.
    prepared_bytes: size of the prepared set, from the TFDS catalogue; what it takes on disk besides the downloads.
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

# ImageNet and Imagenette publish their results on the part named validation (ImageNet's test labels are secret): here
# that part is the test split, and validation is cut from the training part.
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
    """The `Source` of a name. Raises: ValueError that lists the names."""
    if name not in SOURCES:
        raise ValueError(f"data must be one of {', '.join(SOURCES)}, got {name}; use data=digits")
    return SOURCES[name]
