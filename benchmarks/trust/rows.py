"""A row of the table, and the command line of a part."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass

ENGINES = ("embedded", "triton")
PASSED = {True: "yes", False: "**no**", None: "skipped"}


class Absent(Exception):
    """What a part needs is not on this machine; the message says what."""


@dataclass(frozen=True)
class Row:
    """One thing that was done."""

    name: str
    done: str
    figure: str
    """What was measured; of a skipped row, why it was."""
    limit: str
    passed: bool | None


Run = Callable[[str], list[Row]]


def skipped(name: str, reason: str) -> Row:
    """A row for what can't be done here."""
    return Row(name, "", reason, "", None)


def rows_of(name: str, run: Run, engine: str) -> list[Row]:
    """A part's rows; one that says so where what it needs is absent."""
    try:
        return run(engine)
    except Absent as error:
        return [skipped(name, str(error))]


def table(rows: Iterable[tuple[str, Row]]) -> str:
    """Markdown, of (engine, row)."""
    lines = ["| what | engine | done | figure | limit | passed |", "|---|---|---|---|---|---|"]
    for engine, row in rows:
        cells = (row.name, engine, row.done, row.figure, row.limit, PASSED[row.passed])
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def main(doc: str | None, run: Run, engines: tuple[str, ...] = ENGINES) -> int:
    """The command line of a part alone: its table; 1 where a row did not pass."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=engines, action="append", help="by default all")
    chosen = parser.parse_args().engine or engines
    rows = [(engine, row) for engine in chosen for row in rows_of("this part", run, engine)]
    print(table(rows))
    return int(any(row.passed is False for _, row in rows))
