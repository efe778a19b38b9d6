"""Bytes to pixels: golden vectors, and every limit before decoding."""

import io
import os
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from entry import images, preprocessing
from entry.config import ImageSpec
from entry.images import FORMATS, LIGHT, Heavy, ImageError, Limits, image_array, load_image
from entry.preprocessing import preprocess
from tests.golden.preprocessing.make import chunk, picture, png, tiff

GOLDEN = Path(__file__).parents[1] / "golden" / "preprocessing"
SPEC = ImageSpec(size=32, resize=32, preprocessing="v2", mean=(0.5,) * 3, std=(0.5,) * 3)
DATA = os.environ.get("PRG_TEST_DATA")


@pytest.mark.parametrize("name", sorted(np.load(GOLDEN / "expected.npz").files))
def test_golden_vectors(name: str) -> None:
    expected = np.load(GOLDEN / "expected.npz")[name]
    found = load_image((GOLDEN / name).read_bytes(), SPEC)
    assert found.dtype == np.uint8
    # Of a large JPEG, which is decoded at a reduced scale, a level more.
    assert difference(found, expected) <= 1 + name.startswith("large")


def difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other).max())


@pytest.mark.parametrize("size", [(1, 65_535), (65_535, 1), (1, 1), (2, 31), (33, 32)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "I;16", "LA", "CMYK", "YCbCr", "LAB", "F"])
def test_any_shape_and_mode(size: tuple[int, int], mode: str) -> None:
    assert image_array(Image.new(mode, size), SPEC).shape == (3, 32, 32)


SHARES = picture(32, 32, 4) / 255  # [32, 32, 4], in [0, 1]
GREY, RGB, ALPHA = SHARES[..., :1], SHARES[..., :3], SHARES[..., 3:]
LEVELS = (GREY * 15).round().astype(np.int64)


def of(bits: int, *shares: np.ndarray) -> np.ndarray:
    return (np.concatenate(shares, -1) * (2**bits - 1)).round().astype(np.int64)


def over_white(colours: np.ndarray, alpha: np.ndarray = ALPHA) -> np.ndarray:
    return colours * alpha + 1 - alpha


def floats(shares: np.ndarray) -> np.ndarray:
    return shares.astype(np.float32)


REAL, SIGNED = [3], [2]
KEY = of(16, RGB)[3, 4]
NEARLY = np.where(np.arange(1024).reshape(32, 32, 1) == 400, np.add(KEY, (0, 0, 1)), of(16, RGB))
AT_KEY = np.arange(1024).reshape(32, 32, 1) == 3 * 32 + 4


