"""Preprocessing by id: upright, sRGB, no alpha, resized and cropped to what the network takes."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms

from entry.config import ImageSpec

ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour space of an ICC profile -> the Pillow mode it describes."""
STRIP_ROWS = 64
SRGB = ImageCms.createProfile("sRGB")


class NotFinite(ValueError):
    """Pixels of floats that are no numbers."""


def preprocess(picture: Image.Image, spec: ImageSpec) -> Image.Image:
    """An opened picture of any mode -> RGB of size x size, by the preprocessing that `spec` names."""
    return PREPROCESSINGS[spec.preprocessing](picture, spec)


def preprocess_v1(picture: Image.Image, spec: ImageSpec) -> Image.Image:
    """EXIF upright; colour profile to sRGB; 16 bits to 8; alpha over white; first frame; RGB; shorter side to
    `resize` (bicubic, antialiased); centre crop `size`."""
    picture.load()  # TIFF turns itself upright here, and then says orientation 1
    return resize_and_crop(upright(to_rgb(picture), orientation(picture)), spec.resize, spec.size)


PREPROCESSINGS: dict[str, Callable[[Image.Image, ImageSpec], Image.Image]] = {"v1": preprocess_v1}


def orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none or the EXIF block is broken."""
    try:
        value = picture.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # the parser raises whatever a hostile block leads it to; the pixels are still good
        return 1
    return value if isinstance(value, int) else 1


def upright(picture: Image.Image, exif_orientation: int) -> Image.Image:
    """The picture as it was meant to be seen."""
    turn = UPRIGHT.get(exif_orientation)
    return picture if turn is None else picture.transpose(turn)


def to_rgb(picture: Image.Image) -> Image.Image:
    """8-bit sRGB, transparency over white."""
    picture = to_8_bits(picture)
    if not picture.has_transparency_data:
        return to_srgb(picture, picture.info.get("icc_profile"))
    with_alpha = picture if picture.mode == "RGBA" else picture.convert("RGBA")
    colours = to_srgb(with_alpha.convert("RGB"), picture.info.get("icc_profile"))
    white = Image.new("RGB", picture.size, "white")
    white.paste(colours, mask=with_alpha.getchannel("A"))
    return white


def to_8_bits(picture: Image.Image) -> Image.Image:
    """Greyscale of 16 or 32 bits scaled to 8; any other mode as it is.

    Integers are taken to fill 16 bits, which is what files of these modes hold; floats to lie in [0, 1], or
    in [0, 255] if one is above 1. Raises NotFinite where a float is no number: whatever stood in for it
    would be looked at like the picture.
    """
    if picture.mode.startswith("I"):
        return _grey(np.asarray(picture), lambda v: (v.astype(np.int64).clip(0, 65535) + 128) // 257, picture)
    if picture.mode == "F":
        reals = np.asarray(picture)
        strange = reals.size - np.count_nonzero(np.isfinite(reals))
        if strange:
            raise NotFinite(f"{strange:,} of {reals.size:,} pixels are NaN or infinite")
        scale = 255 if reals.max(initial=0) <= 1 else 1
        return _grey(reals, lambda v: (v * scale).clip(0, 255).round(), picture)
    return picture


def to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB in sRGB; a profile that is broken, or made for another kind of picture, is passed over."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            described = PROFILE_MODES[source.profile.xcolor_space]
            if ImageCms.getProfileDescription(source).startswith("sRGB") and described == "RGB":
                return _rgb(picture)
            converted = ImageCms.profileToProfile(picture.convert(described), source, SRGB, outputMode="RGB")
            assert converted is not None  # None is for conversions in place
            return converted
        except (ImageCms.PyCMSError, OSError, KeyError, ValueError, TypeError):
            pass
    if picture.mode == "LAB":
        converted = ImageCms.profileToProfile(picture, ImageCms.createProfile("LAB"), SRGB, outputMode="RGB")
        assert converted is not None
        return converted
    return _rgb(picture)


def _rgb(picture: Image.Image) -> Image.Image:
    return picture if picture.mode == "RGB" else picture.convert("RGB")  # convert would copy it even so


def resize_and_crop(picture: Image.Image, resize: int, size: int) -> Image.Image:
    """Shorter side to `resize`, then the centre `size` x `size`.

    Both in one resampling of the part that the crop needs: the same pixels as one after the other, but a
    picture of 1 x 65,535 does not grow to 32 x 2,097,120 on the way.
    """
    width, height = picture.size
    shorter = min(width, height)
    wide, high = round(width * resize / shorter), round(height * resize / shorter)
    left, top = (wide - size) // 2, (high - size) // 2
    if (wide, high) == (width, height):
        return picture.crop((left, top, left + size, top + size))
    x, y = width / wide, height / high
    box = (left * x, top * y, min((left + size) * x, width), min((top + size) * y, height))
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _grey(
    values: np.ndarray, to_8_bits: Callable[[np.ndarray], np.ndarray], picture: Image.Image
) -> Image.Image:
    """Converted in strips, because the wide numbers in between would take eight times a large picture's memory."""
    converted = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), STRIP_ROWS):
        converted[top : top + STRIP_ROWS] = to_8_bits(values[top : top + STRIP_ROWS])
    grey = Image.fromarray(converted)
    if "icc_profile" in picture.info:
        grey.info["icc_profile"] = picture.info["icc_profile"]
    return grey
