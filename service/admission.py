"""Admission: how many rows (images x levels) may be in work at once, and whose; more are refused before they cost.

A request is one of a flow: its priority and its key. Flows share the places by dynamic thresholds (Choudhury and Hahne
1998): a flow may take another place while it holds less than its share of those that are free. So one greedy key
always leaves room for the next, and bulk for interactive, and nobody's part is set beforehand.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from service.errors import TOO_MANY_IMAGES, Problem, unavailable
from service.schemas import Priority
from service.telemetry import Metrics

RATE_WINDOW_S = 10.0
RATE_REQUESTS = 500
"""Retry-After comes from the speed of the requests that ended in this time, and of so many at most."""
RATE_AGE_S = 0.1
"""How old a computed speed may be: it is asked for at each refusal."""
USUAL = 16
"""The usual size of a request is the mean of about so many of the last."""
SHARES = {"interactive": 4, "bulk": 1}
"""Times the free places that a flow may hold: alone, bulk fills half of all, one interactive key four fifths."""


class Flow(NamedTuple):
    """Requests that are treated as one."""

    priority: Priority = "interactive"
    key: str = ""

    @property
    def share(self) -> float:
        """In times the free places; without keys nobody is there to leave room for but bulk."""
        alone = self.priority == "interactive" and not self.key
        return math.inf if alone else SHARES[self.priority]


class Admission:
    """Counts the rows that are in work, and how fast they are answered."""

    def __init__(self, capacity: int, metrics: Metrics) -> None:
        self.capacity = capacity
        self.held = 0
        """Rows admitted and not yet answered."""
        self._metrics = metrics
        self._flows: Counter[Flow] = Counter()
        """Rows by flow: those admitted, and those expected of requests that have arrived and are still to be read."""
        self._usual = 1.0
        self._done: deque[tuple[float, float, int]] = deque(maxlen=RATE_REQUESTS)
        """(when it ended, busy seconds when it began, rows) of the last requests."""
        self._busy_s = 0.0
        self._changed = time.monotonic()
        self._rate = (-math.inf, 0.0)
        """(when it was computed, rows a second)."""

    def expect(self, flow: Flow) -> "Expected":
        """Count a request that has arrived whole with the rows that are usual, until it is read and admitted."""
        return Expected(self._flows, flow, round(self._usual))

    def shut(self, flow: Flow) -> int | None:
        """Where a request of the usual size would be refused now: seconds until it is worth another try."""
        return None if self._has_room(flow, round(self._usual)) else self.retry_after_s()

    @contextmanager
    def admit(self, rows: int, flow: Flow = Flow(), wait_s: float = math.inf) -> Iterator[None]:  # noqa: B008
        """Hold a place for so many rows.

        wait_s: how long the caller will wait. Raises Problem 503 with the time that the admitted ones will take,
        where there is no room or the answer would come too late.
        """
        if rows > self.capacity:
            limit = f"at most {self.capacity} fit in this server's queue"
            raise Problem(TOO_MANY_IMAGES, f"images x levels = {rows}, {limit}; send fewer")
        self._usual += (rows - self._usual) / USUAL
        if not self._has_room(flow, rows):
            raise self._refused(f"{self.held} images are waiting, at most {self.capacity} may")
        # One slow answer, such as the first of a cold service, says nothing of those to come.
        if len(self._done) >= USUAL and (ahead_s := self._wait_s(flow)) > wait_s:
            raise self._refused(f"the images that wait will take {ahead_s:.0f} s, longer than the deadline")
        begun = self._hold(rows, flow)
        try:
            yield
        except BaseException:
            self._hold(-rows, flow)
            raise
        self._hold(-rows, flow)
        self._done.append((time.monotonic(), begun, rows))

    def retry_after_s(self) -> int:
        """Seconds until what waits now will be done, at the speed of the last busy moments; from 1 to 60."""
        return min(60, max(1, math.ceil(self._wait_s(Flow("bulk")))))

    def _has_room(self, flow: Flow, rows: int) -> bool:
        free = self.capacity - self._flows.total()
        return rows <= free and (self._flows[flow] < flow.share * free)

    def _refused(self, detail: str) -> Problem:
        self._metrics.rejected("queue full")
        return unavailable(detail, self.retry_after_s())

    def _wait_s(self, flow: Flow) -> float:
        """Seconds that the rows before one of this flow will take; interactive ones overtake bulk."""
        rows = self._flows.items()
        ahead = sum(n for of, n in rows if flow.priority == "bulk" or of.priority == "interactive")
        rate = self._speed()
        return ahead / rate if rate else 0.0

    def _speed(self) -> float:
        """Rows a second of the last busy moments; 0 where there were none."""
        now = time.monotonic()
        if now - self._rate[0] > RATE_AGE_S:
            recent = [(begun, rows) for ended, begun, rows in self._done if ended > now - RATE_WINDOW_S]
            busy_s = self._busy() - min((begun for begun, _ in recent), default=0.0)
            rate = sum(rows for _, rows in recent) / busy_s if recent and busy_s > 0 else 0.0
            self._rate = (now, rate)
        return self._rate[1]

    def _busy(self) -> float:
        """For how many seconds in all any rows were held."""
        now = time.monotonic()
        if self.held:
            self._busy_s += now - self._changed
        self._changed = now
        return self._busy_s

    def _hold(self, rows: int, flow: Flow) -> float:
        """Add rows (or subtract them). Returns for how many seconds in all any were held."""
        busy_s = self._busy()
        self.held += rows
        self._flows[flow] += rows
        if not self._flows[flow]:
            del self._flows[flow]
        self._metrics.queued_images.set(self.held)
        return busy_s


class Expected:
    """The place of a request until it is admitted, or ends."""

    def __init__(self, flows: Counter[Flow], flow: Flow, rows: int) -> None:
        self._flows, self._flow, self._rows = flows, flow, rows
        flows[flow] += rows

    def leave(self) -> None:
        """Give the place back; again changes nothing."""
        self._flows[self._flow] -= self._rows
        self._rows = 0
        if not self._flows[self._flow]:
            del self._flows[self._flow]
