"""Several processes, as torchrun starts them: shares of one batch, one averaged gradient, one that writes."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch

# Its functions have the group as their default argument, of the moment when it is imported, which making an optimiser
# does: they would keep a group from ever ending, whose threads then abort the interpreter while that ends.
import torch.distributed.nn.functional
from torch import Tensor, distributed, nn
from torch.distributed.rendezvous import rendezvous

MEETING = timedelta(minutes=5)
"""How long the first waits for the last to be there."""
TIMEOUT = timedelta(hours=2)
"""How long the others wait for the one that validates, draws or decodes."""
LOOK_EVERY_S = 0.5
LAST_WORDS_S = 3.0
"""What a failing process has to explain itself: where any ends, launchers kill the rest."""
FAILED = "failed"
"""The key under which the first process that fails says so."""

Store = Any  # torch.distributed.Store, which torch exports to no type checker
T = TypeVar("T")


class ProcessError(Exception):
    """The processes can't work together, or no longer."""


class Interrupted(Exception):
    """Stopped by SIGINT or SIGTERM, in all processes after the same step; the checkpoint is written."""


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that the environment tells of (WORLD_SIZE, RANK, MASTER_ADDR …); alone without.

    Where one of them fails, all end: it by its own exception, the others by exit status 1 and its message,
    whatever they are at. Raises ProcessError where they don't come together.
    """
    if told_of() == 1:
        yield
        return
    store = _meet_first()
    left = threading.Event()
    watch = threading.Thread(target=_watch, args=(store.clone(), left), daemon=True)
    watch.start()
    interrupted = None
    try:
        try:
            yield
        except Interrupted as error:  # all of them were, and the writer has saved
            interrupted = error
        meet()
    except BaseException as error:
        left.set()
        watch.join()
        first = _fail(store, f"process {distributed.get_rank()} failed: {type(error).__name__}: {error}")
        if first:
            print(f"prg: {first}", file=sys.stderr, flush=True)
            raise SystemExit(1) from None
        raise
    left.set()
    watch.join()
    meet()  # nobody watches any more, so process 0, whose end would be noticed, may go
    distributed.destroy_process_group()
    if interrupted:
        raise interrupted


def told_of() -> int:
    """How many processes the environment tells of."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def be_alone() -> None:
    """Raise ProcessError where several processes were started for what one does."""
    if told_of() > 1:
        raise ProcessError(
            f"WORLD_SIZE = {told_of()}: this is done by one process, start it without torchrun; "
            "several are for prg pretrain, finetune and reproduce"
        )


def count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def writes() -> bool:
    """Whether this is the one that writes files and speaks."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def note(text: str) -> None:
    """Tell a person something, once: a line on stderr."""
    if writes():
        print(f"note: {text}", file=sys.stderr)


def meet() -> None:
    """Go on once all are here. (By gloo, also on GPUs: NCCL's waiting keeps a GPU busy.)"""
    if count() > 1:
        with _others_needed():
            distributed.all_reduce(torch.zeros(1))


@contextmanager
def writer_first() -> Iterator[None]:
    """The writer goes through the body before the others do, so that they find what it wrote."""
    if not writes():
        meet()
    yield
    if writes():
        meet()


def told(work: Callable[[], T]) -> T:
    """What `work` returns, in every process; the writer alone does it."""
    if count() == 1:
        return work()
    box = [work() if writes() else None]
    with _others_needed():
        distributed.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]  # type: ignore[return-value]


def share(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """This process's rows of a whole batch."""
    if count() == 1:
        return batch
    size = len(batch[0]) // count()
    start = distributed.get_rank() * size
    return tuple(t[start : start + size] for t in batch)


def average(model: nn.Module, loss: Tensor, stop: bool) -> tuple[Tensor, bool]:
    """Average the gradient in place; returns the average loss, and whether any process wishes to stop."""
    if count() == 1:
        return loss, stop
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    ends = torch.stack([loss, loss.new_tensor(float(stop))]).to(gradients[0].dtype)
    flat = torch.cat([*(g.flatten() for g in gradients), ends])
    with _others_needed():
        distributed.all_reduce(flat)
    flat /= count()
    parts = flat[:-2].split([g.numel() for g in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    return flat[-2], bool(flat[-1] > 0)


def _meet_first() -> Store:
    """Make the group; returns the store by which its members found each other."""
    cuda = torch.cuda.is_available()
    if cuda:
        own, there = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
        if own >= there:
            raise ProcessError(
                f"LOCAL_RANK = {own}, but there are {there} GPUs: start one process for each GPU"
            )
        torch.cuda.set_device(own)
    try:
        store, rank, size = next(rendezvous("env://", timeout=MEETING))
        store.set_timeout(TIMEOUT)
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ProcessError(
            f"WORLD_SIZE = {told_of()}, but the processes did not come together ({reason}); "
            "start them by torchrun, or unset WORLD_SIZE"
        ) from None
    return store


def _watch(store: Store, left: threading.Event) -> None:
    """End this process, whatever it is at, once another one has failed."""
    while not left.wait(LOOK_EVERY_S):
        try:
            said = store.get(FAILED).decode() if store.check([FAILED]) else ""
        except RuntimeError:
            said = "process 0 is gone, and the others can't meet without it"
        if said and not left.is_set():
            print(f"prg: {said}", file=sys.stderr, flush=True)
            time.sleep(LAST_WORDS_S)
            os._exit(1)


def _fail(store: Store, words: str) -> str:
    """Tell the others; returns what another said before, nothing if this is the first."""
    try:
        first = store.compare_set(FAILED, "", words).decode()
    except RuntimeError:
        return ""
    return "" if first == words else first


@contextmanager
def _others_needed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0]
        raise ProcessError(
            f"another process is gone, perhaps killed ({reason}); the same command continues from the checkpoint"
        ) from None
