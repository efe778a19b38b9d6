"""What every route works with, and the one way from a request to results."""

import math
from dataclasses import dataclass

from fastapi import Request

from entry.config import Entry
from service.auth import Key, Keys
from service.errors import Problem, overloaded
from service.inference import Engine, Inference, ModelStatus, Results, Work
from service.intake import Intake
from service.limits import priority, while_connected
from service.readiness import Readiness
from service.schemas import Options
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
class Gateway:
    """The parts of a running service."""

    settings: Settings
    engine: Engine
    inference: Inference
    readiness: Readiness
    keys: Keys
    metrics: Metrics

    def default_model(self) -> str | None:
        """The model that answers when none is named."""
        return default_model(self.settings, self.engine)

    def choose(self, options: Options) -> Chosen:
        """The model a request means. Raises Problem: 422 for an unknown one, 503 for one that failed."""
        models = self.engine.models()
        name = self.default_model() if options.model is None else options.model
        status = None if name is None else models.get(name)
        if not models:
            raise overloaded("no model is loaded", 5)
        if status is None and options.model is not None:
            there = ", ".join(models)
            raise Problem(422, "Unknown model", f"no model {options.model!r} here; there are: {there}")
        if status is None or status.entry is None:
            reason = status.reason if status else "no such model is loaded"
            raise overloaded(f"{name} can't be served: {reason}", 5)
        return Chosen(status.entry, _version(status, options.model_version))

    async def infer(
        self,
        request: Request,
        key: Key | None,
        intake: Intake,
        chosen: Chosen,
        levels: tuple[float, ...],
        output: str,
        due: float,
    ) -> Results:
        """Results of a request's images; the caller hanging up ends the work."""
        work = Work(
            items=intake.items,
            model=chosen.entry.name,
            version=chosen.version,
            entry=chosen.entry,
            levels=levels,
            output=output,
            due=due,
            priority=priority(request),
            headers={name: request.headers[name] for name in TRACE_HEADERS if name in request.headers},
            admitted=lambda: self.keys.take(key, len(intake.items)),
        )
        results = await while_connected(request, self.inference.run(work))
        if results.rows:
            self.readiness.answered(chosen.entry.name)
        return results


def default_model(settings: Settings, engine: Engine) -> str | None:
    """PRG_DEFAULT_MODEL, else the first by name of those that can be served, else the first."""
    models = engine.models()
    usable = (name for name, status in models.items() if status.entry is not None)
    return settings.default_model or next(usable, next(iter(models), None))


def near(value: float, levels: tuple[float, ...]) -> float | None:
    """The level that is meant by `value`, if one is."""
    return next((level for level in levels if math.isclose(level, value, abs_tol=1e-6)), None)


def _version(status: ModelStatus, asked: str | None) -> str:
    if asked is not None and asked not in status.versions:
        known = ", ".join(status.versions)
        raise Problem(
            422, "Unknown model version", f"{status.name} has no version {asked!r}; there are: {known}"
        )
    return asked or status.default_version
