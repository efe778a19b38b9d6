"""Makes the page's own pictures, drawn by rules alone: samples/ for the mean feature, scenes/ to try it with.

Run as `python -m service.playground.make_pictures`; the same files come out each time.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

HERE = Path(__file__).parent
SAMPLES = 32
SAMPLE_PX = 64
SCENE_PX = 320
FINE = 4
"""Scenes are drawn this much larger and scaled down, for smooth edges."""
Colour = tuple[int, int, int]


def main(argv: list[str] | None = None) -> int:
    """Write every picture beside this file."""
    kinds: tuple[Callable[[np.random.Generator], Image.Image], ...] = (clouds, land, shapes, stripes)
    for index in range(SAMPLES):
        picture = kinds[index % len(kinds)](np.random.default_rng(index))
        picture.save(HERE / "samples" / f"{index:02}.png", optimize=True)
    for value, name in ((0, "black"), (255, "white")):
        Image.new("RGB", (SAMPLE_PX, SAMPLE_PX), (value,) * 3).save(HERE / "samples" / f"{name}.png")
    for name, draw in {"ship": ship, "airplane": airplane, "car": car, "cup": cup}.items():
        grain = np.random.default_rng(len(name))
        scene = draw().resize((SCENE_PX, SCENE_PX), Image.Resampling.LANCZOS)
        values = np.asarray(scene, np.float64) + grain.normal(0, 3, (SCENE_PX, SCENE_PX, 1))
        as_image(values).save(HERE / "scenes" / f"{name}.jpg", quality=86)
    return 0


def as_image(values: np.ndarray) -> Image.Image:
    """[H, W, 3] of any numbers, cut to 0..255."""
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))


def colour(random: np.random.Generator) -> np.ndarray:
    """A muted colour, as most of a photo is."""
    grey = random.uniform(40, 215)
    muted: np.ndarray = np.clip(grey + random.normal(0, 38, 3), 0, 255)
    return muted


def cloud(random: np.random.Generator, slope: float) -> np.ndarray:
    """[S, S] noise whose amplitude falls with frequency**slope (about 1 in photos), from 0 to 1."""
    frequency = np.hypot(np.fft.fftfreq(SAMPLE_PX)[:, None], np.fft.fftfreq(SAMPLE_PX)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.fft2(random.normal(size=(SAMPLE_PX, SAMPLE_PX))) / frequency**slope
    spectrum[0, 0] = 0
    field = np.fft.ifft2(spectrum).real
    scaled: np.ndarray = (field - field.min()) / np.ptp(field)
    return scaled


def clouds(random: np.random.Generator) -> Image.Image:
    """One colour flowing into another."""
    mix = cloud(random, random.uniform(0.9, 1.9))[..., None]
    return as_image(colour(random) * mix + colour(random) * (1 - mix))


def land(random: np.random.Generator) -> Image.Image:
    """A sky, a horizon, a ground with texture, and something that stands on it."""
    rows = np.linspace(0, 1, SAMPLE_PX)[:, None, None]
    sky = colour(random) * (1 - rows) + (colour(random) + 40) * rows
    ground = colour(random) * (0.6 + 0.5 * cloud(random, 1.0)[..., None])
    horizon = random.uniform(0.35, 0.75) + 0.12 * (cloud(random, 1.8)[0] - 0.5)
    picture = as_image(np.where(rows < horizon[None, :, None], sky, ground))
    return with_shape(picture, random, random.uniform(0.12, 0.3))


def shapes(random: np.random.Generator) -> Image.Image:
    """A few bodies before a soft background."""
    picture = clouds(random)
    for _ in range(int(random.integers(2, 5))):
        picture = with_shape(picture, random, random.uniform(0.1, 0.28))
    return picture


def stripes(random: np.random.Generator) -> Image.Image:
    """Waves of one direction: fur, fences, water."""
    angle, period = random.uniform(0, math.pi), random.uniform(4, 24)
    y, x = np.mgrid[:SAMPLE_PX, :SAMPLE_PX]
    bend = 8 * cloud(random, 1.6)
    mix = 0.5 + 0.5 * np.sin((x * math.cos(angle) + y * math.sin(angle) + bend) * math.tau / period)
    return as_image(colour(random) * mix[..., None] + colour(random) * (1 - mix[..., None]))


def with_shape(picture: Image.Image, random: np.random.Generator, radius: float) -> Image.Image:
    """An ellipse or a polygon somewhere, lit from above."""
    size = SAMPLE_PX * FINE
    mask = Image.new("L", (size, size))
    x, y = random.uniform(0.2, 0.8, 2) * size
    corners = int(random.integers(3, 7))
    turn, flat = random.uniform(0, math.tau), random.uniform(0.5, 1)
    angles = turn + np.arange(corners) * math.tau / corners
    if random.random() < 0.5:
        angles = np.linspace(0, math.tau, 40)
    r = radius * size
    points = [(float(x + r * math.cos(a)), float(y + flat * r * math.sin(a))) for a in angles]
    ImageDraw.Draw(mask).polygon(points, fill=255)
    small = mask.resize(picture.size, Image.Resampling.LANCZOS)
    light = np.linspace(1.25, 0.65, SAMPLE_PX)[:, None, None]
    body = as_image(np.broadcast_to(colour(random) * light, (SAMPLE_PX, SAMPLE_PX, 3)))
    return Image.composite(body, picture, small)


def gradient(top: Colour, bottom: Colour) -> Image.Image:
    """A scene's background, from top to bottom."""
    size = SCENE_PX * FINE
    rows = np.linspace(0, 1, size)[:, None, None]
    return as_image(
        np.broadcast_to(np.array(top) * (1 - rows) + np.array(bottom) * rows, (size, size, 3)).copy()
    )


