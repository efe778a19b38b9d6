"""The image path, fuzzed for a bounded time by atheris (libFuzzer): an image or an ImageError comes out, nothing else.

Seeds are the odd files of $PRG_TEST_DATA, else one picture of each format. A crash, another exception, an input that
takes longer than the limit, or a process that grows beyond the limit ends it; the input is kept.
"""

import argparse
import importlib.util
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from benchmarks.trust.corpus import odd_images
from benchmarks.trust.rows import Absent, Row, rows_of, table
from entry.images import FORMATS

SECONDS = 120
INPUT_S = 10
MEMORY_MB = 1500
MAX_BYTES = 65_536
"""Of an input: mutating larger ones is slow, and they decode like small ones."""


def run(engine: str, seconds: int = SECONDS, keep: str = tempfile.gettempdir()) -> list[Row]:
    """One run; the engine plays no part."""
    if importlib.util.find_spec("atheris") is None:
        raise Absent("no atheris: its packages are for Linux on x86-64")
    with tempfile.TemporaryDirectory(prefix="prg-fuzz-") as folder:
        seeds = Path(folder) / "seeds"
        seeds.mkdir()
        files = [data for data in seed_images() if len(data) <= MAX_BYTES]
        for number, data in enumerate(files):
            (seeds / str(number)).write_bytes(data)
        command = [
            *(sys.executable, "-m", "benchmarks.trust.fuzz_target", str(seeds)),
            f"-max_total_time={seconds}",
            f"-timeout={INPUT_S}",
            f"-rss_limit_mb={MEMORY_MB}",
            f"-max_len={MAX_BYTES}",
            f"-artifact_prefix={keep}/",
            "-print_final_stats=1",
        ]
        # libtiff writes its warnings to the terminal, by the megabyte.
        ended = subprocess.run(command, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    said = ended.stderr.decode(errors="replace") + ended.stdout.decode(errors="replace")
    stats = {name: int(value) for name, value in re.findall(r"stat::(\w+):\s+(\d+)", said)}
    passed = ended.returncode == 0 and bool(stats)
    figure = (
        f"{stats['number_of_executed_units']:,} inputs, slowest {stats['slowest_unit_time_sec']} s, "
        f"at most {stats['peak_rss_mb']} MB"
        if passed
        else f"ended with {ended.returncode}: {found(said)}"
    )
    limit = f"an image or an ImageError, {INPUT_S} s, {MEMORY_MB} MB"
    done = f"{len(files)} seeds, {seconds} s"
    return [Row("image path, fuzzed", done, figure, limit, passed)]


def found(said: str) -> str:
    """What libFuzzer or Python says about the input that ended it."""
    lines = [
        line for line in said.splitlines() if re.search(r"ERROR: |Exception:|Error:|Test unit written", line)
    ]
    return "; ".join(lines[:4]) or said[-300:].strip()


def seed_images() -> list[bytes]:
    """The odd files, or one of each format that can be written."""
    try:
        return odd_images()
    except Absent:
        seeds = []
        Image.init()
        for kind in (kind for kind in FORMATS if kind in Image.SAVE):
            buffer = io.BytesIO()
            Image.linear_gradient("L").convert("RGB").resize((40, 32)).save(buffer, kind)
            seeds.append(buffer.getvalue())
        return seeds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=SECONDS)
    parser.add_argument("--keep", default=tempfile.gettempdir(), help="a folder for an input that ended it")
    arguments = parser.parse_args()
    rows = rows_of("fuzz", lambda engine: run(engine, arguments.seconds, arguments.keep), "")
    print(table([("", row) for row in rows]))
    return int(any(row.passed is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
