"""A load generator that costs little: one thread, one epoll, requests that were made before."""

import re
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LEAD_S = 1.0
"""What is answered in the beginning does not count: queues fill."""
PATIENCE_S = 30.0
"""How long after the last request answers are waited for."""


class Answer(NamedTuple):
    """What came of a request."""

    request: int
    due: float
    done: float
    status: int
    """0: the connection ended, or nothing came."""
    body: bytes


LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")


class Line:
    """A connection: one request at a time."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Closed without a TIME_WAIT, which would keep its port from the next ones.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.request, self.due, self.received = 0, 0.0, b""


@dataclass(frozen=True)
class Measured:
    """The answers that count, of so many seconds; and the 99th percentile of how late requests were sent."""

    answers: list[Answer]
    seconds: float
    late_s: float = 0.0

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return sum(answer.status == 200 for answer in self.answers) / self.seconds


def complete(head: bytes, body: bytes) -> bool:
    """Whether a body is all there."""
    length = LENGTH.search(head)
    return len(body) >= int(length[1]) if length else body.endswith(b"\r\n0\r\n\r\n")


class Load:
    """Requests to a port of this machine, in turn."""

    def __init__(self, port: int, requests: Sequence[bytes]) -> None:
        self._address = ("127.0.0.1", port)
        self._requests = requests
        self._next = 0
        self._waiting: dict[int, Line] = {}
        self._free: list[Line] = []
        self._poll = select.epoll()

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

    def opened(self, rate: float, seconds: float) -> Measured:
        """Requests at random (Poisson), so many a second, whether earlier ones are answered or not."""
        gaps = np.random.default_rng(1).exponential(1 / rate, int(rate * (LEAD_S + seconds)))
        begin = time.perf_counter()
        dues = deque((begin + np.cumsum(gaps)).tolist())
        until = dues[-1] + PATIENCE_S
        answers: list[Answer] = []
        late: list[float] = []
        while dues or self._waiting:
            now = time.perf_counter()
            if now > until:
                break
            if dues and dues[0] <= now:
                late.append(now - dues[0])
                self._send(dues.popleft())
            answers += self._read(max(0.0, dues[0] - time.perf_counter()) if dues else 0.1)
        answers += self._give_up()
        counted = [a for a in answers if a.due >= begin + LEAD_S]
        return Measured(counted, seconds, float(np.percentile(late, 99)))

    def close(self) -> None:
        """Close all connections."""
        self._give_up()
        for line in self._free:
            line.socket.close()
        self._free.clear()

    def _send(self, due: float) -> None:
        """On a connection that waits for nothing, or on a new one."""
        if self._free:
            line = self._free.pop()
        else:
            line = Line(self._address)
            self._poll.register(line.socket, select.EPOLLIN)
        line.request, line.due = self._next, due
        self._next = (self._next + 1) % len(self._requests)
        self._waiting[line.socket.fileno()] = line
        line.socket.send(self._requests[line.request])

    def _read(self, wait_s: float) -> list[Answer]:
        """The answers that came meanwhile."""
        answers = []
        for number, _ in self._poll.poll(wait_s):
            if number not in self._waiting:
                # A free one that the server closed.
                self._free.remove(line := next(f for f in self._free if f.socket.fileno() == number))
                line.socket.close()
                continue
            line = self._waiting[number]
            try:
                data = line.socket.recv(1 << 18)
            except OSError:
                data = b""
            line.received += data
            head, found, body = line.received.partition(b"\r\n\r\n")
            if not data:
                answers.append(self._ended(line))
            elif found and complete(head, body):
                answers.append(Answer(line.request, line.due, time.perf_counter(), int(head[9:12]), body))
                line.received = b""
                del self._waiting[number]
                self._free.append(line)
        return answers

    def _ended(self, line: Line) -> Answer:
        del self._waiting[line.socket.fileno()]
        line.socket.close()
        return Answer(line.request, line.due, time.perf_counter(), 0, b"")

    def _give_up(self) -> list[Answer]:
        return [self._ended(line) for line in list(self._waiting.values())]
