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
from service.engines.contract import DeadlineExceeded, EngineUnavailable, Job
from service.engines.embedded import EmbeddedEngine, load
from service.settings import Settings
from service.telemetry import Metrics
from tests.tiny import tiny_digest, write_tiny_entry

Answer = asyncio.Task[dict[str, np.ndarray]]


class Gate:
    """Lets batches through once it is open, and keeps what was in them."""

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
    folder: Path, delay_s: float = 0.0, is_open: bool = False
) -> AsyncIterator[tuple[EmbeddedEngine, Gate]]:
    write_tiny_entry(folder, size=16)
    batching = {"max_batch": 4, "max_delay_ms": delay_s * 1e3}
    running = EmbeddedEngine(Settings(model_repository=folder, **batching), Metrics())  # type: ignore[arg-type]
    await running.start()
    version = running._models["tiny"].served["1"]
    gate = Gate(version.runner)
    version.runner = gate  # type: ignore[assignment]
    if is_open:
        gate.open.set()
    try:
        yield running, gate
    finally:
        gate.open.set()
        await running.close()


def job(*levels: float, due: float = 1e12, priority: str = "interactive", version: str = "1") -> Job:
    """Rows that are told apart by their level, and by their red."""
    images = np.zeros((len(levels), 3, 16, 16), np.uint8)
    images[:, 0] = (np.array(levels) * 255).astype(np.uint8)[:, None, None]
    t_end, digest = np.array(levels, np.float32), tiny_digest(version)
    return Job("tiny", version, digest, images, t_end, ("HIDDEN",), due, priority)  # type: ignore[arg-type]


async def waiting(running: EmbeddedEngine, *jobs: Job) -> list[Answer]:
    """Jobs that the engine has been handed."""
    tasks = [asyncio.create_task(running.infer(one)) for one in jobs]
    await asyncio.sleep(0)
    return tasks


async def busy(running: EmbeddedEngine, gate: Gate, level: float = 0.9) -> Answer:
    """A job that is being computed."""
    [task] = await waiting(running, job(level))
    await asyncio.to_thread(gate.entered.wait, 10)
    return task


def right(found: dict[str, np.ndarray], *levels: float) -> bool:
    hidden = found["HIDDEN"]
    return bool(np.allclose(hidden[:, 3], levels) and np.allclose(hidden[:, 0], levels, atol=1 / 255))


async def test_each_caller_gets_its_own_rows(tmp_path: Path) -> None:
    async with engine(tmp_path, is_open=True) as (running, gate):
        rng = np.random.default_rng(0)
        wanted = [rng.uniform(0, 1, rng.integers(1, 12)).round(3) for _ in range(40)]
        found = await asyncio.gather(*(running.infer(job(*levels)) for levels in wanted))
        assert all(right(f, *levels) for f, levels in zip(found, wanted, strict=True))
        assert max(map(len, gate.batches)) <= 4
        assert len(gate.batches) < sum(map(len, wanted)) / 2


async def test_waiting_jobs_share_a_batch_and_interactive_ones_go_first(tmp_path: Path) -> None:
    async with engine(tmp_path) as (running, gate):
        first = await busy(running, gate)
        bulk, *others = await waiting(running, job(0.1, 0.2, 0.3, priority="bulk"), job(0.4, 0.5), job(0.6))
        gate.open.set()
        await asyncio.gather(first, bulk, *others)
        assert gate.batches == [[0.9], [0.4, 0.5, 0.6, 0.1], [0.2, 0.3]]
        assert right(bulk.result(), 0.1, 0.2, 0.3)


async def test_a_batch_waits_for_company_but_not_longer_than_the_delay(tmp_path: Path) -> None:
    async with engine(tmp_path, delay_s=0.3, is_open=True) as (running, gate):
        await asyncio.gather(running.infer(job(0.1)), running.infer(job(0.2)))
        await asyncio.gather(running.infer(job(0.1, 0.2, 0.3)), running.infer(job(0.4)))  # full: no wait
        assert gate.batches == [[0.1, 0.2], [0.1, 0.2, 0.3, 0.4]]


async def test_a_batch_waits_for_those_who_have_just_been_answered(tmp_path: Path) -> None:
    async with engine(tmp_path, delay_s=0.5) as (running, gate):
        [first] = await waiting(running, replace(job(0.1), alone=True))
        await asyncio.to_thread(gate.entered.wait, 10)
        [second] = await waiting(running, job(0.2))
        await asyncio.sleep(0.6)
        gate.open.set()
        await first
        [back] = await waiting(running, job(0.1))
        await asyncio.gather(second, back)
        assert gate.batches == [[0.1], [0.2, 0.1]]


async def test_a_job_alone_waits_for_no_company(tmp_path: Path) -> None:
    async with engine(tmp_path, delay_s=1, is_open=True) as (running, gate):
        [alone] = await waiting(running, replace(job(0.1), alone=True))
        await asyncio.sleep(0)
        [later] = await waiting(running, job(0.2))
        await asyncio.gather(alone, later)
        assert gate.batches == [[0.1], [0.2]]


async def test_who_gives_up_or_is_late_is_not_computed(tmp_path: Path) -> None:
    async with engine(tmp_path) as (running, gate):
        now = asyncio.get_running_loop().time()
        await busy(running, gate)
        gone, late, stays = await waiting(running, job(0.1), job(0.2, due=now - 1), job(0.3))
        gone.cancel()
        gate.open.set()
        assert right(await stays, 0.3)
        with pytest.raises(DeadlineExceeded):
            await late
        assert gate.batches == [[0.9], [0.3]]


