"""Make the golden vectors of preprocessing v2: image files, and what must come of them.

What must come is computed here step by step, by numpy where that is exact, and shares no code with the package.
Run in this folder: python make.py
"""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

HERE = Path(__file__).parent
SIZE = 32


def picture(width: int, height: int, channels: int = 3) -> np.ndarray:
    """A smooth picture without symmetry, so that any wrong turn or crop shows: uint8 [H, W, C]."""
    y, x = np.mgrid[0:height, 0:width]
    u, v = x / max(width - 1, 1), y / max(height - 1, 1)
    waves = [u, v, u * v, 0.5 + 0.5 * np.sin(5 * u + 3 * v)][:channels]
    return np.stack([(20 + 215 * w).round() for w in waves], -1).astype(np.uint8)


def stepwise(rgb: np.ndarray) -> np.ndarray:
    """Shorter side to SIZE, then the centre: uint8 [3, SIZE, SIZE]."""
    height, width = rgb.shape[:2]
    scale = SIZE / min(width, height)
    target = (round(width * scale), round(height * scale))
    resized = Image.fromarray(rgb)
    if target != (width, height):
        resized = resized.resize(target, Image.Resampling.BICUBIC)
    left, top = (target[0] - SIZE) // 2, (target[1] - SIZE) // 2
    return np.asarray(resized.crop((left, top, left + SIZE, top + SIZE))).transpose(2, 0, 1)


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}
"""EXIF orientation -> what a viewer does to the stored pixels."""


def packed(values: np.ndarray, bits: int, order: str = ">") -> bytes:
    """Numbers [H, W, C] of so many bits, each row from a byte of its own."""
    if values.dtype.kind == "f" or bits in (8, 16, 32):
        kind = "f" if values.dtype.kind == "f" else "u"
        return values.astype(f"{order}{kind}{bits // 8}").tobytes()
    ones = values[..., None].astype(int) >> np.arange(bits)[::-1] & 1
    return np.packbits(ones.reshape(len(values), -1).astype(np.uint8), axis=1).tobytes()


