"""All parts against both engines: one table, printed and written into docs/. `make trust` runs it."""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.pages import commit, write_region
from benchmarks.trust import corpus, drain, faults, fuzz, overload, slow
from benchmarks.trust.rows import ENGINES, Row, rows_of, table
from benchmarks.trust.stage import machine
from entry.files import write_atomically

PARTS: dict[ModuleType, tuple[str, ...]] = {
    **dict.fromkeys((overload, slow, drain, faults, corpus), ENGINES),
    fuzz: ("none",),
}
"""Part -> the engines that it runs against."""
PAGE = Path("docs/reliability.md")
RESULTS = Path("docs/results/trust.json")


def main(argv: list[str] | None = None) -> int:
    """Run the parts; 1 where a row did not pass."""
    names = {part.__name__.rpartition(".")[2]: part for part in PARTS}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=names, nargs="+", help="these parts; the others' rows stay")
    arguments = parser.parse_args(argv)
    parts = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    passed, checked_out = True, commit()
    for name in arguments.only or names:
        begun = time.monotonic()
        rows: list[tuple[str, Row]] = []
        for engine in PARTS[names[name]]:
            print(f"{name}, {engine} ...", file=sys.stderr, flush=True)
            rows += [(engine, row) for row in rows_of(name, names[name].run, engine)]
        print(table(rows), flush=True)
        passed &= all(row.passed is not False for _, row in rows)
        parts[name] = {
            "commit": checked_out,
            "machine": machine(),
            "minutes": round((time.monotonic() - begun) / 60, 1),
            "rows": [{"engine": engine, **asdict(row)} for engine, row in rows],
        }
        write_atomically(RESULTS, json.dumps(parts, indent=1).encode() + b"\n")
        write_region(PAGE, "make trust", page(parts))
    return int(not passed)


def page(parts: dict[str, Any]) -> str:
    """The table of all parts, and where and when each ran."""
    rows = [(row.pop("engine"), Row(**row)) for part in parts.values() for row in map(dict, part["rows"])]
    ran: dict[str, list[str]] = {}
    for name, part in parts.items():
        ran.setdefault(f"at commit {part['commit']} on {part['machine']}", []).append(
            f"{name} ({part['minutes']:.0f} min)"
        )
    return "\n\n".join([table(rows), *(f"{', '.join(names)} {where}." for where, names in ran.items())])


if __name__ == "__main__":
    sys.exit(main())
