"""What a person sees on stderr: notes, and progress bars (plain lines where stderr is no terminal)."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

LINE_EVERY_S = 30.0


class Bar(Protocol):
    """Receives the progress of some work."""

    def advance(self, amount: int, note: str = "") -> None:
        """`amount` more units are done; `note` is shown beside the bar."""


def is_main_process() -> bool:
    """Whether this process writes files and speaks: of several that torchrun started, the first."""
    return os.environ.get("RANK", "0") == "0"


def note(text: str) -> None:
    """One line on stderr."""
    if is_main_process():
        print(f"note: {text}", file=sys.stderr)


def first_few(lines: list[str], count: int = 10) -> str:
    """The first lines of a list, indented, and how many more there are."""
    more = [f"… and {len(lines) - count} more"] if len(lines) > count else []
    return "\n  ".join([*lines[:count], *more])


@contextmanager
def track(title: str, total: int, unit: str = "images", done: int = 0) -> Iterator[Bar]:
    """A bar over `total` units, of which `done` were done before."""
    if not is_main_process():
        yield _Silence()
        return
    if not sys.stderr.isatty():
        yield _Lines(title, total, unit, done)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %  {task.fields[rate]}  {task.fields[note]}"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total, completed=done, rate="", note="")
        start, count = time.monotonic(), 0

        class Rich:
            def advance(self, amount: int, note: str = "") -> None:
                nonlocal count
                count += amount
                rate = f"{count / max(time.monotonic() - start, 1e-9):.0f} {unit}/s"
                progress.update(task, advance=amount, rate=rate, note=note)

        yield Rich()


class _Silence:
    def advance(self, amount: int, note: str = "") -> None:
        pass


@dataclass
class _Lines:
    """A line every half minute, for log files."""

    title: str
    total: int
    unit: str
    done: int
    start: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)
    count: int = 0

    def advance(self, amount: int, note: str = "") -> None:
        self.done += amount
        self.count += amount
        now = time.monotonic()
        if now - self.last < LINE_EVERY_S and self.done < self.total:
            return
        self.last = now
        rate = self.count / max(now - self.start, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        print(
            f"{self.title}: {self.done}/{self.total}, {rate:.0f} {self.unit}/s, "
            f"{left / 60:.1f} min left  {note}",
            file=sys.stderr,
            flush=True,
        )
