"""One drawing is the same picture, however a file stores it."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from stored import DEPTHS, FLOATS, chunk, drawing, low_png, png, saved, tiff

from mmsearch.errors import DecodeError
from mmsearch.media.exif import parse_date
from mmsearch.media.image import decode

IMAGE = drawing()
GRAY = np.asarray(IMAGE.convert("L"))
RGB = np.asarray(IMAGE)
SKY = (2, 2)
SRGB = ImageCms.createProfile("sRGB")


def shown(content: bytes) -> np.ndarray:
    return np.asarray(decode(content).image).astype(int)


def assert_shows(content: bytes, expected: np.ndarray, within: float = 1.0) -> None:
    found = shown(content)
    expected = np.broadcast_to(expected[..., None] if expected.ndim == 2 else expected, found.shape)
    assert np.abs(found - expected).max() <= within


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("name", DEPTHS)
def test_gray_of_every_depth_sign_and_byte_order(name, order):
    sample_format, stored = DEPTHS[name]
    assert_shows(tiff(stored(GRAY), 1, sample_format, order), GRAY)
    assert_shows(tiff(stored(255 - GRAY), 0, sample_format, order), GRAY)  # white is zero


def test_gray_of_12_bits():
    packed = (GRAY.astype("u4") * 4095 // 255).reshape(-1, 2)
    data = np.stack(
        [packed[:, 0] >> 4, (packed[:, 0] & 15) << 4 | packed[:, 1] >> 8, packed[:, 1] & 255], 1
    ).astype(np.uint8)
    content = tiff(np.zeros(GRAY.shape, "u2"), 1, 1)
    content = content.replace(
        struct.pack("<HHIH", 258, 3, 1, 16), struct.pack("<HHIH", 258, 3, 1, 12)
    )
    size = struct.pack("<HHII", 279, 4, 1, GRAY.size * 2)
    content = content.replace(size, struct.pack("<HHII", 279, 4, 1, data.size))
    assert_shows(content[:400] + data.tobytes(), GRAY)


@pytest.mark.parametrize("name", FLOATS)
def test_floating_point_whatever_its_range(name):
    found = shown(tiff(FLOATS[name](GRAY).astype("f4"), 1, 3))[..., 0]
    plain = GRAY <= 200  # what is above may be white, black or unknown, but spoils nothing else
    assert np.abs(found - GRAY)[plain].max() <= 1


def test_a_lone_value_far_off_does_not_make_a_picture_flat():
    for value in (50.0, -9999.0, np.inf, -np.inf, np.nan, 3.4e38):
        samples = (GRAY / 255).astype("f4")
        samples[5, 5] = value
        found = shown(tiff(samples, 1, 3))[..., 0]
        assert np.abs(found - GRAY).mean() < 1


def test_a_mask_of_two_values_stays_one():
    for values in ((0, 5), (0, 1), (-9999, 3), (-1, 1)):
        samples = np.where(GRAY > 128, *values[::-1]).astype("f4")
        found = shown(tiff(samples, 1, 3))[..., 0]
        assert (found[GRAY > 128].min() - found[GRAY <= 128].max()) > 200


@pytest.mark.parametrize("order", "<>")
def test_colours_in_floating_point_and_16_bits(order):
    assert_shows(tiff((RGB / 255).astype("f4"), 2, 3, order), RGB)
    assert_shows(tiff(RGB.astype("u2") * 257, 2, 1, order), RGB)


def test_turns_and_dates_of_a_tiff_that_pillow_does_not_open():
    content = bytearray(tiff((RGB / 255).astype("f4"), 2, 3))
    place = content.index(struct.pack("<H", 278))  # rows per strip: one strip is all there is
    content[place : place + 12] = struct.pack("<HHIHH", 274, 3, 1, 3, 0)
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(io.BytesIO(content))
    assert_shows(bytes(content), RGB[::-1, ::-1])


# -- transparency ----------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_transparent_shade_of_few_bits_is_white(depth):
    shade = int(GRAY[SKY]) >> (8 - depth)
    found = shown(low_png(GRAY, depth, chunk(b"tRNS", struct.pack(">H", shade))))[..., 0]
    levels = (GRAY >> (8 - depth)).astype(int) * 255 // (2**depth - 1)
    assert_levels = np.where(GRAY >> (8 - depth) == shade, 255, levels)
    np.testing.assert_array_equal(found, assert_levels)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("kind", [0, 2])
def test_a_transparent_colour_is_white(depth, kind):
    pixels = GRAY if kind == 0 else RGB
    factor = 257 if depth == 16 else 1
    samples = (pixels.astype(">u2") * factor) if depth == 16 else pixels
    colour = np.atleast_1d(pixels[SKY]).astype(">u2") * factor
    rows = np.ascontiguousarray(samples.reshape(len(pixels), -1)).view(np.uint8)
    is_sky = (pixels == pixels[SKY]).reshape(*GRAY.shape, -1).all(axis=-1)
    expected = np.where(is_sky[..., None], 255, pixels.reshape(*GRAY.shape, -1))
    trns = chunk(b"tRNS", colour.astype(">u2").tobytes())
    assert_shows(png(rows, depth, kind, trns), expected)


def test_a_transparent_shade_of_16_bits_is_that_one_alone():
    values = np.array([[0, 1, 2, 65535]], ">u2")
    content = png(values.view(np.uint8), 16, 0, chunk(b"tRNS", b"\0\1"))
    assert shown(content)[0, :, 0].tolist() == [0, 255, 0, 255]


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_alpha_channel_that_is_zero_everywhere_is_none(form, mode):
    if (form, mode) == ("WEBP", "LA"):
        mode = "RGBA"
    image = IMAGE.convert(mode)
    image.putalpha(0)
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    expected = GRAY if mode == "LA" else RGB
    assert_shows(saved(image, form, **options), expected)
    image.putpixel((0, 0), (*image.getpixel((0, 0))[:-1], 255))
    assert shown(saved(image, form, **options))[5, 5].tolist() == [255] * 3


# -- colours ---------------------------------------------------------------------------------------


def wide_gamut() -> bytes:
    """A profile with colours of its own: sRGB's, with the columns of red and green exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(SRGB).tobytes())
    count = struct.unpack_from(">I", profile, 128)[0]
    at = {}
    for number in range(count):
        name, place, _ = struct.unpack_from(">4sII", profile, 132 + 12 * number)
        at[name] = place
    red, green = at[b"rXYZ"], at[b"gXYZ"]
    profile[red : red + 20], profile[green : green + 20] = (
        profile[green : green + 20], profile[red : red + 20],
    )  # fmt: skip
    return bytes(profile)


