"""What a file declares about its numbers, read from its header before a pixel is decoded."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from PIL import TiffImagePlugin as Tiff
from PIL.BmpImagePlugin import BmpImageFile
from PIL.PngImagePlugin import PngImageFile

SPACES = {
    **dict.fromkeys(("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "F"), "GRAY"),
    **dict.fromkeys(("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr"), "RGB "),
    "CMYK": "CMYK",
    "LAB": "Lab ",
}
"""Pillow's mode -> the colour space, as an ICC profile spells it."""
WHITE = {"I;16": 65535, "I;16B": 65535, "I;16L": 65535, "F": 1}
"""Pillow's mode -> the number that is white, where the file says no other."""

WHITE_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 0, 2, 3, 5, 6
INK_SET, YCBCR_COEFFICIENTS = 332, 529
MAX_SAMPLE, S_MIN_SAMPLE, S_MAX_SAMPLE = 281, 340, 341
UNSIGNED, SIGNED = 1, 2

Tags = Tiff.ImageFileDirectory_v2


class Unreadable(ValueError):
    """Numbers that could be read only by guessing what they mean."""


@dataclass(frozen=True)
class Declared:
    """How the numbers of one picture are to be read."""

    space: str
    """The colour space of the file itself, whatever its pixels are converted to later."""
    black: float = 0
    white: float = 255
    """The numbers that are black and white, where the samples are grey and wider than 8 bits."""
    swapped: bool = False
    """The bytes of each number come in the wrong order."""
    transparent: int | tuple[int, int, int] | None = None
    """The number or colour that is transparent, in the depth of the file."""


def declared(picture: Image.Image) -> Declared:
    """What an opened picture that is not yet loaded declares. Raises Unreadable."""
    how = Declared(SPACES.get(picture.mode, ""), white=WHITE.get(picture.mode, 255))
    if isinstance(picture, Tiff.TiffImageFile):
        return _of_tiff(picture, how)
    if picture.mode not in SPACES:
        raise Unreadable(f"black and white of mode {picture.mode} are not known")
    if isinstance(picture, PngImageFile):
        return _of_png(picture, how)
    if isinstance(picture, BmpImageFile):
        _check_bmp(picture)
    return how


def require_standard_range(data: bytes) -> None:
    """Of an AVIF or HEIF file. Raises Unreadable where its numbers are of high dynamic range, as its `colr` box says.

    Shown as if they were not, they would be another picture (ITU-T H.273: 16 is PQ, 18 is HLG).
    """
    box = data.find(b"colrnclx")
    if box >= 0 and int.from_bytes(data[box + 10 : box + 12]) in (16, 18):
        raise Unreadable("the picture is of high dynamic range (PQ or HLG)")


def _depth(tags: Tags) -> int:
    return int(max(tags.get(Tiff.BITSPERSAMPLE, (1,))))


def _planes(tags: Tags) -> bool:
    return (tags.get(Tiff.PLANAR_CONFIGURATION), tags.get(Tiff.SAMPLESPERPIXEL, 1) > 1) == (2, True)


def _raw(tags: Tags) -> bool:
    return bool(tags.get(Tiff.COMPRESSION, 1) == 1)


