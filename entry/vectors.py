"""Arithmetic on embeddings that the service and the offline scripts share."""

import numpy as np


def unit_length(values: np.ndarray) -> np.ndarray:
    """Each vector along the last axis divided by its Euclidean length; a vector of zeros stays one."""
    length = np.linalg.norm(values, axis=-1, keepdims=True)
    # NaN != 0, so a row of NaN is divided and stays NaN instead of becoming zeros.
    unit: np.ndarray = np.divide(values, length, out=np.zeros_like(values), where=length != 0)
    return unit
