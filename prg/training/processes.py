"""Processes: several as torchrun starts them, with one averaged gradient; one training a folder; signals to stop.

torchrun and `accelerate launch` set the variables that are read here, and end all processes where one fails.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

# Its functions bind the process group of the moment of their import as a default argument, and making an optimiser
# imports them. Imported here, before there is a group, they can't keep one alive into the interpreter's end.
import torch.distributed.nn.functional
from torch import Tensor, distributed, nn

from prg.console import is_main_process, world_size
from prg.errors import Interrupted, ProcessError
from prg.locks import lock

TIMEOUT = timedelta(hours=2)
"""How long the others wait for the main process while it validates, draws or decodes."""

T = TypeVar("T")


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that the environment speaks of (WORLD_SIZE, RANK, MASTER_ADDR …); alone without.

    Raises ProcessError where they don't come together.
    """
    if world_size() == 1:
        yield
        return
    _meet()
    try:
        yield
        barrier()
    except Interrupted:  # all of them were, after the same step
        barrier()
        raise
    finally:
        distributed.destroy_process_group()


def count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this one is."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def barrier() -> None:
    """Go on once all are here. (By gloo, also on GPUs: NCCL's waiting keeps a GPU busy.)"""
    if count() > 1:
        with _explained():
            distributed.all_reduce(torch.zeros(1))


def main_process_first(work: Callable[[], T]) -> T:
    """What `work` returns; the main process does it before the others do, so that they find what it wrote."""
    done: list[T] = []
    on_main_process(lambda: done.append(work()))
    return done[0] if done else work()


def on_main_process(work: Callable[[], T]) -> T:
    """What `work` returns or raises, in every process; the main one alone does it."""
    if count() == 1:
        return work()
    box: list[Any] = [None, None]
    if is_main_process():
        try:
            box[0] = work()
        except Exception as error:
            box[1] = error
    with _explained():
        distributed.broadcast_object_list(box, device=torch.device("cpu"))
    if box[1] is not None:
        raise box[1]
    return box[0]


def share(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """This process's rows of a whole batch.

    Each process prepares the whole batch, so that the result is that of one process for every path, also where
    the coupling of noise and data depends on the batch, and whatever the number of processes.
    """
    if count() == 1:
        return batch
    size = len(batch[0]) // count()
    start = rank() * size
    return tuple(t[start : start + size] for t in batch)


def average_gradients(model: nn.Module, loss: Tensor, stop: bool) -> tuple[Tensor, bool]:
    """Average the gradient in place; returns the average loss, and whether any process wishes to stop.

    All in one all-reduce, so that all stop after the same step. (No DistributedDataParallel: it would rename the
    weights, and want to be told which of them a loss does not use.)
    """
    if count() == 1:
        return loss, stop
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    ends = torch.stack([loss, loss.new_tensor(float(stop))]).to(gradients[0].dtype)
    flat = torch.cat([*(g.flatten() for g in gradients), ends])
    with _explained():
        distributed.all_reduce(flat)
    flat /= count()
    parts = flat[:-2].split([g.numel() for g in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    return flat[-2], bool(flat[-1] > 0)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """One training at a time in a folder: two would write over each other's checkpoints.

    The system releases the lock when the process ends, however it does. Raises ProcessError where another process
    holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        if not on_main_process(lambda: held.enter_context(lock(folder / ".lock"))):
            raise ProcessError(
                f"{folder}: another process is training here; wait for it, or take another folder"
            )
        yield


@contextmanager
def stop_signals(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set the event, so that the loop ends after the step under way; a second one ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: FrameType | None) -> None:
        stop.set()
        signal.signal(number, previous[signal.Signals(number)])

    previous = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _meet() -> None:
    """Make the group."""
    cuda = torch.cuda.is_available()
    if cuda:
        own, there = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
        if own >= there:
            raise ProcessError(
                f"LOCAL_RANK = {own}, but there are {there} GPUs: start one process for each GPU"
            )
        torch.cuda.set_device(own)
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ProcessError(
            f"WORLD_SIZE = {world_size()}, but the processes did not come together ({reason}); "
            "start them by torchrun, or unset WORLD_SIZE"
        ) from None


@contextmanager
def _explained() -> Iterator[None]:
    """A collective's failure as an error that a person understands."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0]
        raise ProcessError(
            f"another process is gone, perhaps killed ({reason}); the same command continues from the checkpoint"
        ) from None
