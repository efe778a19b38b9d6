"""The Triton engine: models in one or several Triton servers, reached by gRPC."""

import asyncio
import contextlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from entry.config import INSTANCES, Entry, EntryError, entry_from_config
from service import tracing
from service.engines.batching import Batcher, Rules
from service.engines.contract import (
    DeadlineExceeded,
    EngineOverloaded,
    EngineUnavailable,
    Job,
    ModelStatus,
    for_metrics,
    while_loading,
)
from service.telemetry import Metrics, log

CHANNEL = [
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # By default a restarted server would not be tried again for up to 15 s.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]
"""All of them, because giving any replaces the client's own defaults."""
PRIORITIES = {"interactive": 1, "bulk": 2}
IN_FLIGHT = 2 * INSTANCES
"""So many calls of a version go to one address at once, and rows of so many batches: those that its instances compute,
and as many that wait there."""
DELAY_S = 0.02
"""How long rows wait for company where so many calls are in flight."""
COMPANY = 0.25
"""Of a batch: so many rows of several callers go in one call. Triton puts calls together but divides none, so large
ones leave gaps."""
CALL_TIMEOUT_S = 5.0
"""Of calls that ask for facts, not for inference."""
LOAD_TIMEOUT_S = 120.0
WATCH_S = 5.0
"""How often an address that answers is checked; one that does not, every WATCH_DOWN_S."""
WATCH_DOWN_S = 0.25
SHUNNED_S = (0.5, 1.0, 2.0, 5.0)
"""How long an address that failed is avoided while there is another, by failures in a row."""


NOT_LOADED = (
    "Triton has not loaded it: it was not asked to, or can't read its config.pbtxt; SIGHUP asks it again"
)
"""Its index is the same in both cases."""
NOT_THERE = "Triton does not have it"
UNLISTED = "Triton serves it, but prg.versions does not list it"
ABSENT = "PRG_MODELS names it, but Triton's repository has no such model"


FOLDERS = re.compile(r"(?<![\w./])/(?:[^\s/:'\"]+/)+")
"""All of an absolute path but its last name: callers read what Triton says, and not where it keeps its files."""
Index = list[tuple[str, str, str, str]]
"""(name, version, state, reason) of each version that a Triton knows of."""


@dataclass(eq=False)
class Replica:
    """One Triton: its client, what it serves, and how it does."""

    address: str
    client: Any
    seen: Index | None = None
    """Its index as last read; None while it does not answer."""
    models: dict[str, ModelStatus] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    """Entries that it could not load, with its reason: of a broken config.pbtxt the index has none."""
    in_flight: int = 0
    failures: int = 0
    shunned_until: float = 0.0
    doubted: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by a failed call, so that the watch looks at once."""

    def module(self, model: str, version: str) -> str | None:
        """The sha256 of the module it serves under that name and version, as last seen."""
        status = self.models.get(model)
        return status.modules.get(version) if status else None

    def failed(self, now: float) -> None:
        """Avoid it for a while."""
        self.shunned_until = now + SHUNNED_S[min(self.failures, len(SHUNNED_S) - 1)]
        self.failures += 1
        self.doubted.set()

    def worked(self) -> None:
        """It is good again."""
        self.failures, self.shunned_until = 0, 0.0


class TritonEngine:
    """Implements the Engine protocol over tritonclient.grpc.aio; one channel an address.

    Triton's health is not asked: it says ready with a dead model process, and not ready for good after one
    failed load. The index says what there is, and inference alone says whether it works.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        chosen: Mapping[str, frozenset[str] | None] | None,
        metrics: Metrics,
    ) -> None:
        self._chosen = chosen
        self._metrics = metrics
        self._replicas = [
            Replica(address, InferenceServerClient(address, channel_args=CHANNEL)) for address in addresses
        ]
        for address in addresses:
            metrics.engine_failures.labels(address)
        self._known: dict[str, ModelStatus] = {}
        """What the index has and was served, for the time in which no address answers."""
        self._rescanning = asyncio.Lock()
        self._loading: frozenset[str] = frozenset()
        self._watches: list[asyncio.Task[None]] = []
        self._batchers: dict[tuple[Any, ...], Batcher] = {}

    async def start(self) -> None:
        """Look at every address once, then keep looking; one that is absent is no error."""
        await asyncio.gather(*(self._look(replica) for replica in self._replicas))
        self._watches = [asyncio.create_task(self._watch(replica)) for replica in self._replicas]

    async def close(self) -> None:
        """Await the calls in flight, fail what waits, close the channels."""
        for batcher in self._batchers.values():
            await batcher.close()
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        for replica in self._replicas:
            await replica.client.close()

    def models(self) -> Mapping[str, ModelStatus]:
        """All models by name; while no address answers, those known from before, as failed."""
        return while_loading(self._statuses(), self._loading)

    def _statuses(self) -> dict[str, ModelStatus]:
        found: dict[str, ModelStatus] = {}
        answering = [replica for replica in self._replicas if replica.seen is not None]
        for replica in answering:
            for name, status in replica.models.items():
                if name not in found or (status.ready and not found[name].ready):
                    found[name] = status
        if not answering:
            addresses = ", ".join(replica.address for replica in self._replicas)
            gone = f"no Triton answers at {addresses}"
            found = {n: ModelStatus(n, s.entry, s.versions, gone, "failed") for n, s in self._known.items()}
        return dict(sorted(found.items()))

    async def infer(self, job: Job) -> dict[str, np.ndarray]:
        """The job's outputs. Raises EngineError.

        Rows of several callers go in one call where others are under way: Triton could put them together as well, but
        a call each costs the gateway more than anything else it does for them.
        """
        most, at_once = self._entry(job).max_batch_size, IN_FLIGHT * len(self._replicas)
        # Alike in all that a call says once for its rows.
        kind = job.model, job.version, job.sha256, job.images.shape[1:], most
        if kind not in self._batchers:
            rules = Rules(
                most,
                full=math.ceil(COMPANY * most),
                max_delay_s=DELAY_S,
                in_work=at_once * most,
                eager=at_once,
                mixed=False,
            )
            self._batchers[kind] = Batcher(self._compute, rules, self._metrics)
        return await self._batchers[kind].infer(job)

    def _entry(self, job: Job) -> Entry:
        """Of the job's model, as it is served now. Raises EngineUnavailable."""
        status = self.models().get(job.model)
        if status is None or status.entry is None:
            raise EngineUnavailable(f"no Triton serves {job.model}")
        return status.entry

    async def rescan(self) -> None:
        """Ask each Triton to load every entry of its index, then read the configurations again."""
        async with self._rescanning:
            try:
                for replica in self._replicas:
                    await self._reload(replica)
                    await self._look(replica)
            finally:
                self._loading = frozenset()

    async def _reload(self, replica: Replica) -> None:
        try:
            index = await replica.client.get_model_repository_index(client_timeout=CALL_TIMEOUT_S)
            names = {model.name for model in index.models}
            self._loading = frozenset(filter(self._is_chosen, names))
            for name in sorted(names):
                await self._load(replica, name)
        except InferenceServerException as error:
            log.warning("rescan failed", address=replica.address, reason=_text(error))

    def _is_chosen(self, name: str) -> bool:
        return self._chosen is None or name in self._chosen

    async def _load(self, replica: Replica, name: str) -> None:
        try:
            await replica.client.load_model(name, client_timeout=LOAD_TIMEOUT_S)
            replica.refused.pop(name, None)
        except InferenceServerException as error:
            replica.refused[name] = _text(error)
            log.error("entry refused", model=name, address=replica.address, reason=_text(error))

    async def _compute(self, job: Job) -> dict[str, np.ndarray]:
        """One call, tried again at another address (or the same, if it is the only one) where one fails.

        A full queue is an answer: to try again would add to the load.
        """
        entry = self._entry(job)
        tried: list[Replica] = []
        for _ in range(max(2, len(self._replicas))):
            replica = self._choose(job, tried)
            tried.append(replica)
            try:
                answer = await self._call(replica, entry, job)
            except EngineUnavailable as error:
                failure = error
                # The first in a row: an outage is one line, not one for each request.
                if not replica.failures:
                    log.warning("engine failed", address=replica.address, model=job.model, reason=str(error))
                replica.failed(asyncio.get_running_loop().time())
                self._metrics.engine_failures.labels(replica.address).inc()
            else:
                replica.worked()
                return answer
        raise failure

    def _choose(self, job: Job, tried: list[Replica]) -> Replica:
        """The least loaded address of those that serve these very weights and did not fail recently.

        One that does not answer now is better than none; one with other weights is not.
        """
        now = asyncio.get_running_loop().time()
        able = [r for r in self._replicas if r.module(job.model, job.version) == job.sha256]
        if not able:
            raise EngineUnavailable("the model was replaced while the request was under way")
        return min(able, key=lambda r: (r in tried, r.seen is None, r.shunned_until > now, r.in_flight))

    async def _call(self, replica: Replica, entry: Entry, job: Job) -> dict[str, np.ndarray]:
        images, t_end = job.images, job.t_end[:, None]
        inputs = [
            InferInput("IMAGE", list(images.shape), "UINT8").set_data_from_numpy(images),
            InferInput("T_END", list(t_end.shape), "FP32").set_data_from_numpy(t_end),
        ]
        left = job.due - asyncio.get_running_loop().time()
        if left <= 0:
            raise DeadlineExceeded("the deadline passed before the engine was asked")
        replica.in_flight += 1
        try:
            result = await replica.client.infer(
                job.model,
                inputs,
                model_version=job.version,
                outputs=[InferRequestedOutput(name) for name in job.outputs],
                priority=PRIORITIES[job.priority],
                timeout=int(left * 1e6),
                client_timeout=left,
                headers=tracing.carried(job.headers) or None,
            )
        except InferenceServerException as error:
            raise translate_error(error) from None
        finally:
            replica.in_flight -= 1
        return {name: _checked(result.as_numpy(name), name, len(images), entry) for name in job.outputs}

    async def _watch(self, replica: Replica) -> None:
        while True:
            await asyncio.sleep(WATCH_DOWN_S)
            if replica.seen is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(replica.doubted.wait(), WATCH_S)
            replica.doubted.clear()
            await self._look(replica)

    async def _look(self, replica: Replica) -> None:
        """Read the index and the configurations."""
        try:
            index = await replica.client.get_model_repository_index(client_timeout=CALL_TIMEOUT_S)
            seen = sorted((m.name, m.version, m.state, FOLDERS.sub("", m.reason)) for m in index.models)
            # The configurations too, each time: a restart may bring other weights under the same index.
            replica.models = await self._read_models(replica, seen)
            if replica.seen is None:
                log.info("engine up", address=replica.address, models=list(replica.models))
            replica.seen = seen
            now = self._statuses()
            self._known |= {name: status for name, status in now.items() if status.entry}
            self._known = {name: status for name, status in self._known.items() if name in now}
        except InferenceServerException as error:
            if replica.seen is not None:
                log.warning("engine down", address=replica.address, reason=_text(error))
            replica.seen = None
            replica.refused.clear()
        self._metrics.engine_up.labels(replica.address).set(replica.seen is not None)
        self._metrics.models(for_metrics(self._statuses()))

    async def _read_models(self, replica: Replica, seen: Index) -> dict[str, ModelStatus]:
        models = {}
        for name, rows in itertools.groupby(seen, key=lambda row: row[0]):
            if self._is_chosen(name):
                models[name] = await self._read_model(replica, name, list(rows))
        for name in sorted((self._chosen or {}).keys() - models.keys()):
            models[name] = ModelStatus(name, None, reason=ABSENT, state="failed")
        for name, status in models.items():
            before = replica.models.get(name)
            news = before is None or before.reason != status.reason
            if status.state == "failed" and status.reason != replica.refused.get(name) and news:
                log.error("entry refused", model=name, address=replica.address, reason=status.reason)
        return models

    async def _read_model(self, replica: Replica, name: str, rows: Index) -> ModelStatus:
        ready = {version for _, version, state, _ in rows if state == "READY"}
        if not ready:
            reasons = "; ".join(sorted({reason.splitlines()[0] for *_, reason in rows if reason}))
            if any(state == "LOADING" for _, _, state, _ in rows):
                return ModelStatus(name, None, reason="Triton is loading it", state="loading")
            if reasons or name in replica.refused:
                return ModelStatus(name, None, reason=reasons or replica.refused[name], state="failed")
            return ModelStatus(name, None, reason=NOT_LOADED, state="not loaded")
        response = await replica.client.get_model_config(name, client_timeout=CALL_TIMEOUT_S)
        where = f"{replica.address}: {name}"
        try:
            entry = entry_from_config(response.config, where)
            versions = _versions(entry, ready, (self._chosen or {}).get(name), where)
        # EntryError, or a parameter too strange to parse.
        except (ValueError, RecursionError) as error:
            return ModelStatus(name, None, reason=str(error), state="failed")
        listed = entry.prg.versions.keys()
        stated = {version: reason for _, version, _, reason in rows}
        failed = dict.fromkeys(ready - listed, UNLISTED)
        failed |= {version: stated.get(version) or NOT_THERE for version in listed - ready}
        chosen = (self._chosen or {}).get(name)
        failed = {v: reason for v, reason in failed.items() if chosen is None or v in chosen}
        return ModelStatus(name, entry, versions, replica.refused.get(name), failed_versions=failed)