@pytest.mark.parametrize(
    ("data", "meant"),
    {
        "12 bits": (tiff(of(12, GREY), 12, 1), GREY),
        "12 bits in 16": (tiff(of(12, GREY), 16, 1, t281=[4095]), GREY),
        "14 bits in 16": (tiff(of(14, GREY), 16, 1, t340=[0], t341=[2**14 - 1]), GREY),
        "16 bits, whatever its brightest pixel": (tiff(of(16, GREY), 16, 1, t281=[60_000]), GREY),
        "16 bits, white is zero": (tiff(of(16, 1 - GREY), 16, 0), GREY),
        "16 bits, big-endian, deflated": (tiff(of(16, GREY), 16, 1, ">", deflate=True), GREY),
        "4 bits, white is zero": (tiff(of(4, 1 - LEVELS / 15), 4, 0), LEVELS / 15),
        "1 bit, white is zero": (tiff(of(1, GREY), 1, 0), 1 - of(1, GREY)),
        "floats": (tiff(floats(GREY), 32, 1, t339=REAL), GREY),
        "floats, white is zero": (tiff(floats(1 - GREY), 32, 0, t339=REAL), GREY),
        "floats, big-endian": (tiff(floats(GREY), 32, 1, ">", t339=REAL), GREY),
        "floats, big-endian, deflated": (tiff(floats(GREY), 32, 1, ">", deflate=True, t339=REAL), GREY),
        "floats of a declared range": (
            tiff(floats(GREY * 300 - 50), 32, 1, t339=REAL, t340=[-50.0], t341=[250.0]),
            GREY,
        ),
        "grey, alpha": (tiff(of(8, GREY, ALPHA), 8, 1, t338=[2]), over_white(GREY)),
        "grey, associated alpha": (tiff(of(8, GREY * ALPHA, ALPHA), 8, 1, t338=[1]), over_white(GREY)),
        "16 bits, alpha": (tiff(of(16, RGB, ALPHA), 16, 2, t338=[2]), over_white(RGB)),
        "16 bits, associated alpha": (tiff(of(16, RGB * ALPHA, ALPHA), 16, 2, t338=[1]), over_white(RGB)),
        "a sample that is no colour": (tiff(of(8, RGB, ALPHA), 8, 2, t338=[0]), RGB),
        "PNG, 16 bits, grey and alpha": (png(of(16, GREY, ALPHA), 16, 4), over_white(GREY)),
        "PNG, 16 bits, RGBA": (png(of(16, RGB, ALPHA), 16, 6), over_white(RGB)),
        "PNG, 16 bits, one colour transparent": (
            png(NEARLY, 16, 2, struct.pack(">3H", *KEY)),
            np.where(AT_KEY, 1, NEARLY / 65535),
        ),
        "PNG, 4 bits, one level transparent": (
            png(LEVELS, 4, 0, struct.pack(">H", 7)),
            np.where(LEVELS == 7, 1, LEVELS / 15),
        ),
    }.values(),
)
def test_numbers_are_read_as_declared(data: bytes, meant: np.ndarray) -> None:
    expected = np.broadcast_to(meant * 255, (32, 32, 3)).transpose(2, 0, 1)
    # Pillow cuts 16 bits of RGB off, and rounds what was multiplied by alpha.
    assert difference(load_image(data, SPEC), expected.round()) <= 2


BMP_MASKS = struct.pack("<4I", 0x7C00, 0x3E0, 0x1F, 0x8000)


def bmp(bits: int, compression: int, header: int, more: bytes) -> bytes:
    fields = struct.pack("<IiiHHIIiiII", header, 2, 2, 1, bits, compression, 8, 0, 0, 2 * (bits <= 8), 0)
    head = (fields + more).ljust(header + len(more) * (bits <= 8), b"\0")
    return b"BM" + struct.pack("<IHHI", 22 + len(head), 0, 0, 14 + len(head)) + head + bytes(8)


@pytest.mark.parametrize(
    "data",
    {
        "no photometric interpretation": tiff(of(8, GREY), 8, None),
        "signed": tiff(of(8, GREY), 8, 1, t339=SIGNED),
        "signed, 16 bits": tiff(of(16, GREY), 16, 1, t339=SIGNED),
        "32 bits": tiff(of(32, GREY), 32, 1),
        "floats beyond 1": tiff(floats(GREY * 255), 32, 1, t339=REAL),
        "floats below 0": tiff(floats(GREY - 0.5), 32, 1, t339=REAL),
        "NaN": tiff(floats(np.where(GREY > 0.9, np.nan, GREY)), 32, 1, t339=REAL),
        "infinite": tiff(floats(np.where(GREY > 0.9, np.inf, GREY)), 32, 1, t339=REAL),
        "an empty range": tiff(floats(GREY), 32, 1, t339=REAL, t340=[1.0], t341=[1.0]),
        "a fourth sample": tiff(of(8, RGB, ALPHA), 8, 2),
        "planes of 16 bits": tiff(of(16, RGB), 16, 2, t284=[2], t273=[8] * 3, t279=[2048] * 3),
        "planes of LAB": tiff(of(8, RGB), 8, 8, t284=[2], t273=[8] * 3, t279=[1024] * 3),
        "other inks": tiff(of(8, SHARES), 8, 5, t332=[2]),
        "YCbCr, subsampled": tiff(of(8, RGB), 8, 6),
        "YCbCr of another range": tiff(of(8, RGB), 8, 6, t530=[1, 1], t532=[16, 235, 128, 240, 128, 240]),
        "YCbCr of other coefficients": tiff(of(8, RGB), 8, 6, t530=[1, 1], t529=[0.2126, 0.7152, 0.0722]),
        "a colour map of 8 bits": tiff(of(1, GREY), 1, 3, t320=[0, 255] * 3),
        "BMP, 8 bits for black and white": bmp(8, 0, 40, bytes(4) + b"\xff\xff\xff\0"),
        "BMP, 1 bit of alpha in 16": bmp(16, 3, 108, BMP_MASKS),
    }.values(),
)
def test_what_could_only_be_guessed_is_refused(data: bytes) -> None:
    assert_error(failure(data), 422, "Image not usable")


