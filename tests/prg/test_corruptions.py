"""Corruptions: deterministic, of the picture's own shape, and worse the higher the severity."""

from itertools import pairwise

import numpy as np
import pytest

from prg.studies.corruptions import CORRUPTIONS, SEVERITIES, corrupted


@pytest.fixture(scope="module", params=[32, 64])
def pictures(request: pytest.FixtureRequest) -> np.ndarray:
    """Smooth colourful pictures with edges and a little texture, uint8 [24, 3, S, S]."""
    rng, scale = np.random.default_rng(0), request.param // 32
    line = np.linspace(0, scale, request.param)
    out = []
    for _ in range(24):
        fx, fy, phase = rng.uniform(1, 7, 3), rng.uniform(1, 7, 3), rng.uniform(0, 6, 3)
        wave = np.sin(fx[:, None, None] * line + fy[:, None, None] * line[:, None] + phase[:, None, None])
        x = 0.45 + 0.25 * wave + rng.normal(0, 0.02, wave.shape)
        colour = rng.uniform(0.1, 0.9, 3)[:, None, None]
        left, right = rng.integers(4 * scale, 10 * scale), rng.integers(16 * scale, 28 * scale)
        x[:, 8 * scale : 20 * scale - scale // 2, left:right] = colour
        out.append((x.clip(0, 1) * 255).astype(np.uint8))
    return np.stack(out)


ORDERED: dict[str, tuple[tuple[int, ...], ...]] = {
    "elastic_transform": (),  # trades bending for moving
    "glass_blur": ((1, 4), (2, 4), (3, 5)),  # one round, then two
    "motion_blur": ((1, 2, 3), (4, 5)),  # a longer line, then a longer one again
    # 28 and 27 boxes a side: which is worse depends on where edges lie
    "pixelate": ((1, 2, 4, 5), (1, 3, 5)),
}
"""Severities of growing distance, where that is not all of them."""


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_higher_severity_is_farther_from_the_clean_picture(name: str, pictures: np.ndarray) -> None:
    distance = {}
    for severity in SEVERITIES:
        bad = corrupted(pictures, name, severity)
        assert bad.shape == pictures.shape
        assert bad.dtype == np.uint8
        distance[severity] = float(np.abs(bad.astype(float) - pictures).mean())
    assert min(distance.values()) > 0.3
    for row in ORDERED.get(name, (SEVERITIES,)):
        assert all(distance[a] < distance[b] for a, b in pairwise(row)), distance


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_image_is_corrupted_by_itself(name: str, pictures: np.ndarray) -> None:
    together = corrupted(pictures[:6], name, 3)
    assert np.array_equal(together, corrupted(pictures[:6], name, 3))
    assert np.array_equal(together[4:], corrupted(pictures[4:6], name, 3, first=4))


def test_what_is_unknown_is_named(pictures: np.ndarray) -> None:
    for side, name, severity, named in (
        (32, "fog", 0, "severity = 0"),
        (32, "fog", 6, "severity = 6"),
        (16, "fog", 1, "16.*32.*64"),
        (32, "frost", 1, "'frost'"),
    ):
        with pytest.raises(ValueError, match=named):
            corrupted(pictures[:, :, :side, :side], name, severity)
