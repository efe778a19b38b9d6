"""How many processor cores this process may use."""

import math
import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Of a container, as its microseconds of processor time in so many microseconds (cgroup v2)."""


def cores() -> int:
    """As many as its affinity and its container's quota allow, the latter rounded up."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        share, period = QUOTA.read_text().split()
        return min(own, math.ceil(int(share) / int(period)))
    # Another system, or no quota: then it says "max".
    except (OSError, ValueError):
        return own
