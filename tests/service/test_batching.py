"""The batcher by itself: how many batches are in work."""

import asyncio

import numpy as np
import pytest

from service.engines.batching import Batcher, Rules
from service.engines.contract import Job
from service.telemetry import Metrics

FULL = 4


def job(rows: int) -> Job:
    images, levels = np.zeros((rows, 3, 16, 16), np.uint8), np.ones(rows, np.float32)
    return Job("tiny", "1", "0" * 64, images, levels, ("state",), 1e12)


@pytest.mark.parametrize(
    ("ahead_s", "rows", "in_work"),
    [(60.0, (4, 4, 4), [4, 4]), (60.0, (4, 3), [4]), (0.0, (4, 4), [4])],
)
async def test_where_batches_are_short_one_full_one_is_handed_over_ahead(
    ahead_s: float, rows: tuple[int, ...], in_work: list[int]
) -> None:
    is_open, begun = asyncio.Event(), list[int]()

    async def compute(batch: Job) -> dict[str, np.ndarray]:
        begun.append(len(batch.images))
        await is_open.wait()
        return {"state": np.zeros((len(batch.images), 1), np.float32)}

    batcher = Batcher(compute, Rules(FULL, FULL, ahead_s=ahead_s), Metrics())
    is_open.set()
    await batcher.infer(job(1))
    is_open.clear()
    begun.clear()
    answers = [asyncio.create_task(batcher.infer(job(n))) for n in rows]
    for _ in range(10):
        await asyncio.sleep(0)
    assert begun == in_work
    is_open.set()
    assert [len((await answer)["state"]) for answer in answers] == list(rows)
    assert begun == list(rows)
