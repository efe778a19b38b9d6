"""What every route works with, and the one way from a request to results."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from fastapi import Request

from entry.config import Entry
from entry.images import ImageError
from entry.vectors import unit_length
from service.admission import Admission
from service.auth import Key, Keys
from service.decoding import Decoder
from service.engines.contract import DeadlineExceeded, Engine, EngineOverloaded, EngineUnavailable, Job
from service.errors import DEADLINE_EXCEEDED, UNKNOWN_MODEL, UNKNOWN_MODEL_VERSION, Problem, unavailable
from service.intake import Item
from service.limits import priority, while_connected
from service.readiness import Readiness
from service.settings import Settings
from service.telemetry import Metrics

TRACE_HEADERS = ("traceparent", "tracestate")
"""W3C Trace Context."""


@dataclass(frozen=True)
class Chosen:
    """The model and version that answer a request."""

    entry: Entry
    version: str

    def facts(self) -> dict[str, str]:
        """How the answer names them."""
        return {
            "model": self.entry.name,
            "model_version": self.version,
            "fingerprint": self.entry.fingerprint(self.version),
        }


@dataclass(frozen=True)
class Results:
    """What became of a request's images: the errors by index, and the values of the others in their order."""

    errors: dict[int, ImageError]
    values: np.ndarray  # float32 [good images, levels, D]

    @property
    def count(self) -> int:
        """Of all images."""
        return len(self.errors) + len(self.values)

    def normalized(self) -> "Results":
        """The same with each vector scaled to length 1."""
        return Results(self.errors, unit_length(self.values))


class Gateway:
    """The parts of a running service."""

    def __init__(self, settings: Settings, engine: Engine, keys: Keys, metrics: Metrics) -> None:
        self.settings = settings
        self.engine = engine
        self.keys = keys
        self.metrics = metrics
        self.readiness = Readiness(engine, self.default_model)
        self.admission = Admission(settings.queue_images, metrics)
        self._decoder = Decoder(settings, metrics)

    async def close(self) -> None:
        """Stop the engine, then free what decodes."""
        await self.engine.close()
        await self._decoder.close()

    def states(self) -> dict[str, str]:
        """State of each model by name, for the log."""
        return {name: status.state for name, status in self.engine.models().items()}

    def default_model(self) -> str | None:
        """PRG_DEFAULT_MODEL, else the first by name of those that can be served, else the first."""
        models = self.engine.models()
        usable = (name for name, status in models.items() if status.entry is not None)
        return self.settings.default_model or next(usable, next(iter(models), None))

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
        output: str,
        due: float,
    ) -> Results:
        """Results of a request's images; the caller hanging up ends the work. Raises Problem."""
        entry, version = chosen.entry, chosen.version
        queue = priority(request)
        trace = {name: request.headers[name] for name in TRACE_HEADERS if name in request.headers}

        async def work() -> Results:
            # What is refused has cost nothing: neither the key's rate, nor the decoding of a byte.
            with self.admission.admit(len(items) * len(levels)):
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
                    fingerprint=entry.fingerprint(version),
                    images=np.repeat(np.stack(images), len(levels), axis=0),
                    t_end=np.tile(np.array(levels, np.float32), len(images)),
                    outputs=(output,),
                    due=due,
                    priority=queue,
                    headers=trace,
                )
                values = (await self._compute(job))[output]
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
