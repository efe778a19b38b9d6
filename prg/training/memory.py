"""Freed memory kept by the process: a training step needs the same again, and the system's pages are slow to come."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
SETTINGS = {
    M_ARENA_MAX: 1,  # other arenas give their memory back whatever the thresholds
    M_MMAP_THRESHOLD: 32
    << 20,  # the most that glibc takes; larger pieces are mapped, and unmapped when freed
    M_TRIM_THRESHOLD: 2**31 - 1,
    M_TOP_PAD: 256 << 20,
}
"""glibc's `mallopt`: by default each step of a training maps, faults in and unmaps most of its memory."""


def keep_freed_memory() -> bool:
    """To be called before threads compute. False where the allocator is not glibc's: nothing is changed."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(key, value) == 1 for key, value in SETTINGS.items())
