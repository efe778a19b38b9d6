"""What a person sees on stderr: notes, and progress bars (plain lines without a terminal, or without rich)."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec

LINE_EVERY_S = 30.0


@dataclass
class Bar:
    """Receives the progress of some work, and shows it."""

    show: Callable[[int, float, str], None]
    """show(units done, units a second, note)."""
    done: int
    first: int = field(init=False)
    start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.first = self.done

    def advance(self, amount: int, note: str = "") -> None:
        """`amount` more units are done; `note` is shown beside the bar."""
        self.done += amount
        rate = (self.done - self.first) / max(time.monotonic() - self.start, 1e-9)
        self.show(self.done, rate, note)


def world_size() -> int:
    """How many processes the environment speaks of, as torchrun does."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main_process() -> bool:
    """Whether this process writes files and speaks: of several that torchrun started, the first."""
    # A RANK alone, as schedulers leave it behind, is no group of processes.
    return world_size() == 1 or os.environ.get("RANK", "0") == "0"


def note(text: str) -> None:
    """One line on stderr."""
    if is_main_process():
        print(f"note: {text}", file=sys.stderr)


def first_few(lines: list[str], count: int = 10) -> str:
    """The first lines of a list, indented, and how many more there are."""
    more = [f"… and {len(lines) - count} more"] if len(lines) > count else []
    return "\n  ".join([*lines[:count], *more])


@contextmanager
def track(title: str, total: int | None, unit: str = "images", done: int = 0) -> Iterator[Bar]:
    """A bar over `total` units (None: nobody knows), of which `done` were done before."""
    if not is_main_process():
        yield Bar(lambda *_: None, done)
        return
    if not (sys.stderr.isatty() and find_spec("rich")):
        yield Bar(_lines(title, total, unit), done)
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

        def show(done: int, rate: float, note: str) -> None:
            progress.update(task, completed=done, rate=f"{rate:.0f} {unit}/s", note=note)

        yield Bar(show, done)


def _lines(title: str, total: int | None, unit: str) -> Callable[[int, float, str], None]:
    """A line every half minute."""
    last = time.monotonic()

    def show(done: int, rate: float, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_EVERY_S and done != total:
            return
        last = now
        left = f", {(total - done) / max(rate, 1e-9) / 60:.1f} min left" if total else ""
        text = f"{title}: {done}/{total or '?'}, {rate:.0f} {unit}/s{left}  {note}"
        print(text, file=sys.stderr, flush=True)

    return show