def profile(space: bytes) -> bytes:
    """A colour profile of this space that would turn everything dark."""
    kinds = {b"GRAY": (b"kTRC",), b"RGB ": (b"rTRC", b"gTRC", b"bTRC")}.get(space, ())
    primaries = ((0.436, 0.222, 0.014), (0.385, 0.717, 0.097), (0.143, 0.061, 0.714))
    xyz = b"XYZ \0\0\0\0"
    tags = [(kind, b"curv\0\0\0\0" + struct.pack(">IHH", 1, 5 * 256, 0)) for kind in kinds]
    tags += [
        (name, xyz + struct.pack(">3i", *(round(v * 65536) for v in values)))
        for name, values in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)
    ] + [(b"wtpt", xyz + struct.pack(">3i", 63190, 65536, 54061))]
    start = 132 + 12 * len(tags)
    table, content = struct.pack(">I", len(tags)), b""
    for name, data in tags:
        table += struct.pack(">4sII", name, start + len(content), len(data))
        content += data
    head = struct.pack(
        ">I4sI4s4s4s12s4s", start + len(content), b"", 0x02400000, b"mntr", space, b"XYZ ", b"", b"acsp"
    )
    return head.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061).ljust(60, b"\0") + table + content


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.mark.parametrize("space", [b"RGB ", b"GRAY", b"CMYK", b"Lab "])
@pytest.mark.parametrize(
    ("kind", "own", "modes"),
    [
        ("JPEG", b"RGB ", ["RGB"]),
        ("PNG", b"RGB ", ["RGB", "RGBA", "P"]),
        ("WEBP", b"RGB ", ["RGB"]),
        ("TIFF", b"RGB ", ["RGB"]),
        ("JPEG", b"GRAY", ["L"]),
        ("PNG", b"GRAY", ["L", "LA", "I;16", "1"]),
        ("JPEG", b"CMYK", ["CMYK"]),
        ("TIFF", None, ["LAB"]),
    ],
)
def test_only_a_profile_of_the_pictures_own_colour_space_counts(
    kind: str, own: bytes | None, modes: list[str], space: bytes
) -> None:
    for mode in modes:
        own_colours = {"I;16": 30_000, "LAB": (120, 0, 0)}
        image = Image.new(mode if mode in own_colours else "RGB", (32, 32), own_colours.get(mode, (120,) * 3))
        image = image if mode in own_colours else image.convert(mode)
        plain = load_image(saved(image, kind), SPEC)
        found = load_image(saved(image, kind, icc_profile=profile(space)), SPEC)
        # Black and white stay what they are; a profile of inks without a table of colours is broken.
        assert (difference(found, plain) > 20) == (space == own and mode not in ("1", "CMYK")), mode


def test_a_grey_picture_that_pillow_opens_as_colours_keeps_its_profile() -> None:
    data = png(of(16, GREY, np.ones_like(GREY)), 16, 4)
    inserted = chunk(b"iCCP", b"grey\0\0" + zlib.compress(profile(b"GRAY")))
    assert difference(load_image(data[:33] + inserted + data[33:], SPEC), load_image(data, SPEC)) > 20


