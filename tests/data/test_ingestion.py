"""Any bytes give an image of the right size and channels, or a reason; the same one each time."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import sys
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from support.commands import ROOT, WITH_SUPPORT, run_command
from support.image_folders import load_dataset
from support.images import decode_image, make_limits
from train import data
from train.data.decode import FORMATS, read_header
from train.data.ingestion.validation import ExampleInfo, inspect

REAL = os.environ.get("INCEPTION_REAL_DATA")
NO_IMAGE = "not an image in a supported format (JPEG, PNG, GIF, BMP, WEBP)"
LIMITS = make_limits(max_pixels=10**6)


@cache
def encoded(kind: str, seed: int = 0, side: int = 24) -> bytes:
    """A structured colour image, different for each seed."""
    generator = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, side)
    pixels = (
        ramp[:, None, None] * generator.random(3) + ramp[None, :, None] * 0.2 + generator.random((side, side, 3)) * 9
    )
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, kind, quality=90)
    return out.getvalue()


def png_of_header(width: int, height: int) -> bytes:
    """A PNG with this size in its header and almost no data."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def is_sound_or_told(found: ExampleInfo, data: bytes) -> bool:
    """Whether it decodes to the size in its header, or has a reason of one line."""
    if found.problem:
        return "\n" not in found.problem
    return decode_image(data, 3).shape in ((found.height, found.width, 3), (found.width, found.height, 3))


# ------------------------------------------------------------------------------------------------------ broken bytes


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_images_are_rejected(kind: str):
    whole = encoded(kind)
    assert not inspect(whole, 0, LIMITS).problem
    for sixteenth in range(16):
        part = whole[: len(whole) * sixteenth // 16]
        found = inspect(part, 0, LIMITS)
        assert found == inspect(part, 0, LIMITS)
        assert is_sound_or_told(found, part)
        # Nothing is filled up: what lacks its pixels is no image. A GIF or WebP may end in a block that nobody needs.
        assert found.problem, f"{sixteenth}/16"


@pytest.mark.parametrize("kind", FORMATS)
def test_single_flipped_bits_give_an_image_or_a_reason(kind: str):
    whole = encoded(kind)
    for bit in np.random.default_rng(1).permutation(8 * len(whole))[:150].tolist():
        part = bytearray(whole)
        part[bit // 8] ^= 1 << bit % 8
        found = inspect(bytes(part), 0, LIMITS)
        assert found == inspect(bytes(part), 0, LIMITS)
        assert is_sound_or_told(found, bytes(part))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"", NO_IMAGE),
        (b"just some text\n", NO_IMAGE),
        (b"\xff\xd8\xff", NO_IMAGE),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", NO_IMAGE),
        (bytes(5000), NO_IMAGE),
        (png_of_header(2000, 2000), "2000x2000 pixels are more than the limit of 1,000,000"),
        (png_of_header(20, 20), "image file is truncated"),
        (b"x" * (LIMITS.max_bytes + 1), "67,108,865 bytes are more than the limit of 67,108,864"),
    ],
    ids=["empty", "text", "a beginning", "svg", "zeros", "bomb", "short", "large"],
)
def test_files_that_are_no_images_are_rejected_with_a_reason(bad: bytes, reason: str):
    assert inspect(bad, 3, LIMITS).problem.startswith(reason)
    assert (inspect(bad, 3, LIMITS).size, inspect(bad, 3, LIMITS).label) == (len(bad), 3)


def test_only_upright_jpegs_take_the_fast_decoder():
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    picture = Image.open(io.BytesIO(encoded("PNG")))
    picture.save(turned, "JPEG", exif=exif)
    grey, ink = io.BytesIO(), io.BytesIO()
    picture.convert("L").save(grey, "JPEG", progressive=True)
    picture.convert("CMYK").save(ink, "JPEG")
    plain = {name: inspect(bytes_, 0, LIMITS).plain for name, bytes_ in {
        "jpeg": encoded("JPEG"), "grey, progressive": grey.getvalue(), "turned": turned.getvalue(),
        "ink": ink.getvalue(), "png": encoded("PNG"),
    }.items()}  # fmt: skip
    assert plain == {"jpeg": True, "grey, progressive": True, "turned": False, "ink": False, "png": False}


def test_png_with_broken_pixels_is_rejected():
    """Reading the EXIF block, which may follow the pixels, decodes them and must not hide the error."""
    broken = bytearray(encoded("PNG"))
    assert not inspect(bytes(broken), 0, LIMITS).problem
    start = broken.index(b"IDAT") + 200
    broken[start : start + 6] = b"\xff" * 6
    assert inspect(bytes(broken), 0, LIMITS).problem


