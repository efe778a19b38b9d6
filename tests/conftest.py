"""What all tests share: one thread a process, so that parallel tests do not fight over the cores, and asyncio.

Hypothesis tries the same examples each time, however slow the machine is.
"""

import asyncio
import inspect
import os

import pytest
from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is first imported, also by the processes tests start

settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.load_profile("same")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Tests that are coroutines run in a loop of their own.

    Not by anyio's plugin, which fails a test for any callback that raises: gRPC's poller, one for all loops of a
    process, now and then reports to one that is closed.
    """
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True
