"""What the fuzzer calls: bytes to an image or an ImageError, with Pillow's Python and ours watched for coverage.

The arguments are libFuzzer's. Any other exception ends it.
"""

import sys

import atheris

with atheris.instrument_imports(include=["PIL", "entry"]):
    from entry.config import ImageSpec
    from entry.images import ImageError, load_image

SPEC = ImageSpec(size=32, resize=32, preprocessing="v2", mean=(0.5,) * 3, std=(0.5,) * 3)


def target(data: bytes) -> None:
    """One file."""
    try:
        image = load_image(data, SPEC)
    except ImageError:
        return
    if image.shape != (3, 32, 32) or image.dtype != "uint8":
        raise AssertionError(f"an image of {image.shape}, {image.dtype}")


if __name__ == "__main__":
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