# Pillow opens all of these, and shows another picture than the file's.
MISREAD: dict[str, Callable[[Tags, Any], bool]] = {
    "does not say whether 0 is black (PhotometricInterpretation)": lambda t, photo: photo is None,
    "has signed integers, whose black and white are not declared": lambda t, photo: (
        SIGNED in t.get(Tiff.SAMPLEFORMAT, ())
    ),
    "has integers of 32 bits, whose black and white are not declared": lambda t, photo: (
        _depth(t) == 32 and t.get(Tiff.SAMPLEFORMAT, (UNSIGNED,))[0] == UNSIGNED
    ),
    "has a fourth sample of undeclared meaning (ExtraSamples)": lambda t, photo: (
        photo == RGB
        and t.get(Tiff.SAMPLESPERPIXEL, 1) > 3
        and t.get(Tiff.EXTRASAMPLES, (None,))[0] not in (0, 1, 2)
    ),
    "has planes of a kind that is not read": lambda t, photo: (
        _planes(t)
        and (photo not in (RGB, CMYK) or (_raw(t) and (_depth(t) > 8 or t.get(Tiff.FILLORDER, 1) != 1)))
    ),
    "has inks that are not CMYK (InkSet)": lambda t, photo: photo == CMYK and t.get(INK_SET, 1) != 1,
    "has subsampled YCbCr without compression": lambda t, photo: (
        photo == YCBCR and _raw(t) and t.get(Tiff.YCBCRSUBSAMPLING, (2, 2)) != (1, 1)
    ),
    "has YCbCr of unusual coefficients or range": lambda t, photo: (
        photo == YCBCR
        and _raw(t)
        and (
            [round(float(c), 3) for c in t.get(YCBCR_COEFFICIENTS, (0.299, 0.587, 0.114))]
            != [0.299, 0.587, 0.114]
            or [float(r) for r in t.get(Tiff.REFERENCEBLACKWHITE, (0, 255, 128, 255, 128, 255))]
            != [0, 255, 128, 255, 128, 255]
        )
    ),
    "has a colour map of 8 bits where 16 are declared": lambda t, photo: (
        photo == PALETTE and 0 < max(t.get(Tiff.COLORMAP, (0,))) < 256
    ),
}
"""What is wrong with a TIFF -> whether these tags, of this PhotometricInterpretation, have it."""


def _of_tiff(picture: Tiff.TiffImageFile, how: Declared) -> Declared:
    tags = picture.tag_v2
    photometric = tags.get(Tiff.PHOTOMETRIC_INTERPRETATION)
    for fault, has in MISREAD.items():
        if has(tags, photometric):
            raise Unreadable(f"the TIFF {fault}")
    if picture.mode not in WHITE:
        return how
    black, white = how.black, how.white
    if picture.mode != "F":
        # By the standard MaxSampleValue is a mere statistic, but cameras of 10, 12 or 14 bits in 16 say so with it.
        most = tags.get(MAX_SAMPLE, (0,))[0]
        white = most if most > 255 and most & (most + 1) == 0 else 2 ** _depth(tags) - 1
    black, white = (
        float(tags.get(tag, (v,))[0]) for tag, v in ((S_MIN_SAMPLE, black), (S_MAX_SAMPLE, white))
    )
    if not -float("inf") < black < white < float("inf"):
        raise Unreadable(f"the TIFF declares numbers from {black:g} to {white:g}")
    if photometric == WHITE_IS_ZERO:
        black, white = white, black
    # libtiff turns numbers into the machine's own order, and Pillow then reads floats as big-endian all the same.
    swapped = picture.mode == "F" and tags.prefix == b"MM" and not _raw(tags)
    return replace(how, black=black, white=white, swapped=swapped)


def _of_png(picture: PngImageFile, how: Declared) -> Declared:
    stored = picture.tile[0].args if picture.tile else ""
    transparent = picture.info.get("transparency")
    if stored == "LA;16B":
        # Pillow makes RGBA of it.
        return replace(how, space="GRAY")
    if stored in ("I;16B", "RGB;16B"):
        return replace(how, transparent=transparent)
    if stored in ("L;2", "L;4") and transparent is not None:
        # Pillow stretches the pixels to 8 bits, but not the one that is transparent.
        picture.info["transparency"] = transparent * {"L;2": 85, "L;4": 17}[stored]
    return how


def _check_bmp(picture: BmpImageFile) -> None:
    assert picture.fp is not None
    picture.fp.seek(0)
    header = picture.fp.read(70)
    # Not for headers of 12 bytes: of these nothing below is true.
    size, bits, compression, alpha = (
        int.from_bytes(header[start:end], "little") for start, end in ((14, 18), (28, 30), (30, 34), (66, 70))
    )
    if picture.mode == "1" and size > 12 and bits != 1 and compression == 0:
        raise Unreadable(f"the BMP has {bits} bits for black and white")
    if picture.mode == "RGB" and size >= 56 and compression == 3 and alpha:
        raise Unreadable("the BMP has transparency in a pixel layout that is not read")