class Pen:
    """Draws in units of the scene: 0..1 from left to right and from top to bottom."""

    def __init__(self, picture: Image.Image) -> None:
        self._draw = ImageDraw.Draw(picture)

    def shape(self, fill: Colour, *points: tuple[float, float]) -> None:
        size = SCENE_PX * FINE
        self._draw.polygon([(x * size, y * size) for x, y in points], fill=fill)

    def oval(self, fill: Colour, x: float, y: float, rx: float, ry: float | None = None) -> None:
        size, ry = SCENE_PX * FINE, rx if ry is None else ry
        self._draw.ellipse([(x - rx) * size, (y - ry) * size, (x + rx) * size, (y + ry) * size], fill=fill)


def soft(picture: Image.Image, radius: float) -> Image.Image:
    """Out of focus."""
    return picture.filter(ImageFilter.GaussianBlur(radius * FINE))


def ship() -> Image.Image:
    """A freighter under an evening sky."""
    picture = gradient((74, 110, 160), (244, 196, 150))
    pen = Pen(picture)
    pen.oval((255, 232, 190), 0.78, 0.5, 0.05)
    picture = soft(picture, 2)
    sea = gradient((120, 132, 150), (18, 44, 74))
    half = SCENE_PX * FINE * 58 // 100
    picture.paste(sea.crop((0, half, sea.width, sea.height)), (0, half))
    pen = Pen(picture)
    for row in range(14):  # light on the waves
        y = 0.6 + 0.4 * (row / 14) ** 1.6
        for k in range(6):
            x = (0.618 * (row * 6 + k)) % 1
            pen.shape((196, 176, 160) if abs(x - 0.78) < 0.14 else (86, 116, 146),
                      (x, y), (x + 0.05 + 0.004 * row, y + 0.003), (x + 0.02, y + 0.004 + row * 4e-4))  # fmt: skip
    pen.shape((58, 66, 82), (0.12, 0.53), (0.9, 0.53), (0.83, 0.64), (0.2, 0.64))
    pen.shape((150, 44, 40), (0.178, 0.61), (0.85, 0.61), (0.83, 0.65), (0.2, 0.65))
    pen.shape((236, 232, 222), (0.62, 0.38), (0.8, 0.38), (0.8, 0.53), (0.62, 0.53))
    pen.shape((210, 206, 198), (0.65, 0.32), (0.76, 0.32), (0.76, 0.38), (0.65, 0.38))
    for k in range(4):
        pen.shape((52, 62, 80), (0.64 + k * 0.04, 0.41), (0.665 + k * 0.04, 0.41),
                  (0.665 + k * 0.04, 0.44), (0.64 + k * 0.04, 0.44))  # fmt: skip
    pen.shape((196, 84, 46), (0.69, 0.22), (0.735, 0.22), (0.735, 0.32), (0.69, 0.32))
    boxes: tuple[Colour, ...] = ((176, 70, 52), (64, 110, 132), (206, 160, 76), (88, 120, 84))
    for k in range(8):
        x, y = 0.22 + (k % 4) * 0.093, 0.47 - (k // 4) * 0.06
        pen.shape(boxes[(k * 3) % 4], (x, y), (x + 0.087, y), (x + 0.087, y + 0.058), (x, y + 0.058))
    return soft(picture, 0.5)


def airplane() -> Image.Image:
    """An airliner in a blue sky."""
    picture = gradient((70, 130, 200), (190, 220, 240))
    pen = Pen(picture)
    puffs = ((0.1, 0.85, 0.12), (0.25, 0.9, 0.16), (0.42, 0.93, 0.12), (0.86, 0.22, 0.08), (0.95, 0.25, 0.1))
    for x, y, r in puffs:
        pen.oval((240, 244, 248), x, y, r, r * 0.55)
    picture = soft(picture, 9)
    pen = Pen(picture)
    pen.shape((150, 160, 172), (0.5, 0.47), (0.66, 0.25), (0.72, 0.25), (0.62, 0.5))  # the far wing
    pen.shape((200, 52, 50), (0.14, 0.5), (0.07, 0.3), (0.15, 0.3), (0.27, 0.5))  # fin
    pen.shape((226, 230, 236), (0.12, 0.5), (0.2, 0.47), (0.8, 0.46), (0.88, 0.49), (0.92, 0.525),
              (0.87, 0.555), (0.78, 0.575), (0.3, 0.58), (0.18, 0.55))  # fmt: skip
    pen.shape((176, 184, 196), (0.18, 0.55), (0.92, 0.53), (0.87, 0.56), (0.78, 0.578), (0.3, 0.583))
    pen.shape((190, 198, 208), (0.13, 0.52), (0.05, 0.58), (0.1, 0.585), (0.25, 0.54))  # tailplane
    pen.shape((168, 176, 190), (0.44, 0.55), (0.3, 0.82), (0.37, 0.82), (0.64, 0.555))  # the near wing
    pen.oval((96, 104, 120), 0.47, 0.66, 0.055, 0.026)
    for k in range(14):
        pen.oval((70, 84, 104), 0.32 + k * 0.034, 0.503, 0.007, 0.009)
    pen.shape((50, 62, 82), (0.845, 0.482), (0.88, 0.492), (0.885, 0.51), (0.845, 0.505))
    return soft(picture, 0.5)


def car() -> Image.Image:
    """A red car on a road."""
    picture = gradient((150, 180, 206), (214, 220, 220))
    pen = Pen(picture)
    for k in range(9):  # trees, far away
        pen.oval((70 + 9 * (k % 3), 100 + 7 * (k % 4), 66), k * 0.13, 0.46 + 0.02 * (k % 2), 0.1, 0.12)
    picture = soft(picture, 5)
    pen = Pen(picture)
    pen.shape((112, 112, 116), (0, 0.56), (1, 0.56), (1, 1), (0, 1))
    pen.shape((128, 140, 92), (0, 0.54), (1, 0.54), (1, 0.6), (0, 0.6))
    pen.shape((206, 204, 196), (0.02, 0.91), (0.3, 0.91), (0.29, 0.93), (0, 0.93))
    pen.shape((206, 204, 196), (0.6, 0.91), (0.88, 0.91), (0.89, 0.93), (0.6, 0.93))
    pen.oval((58, 58, 64), 0.5, 0.79, 0.4, 0.035)
    pen.shape((178, 28, 34), (0.1, 0.6), (0.28, 0.55), (0.36, 0.42), (0.66, 0.42), (0.78, 0.55),
              (0.9, 0.6), (0.92, 0.72), (0.88, 0.77), (0.12, 0.77), (0.08, 0.72))  # fmt: skip
    pen.shape((214, 62, 60), (0.1, 0.6), (0.28, 0.555), (0.78, 0.555), (0.9, 0.6), (0.9, 0.625), (0.1, 0.625))
    pen.shape((60, 80, 98), (0.315, 0.55), (0.38, 0.445), (0.5, 0.445), (0.5, 0.55))
    pen.shape((74, 96, 114), (0.52, 0.55), (0.52, 0.445), (0.645, 0.445), (0.735, 0.55))
    for x in (0.27, 0.73):
        pen.oval((26, 26, 30), x, 0.76, 0.083)
        pen.oval((186, 188, 194), x, 0.76, 0.045)
        pen.oval((90, 92, 100), x, 0.76, 0.02)
    pen.oval((250, 236, 190), 0.895, 0.64, 0.02, 0.016)
    return soft(picture, 0.5)


def cup() -> Image.Image:
    """A cup of coffee on a wooden table: no class of a ten-class model."""
    picture = gradient((206, 196, 184), (184, 168, 150))
    pen = Pen(picture)
    pen.shape((150, 100, 62), (0, 0.6), (1, 0.6), (1, 1), (0, 1))
    for k in range(7):
        y = 0.62 + 0.055 * k
        pen.shape((136, 88, 54), (0, y), (1, y + 0.012), (1, y + 0.018), (0, y + 0.01))
    picture = soft(picture, 2.5)
    pen = Pen(picture)
    pen.oval((104, 68, 42), 0.52, 0.83, 0.33, 0.06)
    pen.oval((232, 230, 224), 0.48, 0.81, 0.32, 0.06)
    pen.oval((206, 204, 198), 0.48, 0.805, 0.2, 0.035)
    pen.oval((226, 224, 218), 0.74, 0.56, 0.11, 0.12)
    pen.oval((198, 186, 172), 0.74, 0.56, 0.066, 0.076)
    pen.shape((240, 238, 232), (0.22, 0.42), (0.74, 0.42), (0.7, 0.7), (0.62, 0.8), (0.34, 0.8), (0.26, 0.7))
    pen.shape((216, 213, 206), (0.6, 0.42), (0.74, 0.42), (0.7, 0.7), (0.62, 0.8), (0.52, 0.8))
    pen.oval((246, 244, 238), 0.48, 0.42, 0.26, 0.055)
    pen.oval((74, 44, 26), 0.48, 0.425, 0.235, 0.044)
    pen.oval((120, 78, 48), 0.44, 0.42, 0.1, 0.016)
    return soft(picture, 0.5)


if __name__ == "__main__":
    sys.exit(main())
