"""TFDS builder over scikit-learn's bundled digits."""

import struct
import zlib
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

SIDE = 8
LEVELS = 16  # the scans count ink in 4x4 cells: 0..16

Entry = tuple[int, dict[str, bytes | int]]  # key, features


class Builder(tfds.core.GeneratorBasedBuilder):
    """1,797 scans of handwritten digits, uint8 [8, 8, 1] in 0..255, ten classes, one part named `train`.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
    (its test part), as bundled with scikit-learn (`sklearn.datasets.load_digits`).
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 (TFDS reads a plain class attribute)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits bundled with scikit-learn.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIDE, SIDE, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            disable_shuffling=True,  # example i is scikit-learn's example i
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Entry]]:
        del dl_manager  # nothing is downloaded
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[Entry]:
        from sklearn.datasets import load_digits

        bundled = load_digits()
        scaled = np.rint(bundled.images * (255 / LEVELS)).astype(np.uint8)
        for index, (pixels, label) in enumerate(zip(scaled, bundled.target, strict=True)):
            yield index, {"image": png(pixels), "label": int(label)}


def png(pixels: np.ndarray) -> bytes:
    """Uncompressed 8-bit grey PNG of uint8 [H, W].

    Written by hand, because a compressor's output differs between versions and the fingerprint is over these bytes.
    """
    height, width = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # filter 0 before every row
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in chunks)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