SWAPPED = RGB[..., [1, 0, 2]]


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "HEIF", "AVIF", "JPEG"])
def test_colours_are_those_that_a_profile_says(form):
    options = {"lossless": True} if form == "WEBP" else {"quality": 100}
    options |= {"subsampling": 0} if form == "JPEG" else {}
    options = {} if form in ("PNG", "TIFF") else options
    plain = shown(saved(IMAGE, form, **options))
    found = shown(saved(IMAGE, form, icc_profile=wide_gamut(), **options))
    assert np.abs(found - plain[..., [1, 0, 2]]).mean() < 2


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_profile_of_srgb_changes_no_pixel(form):
    profile = ImageCms.ImageCmsProfile(SRGB).tobytes()
    np.testing.assert_array_equal(
        shown(saved(IMAGE, form, icc_profile=profile)), shown(saved(IMAGE, form))
    )


@pytest.mark.parametrize("profile", [b"", b"none", b"\0" * 3000, "cmyk"])
def test_a_profile_that_does_not_fit_says_nothing(profile):
    if profile == "cmyk":  # Lab stands for any that is of other colours than the picture
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert_shows(saved(IMAGE, "PNG", icc_profile=profile), RGB, 0)


def test_lab_becomes_rgb():
    lab = ImageCms.profileToProfile(IMAGE, SRGB, ImageCms.createProfile("LAB"), outputMode="LAB")
    assert np.abs(shown(saved(lab, "TIFF")) - RGB).mean() < 2


