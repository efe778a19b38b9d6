"""Preprocessing v2: upright, sRGB, no alpha, resized and cropped to what the network takes."""

import io

import numpy as np
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngImageFile

from entry.config import ImageSpec
from entry.declarations import Declared, Unreadable, declared

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
SIDEWAYS, FROM_RIGHT, FROM_BOTTOM = {5, 6, 7, 8}, {2, 3, 6, 7}, {3, 4, 7, 8}
"""Orientations that swap width and height; whose upright x counts down what is stored; whose upright y does."""
PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour space -> the Pillow mode in which a profile is applied to it."""
REDUCE_TO = 4
"""Times `resize` that a reduced JPEG has on its shorter side, at least. The result differs by 1 to 5 grey levels at
most from that of the whole picture; with twice `resize` it would be 10 for small sharp ones."""
STRIP_ROWS = 64
SRGB = ImageCms.createProfile("sRGB")
PROBE = Image.fromarray(
    np.stack(np.meshgrid(*[np.linspace(0, 255, 9).astype(np.uint8)] * 3), -1).reshape(27, 27, 3)
)
"""Colours from all of RGB [27, 27, 3]: a profile that leaves them as they are is sRGB, whatever it is called."""


def reduce_scale(picture: Image.Image, spec: ImageSpec) -> tuple[float, float]:
    """Have a large JPEG decoded at 1/2, 1/4 or 1/8 of its size: [W, H] of the whole picture in decoded pixels.

    These are fractions where the last column or row is not of a whole pixel. Other pictures stay as they are.
    """
    enough = REDUCE_TO * spec.resize
    drafted = picture.draft(None, (enough, enough))
    return drafted[1][2:] if drafted else picture.size


def preprocess(
    picture: Image.Image, spec: ImageSpec, extent: tuple[float, float] | None = None
) -> Image.Image:
    """An opened picture -> RGB of size x size. Raises Unreadable for what could only be guessed.

    Numbers are read as the file declares them; colour profile to sRGB; alpha over white; first frame; RGB; EXIF
    upright; shorter side to `resize` (bicubic, antialiased); centre crop `size`. `extent` is of `reduce_scale`.
    """
    # Before loading, which loses what the file said.
    how = declared(picture)
    low_bytes = _low_bytes(picture) if isinstance(how.transparent, tuple) else None
    # TIFF turns itself upright here, and then says orientation 1.
    picture.load()
    turn, whole = orientation(picture), extent or picture.size
    return resize_and_crop(*upright(to_rgb(picture, how, low_bytes), turn, whole), spec)


def orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none or the EXIF block is broken."""
    try:
        value = picture.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # the parser raises whatever a hostile block leads it to; the pixels are still good
        return 1
    return value if isinstance(value, int) else 1


def upright(
    picture: Image.Image, turn: int, extent: tuple[float, float]
) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """The picture as it was meant to be seen; and the box of all that is meant by it, as `extent` says."""
    picture = picture.transpose(UPRIGHT[turn]) if turn in UPRIGHT else picture
    width, height = reversed(extent) if turn in SIDEWAYS else extent
    left = picture.width - width if turn in FROM_RIGHT else 0
    top = picture.height - height if turn in FROM_BOTTOM else 0
    return picture, (left, top, left + width, top + height)


def to_rgb(picture: Image.Image, how: Declared, low_bytes: np.ndarray | None = None) -> Image.Image:
    """A loaded picture -> 8-bit sRGB, transparency over white."""
    colours, alpha = to_8_bits(picture, how, low_bytes)
    rgb = to_srgb(colours, how.space, picture.info.get("icc_profile"))
    if alpha is None:
        return rgb
    white = Image.new("RGB", picture.size, "white")
    white.paste(rgb, mask=alpha)
    return white


def to_8_bits(
    picture: Image.Image, how: Declared, low_bytes: np.ndarray | None = None
) -> tuple[Image.Image, Image.Image | None]:
    """Colours of 8 bits in the file's own colour space; and alpha where there is any."""
    if picture.mode == "F" or picture.mode.startswith("I;16"):
        values = np.asarray(picture)  # [H, W]
        opaque = None if how.transparent is None else _mask(values != how.transparent)
        return Image.fromarray(_scaled(values.byteswap() if how.swapped else values, how)), opaque
    if low_bytes is not None:
        high, low = np.divmod(np.array(how.transparent), 256)
        same = (np.asarray(picture) == high) & (low_bytes == low)  # [H, W, 3]
        return picture, _mask(~same.all(-1))
    if not picture.has_transparency_data:
        return picture, None
    # Pillow knows no way from La to RGBA.
    with_alpha = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
    return with_alpha.convert("L" if how.space == "GRAY" else "RGB"), with_alpha.getchannel("A")


