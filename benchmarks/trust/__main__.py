"""All parts against both engines: one table, printed and written into docs/. `make trust` runs it."""

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

from benchmarks.trust import corpus, drain, faults, fuzz, overload, slow
from benchmarks.trust.rows import ENGINES, Row, rows_of, table
from benchmarks.trust.stage import machine

PARTS: dict[ModuleType, tuple[str, ...]] = {
    **dict.fromkeys((overload, slow, drain, faults, corpus), ENGINES),
    fuzz: ("none",),
}
"""Part -> the engines that it runs against."""
PAGE = Path("docs/reliability.md")
RESULTS = Path("docs/results/trust.json")
PLACE = re.compile(r"(?<=<!-- make trust writes what follows -->\n).*?(?=<!-- to here -->)", re.DOTALL)


def main(argv: list[str] | None = None) -> int:
    """Run the parts; 1 where a row did not pass."""
    names = {part.__name__.rpartition(".")[2]: part for part in PARTS}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=names, nargs="+", help="these parts; nothing is written then")
    arguments = parser.parse_args(argv)
    rows: list[tuple[str, Row]] = []
    begun = time.monotonic()
    for name in arguments.only or names:
        for engine in PARTS[names[name]]:
            print(f"{name}, {engine} ...", file=sys.stderr, flush=True)
            rows += [(engine, row) for row in rows_of(name, names[name].run, engine)]
    minutes = (time.monotonic() - begun) / 60
    where = f"`make trust` at commit {commit()}, {machine()}; {minutes:.0f} minutes."
    print(f"\n{table(rows)}\n\n{where}")
    if not arguments.only:
        PAGE.write_text(
            PLACE.sub(lambda _: f"\n{table(rows)}\n\n{where}\n\n", PAGE.read_text("utf-8")), "utf-8"
        )
        facts = {
            "commit": commit(),
            "machine": machine(),
            "system": platform.platform(),
            "minutes": round(minutes, 1),
            "rows": [{"engine": engine, **asdict(row)} for engine, row in rows],
        }
        RESULTS.write_text(json.dumps(facts, indent=1) + "\n")
    return int(any(row.passed is False for _, row in rows))


def commit() -> str:
    """The one that is checked out; with a + where the tree differs."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