LARGE = Image.fromarray(picture(601, 403))
TURNED = Image.Exif()
TURNED[0x0112] = 6


@pytest.mark.parametrize(
    "data",
    {
        "RGB": saved(LARGE, "JPEG", quality=95),
        "progressive": saved(LARGE, "JPEG", quality=95, progressive=True),
        "turned": saved(LARGE, "JPEG", quality=95, exif=TURNED),
        "grey": saved(LARGE.convert("L"), "JPEG", quality=95),
        "CMYK": saved(LARGE.convert("CMYK"), "JPEG", quality=95),
        "profile": saved(LARGE, "JPEG", quality=95, icc_profile=profile(b"RGB ")),
        "MPO": saved(LARGE, "MPO", quality=95, save_all=True, append_images=[LARGE.rotate(90)]),
    }.values(),
)
def test_a_large_jpeg_is_decoded_at_a_reduced_scale(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(images, "preprocess", lambda *a: sizes.append(a[0].size) or preprocess(*a))
    reduced = load_image(data, SPEC)
    monkeypatch.setattr(preprocessing, "REDUCE_TO", 1000)
    assert difference(reduced, load_image(data, SPEC)) <= 2
    assert sizes == [(301, 202), (601, 403)]


def test_a_long_image_never_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    resize = Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *rest: object, **named: object) -> Image.Image:
        sizes.append(size)
        return resize(self, size, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", watched)
    for shape in ((1, 65_535), (65_535, 1)):
        image_array(Image.new("RGB", shape), SPEC)
    assert sizes == [(32, 32), (32, 32)]


def test_resize_larger_than_crop() -> None:
    spec = SPEC.model_copy(update={"resize": 64})
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    found = image_array(Image.fromarray(pixels), spec)
    assert np.array_equal(found, pixels[16:48, 32:64].transpose(2, 0, 1))


DEFAULT = Limits()


def failure(data: bytes, limits: Limits = DEFAULT) -> ImageError:
    with pytest.raises(ImageError) as error:
        load_image(data, SPEC, limits)
    return error.value


def assert_error(error: ImageError, status: int, title: str) -> None:
    assert (error.status, error.title) == (status, title)


RED = saved(Image.new("RGB", (8, 8), "red"), "PNG")


def test_too_many_pixels_are_refused_by_the_header_and_too_many_bytes_before() -> None:
    def claims(side: int) -> bytes:
        return RED[:8] + chunk(b"IHDR", struct.pack(">II", side, side) + RED[24:29]) + RED[33:]

    assert_error(failure(claims(10_000)), 413, "Image too large")
    assert_error(failure(claims(60_000)), 413, "Image too large")  # beyond Pillow's own cap, too
    assert_error(failure(claims(300)), 422, "Image not decodable")  # the header alone refused the others
    error = failure(saved(Image.new("L", (100, 101)), "PNG"), Limits(max_pixels=10_000))
    assert "10,100" in str(error)
    assert_error(failure(RED, Limits(max_bytes=10)), 413, "Image too large")


@pytest.mark.parametrize(
    ("data", "title"),
    [
        (b"", "Empty image"),
        (b"hello, this is text", "Not an image"),
        (RED[:20], "Image not decodable"),
        (RED[:45], "Image not decodable"),
        (tiff(of(10, GREY), 10, 1), "Image not decodable"),
        (tiff(of(8, SHARES, RGB), 8, 2, t338=[0] * 4), "Image not decodable"),
    ],
)
def test_what_is_no_image(data: bytes, title: str) -> None:
    assert_error(failure(data), 422, title)


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"%PDF-1.7 ...", "PDF"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"P6 1 1 255 abc", "PNM"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0isommp42", "a video"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", "a video"),
        (b"\x1aE\xdf\xa3\x01\0\0\0", "a video"),
        (b"\xff\x0a\xfa\x1f", "JPEG XL"),
        (bytes.fromhex("0000000c4a584c200d0a870a"), "JPEG XL"),
        *((saved(Image.new("RGB", (16, 16)), kind), kind[:4]) for kind in ("ICO", "JPEG2000", "DDS")),
    ],
)
def test_a_format_that_is_not_accepted_is_named(start: bytes, name: str) -> None:
    error = failure(start + bytes(40))
    assert_error(error, 415, "Image format not accepted")
    assert str(error).startswith(name)


