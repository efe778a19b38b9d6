"""Work on many pieces, a bounded number of them at once, as tasks or as threads. The first failure is raised."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


async def in_tasks(work: Callable[[T], Coroutine[Any, Any, None]], pieces: Iterable[T], most: int) -> None:
    """A task for each piece; a failure cancels the others. `pieces` is read one ahead."""
    free = asyncio.Semaphore(most)

    async def one(piece: T) -> None:
        try:
            await work(piece)
        finally:
            free.release()

    failures: tuple[BaseException, ...] = ()
    try:
        async with asyncio.TaskGroup() as tasks:
            for piece in pieces:
                await free.acquire()
                tasks.create_task(one(piece))
    except BaseExceptionGroup as group:
        failures = group.exceptions
    if failures:
        raise failures[0]


def in_threads(work: Callable[[T], None], pieces: Iterable[T], most: int) -> None:
    """A thread for each piece; after a failure none is started. `pieces` is read one ahead, in the caller's thread.

    What still runs after a failure or an interruption is not waited for, and does not keep the program from ending.
    """
    ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def one(piece: T) -> None:
        failure = None
        try:
            work(piece)
        except BaseException as error:
            failure = error
        ended.put(failure)

    def wait() -> None:
        if (failure := ended.get()) is not None:
            raise failure

    running = 0
    for piece in pieces:
        if running == most:
            wait()
            running -= 1
        threading.Thread(target=one, args=(piece,), daemon=True).start()
        running += 1
    for _ in range(running):
        wait()


def ahead(work: Callable[[T], R], pieces: Iterable[T], most: int) -> Iterator[R]:
    """work(piece) of each in order, by threads that are up to `most` pieces ahead of whoever asks for them.

    `pieces` is read in the caller's thread.
    """
    pool = ThreadPoolExecutor()
    pending: deque[Future[R]] = deque()
    try:
        for piece in pieces:
            pending.append(pool.submit(work, piece))
            if len(pending) >= most:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
