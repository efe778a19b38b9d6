"""What the images of a training take in the memory of one machine, by the number of its processes.

Each process loads them and reads every batch of an epoch and those held out, as `prg pretrain` does, without a network.
Printed is by how much the processes grew together, in proportional shares (Pss): a page that several map counts once.

PYTHONPATH=. torchrun --nproc-per-node 2 benchmarks/processes.py runs/memory --data photos/
"""

import argparse
import sys
from pathlib import Path

import psutil
import torch
from torch import distributed

from prg.console import is_main_process
from prg.images.held_out import hold_out
from prg.images.sets import Images
from prg.training import processes
from prg.training.loop import batch_at
from prg.training.run import open_run

BATCH = 256


def pss() -> torch.Tensor:
    """Bytes of this process, as float64 [1]."""
    return torch.tensor([psutil.Process().memory_full_info().pss], dtype=torch.float64)


def read(images: Images) -> None:
    """An epoch of batches."""
    for step in range(len(images) // BATCH):
        images.pixels[batch_at(len(images), BATCH, 0, step)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of a run, which gets the decoded images")
    parser.add_argument("--data", required=True)
    parser.add_argument("--recipe", default="images-64")
    arguments = parser.parse_args(argv)
    run = open_run(arguments.folder, arguments.recipe, [f"data.source={arguments.data}"])
    with processes.joined():
        # Decoded before: what that leaves in memory is none of the images'.
        whole = run.training_images()
        size = whole.pixels[:1].nbytes * len(whole)
        del whole
        before = pss()
        parts = hold_out(run.training_images(), run.recipe.data.validation)
        for images in parts:
            read(images)
        # All are still there when any is counted.
        processes.barrier()
        grown = pss() - before
        processes.barrier()
        if processes.count() > 1:
            distributed.all_reduce(grown)
        if is_main_process():
            print(
                f"{processes.count()} processes, images of {size / 1e6:.0f} MB: {float(grown) / 1e6:.0f} MB"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
