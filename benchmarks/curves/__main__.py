"""Speed, memory and start-up against what they depend on, on this machine.

    python -m benchmarks.curves [--only PART...]

Writes docs/results/curves.json, its figures, and the tables of docs/performance.md. Ten minutes on two cores.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.curves import model, service, training
from benchmarks.curves.drawing import draw
from benchmarks.pages import commit, write_region
from benchmarks.trust.stage import machine
from entry.files import write_atomically
from prg.studies.report import Report, table

PARTS = {"model": model.run, "service": service.run, "start": service.starts, "training": training.run}
TITLES = {
    "batch": "The extractor as it is served, by the size of the batch:",
    "steps": "`prg-everyday` with other numbers of Euler steps, 32 images a batch:",
    "image size": "Its network made for other sizes of image, one step, 32 images a batch:",
    "time embedding": "What depends on t alone, at most, and the whole extraction, both eager:",
    "photo size": "prg-serve with `prg-everyday`, 16 callers, one JPEG a request, by its size:",
    "callers": "The same with JPEGs of 640 × 480, by the number of callers:",
    "start": "From exec to `/health/ready`, files cached, medians of three starts; compiling, of one:",
    "while compiling": "What is served before, while and after `PRG_COMPILE_CACHE` has the model compiled:",
    "training": "Fine-tuning of `prg-everyday`, 32 images a step, by steps of the solve:",
}
FIGURES = {"steps": "curves-model.png", "callers": "curves-service.png"}
"""After which table each is shown."""
PAGE = Path("docs/performance.md")
RESULTS = Path("docs/results/curves.json")


def main(argv: list[str] | None = None) -> int:
    """Measure the parts, and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, nargs="+", help="these parts; the others' figures stay")
    arguments = parser.parse_args(argv)
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    at = commit()
    for name in arguments.only or PARTS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        begun = time.monotonic()
        curves = PARTS[name]()
        minutes = round((time.monotonic() - begun) / 60, 1)
        facts = {"commit": at, "machine": machine(), "torch": torch.__version__, "minutes": minutes}
        results[name] = facts | {"curves": curves}
        write_atomically(RESULTS, json.dumps(results, indent=1, ensure_ascii=False).encode() + b"\n")
    if missing := PARTS.keys() - results:
        print(f"no page is written: {', '.join(missing)} not measured yet", file=sys.stderr)
        return 1
    draw({name: rows for part in results.values() for name, rows in part["curves"].items()})
    text = page(results)
    write_region(PAGE, "benchmarks.curves", text)
    print(text)
    return 0


def page(results: dict[str, Any]) -> str:
    """The tables with their figures, and where each part was measured."""
    paragraphs: list[str] = []
    measured: dict[str, list[str]] = {}
    for part in PARTS:
        facts = results[part]
        for name, rows in facts["curves"].items():
            columns = tuple(dict.fromkeys(column for row in rows for column in row))
            cells = [tuple(row.get(column) for column in columns) for row in rows]
            paragraphs += [TITLES[name], table(Report("", "", columns, cells))]
            if name in FIGURES:
                paragraphs.append(f"![By {name}](results/{FIGURES[name]})")
        where = f"commit {facts['commit']}, {facts['machine']}, PyTorch {facts['torch']}"
        measured[where] = [*measured.get(where, []), f"{part} {facts['minutes']}"]
    ran = "; ".join(f"{where} (minutes: {', '.join(parts)})" for where, parts in measured.items())
    paragraphs.append(f"`python -m benchmarks.curves`, {ran}.")
    return "\n\n".join(paragraphs)


if __name__ == "__main__":
    sys.exit(main())
