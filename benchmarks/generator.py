"""A load generator that costs little: one thread, one epoll, requests that were made before."""

import gc
import re
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

LEAD_S = 1.0
"""What is answered in the beginning does not count: queues fill."""
PATIENCE_S = 30.0
"""How long after the last request answers are waited for."""
AT_ONCE = 16
"""Requests that are sent before answers are read again."""
WATCH_S = 0.25
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
END = b"\r\n\r\n"
"""Of a head."""
LAST = re.compile(rb"\r\nconnection: close", re.IGNORECASE)


class Answer(NamedTuple):
    """What came of a request."""

    request: int
    due: float
    done: float
    received: bytes = b""
    """Nothing: the connection ended, or no answer came."""

    @property
    def status(self) -> int:
        """Of HTTP, 0 where there is no answer."""
        return int(self.received[9:12] or 0)

    @property
    def head(self) -> bytes:
        """In lower case."""
        return self.received.partition(END)[0].lower()

    @property
    def body(self) -> bytes:
        """As it came."""
        return self.received.partition(END)[2]

    @property
    def latency_s(self) -> float:
        """Since it was to be sent."""
        return self.done - self.due


@dataclass(frozen=True)
class Measured:
    """The answers that count, of so many seconds; and the 99th percentile of how late requests were sent."""

    answers: list[Answer]
    seconds: float
    late_s: float = 0.0

    @cached_property
    def good(self) -> list[Answer]:
        """Those that are no error."""
        return [answer for answer in self.answers if answer.status == 200]

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return len(self.good) / self.seconds


class Line:
    """A connection: one request at a time."""

    __slots__ = ("due", "full", "received", "request", "socket", "unsent")

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Closed without a TIME_WAIT, which would keep its port from the next ones.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.connect_ex(address)
        self.request, self.due, self.unsent, self.received = 0, 0.0, b"", b""
        self.full = False


def post(path: str, content_type: str, body: bytes) -> bytes:
    """A request as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Load:
    """Requests to a port of this machine, in turn, each on a connection that waits for none, or on a new one."""

    def __init__(self, port: int, requests: Sequence[bytes]) -> None:
        self._address = ("127.0.0.1", port)
        self._requests = requests
        self._next = 0
        self._waiting: dict[int, Line] = {}
        """By the number of their socket."""
        self._free: dict[int, Line] = {}
        self._poll = select.epoll()
        # What is there already: else the collector looks through it again and again, as answers come.
        gc.freeze()

    def closed(self, callers: int, seconds: float) -> Measured:
        """So many callers, each of whom sends again once answered. What is answered in time counts."""
        begin = time.perf_counter()
        until = begin + LEAD_S + seconds
        answers: list[Answer] = []
        for _ in range(callers):
            self._send(begin)
        while self._waiting and time.perf_counter() < until + PATIENCE_S:
            for answer in self._read(0.1):
                answers.append(answer)
                if answer.done < until:
                    self._send(answer.done)
        answers += self._give_up()
        # From an answer to an answer: answers come in batches, of which a fixed time holds one more or less.
        since = max((a.done for a in answers if a.done < begin + LEAD_S), default=begin)
        counted = [a for a in answers if since < a.done < until or not a.status]
        return Measured(counted, max((a.done for a in counted if a.status), default=until) - since)

    def opened(
        self, rate: float, seconds: float, lead_s: float = LEAD_S, watch: Callable[[], object] = lambda: None
    ) -> Measured:
        """Requests at random (Poisson), so many a second, whether earlier ones are answered or not.

        `watch` is called every quarter of a second meanwhile."""
        gaps = np.random.default_rng(1).exponential(1 / rate, int(rate * (lead_s + seconds)))
        begin = watched = time.perf_counter()
        dues = deque((begin + np.cumsum(gaps)).tolist())
        until = dues[-1] + PATIENCE_S
        answers: list[Answer] = []
        late: list[float] = []
        while (dues or self._waiting) and (now := time.perf_counter()) < until:
            for _ in range(AT_ONCE):
                if not dues or dues[0] > now:
                    break
                late.append(now - dues[0])
                self._send(dues.popleft())
            wait_s = dues[0] - time.perf_counter() if dues else WATCH_S
            answers += self._read(min(max(0.0, wait_s), WATCH_S))
            if now > watched + WATCH_S:
                watch()
                watched = now
        answers += self._give_up()
        counted = [a for a in answers if a.due >= begin + lead_s]
        return Measured(counted, seconds, float(np.percentile(late, 99)))

    def close(self) -> None:
        """Close all connections."""
        self._give_up()
        for line in self._free.values():
            line.socket.close()
        self._free.clear()

    def _send(self, due: float) -> None:
        if self._free:
            number, line = self._free.popitem()
        else:
            line = Line(self._address)
            number = line.socket.fileno()
            self._poll.register(number, select.EPOLLIN)
        line.request, line.due, line.unsent = self._next, due, self._requests[self._next]
        self._next = (self._next + 1) % len(self._requests)
        self._waiting[number] = line
        self._write(number, line)

    def _write(self, number: int, line: Line) -> None:
        """As much as the connection takes, and the rest once it takes more."""
        try:
            sent = line.socket.send(line.unsent)
        except OSError:
            # Not yet connected, full, or ended, which reading shows.
            sent = 0
        line.unsent = line.unsent[sent:]
        if bool(line.unsent) != line.full:
            line.full = not line.full
            self._poll.modify(number, select.EPOLLIN | (select.EPOLLOUT if line.full else 0))

    def _read(self, wait_s: float) -> list[Answer]:
        """The answers that came meanwhile."""
        answers = []
        for number, event in self._poll.poll(wait_s):
            if number in self._free:
                # The server closed it.
                self._free.pop(number).socket.close()
                continue
            line = self._waiting[number]
            if event & select.EPOLLOUT:
                self._write(number, line)
            if event == select.EPOLLOUT:
                continue
            try:
                data = line.socket.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                answers.append(self._ended(number))
                continue
            line.received += data
            end = line.received.find(END)
            length = LENGTH.search(line.received, 0, end) if end >= 0 else None
            if length and len(line.received) >= end + len(END) + int(length[1]):
                answers.append(Answer(line.request, line.due, time.perf_counter(), line.received))
                del self._waiting[number]
                if line.unsent or LAST.search(line.received, 0, end):
                    line.socket.close()
                else:
                    self._free[number] = line
                line.received = b""
        return answers

    def _ended(self, number: int) -> Answer:
        line = self._waiting.pop(number)
        line.socket.close()
        return Answer(line.request, line.due, time.perf_counter())

    def _give_up(self) -> list[Answer]:
        return [self._ended(number) for number in list(self._waiting)]
