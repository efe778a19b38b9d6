"""Where PyTorch runs: in one thread that stays, and in threads that end."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


async def in_own_thread(function: Callable[..., T], *arguments: object) -> T:
    """Its result, from a thread that ends with it.

    A thread in which PyTorch has computed keeps helpers of its own for as long as it lives. With more of them than
    cores, OpenMP puts all to sleep between any two operators, and one image takes 1.6 times as long.
    """
    own = ThreadPoolExecutor(1)
    try:
        return await asyncio.get_running_loop().run_in_executor(own, function, *arguments)
    finally:
        own.shutdown(wait=False)