def translate_error(error: InferenceServerException) -> Exception:
    """Triton's error as one of the contract's. Its status alone is not enough: a full queue and a dead server
    have the same."""
    status, text = str(error.status()).removeprefix("StatusCode."), _text(error)
    if status == "UNAVAILABLE" and "maximum queue size" in text.lower():
        return EngineOverloaded("the model's queue in Triton is full")
    if status == "DEADLINE_EXCEEDED" or (status == "UNAVAILABLE" and "timeout expired" in text.lower()):
        return DeadlineExceeded("the model did not answer by the deadline")
    if status == "INVALID_ARGUMENT":
        # Our own bug, so a 500.
        return RuntimeError(f"Triton refused our tensors: {text}")
    return EngineUnavailable(f"Triton failed ({status}: {text})")


def _versions(entry: Entry, ready: set[str], chosen: frozenset[str] | None, where: str) -> tuple[str, ...]:
    """Those served, ascending. Raises EntryError where one that is chosen is not listed, or none is ready."""
    listed = entry.prg.versions.keys()
    if missing := set(chosen or ()) - listed:
        raise EntryError(f"{where}: PRG_MODELS wants version {min(missing)}, there are: {', '.join(listed)}")
    served = ready & (chosen or listed)
    if not served:
        wanted = f"version {' or '.join(sorted(chosen))}" if chosen else "version that prg.versions lists"
        raise EntryError(f"{where}: Triton serves no {wanted}, ready are: {', '.join(sorted(ready))}")
    return tuple(sorted(served, key=int))


def _checked(array: np.ndarray | None, name: str, count: int, entry: Entry) -> np.ndarray:
    """Triton does not verify a model's output against its own configuration, so it is done here."""
    dim = entry.outputs()[name]
    if array is None or array.dtype != np.float32 or array.shape != (count, dim):
        found = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
        raise EngineUnavailable(f"{entry.name} answered {name} as {found}, promised float32 [{count}, {dim}]")
    return array


def _text(error: InferenceServerException) -> str:
    return FOLDERS.sub("", str(error.message())).strip()[:300]
