"""Hundreds of odd or broken images, each beside a good one, three times over: the good one is always answered right.

$PRG_TEST_DATA/odd-images has the files. What the service's processes hold is read after each pass.
"""

import asyncio
import os
import sys
from collections import Counter
from pathlib import Path

from benchmarks.trust.load import client, is_right, random_colour
from benchmarks.trust.rows import Absent, Row, main
from benchmarks.trust.stage import staged
from tests.tiny import png

PASSES = 3
CALLERS = 4
DOCUMENTED = (413, 415, 422)
"""What an image's own error may be."""
GROWTH_MB = 20.0
"""From the second pass to the third."""
MORE_THREADS = 2
"""Likewise: pools begin their threads when they are first needed."""


def odd_images() -> list[bytes]:
    """The files. Raises Absent."""
    folder = Path(os.environ.get("PRG_TEST_DATA") or "/nowhere") / "odd-images"
    files = [path for path in sorted(folder.glob("*/**/*")) if path.is_file()]
    if not files:
        raise Absent("PRG_TEST_DATA names no folder with odd-images/")
    return [path.read_bytes() for path in files]


def run(engine: str) -> list[Row]:
    """The passes."""
    files, statuses, usages = odd_images(), Counter[int](), []
    wrong: list[str] = []
    with staged(engine) as stage:
        for _ in range(PASSES):
            asyncio.run(one_pass(stage.gateway.url, files, statuses, wrong))
            usages.append(stage.gateway.usage())
    errors = ", ".join(f"{n:,} {status}" for status, n in sorted(statuses.items()) if status != 200)
    first, second, third = usages[0], *usages[-2:]
    kept = f"{first.memory_mb:.0f}, {second.memory_mb:.0f}, {third.memory_mb:.0f} MB"
    flat = (
        third.memory_mb - second.memory_mb < GROWTH_MB
        and third.files <= second.files
        and third.threads <= second.threads + MORE_THREADS
    )
    done = f"{len(files)} odd files, each beside a good one, {PASSES} passes"
    example = f" ({wrong[0]})" if wrong else ""
    answers = f"{len(wrong)} wrong{example}; of the odd ones {statuses[200]:,} embedded, {errors}"
    return [
        Row("corpus", done, answers, f"the good one right, the other answered or {DOCUMENTED}", not wrong),
        Row(
            "corpus, what is kept",
            "the service's processes after each pass",
            f"{kept}; {second.files}, {third.files} files; {second.threads}, {third.threads} threads",
            f"third at most {GROWTH_MB:g} MB and {MORE_THREADS} threads above the second, files flat",
            flat,
        ),
    ]


async def one_pass(url: str, files: list[bytes], statuses: Counter[int], wrong: list[str]) -> None:
    """Every file once."""
    waiting = iter(files)

    async def caller() -> None:
        for odd in waiting:
            colour = random_colour()
            response = await http.post("/embed", files=[("files", ("a", png(colour))), ("files", ("b", odd))])
            if response.status_code != 200:
                wrong.append(f"{response.status_code}: {response.text[:200]}")
                continue
            good, other = response.json()["data"]
            if not is_right(good.get("embedding", []), colour, "1"):
                wrong.append(f"{colour} was answered {good}")
            status = other["error"]["status"] if "error" in other else 200
            statuses[status] += 1
            if status not in (200, *DOCUMENTED):
                wrong.append(f"{other['error']}")

    async with client(url) as http:
        await asyncio.gather(*(caller() for _ in range(CALLERS)))


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
