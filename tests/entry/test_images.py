"""Bytes to pixels: golden vectors, and every limit before decoding."""

import io
import json
import os
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from entry import images
from entry.config import ImageSpec
from entry.images import FORMATS, ImageError, Limits, image_array, load_image
from tests.tiny import png

GOLDEN = Path(__file__).parents[1] / "golden" / "preprocessing"
SPEC = ImageSpec(size=32, resize=32, preprocessing="v1", mean=(0.5,) * 3, std=(0.5,) * 3)
DATA = os.environ.get("PRG_TEST_DATA")


@pytest.mark.parametrize("name", sorted(np.load(GOLDEN / "expected.npz").files))
def test_golden_vectors(name: str) -> None:
    expected = np.load(GOLDEN / "expected.npz")[name]
    found = load_image((GOLDEN / name).read_bytes(), SPEC)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("size", [(1, 65_535), (65_535, 1), (1, 1), (2, 31), (33, 32)])
@pytest.mark.parametrize(
    "mode", ["RGB", "L", "RGBA", "P", "1", "I;16", "LA", "CMYK", "YCbCr", "LAB", "F", "I"]
)
def test_any_shape_and_mode(size: tuple[int, int], mode: str) -> None:
    assert image_array(Image.new(mode, size), SPEC).shape == (3, 32, 32)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_tiff_of_floats_that_are_no_numbers_is_refused(value: float) -> None:
    pixels = np.linspace(0, 1, 40 * 40, dtype=np.float32).reshape(40, 40)

    def tiff() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "TIFF")
        return buffer.getvalue()

    assert np.ptp(load_image(tiff(), SPEC)) > 200
    pixels[3, 4] = value
    with pytest.raises(ImageError, match="1 of 1,600 pixels are NaN or infinite") as refused:
        load_image(tiff(), SPEC)
    assert refused.value.status == 422


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


def header_only_png(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_too_many_pixels_are_refused_by_the_header() -> None:
    assert failure(header_only_png(10_000, 10_000)).status == 413
    assert failure(header_only_png(60_000, 60_000)).status == 413  # beyond Pillow's own cap, too
    assert failure(header_only_png(300, 300)).status == 422  # so the header alone was what refused the others
    assert "100 x 101 = 10,100 pixels" in str(failure(png(size=(100, 101)), Limits(max_pixels=10_000)))


def test_too_many_bytes() -> None:
    error = failure(png(), Limits(max_bytes=10))
    assert error.status == 413
    assert "at most 10" in str(error)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", 422),
        (b"hello, this is text", 422),
        (png()[:60], 422),
        (png()[:20], 422),
        (b"%PDF-1.7 ...", 415),
        (b"\x00\x00\x00\x20ftypavif" + bytes(40), 415),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 415),
        (b"P6 1 1 255 abc", 415),
    ],
)
def test_what_is_no_image(data: bytes, status: int) -> None:
    assert failure(data).status == status


def test_a_format_that_pillow_knows_and_we_do_not_take() -> None:
    for kind in ("ICO", "JPEG2000", "PPM", "DDS"):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16)).save(buffer, kind)
        assert failure(buffer.getvalue()).status == 415, kind


@pytest.mark.skipif(not DATA, reason="PRG_TEST_DATA is not set")
def test_odd_images(capfd: pytest.CaptureFixture[str]) -> None:
    """Every odd file is an array or an ImageError, and mostly what its maker says."""
    folder = Path(DATA or "") / "odd-images"
    rows = [json.loads(line) for line in (folder / "MANIFEST.jsonl").read_text().splitlines()]
    differing = []
    for row in rows:
        status = outcome((folder / row["path"]).read_bytes())
        pillow = row["pillow13"]
        if pillow.get("format") in FORMATS and (status == 200) != (pillow["outcome"] == "ok"):
            differing.append(row["path"])
    capfd.readouterr()  # libtiff writes its warnings straight to the terminal
    assert len(rows) > 600
    assert len(differing) <= 2, differing


def outcome(data: bytes) -> int:
    try:
        found = load_image(data, SPEC)
    except ImageError as error:
        return error.status
    return 200 if found.shape == (3, 32, 32) else 500


@pytest.mark.parametrize(("large", "together"), [(8 * 8, True), (8 * 8 - 1, False)])
def test_large_pictures_are_decoded_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch, large: int, together: bool
) -> None:
    both = threading.Barrier(2)
    met = []

    def decode(picture: Image.Image, spec: ImageSpec) -> np.ndarray:
        try:
            both.wait(10 if together else 0.2)
            met.append(True)
        except threading.BrokenBarrierError:
            met.append(False)
        return image_array(picture, spec)

    monkeypatch.setattr(images, "image_array", decode)
    monkeypatch.setattr(images, "LARGE_PIXELS", large)
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(images.load_image, data.getvalue(), SPEC, Limits()) for _ in range(2)]:
            future.result()
    assert met == [together, together]
