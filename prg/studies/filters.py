"""Filters that pictures go bad by (Hendrycks and Dietterich 2019): picture, constants of a severity, generator.

Each takes a picture, float64 [S, S, 3] in [0, 1], and gives one of the same shape that may leave [0, 1]. OpenCV and
ImageMagick are done without: their filters are written in numpy and scipy here, so pixels differ from the
published files in detail, and figures are comparable among themselves, not digit by digit with published ones.
"""

import io

import numpy as np
from PIL import Image as Picture


def gaussian_noise(x: np.ndarray, scale: float, generator: np.random.Generator) -> np.ndarray:
    """Normal noise."""
    return x + generator.normal(0, scale, x.shape)


def shot_noise(x: np.ndarray, photons: float, generator: np.random.Generator) -> np.ndarray:
    """Poisson noise of so many photons in white."""
    return generator.poisson(x * photons) / photons


def impulse_noise(x: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Salt and pepper on that share of the values."""
    hit, salt = generator.random(x.shape) < share, generator.random(x.shape) < 0.5
    return np.where(hit, salt.astype(x.dtype), x)


def gaussian_blur(x: np.ndarray, sigma: float, _: np.random.Generator) -> np.ndarray:
    """A Gaussian over space, none over colour."""
    from scipy.ndimage import gaussian_filter

    blurred: np.ndarray = gaussian_filter(x, (sigma, sigma, 0), mode="nearest", truncate=4)
    return blurred


def defocus_blur(x: np.ndarray, constants: tuple[float, float], _: np.random.Generator) -> np.ndarray:
    """A disk of that radius, its edge smoothed."""
    from scipy.ndimage import convolve, gaussian_filter

    radius, smoothing = constants
    line = np.arange(-8, 9)
    disk = (line[:, None] ** 2 + line**2 <= radius**2).astype(float)
    kernel = gaussian_filter(disk / disk.sum(), smoothing, mode="mirror", radius=1)
    out: np.ndarray = convolve(x, kernel[:, :, None], mode="mirror")
    return out


def glass_blur(
    x: np.ndarray, constants: tuple[float, int, int], generator: np.random.Generator
) -> np.ndarray:
    """Blurred, each pixel replaced by a neighbour above or to the left (so the published files), blurred again."""
    sigma, reach, rounds = constants
    x = gaussian_blur(x, sigma, generator)
    inner = np.arange(reach + 1, len(x) - reach + 1)
    for _ in range(rounds):
        dy, dx = generator.integers(-reach, reach, (2, len(inner), len(inner)))
        moved = x.copy()
        moved[np.ix_(inner, inner)] = x[inner[:, None] + dy, inner + dx]
        x = moved
    return gaussian_blur(x, sigma, generator)


def motion_blur(x: np.ndarray, constants: tuple[float, float], generator: np.random.Generator) -> np.ndarray:
    """Smeared along a line within 45 degrees of the horizontal."""
    radius, sigma = constants
    return smeared(x, radius, sigma, generator.uniform(-45, 45))


def smeared(x: np.ndarray, radius: float, sigma: float, angle: float) -> np.ndarray:
    """The mean of copies shifted along `angle` (degrees), weighted by half a Gaussian; edges are repeated."""
    side = len(x)
    i = np.arange(2 * int(np.ceil(radius)) + 1)
    weights = np.exp(-(i**2) / (2 * sigma**2))
    weights /= weights.sum()
    rows = np.ceil(i * np.sin(np.radians(angle)) - 0.5).astype(int)
    columns = np.ceil(i * np.cos(np.radians(angle)) - 0.5).astype(int)
    line = np.arange(side)
    out = np.zeros_like(x)
    for weight, dy, dx in zip(weights, rows, columns, strict=True):
        out += weight * x[(line + dy).clip(0, side - 1)][:, (line + dx).clip(0, side - 1)]
    return out


def zoom_blur(x: np.ndarray, farthest: float, _: np.random.Generator) -> np.ndarray:
    """The mean of the picture and its enlargements from 1 up to `farthest`, in hundredths."""
    factors = np.arange(1, farthest, 0.01)
    return (x + sum(enlarged(x, f) for f in factors)) / (len(factors) + 1)


def enlarged(x: np.ndarray, factor: float) -> np.ndarray:
    """The middle of [S, S, C], enlarged to [S, S, C]."""
    from scipy.ndimage import zoom

    side = len(x)
    part = int(np.ceil(side / factor))
    top = (side - part) // 2
    big: np.ndarray = zoom(x[top : top + part, top : top + part], (factor, factor, 1), order=1)
    trim = (len(big) - side) // 2
    return big[trim : trim + side, trim : trim + side]


def fog(x: np.ndarray, constants: tuple[float, float], generator: np.random.Generator) -> np.ndarray:
    """Clouds of a plasma fractal added, contrast reduced accordingly."""
    amount, decay = constants
    brightest = x.max()
    side = len(x)
    clouds = plasma(1 << (side - 1).bit_length(), decay, generator)[:side, :side, None]
    return (x + amount * clouds) * brightest / (brightest + amount)


def plasma(side: int, decay: float, generator: np.random.Generator) -> np.ndarray:
    """A height map [side, side] in [0, 1] by the diamond-square algorithm on a torus; side is a power of two."""
    heights = np.zeros((side, side))
    step, wobble = side, 100.0

    def jittered(total: np.ndarray) -> np.ndarray:
        return total / 4 + wobble * generator.uniform(-wobble, wobble, total.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        down = corners + np.roll(corners, -1, 0)
        heights[half::step, half::step] = jittered(down + np.roll(down, -1, 1))
        middles = heights[half::step, half::step]
        above, left = middles + np.roll(middles, 1, 0), middles + np.roll(middles, 1, 1)
        heights[::step, half::step] = jittered(above + corners + np.roll(corners, -1, 1))
        heights[half::step, ::step] = jittered(left + corners + np.roll(corners, -1, 0))
        step, wobble = half, wobble / decay
    heights -= heights.min()
    return heights / heights.max()


def snow(x: np.ndarray, constants: tuple[float, ...], generator: np.random.Generator) -> np.ndarray:
    """Flakes blown in one direction over a whitened picture, and the same flakes turned around."""
    mean, spread, size, threshold, radius, sigma, kept = constants
    flakes = enlarged(generator.normal(mean, spread, x.shape[:2])[:, :, None], size)
    flakes = np.where(flakes < threshold, 0, flakes).clip(0, 1)
    flakes = smeared(flakes, radius, sigma, generator.uniform(-135, -45))
    white = np.maximum(x, grey(x) * 1.5 + 0.5)
    return kept * x + (1 - kept) * white + flakes + np.rot90(flakes, 2)


def grey(x: np.ndarray) -> np.ndarray:
    """Luma [S, S, 1]."""
    return x @ np.array([[0.299], [0.587], [0.114]])


def contrast(x: np.ndarray, factor: float, _: np.random.Generator) -> np.ndarray:
    """Drawn together towards the mean colour."""
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * factor + mean


def brightness(x: np.ndarray, amount: float, _: np.random.Generator) -> np.ndarray:
    """The value of hue, saturation, value, raised."""
    value = x.max(2, keepdims=True)
    return recoloured(x, (value + amount).clip(0, 1), saturation(x))


def saturation(x: np.ndarray) -> np.ndarray:
    """[S, S, 1] in [0, 1]."""
    value = x.max(2, keepdims=True)
    return (value - x.min(2, keepdims=True)) / np.maximum(value, 1e-12)


def recoloured(x: np.ndarray, value: np.ndarray, saturation_: np.ndarray) -> np.ndarray:
    """The same hue with another value and saturation. A grey pixel's hue is red, as in any conversion to HSV."""
    top, bottom = x.max(2, keepdims=True), x.min(2, keepdims=True)
    colourful = top > bottom
    below = np.where(colourful, (top - x) / np.where(colourful, top - bottom, 1), np.array([0.0, 1.0, 1.0]))
    return value * (1 - saturation_ * below)


def jpeg_compression(x: np.ndarray, quality: int, _: np.random.Generator) -> np.ndarray:
    """Through JPEG of that quality."""
    file = io.BytesIO()
    picture(x).save(file, "JPEG", quality=quality)
    with Picture.open(file) as read:
        return np.asarray(read) / 255


def pixelate(x: np.ndarray, factor: float, _: np.random.Generator) -> np.ndarray:
    """Smaller and large again, by boxes."""
    side = len(x)
    small = picture(x).resize((int(side * factor),) * 2, Picture.Resampling.BOX)
    return np.asarray(small.resize((side, side), Picture.Resampling.BOX)) / 255


def picture(x: np.ndarray) -> Picture.Image:
    """As Pillow's image."""
    return Picture.fromarray((x * 255).round().astype(np.uint8))


def elastic_transform(
    x: np.ndarray, constants: tuple[float, float, float], generator: np.random.Generator
) -> np.ndarray:
    """A random affine map, then a smooth random displacement; the constants are shares of the side."""
    from scipy.ndimage import gaussian_filter, map_coordinates

    side = len(x)
    strength, sigma, affine = (c * side for c in constants)
    middle, reach = side // 2, side // 3
    corners = np.array([[reach, reach], [reach, -reach], [-reach, -reach]], float) + middle
    moved = corners + generator.uniform(-affine, affine, corners.shape)
    ones = np.ones((3, 1))
    back = np.linalg.solve(np.hstack([moved, ones]), corners)  # [3, 2]: where each pixel comes from
    shift = [generator.uniform(-1, 1, (side, side)) for _ in range(2)]
    if sigma > 0:
        shift = [gaussian_filter(s, sigma, mode="reflect", truncate=3) for s in shift]
    column, row = np.meshgrid(np.arange(side, dtype=float), np.arange(side, dtype=float))
    at = np.stack([column + strength * shift[0], row + strength * shift[1], np.ones((side, side))], -1) @ back
    places = [at[..., 1], at[..., 0]]
    return np.stack([map_coordinates(x[..., c], places, order=1, mode="mirror") for c in range(3)], -1)
