"""What all tests share: one thread a process, so that parallel tests do not fight over the cores, and asyncio."""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is first imported, also by the processes tests start


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """What runs the tests that are coroutines."""
    return "asyncio"
