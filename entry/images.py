"""Bytes of an image to uint8 [3, S, S]: every limit before decoding, then decoding."""

import io
import threading
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from entry.config import ImageSpec
from entry.preprocessing import NotFinite, preprocess

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""The formats that are parsed at all. Few and well-trodden, because parsers of exotic formats are where the
holes are."""
OTHERS = {
    b"%PDF": "PDF",
    b"8BPS": "Photoshop",
    b"\x00\x00\x01\x00": "ICO",
    b"\x00\x00\x00\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"v/1\x01": "OpenEXR",
    b"#?RADIANCE": "Radiance HDR",
    b"qoif": "QOI",
    b"DDS ": "DDS",
    b"farbfeld": "farbfeld",
    b"<svg": "SVG",
    b"<?xml": "SVG or other XML",
    **{b"P%d" % number: "PNM" for number in range(1, 8)},
}
"""How files of some formats begin that are images, but not accepted."""


LARGE_PIXELS = 12_000_000
"""Of pictures larger than this one is decoded at a time, whatever the number of threads: each can take hundreds
of megabytes for a moment."""
_large = threading.Lock()


class ImageError(ValueError):
    """An image that can't be used: an HTTP status, a short title and what to do."""

    def __init__(self, status: int, title: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.title = title


@dataclass(frozen=True)
class Limits:
    """What one image may be."""

    max_bytes: int = 20 << 20
    max_pixels: int = 50_000_000


def load_image(data: bytes, spec: ImageSpec, limits: Limits = Limits()) -> np.ndarray:
    """Decode and preprocess one image file: uint8 [3, S, S].

    Raises ImageError: 413 over the byte or pixel cap (known from the header, before a pixel is decoded), 415
    for a format that is not accepted, 422 for what can't be decoded or has pixels that are no numbers.
    """
    if not data:
        raise ImageError(422, "Empty image", "the image is empty (0 bytes)")
    if len(data) > limits.max_bytes:
        raise ImageError(
            413,
            "Image too large",
            f"the image has {len(data):,} bytes, at most {limits.max_bytes:,} are taken",
        )
    with _open(data, limits) as picture:
        pixels = picture.width * picture.height
        if pixels > limits.max_pixels:
            raise ImageError(
                413,
                "Image too large",
                f"the image has {picture.width} x {picture.height} = {pixels:,} pixels, "
                f"at most {limits.max_pixels:,} are taken",
            )
        try:
            with _large if pixels > LARGE_PIXELS else nullcontext():
                return image_array(picture, spec)
        except NotFinite as error:
            raise ImageError(
                422, "Image not usable", f"{error}; give them values, in [0, 1] or in [0, 255]"
            ) from None
        except Exception as error:  # decoders raise nearly anything on hostile files; nothing else runs here
            raise ImageError(
                422,
                "Image not decodable",
                f"the {picture.format} file is broken or truncated ({_line(error)})",
            ) from None


def image_array(picture: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Preprocess an opened picture: uint8 [3, S, S]."""
    return np.ascontiguousarray(np.asarray(preprocess(picture, spec)).transpose(2, 0, 1))


def _open(data: bytes, limits: Limits) -> Image.Image:
    """Read the header. Pillow's own cap on pixels stays as it is, and is answered like ours."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(
            413,
            "Image too large",
            f"the image has far more than the {limits.max_pixels:,} pixels that are taken",
        ) from None
    except UnidentifiedImageError:
        accepted = ", ".join(FORMATS)
        for start, name in OTHERS.items():
            if data.startswith(start) or (start == b"<svg" and b"<svg" in data[:256]):
                raise ImageError(
                    415, "Image format not accepted", f"{name} is not accepted; send {accepted}"
                ) from None
        if data[4:8] == b"ftyp":
            raise ImageError(
                415, "Image format not accepted", f"HEIF, AVIF and video are not accepted; send {accepted}"
            ) from None
        raise ImageError(
            422, "Not an image", f"the bytes are no image, or are broken at the start; accepted: {accepted}"
        ) from None
    except Exception as error:  # a header can make a parser raise nearly anything, too
        raise ImageError(422, "Image not decodable", f"the header is broken ({_line(error)})") from None


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