async def test_closing_fails_what_waits(tmp_path: Path) -> None:
    async with engine(tmp_path) as (running, gate):
        first = await busy(running, gate)
        [other] = await waiting(running, job(0.1))
        closing = asyncio.create_task(running.close())
        await asyncio.sleep(0)
        gate.open.set()
        await closing
        assert right(await first, 0.9)
        with pytest.raises(EngineUnavailable):
            await other


async def test_a_failing_batch_fails_its_jobs_and_no_other(tmp_path: Path) -> None:
    async with engine(tmp_path) as (running, gate):
        gate.fail = True
        doomed = await busy(running, gate, 0.1)
        [other] = await waiting(running, job(0.2))
        gate.open.set()
        with pytest.raises(EngineUnavailable, match="RuntimeError"):
            await doomed
        assert right(await other, 0.2)


async def test_a_job_that_the_model_can_not_take_ends_nothing(tmp_path: Path) -> None:
    async with engine(tmp_path, is_open=True) as (running, _):
        wrong = {"images": np.zeros((1, 3, 8, 8), np.uint8), "sha256": "0" * 64, "outputs": ("NOTHING",)}
        for name, value in wrong.items():
            with pytest.raises(EngineUnavailable):
                await running.infer(replace(job(0.1), **{name: value}))
            assert right(await running.infer(job(0.3)), 0.3)


async def test_weights_replaced_while_a_request_is_under_way_are_not_mixed(tmp_path: Path) -> None:
    async with engine(tmp_path, is_open=True) as (running, _):
        before = job(0.5)
        directory = write_tiny_entry(tmp_path, size=16, versions=("1", "2"))
        (directory / "1" / "model.pt").write_bytes((directory / "2" / "model.pt").read_bytes())
        entry = read_entry(directory)
        entry.prg.versions["1"] = entry.prg.versions["2"]
        write_entry(directory, entry)
        await running.rescan()
        with pytest.raises(EngineUnavailable):
            await running.infer(before)
        after = await running.infer(replace(before, sha256=tiny_digest("2")))
        assert after["HIDDEN"][0, 3] == pytest.approx(0.51)


class Fussy(torch.nn.Module):
    """Takes no batch of two."""

    def forward(self, IMAGE: Tensor, T_END: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert IMAGE.shape[0] == 1
        return T_END.expand(1, 768), T_END.expand(1, 5), T_END.expand(1, 4)


async def test_the_strangest_entry_keeps_no_other_from_serving(tmp_path: Path) -> None:
    for strange, old, new in (
        ("number", '\\"dim\\":768', '\\"dim\\":' + "9" * 20),
        ("depth", '\\"path\\":\\"icfm\\"', '\\"path\\":' + "[" * 100_000),
    ):
        config = write_tiny_entry(tmp_path, strange, size=16) / "config.pbtxt"
        text = config.read_text()
        assert old in text
        config.write_text(text.replace(old, new))
    directory = write_tiny_entry(tmp_path, "batch", size=16, head=False)
    module, entry = directory / "1" / "model.pt", read_entry(directory)
    torch.jit.script(Fussy()).save(str(module))
    version = entry.prg.versions["1"]
    entry.prg.versions["1"] = version.model_copy(update={"sha256": sha256(module)})
    write_entry(directory, entry)
    async with engine(tmp_path, is_open=True) as (running, _):
        ready = {name: status.ready for name, status in running.models().items()}
        assert ready == {"number": False, "depth": False, "batch": False, "tiny": True}
        assert right(await running.infer(job(0.3)), 0.3)


async def test_a_rescan_takes_new_versions_keeps_what_runs_and_survives_bad_ones(tmp_path: Path) -> None:
    async with engine(tmp_path, is_open=True) as (running, gate):
        write_tiny_entry(tmp_path, "second")
        damaged = write_tiny_entry(tmp_path, size=16, versions=("1", "2", "3")) / "3" / "model.pt"
        damaged.write_bytes(damaged.read_bytes()[:-1])
        await running.rescan()
        status = running.models()["tiny"]
        assert running._models["tiny"].served["1"].runner is gate
        assert (status.default_version, status.failed_versions.keys()) == ("2", {"3"})
        assert (await running.infer(job(0.5, version="2")))["HIDDEN"][0, 3] == pytest.approx(0.51)
        (tmp_path / "tiny" / "config.pbtxt").write_text("nonsense")
        (tmp_path / "second" / "config.pbtxt").unlink()
        await running.rescan()
        [status] = running.models().values()
        assert status.entry is not None
        assert "config.pbtxt" in (status.reason or "")
        assert right(await running.infer(job(0.5)), 0.5)


async def test_while_a_rescan_loads_the_models_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, go_on = threading.Event(), threading.Event()

    def slow(*what: object) -> Runner:
        loading.set()
        assert go_on.wait(10)
        return load(*what)  # type: ignore[arg-type]

    async with engine(tmp_path, is_open=True) as (running, _):
        write_tiny_entry(tmp_path, "second")
        monkeypatch.setattr("service.engines.embedded.load", slow)
        rescan = asyncio.create_task(running.rescan())
        await asyncio.to_thread(loading.wait, 10)
        found = running.models()
        assert {name: s.state for name, s in found.items()} == {"second": "loading", "tiny": "ready"}
        assert found["tiny"].reason
        assert right(await running.infer(job(0.5)), 0.5)
        go_on.set()
        await rescan
        assert [(s.state, s.reason) for s in running.models().values()] == [("ready", None)] * 2