# ------------------------------------------------------------------------------------------------- the header reader


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(FORMATS), st.integers(0, 60))
def test_header_reader_accepts_or_rejects_random_bytes(noise: bytes, kind: str, kept: int):
    """Random bytes after a real beginning of any length."""
    bytes_ = encoded(kind)[:kept] + noise
    try:
        header = read_header(bytes_, 10**6)
    except ValueError as refusal:
        assert str(refusal) and "\n" not in str(refusal)
    else:
        assert header.format in (*FORMATS, "MPO")
        assert 0 < header.width * header.height <= 10**6


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FORMATS), st.data())
def test_changed_headers_are_accepted_or_rejected(kind: str, draw: st.DataObject):
    bytes_ = bytearray(encoded(kind))
    for _ in range(draw.draw(st.integers(1, 4))):
        bytes_[draw.draw(st.integers(0, 80))] = draw.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        assert 0 < read_header(bytes(bytes_), 10**6).width <= 10**6
    assert is_sound_or_told(inspect(bytes(bytes_), 0, LIMITS), bytes(bytes_))


# ------------------------------------------------------------------------------------------------------ whole folders


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that every user can access."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def fill(root: Path, number: int = 40) -> None:
    """Two classes of sound images."""
    for index in range(number):
        folder = root / ("cats and dogs", "x")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        kind = FORMATS[index % len(FORMATS)]
        (folder / f"{index} {kind}.JpG").write_bytes(encoded(kind, index))


def load(root: Path, index: Path, **options) -> data.dataset.Dataset:
    return load_dataset("folder", index, image_size=16, channels=3, root=str(root), **options)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_every_file_of_a_class_folder_is_an_image_or_has_a_reason(shared_folder: Path):
    root, bad = shared_folder / "root", shared_folder / "root/x"
    fill(root)
    (bad / "text.jpg").write_text("no picture")
    (bad / "empty.png").touch()
    (bad / "folder.jpg").mkdir()
    os.mkfifo(bad / "pipe.jpg")
    (bad / "gone.jpg").symlink_to("nowhere")
    (bad / "out.jpg").symlink_to(ROOT / "README.md")
    (bad / "locked.jpg").write_bytes(encoded("JPEG", 99))
    (bad / "locked.jpg").chmod(0)
    (bad / "inside.jpg").symlink_to("../cats and dogs/0 JPEG.JpG")
    reasons = {
        "x/empty.png": NO_IMAGE,
        "x/folder.jpg": "a folder",
        "x/gone.jpg": "No such file or directory",
        "x/locked.jpg": "Permission denied",
        "x/out.jpg": f"is outside {root.resolve()}",
        "x/pipe.jpg": "not a regular file",
        "x/text.jpg": NO_IMAGE,
    }
    with as_nobody():
        with pytest.raises(ValueError) as refused:
            load(root, shared_folder / "index")
        named = "; ".join(f"{root}/{name} ({why})" for name, why in reasons.items())
        assert str(refused.value) == (
            f"7 of 48 images cannot be read: {named}; "
            "fix or remove them, or set data.on_error=skip data.max_skipped=7 to leave them out"
        )
        found = load(root, shared_folder / "index", on_error="skip", on_leak="warn")
    assert dict(found.skipped) == reasons
    assert sum(found.split_sizes.values()) == 41
    assert found.notes[0] == (
        f"warning: skipped 7 broken examples: x/empty.png ({NO_IMAGE}); x/folder.jpg (a folder); "
        "x/gone.jpg (No such file or directory); ..."
    )


