import io
import os
import socket
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dora_lightning.images import check_image, describe, image_size, open_image, pad_to_square


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(values.squeeze())


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


class Row:
    """An image that is decoded when it is needed."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def open(self) -> Image.Image:
        return Image.open(io.BytesIO(self.data))

    def __str__(self) -> str:
        return "row 7 of a data set"


@pytest.fixture
def sources(tmp_path: Path) -> list[Any]:
    image = noise(20, 10)
    image.save(tmp_path / "a.png")
    return [tmp_path / "a.png", str(tmp_path / "a.png"), encoded(image), image, Row(encoded(image))]


def test_every_kind_of_source(sources: list[Any], tmp_path: Path) -> None:
    for source in sources:
        image = open_image(source)
        assert (image.mode, image.size) == ("RGB", (20, 10))
        assert np.array_equal(np.asarray(image), np.asarray(noise(20, 10)))
        assert image_size(source) == check_image(source, decode=False) == check_image(source, decode=True) == (20, 10)
    assert [describe(source) for source in sources] == [
        str(tmp_path / "a.png"),
        str(tmp_path / "a.png"),
        f"an encoded image of {len(sources[2])} bytes",
        "an image of 20 x 10 pixels in memory",
        "row 7 of a data set",
    ]


def test_an_image_that_was_given_stays_open() -> None:
    image = noise(8, 8)
    open_image(image).close()
    assert open_image(image).size == (8, 8)


def test_other_modes_become_rgb_as_pillow_converts_them() -> None:
    for image in (noise(8, 8, "L"), noise(8, 8, "RGBA"), noise(8, 8).convert("P"), noise(8, 8).convert("CMYK")):
        assert np.array_equal(np.asarray(open_image(image)), np.asarray(image.convert("RGB")))


def test_a_transparent_palette_keeps_its_colours() -> None:
    image = noise(8, 8).convert("P")
    opaque = np.asarray(image.convert("RGB"))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=bytes(range(256)))
    assert np.array_equal(np.asarray(open_image(buffer.getvalue())), opaque)  # and Pillow does not warn


# row r, column c -> where EXIF 2.3, table 6, puts the stored pixel: "the 0th row is the visual top", ...
STORED = np.arange(5 * 8, dtype=np.uint8).reshape(5, 8) * 6
SHOWN = {
    1: STORED,
    2: STORED[:, ::-1],
    3: STORED[::-1, ::-1],
    4: STORED[::-1],
    5: STORED.T,
    6: STORED[::-1].T,
    7: STORED[::-1, ::-1].T,
    8: STORED[:, ::-1].T,
}


def with_exif(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    options = {"quality": 100} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(STORED).save(buffer, kind, exif=exif, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", SHOWN)
def test_photos_are_turned_upright(kind: str, orientation: int) -> None:
    data = with_exif(kind, orientation)
    shown = np.asarray(open_image(data))
    assert shown.shape[:2] == SHOWN[orientation].shape
    for channel in range(3):
        assert np.abs(shown[..., channel].astype(int) - SHOWN[orientation]).max() <= 3  # JPEG is not exact
    assert image_size(data) == check_image(data, True) == check_image(data, False) == shown.shape[1::-1]
    # the same image in memory
    assert np.array_equal(np.asarray(open_image(Image.open(io.BytesIO(data)))), shown)


def test_llava_leaves_photos_as_they_are_stored() -> None:
    data = with_exif("PNG", 6)
    assert np.array_equal(np.asarray(open_image(data, exif_rotation=False))[..., 0], STORED)
    for decode in (True, False):
        assert check_image(data, decode, exif_rotation=False) == image_size(data, exif_rotation=False) == (8, 5)


def test_a_tiff_is_turned_once() -> None:
    buffer = io.BytesIO()
    Image.fromarray(STORED).save(buffer, "TIFF", tiffinfo={274: 6})
    assert np.array_equal(np.asarray(open_image(buffer.getvalue()))[..., 0], SHOWN[6])
    assert image_size(buffer.getvalue()) == (5, 8)


def test_broken_exif_data_say_nothing() -> None:
    data = with_exif("JPEG", 6)
    start = data.index(b"Exif\0\0") + 6
    assert open_image(data[:start] + b"XXXX" + data[start + 4 :]).size == (8, 5)
    for number in (0, 9):
        assert open_image(with_exif("JPEG", number)).size == (8, 5)


SIXTEEN_BITS = np.tile(np.array([0, 128, 129, 257, 300, 32768, 40000, 65535], dtype=np.uint16), (4, 1))
EIGHT_BITS = np.tile(np.array([0, 0, 1, 1, 1, 128, 156, 255], dtype=np.uint8), (4, 1))  # divided by 257, rounded


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bits_is_scaled(kind: str) -> None:
    for image in (Image.fromarray(SIXTEEN_BITS), Image.open(io.BytesIO(encoded(Image.fromarray(SIXTEEN_BITS), kind)))):
        for channel in range(3):
            assert np.array_equal(np.asarray(open_image(image))[..., channel], EIGHT_BITS)


def tiff(values: np.ndarray[Any, Any], order: str, bits: int, photometric: int, sample_format: int) -> bytes:
    """A TIFF of one strip, written by hand."""
    pixels = values.tobytes() if bits != 12 else pack_12_bits(values)
    height, width = values.shape
    tags = [
        *((256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1)),
        *((278, height), (279, len(pixels)), (339, sample_format)),
    ]
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8 + len(pixels))
    return head + pixels + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def pack_12_bits(values: np.ndarray[Any, Any]) -> bytes:
    digits = "".join(f"{value:012b}" for value in values.ravel().tolist())
    return int(digits, 2).to_bytes(len(digits) // 8, "big")


def test_tiff_of_other_kinds_is_scaled() -> None:
    for order in "<>":
        data = tiff(SIXTEEN_BITS.astype(order + "u2"), order, 16, 1, 1)
        assert np.array_equal(np.asarray(open_image(data))[..., 0], EIGHT_BITS)
        fractions = np.tile(np.array([0, 0.25, 0.5, 1], dtype=order + "f4"), (4, 1))
        assert np.asarray(open_image(tiff(fractions, order, 32, 1, 3)))[0, :, 0].tolist() == [0, 64, 128, 255]
    # white is zero
    assert np.array_equal(np.asarray(open_image(tiff(SIXTEEN_BITS, "<", 16, 0, 1)))[..., 0], 255 - EIGHT_BITS)
    twelve = np.tile(np.array([0, 16, 2048, 4095], dtype=np.uint16), (4, 1))
    assert np.asarray(open_image(tiff(twelve, "<", 12, 1, 1)))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("values", "sample_format", "message"),
    [
        (
            np.array([0.0, 255.0], dtype=np.float32),
            3,
            "floating point numbers from 0 to 255: expected 0 .*8 or 16 bits",
        ),
        (np.array([-0.5, 1.0], dtype=np.float32), 3, "floating point numbers from -0.5 to 1"),
        (np.array([0.0, np.nan], dtype=np.float32), 3, "floating point numbers from nan"),
        (np.array([0, 70_000], dtype=np.int32), 2, "whole numbers from 0 to 70000, of 32 bits .*8 or 16 bits"),
        (np.array([-5, 5], dtype=np.int32), 2, "whole numbers from -5 to 5"),
    ],
)
def test_numbers_without_a_known_white_are_refused(
    tmp_path: Path, values: np.ndarray[Any, Any], sample_format: int, message: str
) -> None:
    (tmp_path / "depth.tif").write_bytes(tiff(np.tile(values, (4, 2)), "<", 32, 1, sample_format))
    with pytest.raises(ValueError, match=rf"depth.tif: .*{message}"):
        open_image(tmp_path / "depth.tif")


def test_whole_numbers_that_are_an_8_bit_image_s_are_taken_as_such() -> None:
    assert np.array_equal(
        np.asarray(open_image(noise(8, 8, "L").convert("I"))), np.asarray(noise(8, 8, "L").convert("RGB"))
    )


def test_colors_of_16_bits_keep_their_upper_8() -> None:
    rows = np.array([[0x1234, 0x80FF, 0xFFFF]] * 4, dtype=">u2")
    lines = b"".join(b"\0" + row.tobytes() * 4 for row in rows)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    assert np.asarray(open_image(b"\x89PNG\r\n\x1a\n" + parts))[0, 0].tolist() == [0x12, 0x80, 0xFF]


def test_adobe_s_inverted_cmyk() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = np.asarray(open_image(encoded(image, "JPEG")))[0, 0].astype(int)
    assert np.abs(red - [255, 0, 0]).max() < 6


def test_the_first_frame_and_the_first_page_are_read() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("#ff0000", "#00ff00")]
    for kind in ("GIF", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        assert np.abs(np.asarray(open_image(buffer.getvalue()))[0, 0].astype(int) - [255, 0, 0]).max() < 4


def test_truncated_images_show_when_they_are_decoded(tmp_path: Path) -> None:
    for kind in ("PNG", "JPEG", "GIF", "WEBP"):
        path = tmp_path / f"broken.{kind.lower()}"
        path.write_bytes(encoded(noise(60, 40), kind)[:-700])
        for broken in (lambda path=path: open_image(path), lambda path=path: check_image(path, decode=True)):
            with pytest.raises(ValueError, match=rf"broken.{kind.lower()}: "):
                broken()
        if kind != "WEBP":  # whose header needs the whole file
            assert check_image(path, decode=False) == (60, 40)


@pytest.mark.parametrize("decode", [True, False])
def test_what_is_no_image_is_named(tmp_path: Path, decode: bool) -> None:
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").touch()
    for name, message in [
        ("text.jpg", "not an image that is read .*a file that begins with b'not an i'"),
        ("empty.jpg", "not an image .*found an empty file"),
        ("absent.jpg", "no such image"),
        (".", "expected an image file, found a folder"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            check_image(tmp_path / name, decode)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(ValueError, match="an encoded image of 3 bytes: not an image"):
        check_image(b"abc", decode)
    with pytest.raises(
        ValueError, match=r"42: .*expected a path, bytes, a PIL image or something with open\(\), found int"
    ):
        check_image(42, decode)


@pytest.mark.parametrize("decode", [True, False])
def test_what_is_no_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decode: bool) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.jpg")
        for path, kind in {"pipe.jpg": "a named pipe", "socket.jpg": "a socket", "/dev/zero": "a device"}.items():
            with pytest.raises(ValueError, match=f"{path}: expected an image file, found {kind}"):
                check_image(path, decode)


@pytest.mark.parametrize("decode", [True, False])
def test_only_common_formats_are_tried(tmp_path: Path, decode: bool) -> None:
    for kind, found in {"EPS": "PostScript", "PCX": "begins with", "ICO": "begins with", "PDF": "a PDF"}.items():
        (tmp_path / "a.jpg").write_bytes(encoded(noise(20, 10), kind))
        with pytest.raises(ValueError, match=rf"a.jpg: not an image that is read \(BMP, .*found .*{found}"):
            check_image(tmp_path / "a.jpg", decode)
    for start, found in {
        b"\0\0\0\x20ftypavif": "AVIF",
        b"<svg/>": "SVG",
        b"version https://git-lfs.github.com/spec/v1": "a Git LFS pointer",
    }.items():
        with pytest.raises(ValueError, match=found):
            check_image(start, decode)


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((1, 1), "too small: expected at least 4 pixels a side, found 1 x 1"),
        ((3, 50), "too small.*found 3 x 50"),
        ((20_000, 200), "too large: expected at most 9000 pixels a side, found 20000 x 200"),
        ((200, 9001), "too large"),
        ((804, 4), "too elongated: expected at most 200 times as long as the other side, found 804 x 4"),
        ((4, 804), "too elongated"),
    ],
)
def test_sizes_that_cannot_be_used(tmp_path: Path, size: tuple[int, int], message: str, decode: bool) -> None:
    Image.new("RGB", size).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=rf"a.png: {message}"):
        check_image(tmp_path / "a.png", decode)
    with pytest.raises(ValueError, match=message):
        open_image(Image.new("RGB", size))
    assert image_size(tmp_path / "a.png") == size


def test_the_largest_and_smallest_that_can_be_used() -> None:
    for size in [(4, 4), (4, 800), (9000, 45)]:
        assert check_image(Image.new("L", size), decode=True) == size


def test_a_decompression_bomb(tmp_path: Path) -> None:
    for side in (9_500, 14_000):  # Pillow warns of the one and refuses the other
        Image.new("1", (side, side)).save(tmp_path / "a.png")
        with pytest.raises(ValueError, match=r"a.png: too large: at most 9000 pixels a side"):
            open_image(tmp_path / "a.png")


@pytest.mark.parametrize("size", [(6, 3), (3, 6), (5, 2), (2, 5), (4, 4)])
def test_padding_is_that_of_llava(size: tuple[int, int]) -> None:
    image = noise(*size)
    width, height = size
    side = max(size)
    expected = np.empty((side, side, 3), dtype=np.uint8)
    expected[:] = (122, 116, 104)
    # expand2square: the offset of the shorter side is rounded down
    top, left = (width - height) // 2 if width > height else 0, (height - width) // 2 if height > width else 0
    expected[top : top + height, left : left + width] = np.asarray(image)
    assert np.array_equal(np.asarray(pad_to_square(image, (122, 116, 104))), expected)