AVIF = saved(Image.new("RGB", (40, 32), "red"), "AVIF", quality=100)


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf", "AVIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIF"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIF"),
    ],
)
def test_a_format_that_not_every_pillow_reads(start: bytes, name: str) -> None:
    """Where it is read a broken file is broken; where it is not, it is named."""
    without = Limits(formats=tuple(kind for kind in FORMATS if kind != name))
    for limits, status in ((Limits(formats=(*without.formats, name)), 422), (without, 415)):
        with pytest.raises(ImageError, match=name) as error:
            load_image(start + bytes(40), SPEC, limits)
        assert error.value.status == status


def test_avif_and_heif(tmp_path: Path) -> None:
    image = load_image(AVIF, SPEC)
    assert (image[0] > 240).all()
    assert (image[1:] < 15).all()
    if not DATA:
        pytest.skip("PRG_TEST_DATA is not set, and pi-heif writes no files")
    pytest.importorskip("pi_heif")
    heif = (Path(DATA) / "odd-images" / "pillow" / "avif" / "hopper.heif").read_bytes()
    assert load_image(heif, SPEC).std() > 20


@pytest.mark.parametrize("transfer", [16, 18])
def test_high_dynamic_range_is_not_shown_as_if_it_were_not(transfer: int) -> None:
    colour = AVIF.index(b"colrnclx") + 10
    error = failure(AVIF[:colour] + transfer.to_bytes(2) + AVIF[colour + 2 :])
    assert_error(error, 422, "Image not usable")


@pytest.mark.parametrize(
    ("data", "heavy"),
    [
        (RED, False),
        (saved(LARGE, "JPEG"), False),
        (saved(LARGE, "JPEG", progressive=True), False),
        (saved(Image.new("L", (4000, 3100)), "PNG"), True),
        (saved(Image.new("L", (4000, 3100)), "JPEG"), False),
        (saved(Image.new("L", (4000, 3100)), "JPEG", progressive=True), True),
        (saved(LARGE, "JPEG") + b"\xff\xda" * 60, True),
        (saved(LARGE, "TIFF"), True),
        (AVIF, True),
    ],
)
def test_what_is_heavy(data: bytes, heavy: bool) -> None:
    if heavy:
        with pytest.raises(Heavy):
            load_image(data, SPEC, most=LIGHT)
    else:
        assert (load_image(data, SPEC, most=LIGHT) == load_image(data, SPEC)).all()


@pytest.mark.parametrize(
    ("data", "large", "together"),
    [
        (RED, 8 * 8, True),
        (RED, 8 * 8 - 1, False),
        # What counts is what is decoded: half the width and height, but libjpeg keeps all of a progressive one.
        (saved(LARGE, "JPEG"), 100_000, True),
        (saved(LARGE, "JPEG", progressive=True), 100_000, False),
    ],
)
def test_large_pictures_are_decoded_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch, data: bytes, large: int, together: bool
) -> None:
    both = threading.Barrier(2)
    met = []

    def decode(*arguments: Any) -> Image.Image:
        try:
            both.wait(10 if together else 0.2)
            met.append(True)
        except threading.BrokenBarrierError:
            met.append(False)
        return preprocess(*arguments)

    monkeypatch.setattr(images, "preprocess", decode)
    monkeypatch.setattr(images, "LARGE_PIXELS", large)
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(images.load_image, data, SPEC, Limits()) for _ in range(2)]:
            future.result()
    assert met == [together, together]
