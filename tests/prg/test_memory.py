"""The allocator's settings are taken, and freed memory stays."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from prg.training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        pieces = [torch.ones(6 << 20, dtype=torch.uint8) for _ in range(30)]
        del pieces
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_memory_that_was_freed_is_used_again_without_page_faults() -> None:
    found = {}
    for mode in ("keep", "as it is"):
        run = [sys.executable, "-c", PROGRAM, mode]
        found[mode] = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    if found["as it is"] < 1000:
        pytest.skip("this kernel doesn't count page faults, or its allocator keeps freed memory by itself")
    assert found["keep"] < 100
