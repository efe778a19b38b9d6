"""The embedded engine: models in this process, behind dynamic batching."""

import asyncio
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from entry.config import Entry, EntryError, find_entries
from service.engines.batching import Batcher, Rules
from service.engines.compiling import Compiling, can_be_compiled
from service.engines.contract import EngineUnavailable, Job, ModelStatus, for_metrics, while_loading
from service.engines.threads import in_own_thread
from service.settings import Settings
from service.telemetry import Metrics, log

if TYPE_CHECKING:
    # At run time only where a model is loaded, because it imports torch.
    from entry.runner import Runner

WARM_UP_CALLS = 3
"""TorchScript compiles in its first calls."""
AHEAD_S = 0.05
"""As a GPU's batches are."""


class _Version:
    """A version that is served: its module behind a batcher. All compute in one thread."""

    def __init__(
        self, runner: "Runner", settings: Settings, thread: ThreadPoolExecutor, metrics: Metrics
    ) -> None:
        self.runner = runner
        self._thread = thread
        most, delay_s = settings.max_batch, settings.max_delay_ms / 1e3
        self.batcher = Batcher(self._compute, Rules(most, most, delay_s, ahead_s=AHEAD_S), metrics)

    async def _compute(self, job: Job) -> dict[str, np.ndarray]:
        run = asyncio.get_running_loop().run_in_executor
        return await run(self._thread, self.runner.run, job.images, job.t_end)


@dataclass
class _Model:
    """A model as it was last seen: its status, and what is served of it, by version."""

    status: ModelStatus
    served: dict[str, _Version] = field(default_factory=dict)