def test_gamma_of_a_png_is_undone():
    linear = ((RGB / 255) ** 2.2 * 255).round().astype(np.uint8)
    rows = linear.reshape(len(RGB), -1)
    assert_shows(png(rows, 8, 2, chunk(b"gAMA", struct.pack(">I", 100_000))), RGB, 6)
    usual = chunk(b"gAMA", struct.pack(">I", 45_455))
    assert_shows(png(RGB.reshape(len(RGB), -1), 8, 2, usual), RGB, 0)
    srgb = chunk(b"sRGB", b"\0")
    both = (chunk(b"gAMA", struct.pack(">I", 100_000)), srgb)
    assert_shows(png(rows, 8, 2, *both), linear, 0)
    assert_shows(png(rows, 8, 2, chunk(b"gAMA", bytes(4))), linear, 0)


# -- chunks that no picture needs ------------------------------------------------------------------

LONG = b'{"node": 1}' * 200_000


@pytest.mark.parametrize(
    "more",
    [
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(LONG)),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LONG)),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + LONG),
        chunk(b"tEXt", b"parameters\0" + LONG * 40),
        chunk(b"iCCP", b"scanner\0\0" + zlib.compress(LONG)),
        chunk(b"iCCP", b"no zlib\0\0nonsense"),
        chunk(b"iCCP", b"method\0\7" + zlib.compress(LONG)),
        chunk(b"tEXt", b"Comment\0hello", damage=1),
        chunk(b"iCCP", b"x\0\0" + zlib.compress(wide_gamut()), damage=1),
        chunk(b"tIME", bytes(7), damage=1),
        chunk(b"pHYs", b"\0"),
        chunk(b"gAMA", b"\0"),
        chunk(b"sRGB", b""),
        chunk(b"tRNS", b"\0"),
        chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
        chunk(b"zTXt", b"nothing behind its name"),
        chunk(b"tEXt", bytes(50)),
        chunk(b"vpAg", bytes(3)),
    ],
    ids=range(18),
)
def test_no_chunk_that_a_png_does_not_need_costs_it(more):
    assert_shows(png(RGB.reshape(len(RGB), -1), 8, 2, more), RGB, 0)


