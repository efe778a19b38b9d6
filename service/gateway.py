"""What every route works with, and the one way from a request to results."""

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np
from fastapi import Request

from entry.config import Entry
from entry.images import ImageError
from entry.vectors import unit_length
from service import tracing
from service.admission import Admission, Flow
from service.auth import Key, Keys
from service.decoding import Decoder
from service.engines.contract import DeadlineExceeded, Engine, EngineOverloaded, EngineUnavailable, Job
from service.errors import DEADLINE_EXCEEDED, UNKNOWN_MODEL, UNKNOWN_MODEL_VERSION, Problem, unavailable
from service.intake import Item
from service.limits import priority, while_connected
from service.readiness import Readiness
from service.settings import Settings
from service.telemetry import Metrics, log

TRACE_HEADERS = ("traceparent", "tracestate")
"""W3C Trace Context."""


@dataclass(frozen=True)
class Chosen:
    """The model and version that answer a request."""

    entry: Entry
    version: str

    def facts(self, of: Literal["encoder", "model"]) -> dict[str, str]:
        """How the answer names them; the fingerprint is of what made it."""
        return {
            "model": self.entry.name,
            "model_version": self.version,
            "fingerprint": getattr(self.entry.fingerprints(self.version), of),
        }


@dataclass(frozen=True)
class Results:
    """What became of a request's images: the errors by index, and the values of the others in their order."""

    errors: dict[int, ImageError]
    values: np.ndarray  # float32 [good images, levels, D], the outputs asked for side by side

    @property
    def count(self) -> int:
        """Of all images."""
        return len(self.errors) + len(self.values)

    def vectors(self, dim: int, normalize: bool) -> "Results":
        """The first `dim` numbers of each vector, on request scaled to length 1."""
        values = self.values[..., :dim]
        return Results(self.errors, unit_length(values) if normalize else values)


class Gateway:
    """The parts of a running service."""

    def __init__(
        self, settings: Settings, engine: Engine, keys: Keys, admission: Admission, metrics: Metrics
    ) -> None:
        self.settings = settings
        self.engine = engine
        self.keys = keys
        self.metrics = metrics
        self.readiness = Readiness(engine, self.default_model)
        self.admission = admission
        metrics.queue_limit.set(settings.queue_images)
        self._decoder = Decoder(settings, metrics)
        self._default = settings.default_model or None

    async def close(self) -> None:
        """Stop the engine, then free what decodes."""
        await self.engine.close()
        await self._decoder.close()

    def states(self) -> dict[str, str]:
        """State of each model by name, for the log."""
        return {name: status.state for name, status in self.engine.models().items()}

    def default_model(self) -> str | None:
        """PRG_DEFAULT_MODEL, else the first by name of those that were served when the first was.

        From then on that one: whatever a reload brings or takes, an unnamed request never moves to another model.
        """
        models = self.engine.models()
        if self._default is None:
            served = [name for name, status in models.items() if status.ready]
            if served:
                self._default = served[0]
                why = f"the first by name of {len(served)} that are served; PRG_DEFAULT_MODEL names another"
                log.info("default model", model=served[0], why=why if served[1:] else "the only one")
        return self._default or next(iter(models), None)

    def choose(self, model: str | None, version: str | None = None) -> Chosen:
        """The model a request means. Raises Problem: 422 for an unknown one, 503 for one that failed."""
        models = self.engine.models()
        if not models:
            raise unavailable("no model is loaded", 5)
        name = self.default_model() if model is None else model
        status = models.get(name or "")
        if status is None and model is not None:
            raise Problem(UNKNOWN_MODEL, f"no model {model!r} here; there are: {', '.join(models)}")
        if status is None or status.entry is None:
            reason = status.reason if status else "no such model is loaded"
            raise unavailable(f"{name} can't be served: {reason}", 5)
        if version is not None and version in status.failed_versions:
            raise unavailable(
                f"{name} version {version} can't be served: {status.failed_versions[version]}", 5
            )
        if version is not None and version not in status.versions:
            known = ", ".join(status.versions)
            raise Problem(UNKNOWN_MODEL_VERSION, f"{name} has no version {version!r}; there are: {known}")
        return Chosen(status.entry, version or status.default_version)

    async def infer(
        self,
        request: Request,
        key: Key | None,
        items: Sequence[Item],
        chosen: Chosen,
        levels: tuple[float, ...],
        outputs: tuple[str, ...],
        due: float,
    ) -> Results:
        """Results of a request's images; the caller hanging up ends the work. Raises Problem."""
        entry, version = chosen.entry, chosen.version
        flow = Flow(priority(request), key.name if key else "")
        trace = {name: request.headers[name] for name in TRACE_HEADERS if name in request.headers}

        async def work() -> Results:
            rows = len(items) * len(levels)
            with ExitStack() as places:
                # What is refused has cost nothing: neither the key's rate, nor the decoding of a byte.
                with tracing.span("admission", rows=rows):
                    if expected := request.scope.get("state", {}).get("expected"):
                        expected.leave()
                    wait_s = due - asyncio.get_running_loop().time()
                    places.enter_context(self.admission.admit(rows, flow, wait_s))
                    self.keys.take(key, len(items))
                decoded = await self._decoder.decode(items, entry.prg.image)
                images = [image for image in decoded if not isinstance(image, ImageError)]
                errors = {i: error for i, error in enumerate(decoded) if isinstance(error, ImageError)}
                self.metrics.images(entry.name, len(images), len(errors), key.name if key else None)
                if not images:
                    return Results(errors, np.empty((0, len(levels), 0), np.float32))
                job = Job(
                    model=entry.name,
                    version=version,
                    sha256=entry.prg.versions[version].sha256,
                    images=np.repeat(np.stack(images), len(levels), axis=0),
                    t_end=np.tile(np.array(levels, np.float32), len(images)),
                    outputs=outputs,
                    due=due,
                    priority=flow.priority,
                    headers=trace,
                    alone=self.admission.held == rows,
                )
                computed = await self._compute(job)
                values = np.concatenate([computed[name] for name in outputs], axis=1)
            return Results(errors, values.reshape(len(images), len(levels), -1))

        results = await while_connected(request, work())
        if len(results.values):
            self.readiness.answered(entry.name)
        return results

    async def _compute(self, job: Job) -> dict[str, np.ndarray]:
        """The engine's outputs. Raises Problem where it fails: that fails the whole request."""
        try:
            outputs = await self.engine.infer(job)
        except EngineOverloaded as error:
            self.metrics.rejected("engine queue")
            raise unavailable(str(error), self.admission.retry_after_s()) from None
        except EngineUnavailable as error:
            self.metrics.rejected("engine failure")
            raise unavailable(f"the model can't answer: {error}", 1) from None
        except DeadlineExceeded as error:
            raise Problem(DEADLINE_EXCEEDED, str(error)) from None
        if not all(np.isfinite(values).all() for values in outputs.values()):
            raise unavailable(f"{job.model}: the model answered with numbers that are not finite", 30)
        return outputs