def tiff(
    values: np.ndarray,
    bits: int,
    photometric: int | None,
    order: str = "<",
    deflate: bool = False,
    **more: object,
) -> bytes:
    """A TIFF of numbers [H, W, C], with more tags as `t338=[1]`."""
    height, width, channels = values.shape
    data = packed(values, bits, order)
    data = zlib.compress(data) if deflate else data
    tags = {256: [width], 257: [height], 258: [bits] * channels, 259: [8 if deflate else 1], 273: [8]}
    tags |= {277: [channels], 278: [height], 279: [len(data)]} | (
        {} if photometric is None else {262: [photometric]}
    )
    tags |= {int(name[1:]): numbers for name, numbers in more.items()}
    directory, beyond = b"", b""
    start = 8 + len(data) + 2 + 12 * len(tags) + 4
    for tag, numbers in sorted(tags.items()):
        real = isinstance(numbers[0], float)
        content = struct.pack(f"{order}{len(numbers)}{'d' if real else 'I'}", *numbers)
        directory += struct.pack(f"{order}HHI", tag, 12 if real else 4, len(numbers))
        if len(content) <= 4:
            directory += content
        else:
            directory += struct.pack(f"{order}I", start + len(beyond))
            beyond += content
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(tags)) + directory + bytes(4) + beyond


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: np.ndarray, bits: int, colour_type: int, transparent: bytes = b"") -> bytes:
    """A PNG of numbers [H, W, C]; `transparent` is its tRNS chunk."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + packed(row[None], bits) for row in values)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
        + (chunk(b"tRNS", transparent) if transparent else b"")
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def save(name: str, image: Image.Image, **options: object) -> None:
    image.save(HERE / name, **options)


def main() -> None:
    expected: dict[str, np.ndarray] = {}
    stored = picture(48, 40)
    for orientation, turn in TURNS.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        name = f"orientation-{orientation}.png"
        save(name, Image.fromarray(stored), exif=exif)
        expected[name] = stepwise(np.ascontiguousarray(turn(stored)))

    exif = Image.Exif()
    exif[0x0112] = 6
    save("orientation-6.jpg", Image.fromarray(stored), exif=exif, quality=95)
    decoded = np.asarray(Image.open(HERE / "orientation-6.jpg"))
    expected["orientation-6.jpg"] = stepwise(np.ascontiguousarray(TURNS[6](decoded)))

    square = picture(SIZE, SIZE)
    save("untouched.png", Image.fromarray(square))
    expected["untouched.png"] = square.transpose(2, 0, 1)

    rgba = picture(SIZE, SIZE, 4)
    save("alpha.png", Image.fromarray(rgba))
    share = rgba[..., 3:].astype(np.float64) / 255
    expected["alpha.png"] = (
        (rgba[..., :3] * share + 255 * (1 - share)).round().astype(np.uint8).transpose(2, 0, 1)
    )

    grey = square[..., 0]
    save("grey.png", Image.fromarray(grey))
    expected["grey.png"] = np.stack([grey] * 3)
    deep = np.linspace(0, 65535, SIZE * SIZE).reshape(SIZE, SIZE).astype(np.uint16)
    save("grey-16.png", Image.fromarray(deep))
    expected["grey-16.png"] = np.stack([(deep / 257).round().astype(np.uint8)] * 3)
    grey_alpha = np.dstack([grey, rgba[..., 3]])
    save("grey-alpha.png", Image.fromarray(grey_alpha))
    mixed = (grey[..., None] * share + 255 * (1 - share)).round().astype(np.uint8)[..., 0]
    expected["grey-alpha.png"] = np.stack([mixed] * 3)

    indices = (np.arange(SIZE * SIZE).reshape(SIZE, SIZE) // 7 % 5).astype(np.uint8)
    palette = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 99, 199], [200, 100, 0]], np.uint8)
    paletted = Image.frombytes("P", (SIZE, SIZE), indices.tobytes())
    paletted.putpalette(palette.tobytes())
    save("palette.png", paletted)
    expected["palette.png"] = palette[indices].transpose(2, 0, 1)
    save("palette-transparent.png", paletted, transparency=2)
    over_white = palette.copy()
    over_white[2] = 255
    expected["palette-transparent.png"] = over_white[indices].transpose(2, 0, 1)

    cmyk = picture(SIZE, SIZE, 4)
    cmyk[..., 3] //= 4
    save("cmyk.tif", Image.frombytes("CMYK", (SIZE, SIZE), cmyk.tobytes()))
    ink = cmyk.astype(np.float64)
    plain = (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255
    expected["cmyk.tif"] = plain.round().astype(np.uint8).transpose(2, 0, 1)

    # A profile of sRGB's own primaries, but of linear light, so that the conversion has a formula.
    linear = (square.astype(np.float64) / 255).clip(0.01, 1)
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    expected["linear-profile.png"] = (curve * 255).round().astype(np.uint8).transpose(2, 0, 1)
    save(
        "linear-profile.png",
        Image.fromarray((linear * 255).round().astype(np.uint8)),
        icc_profile=linear_profile(),
    )

    frames = [Image.fromarray(square), Image.new("RGB", (SIZE, SIZE), "black")]
    save("animation.webp", frames[0], save_all=True, append_images=frames[1:], lossless=True, duration=100)
    expected["animation.webp"] = square.transpose(2, 0, 1)

    large = picture(3000, 2000)
    save("large.webp", Image.fromarray(large), lossless=True, quality=50)
    expected["large.webp"] = stepwise(large)
    tall = picture(100, 1003)
    save("tall.png", Image.fromarray(tall))
    expected["tall.png"] = stepwise(tall)
    small = picture(11, 7)
    save("small.png", Image.fromarray(small))
    expected["small.png"] = stepwise(small)
    for name, orientation in (("large.jpg", 1), ("large-turned.jpg", 8)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        save(name, Image.fromarray(picture(1203, 901)), quality=90, exif=exif)
        decoded = np.asarray(Image.open(HERE / name))
        expected[name] = stepwise(np.ascontiguousarray(TURNS[orientation](decoded)))

    (HERE / "grey-16-transparent.png").write_bytes(png(deep[..., None], 16, 0, struct.pack(">H", deep[5, 6])))
    expected["grey-16-transparent.png"] = np.where(
        np.arange(1024).reshape(32, 32) == 166, 255, expected["grey-16.png"]
    )
    np.savez_compressed(HERE / "expected.npz", **expected)


def linear_profile() -> bytes:
    """The sRGB profile with its three curves replaced by the identity (a `curv` tag of no entries)."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(data[128:132], "big")
    for i in range(count):
        entry = 132 + 12 * i
        if bytes(data[entry : entry + 4]) in (b"rTRC", b"gTRC", b"bTRC"):
            offset = int.from_bytes(data[entry + 4 : entry + 8], "big")
            data[offset : offset + 12] = b"curv" + bytes(8)
            data[entry + 8 : entry + 12] = (12).to_bytes(4, "big")
    text = bytes(data).replace(b"sRGB built-in", b"linear lights")
    text = text.replace("sRGB built-in".encode("utf-16-be"), "linear lights".encode("utf-16-be"))
    assert ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(text))).startswith("linear")
    return text


if __name__ == "__main__":
    main()
