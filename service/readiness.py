"""Readiness: the default model answered a request, or else a canary, not long ago."""

import asyncio
import math
from collections.abc import Callable

import numpy as np

from service.engines.contract import Engine, EngineOverloaded, Job
from service.telemetry import log

FRESH_S = 30.0
"""An answer proves the engine for this long."""
CANARY_EVERY_S = 10.0
CANARY_TIMEOUT_S = 10.0


class Readiness:
    """Watches the default model through the engine. A full queue that rejects a canary proves nothing."""

    def __init__(self, engine: Engine, model: Callable[[], str | None]) -> None:
        self._engine = engine
        self._model = model
        self._last = -math.inf
        self._failure = "no model has answered yet"
        self.stopping = False

    def answered(self, model: str) -> None:
        """A real request was answered."""
        if model == self._model():
            self._last = asyncio.get_running_loop().time()

    def reason(self) -> str | None:
        """Why not ready; None where ready."""
        if self.stopping:
            return "the service is stopping"
        if asyncio.get_running_loop().time() - self._last < FRESH_S:
            return None
        return f"{self._model()}: {self._failure}"

    async def watch(self) -> None:
        """Send a canary whenever no answer came for a while; runs until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            if loop.time() - self._last >= CANARY_EVERY_S:
                await self._canary()
            await asyncio.sleep(CANARY_EVERY_S if self.reason() is None else 1.0)

    async def _canary(self) -> None:
        name = self._model() or ""
        status = self._engine.models().get(name)
        if status is None or status.entry is None:
            self._failure = (status and status.reason) or "no such model is loaded"
            self._last = -math.inf
            return
        size = status.entry.prg.image.size
        job = Job(
            model=name,
            version=status.default_version,
            sha256=status.modules[status.default_version],
            images=np.zeros((1, 3, size, size), np.uint8),
            t_end=np.full(1, status.entry.prg.t_end, np.float32),
            outputs=("STATE",),
            due=asyncio.get_running_loop().time() + CANARY_TIMEOUT_S,
        )
        try:
            async with asyncio.timeout(CANARY_TIMEOUT_S):
                await self._engine.infer(job)
        except EngineOverloaded:
            return
        # The watch must go on whatever an engine raises.
        except Exception as error:
            self._failure = f"a canary failed ({str(error) or type(error).__name__})"
            log.warning("canary failed", model=name, reason=self._failure)
            return
        self.answered(name)