class EmbeddedEngine:
    """Implements the Engine protocol with entry.runner."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._repository = settings.model_repository
        self._chosen = settings.chosen_models
        self._metrics = metrics
        self._models: dict[str, _Model] = {}
        self._thread = ThreadPoolExecutor(1, "compute")
        self._compiling = Compiling(settings)
        self._rescanning = asyncio.Lock()
        self._loading: frozenset[str] = frozenset()

    async def start(self) -> None:
        """Load every chosen entry."""
        await self.rescan()

    async def close(self) -> None:
        """Finish the batch in progress; whatever waits fails."""
        await self._compiling.stop()
        for model in self._models.values():
            for version in model.served.values():
                await version.batcher.close()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def models(self) -> Mapping[str, ModelStatus]:
        """All models by name."""
        return while_loading(self._statuses(), self._loading)

    def _statuses(self) -> dict[str, ModelStatus]:
        return {name: model.status for name, model in self._models.items()}

    async def infer(self, job: Job) -> dict[str, np.ndarray]:
        """The job's outputs. Raises EngineError."""
        model = self._models.get(job.model)
        version = model.served.get(job.version) if model else None
        if version is None:
            raise EngineUnavailable(f"{job.model} version {job.version} is not loaded")
        prg, size = version.runner.entry.prg, job.images.shape[2]
        if (prg.versions[job.version].sha256, prg.image.size) != (job.sha256, size):
            raise EngineUnavailable("the model was replaced while the request was under way")
        return await version.batcher.infer(job)

    async def rescan(self) -> None:
        """Load what is new, keep what is unchanged, drop what is gone.

        Where a model that serves can't be loaded in its new form, the old one goes on serving and its
        status has the reason: a slip in the repository must not take a working model down.
        """
        async with self._rescanning:
            await self._compiling.stop()
            found = await asyncio.to_thread(self._found)
            wanted = {n: e for n, e in found.items() if self._chosen is None or n in self._chosen}
            self._loading = frozenset(wanted)
            try:
                fresh = {name: await self._refreshed(name, entry) for name, entry in wanted.items()}
            finally:
                self._loading = frozenset()
            kept = {version for model in fresh.values() for version in model.served.values()}
            old = {version for model in self._models.values() for version in model.served.values()} - kept
            self._models = fresh
            self._compiling.start([v.runner for model in fresh.values() for v in model.served.values()])
        for version in old:
            await version.batcher.drain()
        self._metrics.models(for_metrics(self._statuses()))

    def _found(self) -> dict[str, Entry | EntryError]:
        """The entries as they will answer here."""
        found = find_entries(self._repository)
        if self._settings.precision == "entry":
            return found
        return {n: replace(e, computed_in="bf16") if isinstance(e, Entry) else e for n, e in found.items()}

    async def _refreshed(self, name: str, found: Entry | EntryError) -> _Model:
        before = self._models.get(name)
        served: dict[str, _Version] = {}
        try:
            if isinstance(found, EntryError):
                raise found
            chosen = self._chosen.get(found.name) if self._chosen else None
            listed = found.failed_versions.items()
            failed = {v: self._reason(r) for v, r in listed if chosen is None or v in chosen}
            for version in self._versions(found, chosen):
                try:
                    served[version] = await self._version(before, found, version)
                # Also what torch raises for a strange module: the other versions must serve.
                except Exception as error:
                    failed[version] = self._reason(error)
            if not served:
                raise EntryError("; ".join(failed.values()))
        except EntryError as error:
            reason = self._reason(error)
            log.error("entry refused", model=name, reason=reason)
            if before and before.served and before.status.entry:
                kept = f"an older state of it is served, because: {reason}"
                status = ModelStatus(name, before.status.entry, before.status.versions, kept)
                return _Model(status, before.served)
            return _Model(ModelStatus(name, None, reason=reason, state="failed"))
        for version, reason in failed.items():
            log.error("version refused", model=name, version=version, reason=reason)
        return _Model(ModelStatus(name, found, tuple(served), failed_versions=failed), served)

    def _reason(self, error: object) -> str:
        """What callers may read of it: files by their place in the repository, not on this machine."""
        return str(error).replace(f"{self._repository}{os.sep}", "")

    def _versions(self, entry: Entry, chosen: frozenset[str] | None) -> tuple[str, ...]:
        """The versions to try, ascending."""
        missing = set(chosen or ()) - entry.prg.versions.keys()
        if missing:
            raise EntryError(
                f"{self._repository / entry.name}: PRG_MODELS wants version {min(missing)}, "
                f"there are: {', '.join(entry.prg.versions)}"
            )
        return tuple(v for v in entry.usable_versions if chosen is None or v in chosen)

    async def _version(self, before: _Model | None, entry: Entry, version: str) -> _Version:
        """The one that runs already if its weights and facts are the same, or else a new one."""
        old = before.served.get(version) if before else None
        if old and _same(old.runner.entry, entry, version):
            return old
        directory = self._repository / entry.name
        runner = await in_own_thread(load, directory, version, self._settings)
        log.info(
            "model loaded",
            model=entry.name,
            version=version,
            device=str(runner.device),
            precision=runner.entry.precision,
            compiled=bool(runner.compiled),
        )
        return _Version(runner, self._settings, self._thread, self._metrics)


def load(directory: Path, version: str, settings: Settings) -> "Runner":
    """A version loaded and compiled for single images and whole batches. Raises EntryError."""
    from entry.runner import Runner

    runner = Runner(directory, version, settings.device, settings.precision)
    if settings.compile_cache and can_be_compiled(runner):
        runner.use_compiled(settings.compile_cache, settings.max_batch)
    size = runner.entry.prg.image.size
    for batch in (1, settings.max_batch):
        for _ in range(WARM_UP_CALLS):
            runner.run(np.zeros((batch, 3, size, size), np.uint8), np.full(batch, 0.5, np.float32))
    return runner


def _same(old: Entry, new: Entry, version: str) -> bool:
    facts = [e.prg.model_dump(exclude={"versions"}) for e in (old, new)]
    return facts[0] == facts[1] and old.prg.versions[version].sha256 == new.prg.versions[version].sha256
