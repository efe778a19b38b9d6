"""The embedded engine and the way to it: batching, order, deadlines, overload, failures."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from entry.config import read_entry, write_entry
from entry.files import sha256
from entry.runner import Runner
from service.engines.contract import DeadlineExceeded, EngineOverloaded, EngineUnavailable, Job
from service.engines.embedded import EmbeddedEngine, load
from service.settings import Settings
from service.telemetry import Metrics
from tests.tiny import tiny_digest, write_tiny_entry


class Gate:
    """Lets batches through one by one, and keeps what was in them."""

    def __init__(self, runner: Runner) -> None:
        self.entry = runner.entry
        self._runner = runner
        self.open = threading.Event()
        self.entered = threading.Event()
        self.batches: list[list[float]] = []
        self.fail = False

    def run(self, images: np.ndarray, t_end: np.ndarray) -> dict[str, np.ndarray]:
        self.batches.append([round(float(t), 3) for t in t_end])
        self.entered.set()
        assert self.open.wait(10)
        if self.fail:
            self.fail = False
            raise RuntimeError("out of memory")
        return self._runner.run(images, t_end)


@asynccontextmanager
async def engine(
    tmp_path: Path, delay_s: float = 0.0, queue: int = 64
) -> AsyncIterator[tuple[EmbeddedEngine, Gate]]:
    write_tiny_entry(tmp_path, size=16)
    settings = Settings(
        model_repository=tmp_path, max_batch=4, max_delay_ms=delay_s * 1e3, queue_images=queue
    )
    running = EmbeddedEngine(settings, Metrics())
    await running.start()
    batcher = running._models["tiny"].batchers["1"]
    gate = Gate(batcher.runner)
    batcher.runner = gate  # type: ignore[assignment]
    try:
        yield running, gate
    finally:
        gate.open.set()
        await running.close()


def job(*levels: float, due: float = 1e12, priority: str = "interactive", version: str = "1") -> Job:
    """Rows that are told apart by their level, and by their red."""
    images = np.zeros((len(levels), 3, 16, 16), np.uint8)
    images[:, 0] = (np.array(levels) * 255).astype(np.uint8)[:, None, None]
    return Job(
        "tiny",
        version,
        tiny_digest(version),
        images,
        np.array(levels, np.float32),
        ("HIDDEN",),
        due,
        priority,
    )  # type: ignore[arg-type]


def right(found: dict[str, np.ndarray], *levels: float) -> bool:
    hidden = found["HIDDEN"]
    return bool(np.allclose(hidden[:, 3], levels) and np.allclose(hidden[:, 0], levels, atol=1 / 255))


async def under_way(gate: Gate) -> None:
    await asyncio.to_thread(gate.entered.wait, 10)
    gate.entered.clear()


def test_each_caller_gets_its_own_rows(tmp_path: Path) -> None:
    async def scene() -> None:
        async with engine(tmp_path, queue=1000) as (running, gate):
            gate.open.set()
            rng = np.random.default_rng(0)
            wanted = [rng.uniform(0, 1, rng.integers(1, 12)).round(3) for _ in range(40)]
            found = await asyncio.gather(*(running.infer(job(*levels)) for levels in wanted))
            assert all(right(f, *levels) for f, levels in zip(found, wanted, strict=True))
            assert max(map(len, gate.batches)) <= 4
            assert len(gate.batches) < sum(map(len, wanted)) / 2

    asyncio.run(scene())


def test_waiting_jobs_share_a_batch_and_interactive_ones_go_first(tmp_path: Path) -> None:
    async def scene() -> None:
        async with engine(tmp_path) as (running, gate):
            first = asyncio.create_task(running.infer(job(0.9)))
            await under_way(gate)
            later = [
                asyncio.create_task(running.infer(job(0.1, 0.2, 0.3, priority="bulk"))),
                asyncio.create_task(running.infer(job(0.4, 0.5))),
                asyncio.create_task(running.infer(job(0.6))),
            ]
            await asyncio.sleep(0)
            gate.open.set()
            await asyncio.gather(first, *later)
            assert gate.batches == [[0.9], [0.4, 0.5, 0.6, 0.1], [0.2, 0.3]]
            assert right(later[0].result(), 0.1, 0.2, 0.3)

    asyncio.run(scene())


def test_a_batch_waits_for_company_but_not_longer_than_the_delay(tmp_path: Path) -> None:
    async def scene() -> None:
        async with engine(tmp_path, delay_s=0.3) as (running, gate):
            gate.open.set()
            await asyncio.gather(running.infer(job(0.1)), running.infer(job(0.2)))
            await asyncio.gather(running.infer(job(0.1, 0.2, 0.3)), running.infer(job(0.4)))  # full: no wait
            assert gate.batches == [[0.1, 0.2], [0.1, 0.2, 0.3, 0.4]]

    asyncio.run(scene())


def test_who_gives_up_or_is_late_is_not_computed(tmp_path: Path) -> None:
    async def scene() -> None:
        async with engine(tmp_path) as (running, gate):
            now = asyncio.get_running_loop().time()
            first = asyncio.create_task(running.infer(job(0.9)))
            await under_way(gate)
            gone = asyncio.create_task(running.infer(job(0.1)))
            late = asyncio.create_task(running.infer(job(0.2, due=now - 1)))
            stays = asyncio.create_task(running.infer(job(0.3)))
            await asyncio.sleep(0)
            gone.cancel()
            gate.open.set()
            assert right(await stays, 0.3)
            with pytest.raises(DeadlineExceeded):
                await late
            await first
            assert gate.batches == [[0.9], [0.3]]

    asyncio.run(scene())


def test_a_full_queue_refuses_and_recovers(tmp_path: Path) -> None:
    async def scene() -> None:
        async with engine(tmp_path, queue=4) as (running, gate):
            first = asyncio.create_task(running.infer(job(0.9)))
            await under_way(gate)
            waiting = asyncio.create_task(running.infer(job(0.1, 0.2, 0.3)))
            await asyncio.sleep(0)
            with pytest.raises(EngineOverloaded, match="3 images are waiting, at most 4"):
                await running.infer(job(0.4, 0.5))
            gate.open.set()
            await asyncio.gather(first, waiting)
            assert right(await running.infer(job(0.4, 0.5)), 0.4, 0.5)

    asyncio.run(scene())


def test_a_failing_batch_fails_its_jobs_and_no_other(tmp_path: Path) -> None:
    async def scene() -> None:
        async with engine(tmp_path) as (running, gate):
            gate.fail = True
            doomed = asyncio.create_task(running.infer(job(0.1)))
            await under_way(gate)
            other = asyncio.create_task(running.infer(job(0.2)))
            await asyncio.sleep(0)
            gate.open.set()
            with pytest.raises(EngineUnavailable, match="RuntimeError"):
                await doomed
            assert right(await other, 0.2)

    asyncio.run(scene())


def test_a_job_that_the_model_can_not_take_fails_alone(tmp_path: Path) -> None:
    async def scene() -> None:
        async with engine(tmp_path) as (running, gate):
            gate.open.set()
            right_one = job(0.1)
            wrong_size = replace(right_one, images=np.zeros((1, 3, 8, 8), np.uint8))
            wrong_weights = replace(right_one, sha256="0" * 64)
            wrong_output = replace(right_one, outputs=("NOTHING",))
            for wrong in (wrong_size, wrong_weights, wrong_output):
                results = await asyncio.gather(
                    running.infer(wrong), running.infer(job(0.2)), return_exceptions=True
                )
                assert isinstance(results[0], EngineUnavailable)
            assert right(await running.infer(job(0.3)), 0.3)

    asyncio.run(scene())


def test_weights_replaced_while_a_request_is_under_way_are_not_mixed(tmp_path: Path) -> None:
    async def scene() -> None:
        async with engine(tmp_path) as (running, gate):
            gate.open.set()
            before = job(0.5)
            path = tmp_path / "tiny" / "1" / "model.pt"
            write_tiny_entry(tmp_path, size=16, versions=("1", "2"))
            path.write_bytes((tmp_path / "tiny" / "2" / "model.pt").read_bytes())
            entry = read_entry(tmp_path / "tiny")
            entry.prg.versions["1"] = entry.prg.versions["2"]
            write_entry(tmp_path / "tiny", entry)
            await running.rescan()
            with pytest.raises(EngineUnavailable, match="replaced"):
                await running.infer(before)
            after = await running.infer(replace(before, sha256=tiny_digest("2")))
            assert after["HIDDEN"][0, 3] == pytest.approx(0.51)

    asyncio.run(scene())


@pytest.mark.parametrize("strange", ["number", "depth", "batch"])
def test_the_strangest_entry_keeps_no_other_from_serving(tmp_path: Path, strange: str) -> None:
    directory = write_tiny_entry(tmp_path, "strange", size=16)
    config = directory / "config.pbtxt"
    if strange == "number":
        config.write_text(config.read_text().replace('\\"dim\\":768', '\\"dim\\":' + "9" * 20))
    elif strange == "depth":
        config.write_text(config.read_text().replace('\\"path\\":\\"icfm\\"', '\\"path\\":' + "[" * 100_000))
    else:

        class Fussy(torch.nn.Module):
            def forward(self, IMAGE: Tensor, T_END: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                assert IMAGE.shape[0] == 1
                return T_END.expand(1, 768), T_END.expand(1, 5), T_END.expand(1, 4)

        directory = write_tiny_entry(tmp_path, "strange", size=16, head=False)
        torch.jit.script(Fussy()).save(str(directory / "1" / "model.pt"))
        entry = read_entry(directory)
        found = {"sha256": sha256(directory / "1" / "model.pt")}
        entry.prg.versions["1"] = entry.prg.versions["1"].model_copy(update=found)
        write_entry(directory, entry)

    async def scene() -> None:
        async with engine(tmp_path) as (running, gate):
            gate.open.set()
            assert not running.models()["strange"].ready
            assert right(await running.infer(job(0.3)), 0.3)

    asyncio.run(scene())


def test_closing_fails_what_waits(tmp_path: Path) -> None:
    async def scene() -> None:
        async with engine(tmp_path) as (running, gate):
            first = asyncio.create_task(running.infer(job(0.9)))
            await under_way(gate)
            waiting = asyncio.create_task(running.infer(job(0.1)))
            await asyncio.sleep(0)
            closing = asyncio.create_task(running.close())
            await asyncio.sleep(0)
            gate.open.set()
            await closing
            assert right(await first, 0.9)
            with pytest.raises(EngineUnavailable, match="stopping"):
                await waiting

    asyncio.run(scene())


def test_a_rescan_takes_new_versions_keeps_what_runs_and_survives_a_bad_one(tmp_path: Path) -> None:
    async def scene() -> None:
        async with engine(tmp_path) as (running, gate):
            gate.open.set()
            write_tiny_entry(tmp_path, size=16, versions=("1", "2"))
            write_tiny_entry(tmp_path, "second")
            await running.rescan()
            assert running._models["tiny"].batchers["1"].runner is gate
            assert running.models()["tiny"].default_version == "2"
            assert (await running.infer(job(0.5, version="2")))["HIDDEN"][0, 3] == pytest.approx(0.51)
            (tmp_path / "tiny" / "config.pbtxt").write_text("nonsense")
            (tmp_path / "second" / "config.pbtxt").unlink()
            await running.rescan()
            status = running.models()["tiny"]
            assert status.entry is not None
            assert "an older state of it is served" in (status.reason or "")
            assert right(await running.infer(job(0.5)), 0.5)
            assert list(running.models()) == ["tiny"]

    asyncio.run(scene())


def test_while_a_rescan_loads_the_models_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loading, go_on = threading.Event(), threading.Event()

    def slow(*what: object) -> Runner:
        loading.set()
        assert go_on.wait(10)
        return load(*what)  # type: ignore[arg-type]

    async def scene() -> None:
        async with engine(tmp_path) as (running, gate):
            gate.open.set()
            write_tiny_entry(tmp_path, "second")
            monkeypatch.setattr("service.engines.embedded.load", slow)
            rescan = asyncio.create_task(running.rescan())
            await asyncio.to_thread(loading.wait, 10)
            found = running.models()
            assert {name: status.state for name, status in found.items()} == {
                "second": "loading",
                "tiny": "ready",
            }
            assert "being read again" in (found["tiny"].reason or "")
            assert right(await running.infer(job(0.5)), 0.5)
            go_on.set()
            await rescan
            assert [(s.state, s.reason) for s in running.models().values()] == [("ready", None)] * 2

    asyncio.run(scene())


def test_a_bad_version_fails_alone(tmp_path: Path) -> None:
    async def scene() -> None:
        async with engine(tmp_path) as (running, gate):
            gate.open.set()
            path = write_tiny_entry(tmp_path, size=16, versions=("1", "2", "3")) / "3" / "model.pt"
            path.write_bytes(path.read_bytes()[:-1])
            (path.parents[1] / "2" / "model.pt").unlink()
            await running.rescan()
            status = running.models()["tiny"]
            assert (status.ready, status.versions) == (True, ("1",))
            assert status.failed_versions.keys() == {"2", "3"}

    asyncio.run(scene())


def test_an_entry_whose_weights_changed_is_refused_and_the_others_serve(tmp_path: Path) -> None:
    async def scene() -> None:
        path = write_tiny_entry(tmp_path, "bad", size=16) / "1" / "model.pt"
        path.write_bytes(path.read_bytes()[:-1])
        async with engine(tmp_path) as (running, gate):
            gate.open.set()
            assert "sha256" in (running.models()["bad"].reason or "")
            assert right(await running.infer(job(0.5)), 0.5)

    asyncio.run(scene())
