"""Bytes of an image to uint8 [3, S, S]: the accepted formats, every limit before decoding, then decoding."""

import io
import re
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from entry.config import ImageSpec
from entry.declarations import Unreadable, require_standard_range
from entry.errors import ImageError as ImageError
from entry.preprocessing import preprocess, reduce_scale

FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""The formats that are parsed at all, as Pillow names them. Few, because parsers of exotic formats are where the
holes are. Which files of a folder are images at all, prg.images.walk says."""
try:
    from pi_heif import register_heif_opener
except ImportError:
    pass
else:
    register_heif_opener()
    FORMATS += ("HEIF",)
DECLINED = (
    (rb"%PDF", "PDF"),
    (rb"8BPS", "Photoshop"),
    (rb"\x00\x00\x01\x00", "ICO"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000"),
    (rb"\0\0\0\x0cJXL \r\n\x87\n|\xff\x0a", "JPEG XL"),
    (rb"v/1\x01", "OpenEXR"),
    (rb"#\?RADIANCE", "Radiance HDR"),
    (rb"qoif", "QOI"),
    (rb"DDS ", "DDS"),
    (rb"farbfeld", "farbfeld"),
    (rb".{0,250}<svg", "SVG"),
    (rb"<\?xml", "SVG or other XML"),
    (rb"P[1-7]", "PNM"),
    (rb"....ftypcrx ", "Canon raw"),
    (rb"....(ftyp|moov|mdat|wide)|\x1aE\xdf\xa3|RIFF....AVI ", "a video"),
)
"""How files begin that are known, but not accepted -> what they are. The first that fits."""
CONVERT = {
    "HEIF": "convert it, as with `heif-convert photo.heic photo.jpg`, or pip install 'prg-service[heif]' there",
    "JPEG XL": "convert it, as with `djxl photo.jxl photo.png`",
    "a video": "take a picture out of it, as with `ffmpeg -i video.mp4 -frames:v 1 picture.png`",
}
STARTS = {b"\xff\xd8": "JPEG", b"\x89PNG": "PNG", b"RIFF": "WEBP", b"GIF8": "GIF", b"BM": "BMP"}
STARTS |= dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "TIFF")
"""How files of the accepted formats begin."""
BOXED = (
    (rb"....ftyp(....){0,16}avi[fs]", "AVIF"),
    (rb"....ftyp(....){0,16}(hei[cxms]|hev[cxms]|mif1|msf1)", "HEIF"),
)
"""The same of those that not every Pillow reads."""
LARGE_PIXELS = 12_000_000
"""Of pictures larger than this one is decoded at a time, whatever the number of threads: each can take hundreds
of megabytes for a moment."""
COMPLEX = ("AVIF", "HEIF", "TIFF")
"""Formats with large decoders, in which holes are found year by year."""
_large = threading.Lock()


class Effort(NamedTuple):
    """How large a picture is to a decoder."""

    pixels: int
    """That are decoded: of a JPEG at the scale it is read at."""
    scans: int
    """Of a JPEG; the usual progressive one has ten. A decoder goes over the whole picture for each."""


LIGHT = Effort(LARGE_PIXELS, 50)


@dataclass(frozen=True)
class Limits:
    """What one image may be."""

    max_bytes: int = 20 << 20
    max_pixels: int = 50_000_000
    formats: tuple[str, ...] = FORMATS


class Heavy(Exception):
    """An image that takes more than the effort asked for, or is of a complex format."""


def load_image(
    data: bytes, spec: ImageSpec, limits: Limits = Limits(), most: Effort | None = None
) -> np.ndarray:
    """Decode and preprocess one image file: uint8 [3, S, S].

    most: raise Heavy before decoding what takes more.

    Raises ImageError: 413 over the byte or pixel cap (known from the header, before a pixel is decoded), 415 for a
    format that is not accepted, 422 for what can't be decoded, or only by guessing what its numbers mean.
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
        scans = data.count(b"\xff\xda") if picture.format in ("JPEG", "MPO") else 1
        if most and (picture.format in COMPLEX or scans > most.scans):
            raise Heavy
        try:
            if picture.format in ("AVIF", "HEIF"):
                require_standard_range(data)
            return image_array(picture, spec, most)
        except Heavy:
            raise
        except Unreadable as error:
            raise ImageError(
                422, "Image not usable", f"{error}; save it with 8 bits a sample, as RGB or grey"
            ) from None
        except MemoryError:
            raise ImageError(422, "Image not decodable", "decoding it takes too much memory") from None
        except Exception as error:  # decoders raise nearly anything on hostile files; nothing else runs here
            raise ImageError(
                422,
                "Image not decodable",
                f"the {picture.format} file is broken or truncated ({_line(error)})",
            ) from None


def image_array(picture: Image.Image, spec: ImageSpec, most: Effort | None = None) -> np.ndarray:
    """Preprocess an opened picture: uint8 [3, S, S]. Raises Heavy where it has more pixels than `most`."""
    # libjpeg keeps a progressive picture whole, whatever the scale.
    whole = picture.width * picture.height if "progressive" in picture.info else 0
    extent = reduce_scale(picture, spec)
    pixels = max(whole, picture.width * picture.height)
    if most and pixels > most.pixels:
        raise Heavy
    with _large if pixels > LARGE_PIXELS else nullcontext():
        picture = preprocess(picture, spec, extent)
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def _open(data: bytes, limits: Limits) -> Image.Image:
    """Read the header. Pillow's own cap on pixels stays as it is, and is answered like ours."""
    try:
        return Image.open(io.BytesIO(data), formats=limits.formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(
            413,
            "Image too large",
            f"the image has far more than the {limits.max_pixels:,} pixels that are taken",
        ) from None
    except UnidentifiedImageError:
        raise _unidentified(data, limits.formats) from None
    except Exception as error:  # a header can make a parser raise nearly anything, too
        raise ImageError(422, "Image not decodable", f"the header is broken ({_line(error)})") from None


def _unidentified(data: bytes, formats: tuple[str, ...]) -> ImageError:
    accepted = ", ".join(formats)
    # The first alone: an AVIF file is one by the rules of HEIF too.
    boxed = [name for start, name in BOXED if re.match(start, data, re.DOTALL)][:1]
    declined = boxed or [name for start, name in DECLINED if re.match(start, data, re.DOTALL)]
    for name in declined:
        if name not in formats:
            advice = f"; {CONVERT[name]}" if name in CONVERT else ""
            return ImageError(
                415, "Image format not accepted", f"{name} is not accepted; send {accepted}{advice}"
            )
    for name in boxed or [name for beginning, name in STARTS.items() if data.startswith(beginning)]:
        return ImageError(
            422,
            "Image not decodable",
            f"the {name} file is broken at the start, or of a kind that is not read; "
            "save it with 8 bits a sample, as RGB or grey",
        )
    return ImageError(
        422, "Not an image", f"the bytes are no image, or are broken at the start; accepted: {accepted}"
    )


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
