"""The same partitions by a Ray cluster: RAY_ADDRESS names one, or else one is started on this machine."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from entry.errors import needs
from prg.console import Bar
from prg.embed.engines import Embedder
from prg.embed.partitions import Shard, Summary, write_partitions
from prg.embed.rows import About, Form
from prg.embed.stores import Store, open_store

Make = Callable[[], Embedder]
"""Makes an embedder in a worker, which loads its model there."""


class OnRay:
    """Writes partitions by an actor on each GPU or, where there is none, each processor core.

    An actor that dies is started again, and its shard done again: partitions are written whole or not at all. out, the
    entry and the images must be readable at the same paths or URLs on all machines.
    """

    def __init__(self, out: str, make: Make) -> None:
        self._out = out
        self._make = make

    def __call__(
        self, shards: Iterable[Shard], store: Store, form: Form, embedder: Embedder, about: About, bar: Bar
    ) -> tuple[list[str], Summary]:
        """As `write_partitions`. Raises PackageError without Ray."""
        with needs("ray"):
            import ray
            from ray.util import ActorPool
        ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
        try:
            there = ray.cluster_resources()  # type: ignore[no-untyped-call]
            gpus, cores = int(there.get("GPU", 0)), int(there["CPU"])
            options: dict[str, Any] = {"num_gpus": 1} if gpus else {"num_cpus": 1}
            actor: Any = ray.remote(max_restarts=-1, max_task_retries=-1, **options)(_Worker)
            pool: Any = ActorPool(
                [actor.remote(self._out, self._make, form, about) for _ in range(gpus or cores)]
            )
            names, summary = [], Summary()
            for found, done in pool.map_unordered(lambda worker, shard: worker.work.remote(shard), shards):
                names += found
                summary.add(done)
                bar.advance(done.images)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # what the worker raised
        finally:
            ray.shutdown()
        return names, summary


class _Worker:
    """One embedder, and shard after shard."""

    def __init__(self, out: str, make: Make, form: Form, about: About) -> None:
        self._store = open_store(out)
        self._embedder = make()
        self._form = form
        self._about = about

    def work(self, shard: Shard) -> tuple[list[str], Summary]:
        """As `write_partitions`, of one shard."""
        silent = Bar(lambda *_: None, 0)
        return write_partitions([shard], self._store, self._form, self._embedder, self._about, silent)