def test_skipped_broken_image_is_inspected_again_and_nothing_is_written(shared_folder: Path):
    """Other processes may be reading the index."""
    fill(shared_folder / "root")
    (shared_folder / "root/x/z.png").write_bytes(b"broken")
    load(shared_folder / "root", shared_folder / "index", on_error="skip")
    [table] = (shared_folder / "index/.index").glob("*.arrow")
    before = table.stat()
    assert len(load(shared_folder / "root", shared_folder / "index", on_error="skip").skipped) == 1
    assert table.stat() == before
    status = (shared_folder / "root/x/z.png").stat()
    shutil.copyfile(
        next((shared_folder / "root/cats and dogs").iterdir()), shared_folder / "root/x/z.png"
    )  # it can be read now
    os.utime(shared_folder / "root/x/z.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert load(shared_folder / "root", shared_folder / "index", on_error="skip", on_leak="warn").skipped == ()
    assert table.stat().st_ino != before.st_ino


def test_ten_broken_images_are_named_and_all_are_counted(shared_folder: Path):
    fill(shared_folder / "root")
    for number in range(12):
        (shared_folder / f"root/x/z{number:02d}.png").write_bytes(bytes([number]))
    with pytest.raises(ValueError) as refused:
        load(shared_folder / "root", shared_folder / "index")
    assert str(refused.value).count(NO_IMAGE) == 10
    assert str(refused.value).startswith("12 of 52 images cannot be read: ")
    assert str(refused.value).endswith(
        f"z09.png ({NO_IMAGE}) and 2 more; fix or remove them, or set data.on_error=skip data.max_skipped=12 to leave "
        "them out"
    )
    with pytest.raises(ValueError, match=r"or set data.max_skipped=12 to leave them out$"):
        load(shared_folder / "root", shared_folder / "index", on_error="skip", max_skipped=11)
    assert len(load(shared_folder / "root", shared_folder / "index", on_error="skip", max_skipped=12).skipped) == 12


def test_jpeg_with_decoder_warnings_is_decoded_by_pillow(shared_folder: Path, capfd: pytest.CaptureFixture):
    fill(shared_folder / "root")
    whole = encoded("JPEG", 77)
    table = whole.index(b"\xff\xdb")
    (shared_folder / "root/x/odd.jpg").write_bytes(whole[:table] + b"\0\0\0" + whole[table:])
    found = load(shared_folder / "root", shared_folder / "index")
    assert capfd.readouterr().err == ""
    rows = {row["path"]: row["plain"] for row in found.train.example_index.table.to_pylist()}
    assert rows.pop("x/odd.jpg") is False
    assert Counter(rows.values()) == {True: 8, False: 32}


LOAD = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30,) * 2)  # of addresses, of which TensorFlow alone takes most
from support.image_folders import load_dataset
from train.data.pixel_cache import load_into_memory
found = load_dataset(
    "folder", sys.argv[2], image_size=32, channels=3, root=sys.argv[1], on_error="skip", max_skipped=500, on_leak="warn"
)
for split in found.splits.values():
    assert load_into_memory(split).shape == (len(split), 32, 32, 3), split.name
assert "tensorflow" not in sys.modules
print(json.dumps([found.split_sizes, found.fingerprint, found.skipped]))
"""


def loaded_in_two_gib(root: Path, index: Path) -> list:
    """Loads in a separate process; returns (counts, fingerprint, skipped)."""
    done = run_command(sys.executable, "-c", LOAD, str(root), str(index), env=WITH_SUPPORT, timeout=300)
    assert done.code == 0, done.err[-2000:]
    return json.loads(done.out.splitlines()[-1])


@pytest.mark.slow
def test_large_photographs_load_within_two_gib(shared_folder: Path):
    fill(shared_folder / "root")
    for number in range(3):
        Image.new("RGBA", (4000, 4000), (number, 0, 0, 128)).save(
            shared_folder / f"root/x/large {number}.png", compress_level=1
        )
    (shared_folder / "root/x/bomb.png").write_bytes(png_of_header(60_000, 60_000))
    counts, _, skipped = loaded_in_two_gib(shared_folder / "root", shared_folder / "index")
    assert sum(counts.values()) == 43
    assert [name for name, _ in skipped] == ["x/bomb.png"]


@pytest.mark.real_data
@pytest.mark.skipif(REAL is None, reason="INCEPTION_REAL_DATA names no folder")
def test_odd_images_are_accepted_or_rejected(shared_folder: Path):
    """Every file of a corpus of odd images gives an image or a reason within 2 GiB, and the same one twice."""
    index = json.loads((Path(str(REAL)) / "odd_images/index.json").read_text())
    for number, entry in enumerate(index):
        folder = shared_folder / "root" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(str(REAL)) / "odd_images" / entry["file"], folder / f"{number:03d}")
    counts, digest, skipped = loaded_in_two_gib(shared_folder / "root", shared_folder / "index")
    assert [counts, digest, skipped] == loaded_in_two_gib(shared_folder / "root", shared_folder / "another index")
    assert sum(counts.values()) + len(skipped) == len(index) == 227
    broken = {name.partition("/")[2] for name, _ in skipped}
    ours = {f"{number:03d}" for number, entry in enumerate(index) if entry.get("format") in (*FORMATS, "MPO")}
    fine = {f"{number:03d}" for number, entry in enumerate(index) if entry["decode"] == "ok"}
    assert broken & ours & fine == set()  # what Pillow decodes, of our formats, is decoded
    assert {f"{number:03d}" for number in range(227)} - broken <= ours & fine


def test_broken_image_releases_the_lock_of_large_images():
    broken = png_of_header(2100, 2100)  # above the size at which one waits for another
    for _ in range(3):
        assert inspect(broken, 0, make_limits()).problem.startswith("image file is truncated")
    done = threading.Thread(target=inspect, args=(broken, 0, make_limits()))
    done.start()
    done.join(10)
    assert not done.is_alive()
