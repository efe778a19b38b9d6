"""Several processes, as torchrun starts them: shares of one batch, one averaged gradient, one that writes.

torchrun and `accelerate launch` set the variables that are read here, and end all processes where one fails.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch

# Its functions bind the process group of the moment of their import as a default argument, and making an optimiser
# imports them. Imported here, before there is a group, they can't keep one alive into the interpreter's end.
import torch.distributed.nn.functional
from torch import Tensor, distributed, nn

from prg.console import is_main_process
from prg.errors import Interrupted, ProcessError

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


def world_size() -> int:
    """How many processes the environment speaks of."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def refuse_several() -> None:
    """Raise ProcessError where several processes were started for the work of one."""
    if world_size() > 1:
        raise ProcessError(
            f"WORLD_SIZE = {world_size()}: this is done by one process, start it without torchrun; "
            "several are for prg pretrain, finetune and reproduce"
        )


def count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def barrier() -> None:
    """Go on once all are here. (By gloo, also on GPUs: NCCL's waiting keeps a GPU busy.)"""
    if count() > 1:
        with _explained():
            distributed.all_reduce(torch.zeros(1))


@contextmanager
def main_process_first() -> Iterator[None]:
    """The main process goes through the body before the others do, so that they find what it wrote."""
    if not is_main_process():
        barrier()
    yield
    if is_main_process():
        barrier()


def on_main_process(work: Callable[[], T]) -> T:
    """What `work` returns, in every process; the main one alone does it."""
    if count() == 1:
        return work()
    box = [work() if is_main_process() else None]
    with _explained():
        distributed.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]  # type: ignore[return-value]


def share(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """This process's rows of a whole batch.

    Each process prepares the whole batch, so that the result is that of one process for every path, also where
    the coupling of noise and data depends on the batch, and whatever the number of processes.
    """
    if count() == 1:
        return batch
    size = len(batch[0]) // count()
    start = distributed.get_rank() * size
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
