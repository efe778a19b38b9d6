"""Served models are compiled for this processor in the background, by processes of low priority."""

import asyncio
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from service.engines.threads import in_own_thread
from service.settings import Settings
from service.telemetry import log

if TYPE_CHECKING:
    # For its type alone: at run time it would import torch.
    from entry.runner import Runner

ROOT = Path(__file__).parents[2]
"""Where the packages lie."""


def can_be_compiled(runner: "Runner") -> bool:
    """On a processor and in fp32. Compiled in bf16 by PyTorch 2.13, HIDDEN is wrong, and on a GPU nobody tried."""
    return runner.device.type == "cpu" and runner.entry.precision == "fp32"


class Compiling:
    """One version after another; each is used as soon as it is compiled and proven equal."""

    def __init__(self, settings: Settings) -> None:
        self._cache = settings.compile_cache
        self._most = settings.max_batch
        self._task: asyncio.Task[None] | None = None
        self._warned = False

    def start(self, runners: Sequence["Runner"]) -> None:
        """Begin with those of the runners that are not compiled yet."""
        if self._cache is None:
            return
        waiting = [runner for runner in runners if not runner.compiled and can_be_compiled(runner)]
        if waiting:
            self._task = asyncio.create_task(self._compile(self._cache.absolute(), waiting))

    async def stop(self) -> None:
        """Stop, with the process that compiles."""
        if self._task:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _compile(self, cache: Path, runners: list["Runner"]) -> None:
        from entry.compiled import compiler

        if compiler() is None:
            if not self._warned:
                log.warning("models are not compiled: there is no C++ compiler (CXX, else g++ or clang++)")
            self._warned = True
            return
        for runner in runners:
            try:
                reason = await self._run(runner, cache)
                if not reason and not await in_own_thread(runner.use_compiled, cache, self._most):
                    reason = "it can't be loaded, or its answers differ by more than the entry's tolerance"
            # Whatever it is: TorchScript serves on.
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            about = {"model": runner.entry.name, "version": runner.version}
            if reason:
                log.warning("model not compiled", **about, reason=reason)
            else:
                log.info("model compiled", **about)

    async def _run(self, runner: "Runner", cache: Path) -> str | None:
        """Compile one; why that failed, if it did."""
        what = (str(runner.directory.absolute()), runner.version, str(cache), "--most", str(self._most))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "entry.compile", *what),
            cwd=ROOT,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            _, stderr = await process.communicate()
        except asyncio.CancelledError:
            with suppress(ProcessLookupError):
                process.terminate()
            await process.wait()
            raise
        if process.returncode == 0:
            return None
        return (
            stderr.decode(errors="replace").strip().splitlines() or [f"exit status {process.returncode}"]
        )[-1]