def to_srgb(picture: Image.Image, space: str, profile: bytes | None) -> Image.Image:
    """RGB in sRGB; a profile that is broken, or of another colour space than the file's, is ignored."""
    if profile and space in PROFILE_MODES:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if source.profile.xcolor_space == space:
                return _convert(_in(PROFILE_MODES[space], picture), source)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass
    return (
        _convert(picture, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")))
        if space == "Lab "
        else _in("RGB", picture)
    )


def _convert(picture: Image.Image, source: ImageCms.ImageCmsProfile) -> Image.Image:
    transform = ImageCms.buildTransform(source, SRGB, picture.mode, "RGB")
    if picture.mode == "RGB":
        probed = np.asarray(ImageCms.applyTransform(PROBE, transform)).astype(int)
        if np.abs(probed - np.asarray(PROBE)).max() <= 1:
            return picture
    converted = ImageCms.applyTransform(picture, transform)
    # None is for conversions in place.
    assert converted is not None
    return converted


def _in(mode: str, picture: Image.Image) -> Image.Image:
    # Image.convert copies a picture that is in this mode already.
    return picture if picture.mode == mode else picture.convert(mode)


def resize_and_crop(
    picture: Image.Image, whole: tuple[float, float, float, float], spec: ImageSpec
) -> Image.Image:
    """Shorter side of the box to `resize`, then its centre `size` x `size`.

    Both in one resampling of the part that the crop needs: the same pixels as one after the other, but a
    picture of 1 x 65,535 does not grow to 32 x 2,097,120 on the way.
    """
    left, top, right, bottom = whole
    width, height, shorter = right - left, bottom - top, min(right - left, bottom - top)
    wide, high = round(width * spec.resize / shorter), round(height * spec.resize / shorter)
    x, y = (wide - spec.size) // 2, (high - spec.size) // 2
    if (wide, high) == picture.size:
        return picture.crop((x, y, x + spec.size, y + spec.size))
    # Source pixels for one of the result.
    across, down = width / wide, height / high
    box = (
        left + x * across,
        top + y * down,
        min(left + (x + spec.size) * across, right),
        min(top + (y + spec.size) * down, bottom),
    )
    return picture.resize((spec.size, spec.size), Image.Resampling.BICUBIC, box=box)


def _scaled(values: np.ndarray, how: Declared) -> np.ndarray:
    """Numbers [H, W] between black and white -> uint8 [H, W].

    In strips, because the wide numbers in between would take eight times a large picture's memory.
    """
    low, high = sorted((how.black, how.white))
    half_a_level = (high - low) / 510
    strips = [values[top : top + STRIP_ROWS] for top in range(0, len(values), STRIP_ROWS)]
    inside = sum(np.count_nonzero((s >= low - half_a_level) & (s <= high + half_a_level)) for s in strips)
    if inside < values.size:
        raise Unreadable(
            f"{values.size - inside:,} of {values.size:,} pixels are NaN, infinite or outside [{low:g}, {high:g}]"
        )
    converted = np.empty(values.shape, np.uint8)
    for i, strip in enumerate(strips):
        share = (strip.astype(np.float64) - how.black) / (how.white - how.black)
        converted[i * STRIP_ROWS : (i + 1) * STRIP_ROWS] = (share * 255).round().clip(0, 255)
    return converted


def _low_bytes(picture: Image.Image) -> np.ndarray:
    """The lower bytes [H, W, 3] of a PNG of 3 x 16 bits, which Pillow drops: they tell what is transparent."""
    assert isinstance(picture, PngImageFile)
    assert picture.fp is not None
    at = picture.fp.tell()
    picture.fp.seek(0)
    again = Image.open(io.BytesIO(picture.fp.read()), formats=("PNG",))
    picture.fp.seek(at)
    # The file has the high byte first. To read it as low byte first is to get the other one.
    again.tile = [tile._replace(args="RGB;16L") for tile in again.tile]
    return np.asarray(again)


def _mask(shown: np.ndarray) -> Image.Image:
    return Image.fromarray(shown.astype(np.uint8) * np.uint8(255))
