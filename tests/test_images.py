import io
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


def test_orientation_is_ignored_as_in_llava() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    buffer = io.BytesIO()
    noise(20, 10).save(buffer, "JPEG", exif=exif)
    assert open_image(buffer.getvalue()).size == image_size(buffer.getvalue()) == (20, 10)


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
        ("text.jpg", "not an image"),
        ("empty.jpg", "not an image"),
        ("absent.jpg", "no such image"),
        (".", "cannot be decoded: .*directory"),
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
