"""Compile a version of an entry for this processor, by a process of its own: python -m entry.compile."""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from entry import compiled
from entry.runner import Runner


def main(argv: list[str] | None = None) -> int:
    """Compile it unless that is done; what is there and no longer good is replaced."""
    parser = argparse.ArgumentParser(prog="python -m entry.compile", description=__doc__)
    parser.add_argument("entry", type=Path)
    parser.add_argument("version")
    parser.add_argument("cache", type=Path)
    parser.add_argument("--most", type=int, default=32, help="rows of the largest batch")
    arguments = parser.parse_args(argv)
    os.nice(19)
    # By an exception, so that temporary files go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    runner = Runner(arguments.entry, arguments.version)
    sizes = compiled.batch_sizes(arguments.most)
    wanted = compiled.facts(runner.entry.prg.versions[runner.version].sha256, sizes)
    directory = compiled.folder(arguments.cache, runner.entry.name, runner.version)
    directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Hidden, beside it: a rename then makes it appear whole.
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as temporary:
        # Read when PyTorch's compiler is imported. One thread: no pool of workers that outlives this process.
        os.environ |= {
            "TORCHINDUCTOR_CACHE_DIR": f"{temporary}/inductor",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        made = Path(temporary) / "made"
        made.mkdir()
        for size in sizes:
            compiled.make(runner.module, runner.entry.prg.image.size, size, made / f"{size}.so")
        compiled.write_facts(made, wanted)
        shutil.rmtree(directory, ignore_errors=True)
        try:
            made.rename(directory)
        except OSError:
            # Another process was first.
            if not compiled.is_good(directory, wanted):
                raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
