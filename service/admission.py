"""Admission: how many rows (images x levels) may be in flight at once; more are refused before they cost anything."""

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import TOO_MANY_IMAGES, Problem, unavailable
from service.telemetry import Metrics

RATE_WINDOW_S = 10.0
RATE_REQUESTS = 500
"""Retry-After comes from the speed of the requests that ended in this time, and of so many at most."""


class Admission:
    """Counts the rows that are admitted and not yet answered, and how fast rows are answered."""

    def __init__(self, capacity: int, metrics: Metrics) -> None:
        self.capacity = capacity
        self.held = 0
        self._metrics = metrics
        self._done: deque[tuple[float, float, int]] = deque(maxlen=RATE_REQUESTS)
        """(when it ended, busy seconds when it began, rows) of the last requests."""
        self._busy_s = 0.0
        self._changed = time.monotonic()

    @contextmanager
    def admit(self, rows: int) -> Iterator[None]:
        """Hold a place for so many rows. Raises Problem 503 with the time that the admitted ones will take."""
        if rows > self.capacity:
            limit = f"at most {self.capacity} fit in this server's queue"
            raise Problem(TOO_MANY_IMAGES, f"images x levels = {rows}, {limit}; send fewer")
        if self.held + rows > self.capacity:
            self._metrics.rejected("queue full")
            detail = f"{self.held} images are waiting, at most {self.capacity} may"
            raise unavailable(detail, self.retry_after_s())
        begun = self._hold(rows)
        try:
            yield
        except BaseException:
            self._hold(-rows)
            raise
        self._hold(-rows)
        self._done.append((time.monotonic(), begun, rows))

    def retry_after_s(self) -> int:
        """Seconds until what waits now will be done, at the speed of the last busy moments; from 1 to 60."""
        now = time.monotonic()
        recent = [(begun, rows) for ended, begun, rows in self._done if ended > now - RATE_WINDOW_S]
        busy_s = self._hold(0) - min((begun for begun, _ in recent), default=0.0)
        if not recent or busy_s <= 0:
            return 1
        rate = sum(rows for _, rows in recent) / busy_s
        return min(60, max(1, math.ceil(self.held / rate)))

    def _hold(self, rows: int) -> float:
        """Add rows (or subtract them). Returns for how many seconds in all any were held."""
        now = time.monotonic()
        if self.held:
            self._busy_s += now - self._changed
        self._changed = now
        self.held += rows
        self._metrics.queued_images.set(self.held)
        return self._busy_s
