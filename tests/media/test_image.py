"""Decoding and preprocessing, against open_clip's own transform."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from open_clip.transform import image_transform
from PIL import Image

from mmsearch.errors import DecodeError
from mmsearch.media.fit import fit
from mmsearch.media.image import FORMATS, MAX_PIXELS, decode
from mmsearch.types import Preprocess

MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(224, 224), (320, 240), (240, 321), (500, 37), (31, 400), (9, 9)])
def test_pixels_are_open_clips(mode, size):
    image = noise(size)
    how = Preprocess((64, 64), MEAN, STD, resize_mode=mode, fill_color=7)
    theirs = image_transform(
        64, is_train=False, mean=MEAN, std=STD, resize_mode=mode, interpolation="bicubic",
        fill_color=7,
    )(image)  # fmt: skip
    expected = (theirs.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    np.testing.assert_array_equal(fit(image, how), expected)


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_pixels_are_open_clips_for_an_oblong_model(mode):
    image = noise((300, 200))
    how = Preprocess((48, 96), MEAN, STD, resize_mode=mode)
    theirs = image_transform((48, 96), is_train=False, mean=MEAN, std=STD, resize_mode=mode)(image)
    expected = (theirs.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    np.testing.assert_array_equal(fit(image, how), expected)


def quadrants() -> Image.Image:
    """Four colours, so that every turn and mirror image can be told apart."""
    image = Image.new("RGB", (60, 40))
    for place, colour in enumerate(("red", "lime", "blue", "white")):
        image.paste(
            colour, (place % 2 * 30, place // 2 * 20, place % 2 * 30 + 30, place // 2 * 20 + 20)
        )
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    turn_back = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    upright = quadrants()
    stored = upright.transpose(turn_back) if turn_back is not None else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encoded(stored, "PNG", exif=exif))
    assert (found.width, found.height) == (60, 40)
    np.testing.assert_array_equal(np.asarray(found.image), np.asarray(upright))


def test_capture_date_comes_from_exif():
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2019:07:04 12:30:15"
    found = decode(encoded(quadrants(), "JPEG", exif=exif))
    assert str(found.captured) == "2019-07-04 12:30:15"


@pytest.mark.parametrize("value", ["", "0000:00:00 00:00:00", "yesterday", "2019:13:41 99:00:00"])
def test_a_capture_date_that_is_none_says_nothing(value):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = value
    assert decode(encoded(quadrants(), "JPEG", exif=exif)).captured is None


def test_damaged_exif_costs_no_picture():
    content = encoded(quadrants(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode(content).image.size == (60, 40)


def test_transparency_is_shown_on_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    assert decode(encoded(image)).image.getpixel((1, 1)) == (255, 255, 255)


def test_a_palette_with_transparency_is_shown_on_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0] * 256)
    assert decode(encoded(image, "PNG", transparency=0)).image.getpixel((1, 1)) == (255,) * 3


def test_sixteen_bit_gray_keeps_its_shades():
    values = np.array([[0, 32768, 65535]], dtype=np.uint16)
    content = encoded(Image.fromarray(values), "PNG")
    assert [pixel[0] for pixel in np.asarray(decode(content).image)[0]] == [0, 127, 255]


def test_cmyk_becomes_rgb():
    content = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    red, green, blue = decode(content).image.getpixel((4, 4))
    assert red > 200
    assert max(green, blue) < 80


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(content).image.getpixel((2, 2)) == (255, 0, 0)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "HEIF", "AVIF"])
def test_every_promised_format_is_read(form):
    assert form in FORMATS
    found = decode(encoded(quadrants(), form))
    assert found.image.mode == "RGB"
    assert found.image.size == (60, 40)


def test_a_large_jpeg_is_reduced_but_never_below_twice_what_is_needed():
    content = encoded(noise((2000, 1200)), "JPEG")
    found = decode(content, at_least=(224, 224))
    assert (found.width, found.height) == (2000, 1200)
    assert 448 <= min(found.image.size) < 1200


def test_reducing_hardly_changes_what_the_model_sees():
    content = encoded(noise((2000, 1500)), "JPEG", quality=92)
    how = Preprocess((224, 224), MEAN, STD, resize_mode="squash")
    whole, reduced = (
        fit(decode(content, at_least=size).image, how).astype(float).ravel()
        for size in (None, (224, 224))
    )
    cosine = whole @ reduced / np.linalg.norm(whole) / np.linalg.norm(reduced)
    assert cosine > 0.9999


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"no image at all", "not an image"),
        (encoded(noise((300, 300)), "JPEG")[:2000], "damaged image"),
        (encoded(noise((300, 300)), "PNG")[:9000], "damaged image"),
    ],
)
def test_what_is_no_image_says_why(content, reason):
    with pytest.raises(DecodeError, match=reason):
        decode(content)


def test_a_bomb_is_refused_before_it_is_decoded():
    with pytest.raises(DecodeError, match="too large: 10 x 10 pixels"):
        decode(encoded(Image.new("1", (10, 10))), most_pixels=99)


def test_other_formats_are_not_opened_even_if_pillow_could():
    with pytest.raises(DecodeError, match="not read"):
        decode(encoded(quadrants(), "PPM"))


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 2)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_a_thin_strip_takes_no_more_than_it_must(size, mode):
    how = Preprocess((64, 64), MEAN, STD, resize_mode=mode)
    assert fit(Image.new("RGB", size, "red"), how).shape == (64, 64, 3)


def test_cutting_the_ends_off_a_strip_changes_no_pixel():
    image = noise((4600, 60))
    how = Preprocess((64, 64), MEAN, STD)
    theirs = image_transform(64, is_train=False, mean=MEAN, std=STD)(image)
    expected = theirs.permute(1, 2, 0).numpy() * 255
    np.testing.assert_allclose(fit(image, how), expected, atol=2)


def test_every_hostile_file_is_an_image_or_has_a_reason(data):
    """And what Pillow alone reads to its end without a complaint, we read too.

    But for one JPEG, whose tables are damaged: it comes out garbled and half gray.
    """
    listed = json.loads((data / "ugly" / "index.json").read_text())
    assert len(listed) == 383
    readable = 0
    for entry in listed:
        content = (data / "ugly" / "files" / entry["path"]).read_bytes()
        try:
            found = decode(content, at_least=(224, 224))
        except DecodeError as error:
            assert str(error)
            if "5482a5465776" not in entry["path"]:
                assert not pillow_reads(content), f"{entry['path']}: {error}"
        else:
            readable += 1
            assert found.image.mode == "RGB"
    assert 300 < readable < 383


def pillow_reads(content: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                return False
            image.load()
            return min(image.size) > 0
    except Exception:  # noqa: BLE001 - whatever Pillow raises, it does not read the file
        return False


def test_a_jpeg_that_goes_on_with_zeros_is_damaged(picture):
    """As a copy that was cut off in a file of full size; with and without another in its EXIF."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (200, 300, 3), np.uint8))
    out = io.BytesIO()
    picture().save(out, "JPEG")
    for options in ({}, {"progressive": True}, {"exif": b"Exif\0\0" + out.getvalue()}):
        whole = io.BytesIO()
        noise.save(whole, "JPEG", **options)
        content = whole.getvalue()
        assert decode(content).width == 300
        assert decode(content + bytes(999)).width == 300  # behind its end there may be anything
        for share in (0.3, 0.6, 0.95):
            cut = content[: int(len(content) * share)]
            with pytest.raises(DecodeError, match="damaged image"):
                decode(cut + bytes(len(content) - len(cut)))
