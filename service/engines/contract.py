"""What an engine must be: its protocol, its jobs, its errors, and how it describes its models."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np

from entry.config import Entry, Fingerprints
from service.schemas import Priority


class EngineError(Exception):
    """Every way an engine can fail: EngineOverloaded | EngineUnavailable | DeadlineExceeded."""


class EngineOverloaded(EngineError):
    """Its queue is full; nothing is broken."""


class EngineUnavailable(EngineError):
    """It is down, failing, or answered with nonsense."""


class DeadlineExceeded(EngineError):
    """The job was dropped because its time was up."""


State = Literal["ready", "loading", "not loaded", "failed"]
"""Ready: it serves. Loading: it does not serve yet. Not loaded: a Triton has it, but never loaded it. Callers see
`failed` for all but the first, with a reason that says which; the log has the state itself."""


@dataclass(frozen=True)
class ModelStatus:
    """A model as the engine has it. One that is not ready has a reason, and its entry if that is known."""

    name: str
    entry: Entry | None
    versions: tuple[str, ...] = ()
    """Those served, ascending."""
    reason: str | None = None
    state: State = "ready"
    failed_versions: Mapping[str, str] = field(default_factory=dict)
    """Those that can't be served, with the reason, while others are."""

    @property
    def ready(self) -> bool:
        """Whether it serves."""
        return self.state == "ready"

    @property
    def default_version(self) -> str:
        """The highest served."""
        return self.versions[-1]

    @property
    def fingerprints(self) -> dict[str, Fingerprints]:
        """Of the versions served."""
        return {v: self.entry.fingerprints(v) for v in self.versions} if self.entry else {}

    @property
    def modules(self) -> dict[str, str]:
        """The sha256 of the modules served, by version."""
        return {v: self.entry.prg.versions[v].sha256 for v in self.versions} if self.entry else {}


RELOADING = "the repository is being read again; until that is done it is served as it was"


def while_loading(models: Mapping[str, ModelStatus], loading: Collection[str]) -> Mapping[str, ModelStatus]:
    """The models, sorted by name, while some are being loaded: one that serves goes on, and says it may change."""
    seen = dict(models)
    for name in loading:
        status = models.get(name)
        if status and status.ready:
            seen[name] = replace(status, reason=RELOADING)
        else:
            status = status or ModelStatus(name, None)
            seen[name] = replace(status, reason="it is being loaded", state="loading")
    return dict(sorted(seen.items()))


def for_metrics(
    models: Mapping[str, ModelStatus],
) -> dict[str, tuple[bool, Mapping[str, Fingerprints]]]:
    """Name -> (whether it serves, fingerprints by version)."""
    return {name: (status.ready, status.fingerprints) for name, status in models.items()}


@dataclass(frozen=True)
class Job:
    """Rows to compute: an image at a level each."""

    model: str
    version: str
    sha256: str
    """Of the module that the request chose: an engine that has another by now refuses."""
    images: np.ndarray  # uint8 [N, 3, S, S]
    t_end: np.ndarray  # float32 [N]
    outputs: tuple[str, ...]
    """Names of the outputs to compute, of those that the entry has."""
    due: float
    """The loop's time after which nobody waits for it."""
    priority: Priority = "interactive"
    headers: Mapping[str, str] = field(default_factory=dict)
    """Passed on to a remote engine: the trace that the request belongs to."""
    alone: bool = False
    """Nothing else is in work, so there is no company to wait for."""


class Engine(Protocol):
    """The one seam between the gateway and what computes."""

    async def start(self) -> None:
        """Make the models ready; one that can't be is a failed status, not an exception."""

    async def close(self) -> None:
        """Stop; jobs in flight are finished or fail."""

    def models(self) -> Mapping[str, ModelStatus]:
        """All models by name, in the order of names."""

    async def infer(self, job: Job) -> dict[str, np.ndarray]:
        """The job's outputs, float32 [N, D] each. Raises EngineError; cancelling it drops the job."""

    async def rescan(self) -> None:
        """Look at the repository again."""