def test_a_damaged_chunk_that_the_picture_needs_is_damage():
    whole = png(RGB.reshape(len(RGB), -1), 8, 2)
    place = whole.index(b"IDAT") + 40
    for content in (whole[:place] + b"\0" * 9 + whole[place + 9 :], whole[: len(whole) // 2]):
        with pytest.raises(DecodeError, match="damaged image"):
            decode(content)


def test_exif_of_a_png_counts_wherever_it_stands():
    exif = Image.Exif()
    exif[0x0112], exif[0x0132] = 3, "2020:02:03 04:05:06"
    rows, data = RGB.reshape(len(RGB), -1), exif.tobytes()
    hexed = b"\nexif\n" + str(len(data)).encode().rjust(8) + b"\n" + data.hex().encode() + b"\n"
    for more in (
        chunk(b"eXIf", data.removeprefix(b"Exif\0\0")),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(hexed)),
        chunk(b"tEXt", b"Raw profile type APP1\0" + hexed),
    ):
        found = decode(png(rows, 8, 2, more))
        np.testing.assert_array_equal(np.asarray(found.image), RGB[::-1, ::-1])
        assert found.captured.year == 2020


# -- turns and dates -------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "value"), [("B", b"\6"), ("I", 6), ("A", b"6\0"), ("H2", 6)])
def test_an_orientation_counts_whatever_type_it_is_written_in(form, value):
    upright = np.asarray(IMAGE)
    kind = {"B": 1, "I": 4, "A": 2, "H2": 3}[form]
    count = {"B": 1, "I": 1, "A": 2, "H2": 2}[form]
    field = {
        "B": lambda: value.ljust(4, b"\0"), "I": lambda: struct.pack("<I", value),
        "A": lambda: value.ljust(4, b"\0"), "H2": lambda: struct.pack("<HH", value, value),
    }[form]()  # fmt: skip
    exif = (
        b"Exif\0\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHI", 0x0112, kind, count) + field + bytes(4)
    )
    stored = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    found = decode(saved(stored, "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(found.image), upright)


def test_a_heic_that_exif_alone_turns_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = IMAGE.transpose(Image.Transpose.ROTATE_90)
    content = saved(stored, "HEIF", exif=exif, quality=100)
    assert b"irot" not in content
    found = decode(content)
    assert found.image.size == IMAGE.size == (found.width, found.height)
    assert np.abs(np.asarray(found.image).astype(int) - RGB).mean() < 6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2019:07:04 12:30:15", "2019-07-04 12:30:15"),
        ("2012-12-22 10:37:28", "2012-12-22 10:37:28"),
        ("2012/12/22 10:37:28", "2012-12-22 10:37:28"),
        ("2012.12.22 10:37:28", "2012-12-22 10:37:28"),
        ("2012-12-22T10:37:28+02:00", "2012-12-22 10:37:28"),
        ("2012:12:22 10:37:28.123Z", "2012-12-22 10:37:28"),
        ("2015:08:22 24:08:19", "2015-08-22 00:08:19"),
        ("2019:03:04 05:06", "2019-03-04 05:06:00"),
        ("2019:03:04", "2019-03-04 00:00:00"),
        ("2004: 1: 5  9: 3: 1", "2004-01-05 09:03:01"),
        ("2012:12:22 10:37:28 PM", "2012-12-22 22:37:28"),
        ("2012:12:22 12:37:28 am", "2012-12-22 00:37:28"),
        ("2016:12:31 23:59:60", "2016-12-31 23:59:59"),
        (b"2019:07:04 12:30:15\0", "2019-07-04 12:30:15"),
        ("0000:00:00 00:00:00", None),
        ("    :  :     :  :  ", None),
        ("2019:13:41 99:00:00", None),
        ("2019:02:30 10:00:00", None),
        ("yesterday", None),
        ("", None),
        (None, None),
        (1_600_000_000, None),
    ],
)
def test_dates_as_cameras_write_them(text, expected):
    found = parse_date(text)
    assert (str(found) if found else None) == expected


# -- reasons ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (saved(IMAGE, "JPEG2000"), "not read: JPEG 2000"),
        (saved(IMAGE, "ICO"), "not read: icon"),
        (saved(IMAGE, "PPM"), "not read: Netpbm"),
        (b"8BPS\0\1" + bytes(99), "not read: Photoshop"),
        (b"\xff\x0a" + bytes(99), "not read: JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "not read: JPEG XL"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "not read: SVG"),
        (b"FUJIFILMCCD-RAW 0201", "not read: camera raw"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1", "not read: camera raw"),
        (b"<!DOCTYPE html><html>404</html>", "not an image: a web page"),
        (b"%PDF-1.7\n", "not an image: a PDF"),
        (b"\0\0\0\x20ftypmp42\0\0\0\0", "not an image: a video"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not an image: a pointer of Git LFS"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "PNG that is damaged, or of a kind"),
        (b"II*\0" + bytes(99), "TIFF that is damaged, or of a kind"),
        (tiff(np.zeros((4, 4, 2), "c8"), 1, 6), "TIFF of a kind|TIFF that is damaged, or of"),
        (bytes(500), "not an image, or damaged at its start"),
        (b"<!---->" * 100 + b"<html>", "not an image: a web page"),
        (b"\xef\xbb\xbf<!DOCTYPE html>\n<title>x", "not an image: a web page"),
        (b"<!DOCTYPE svg [ <!ENTITY a '>'> ]>\n<svg>", "not read: SVG"),
        (b"<!--" * 20_000, "not an image: an XML document"),
        (b"BMW is a car", "not an image, or damaged at its start"),
        (b"p1 notes", "not an image, or damaged at its start"),
        (b"once upon a time", "not an image, or damaged at its start"),
    ],
)
def test_a_reason_says_what_a_file_is(content, reason):
    with pytest.raises(DecodeError, match=reason):
        decode(content)
