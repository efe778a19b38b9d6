"""Vectors of length 1: zeros, float32 and NaN survive."""

import numpy as np
import pytest

from entry.vectors import unit_length


def test_each_vector_along_the_last_axis_has_length_1() -> None:
    values = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
    unit = unit_length(values)
    assert unit.dtype == np.float32
    assert np.linalg.norm(unit, axis=-1) == pytest.approx(np.ones((3, 2)))
    assert unit * np.linalg.norm(values, axis=-1, keepdims=True) == pytest.approx(values, abs=1e-6)
    unit = unit_length(np.array([[0, 0], [np.nan, np.nan], [3, 4]], np.float32))
    assert np.array_equal(unit, np.array([[0, 0], [np.nan, np.nan], [0.6, 0.8]], np.float32), equal_nan=True)
