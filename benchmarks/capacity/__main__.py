"""How many gateways, GPUs, cores and how much network a load needs: a simulation, first held against this machine.

--measure  times the parts and the service on one core of this machine, and writes the file of times, some five
           minutes.
Without it, the tables are made from that file. What is assumed is an option: prices, the GPU, how busy things may be.

PYTHONPATH=. python -m benchmarks.capacity [--measure]
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.capacity.measure import measure
from benchmarks.capacity.tables import Assumed, tables
from entry.files import write_atomically

TIMES = Path("docs/results/capacity.json")
SECONDS = 30.0


def parser() -> argparse.ArgumentParser:
    """The defaults are those of docs/scaling.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="measure this machine, and write --times")
    parser.add_argument("--entry", type=Path, default=Path("model_repository/prg-everyday"))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each load, when measuring")
    parser.add_argument("--times", type=Path, default=TIMES, help=f"default: {TIMES}")
    # prg-cifar10 on an H200 in TF32: 4.05 ms for 8 images, 4.88 for 64 (docs/results.md).
    parser.add_argument("--gpu-batch-ms", type=float, default=3.93, help="of a batch, whatever is in it")
    parser.add_argument("--gpu-image-ms", type=float, default=0.0148, help="more for each image")
    parser.add_argument("--max-batch", type=int, default=64)
    parser.add_argument("--cores", type=int, default=2, help="of a gateway")
    parser.add_argument("--machine-cores", type=int, default=16, help="beside the GPU, in a backfill")
    parser.add_argument("--busy", type=float, default=0.6, help="share of the time that things may be busy")
    parser.add_argument("--gpu-hour", type=float, default=4.0, help="price")
    parser.add_argument("--core-hour", type=float, default=0.05, help="price")
    return parser


def assumed_by(arguments: argparse.Namespace) -> Assumed:
    """Raises SystemExit for what can't be."""
    values = {name: getattr(arguments, name) for name in Assumed.__dataclass_fields__}
    for name, value in values.items():
        if value <= 0 and not name.endswith("_hour"):
            raise SystemExit(f"--{name.replace('_', '-')} {value:g}: must be above 0")
    if values["busy"] >= 1:
        raise SystemExit(f"--busy {values['busy']:g}: must be below 1, else what waits grows without end")
    return Assumed(**values)


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    assumed = assumed_by(arguments)
    if arguments.measure:
        facts = measure(arguments.entry, arguments.seconds)
        write_atomically(arguments.times, (json.dumps(facts, indent=1) + "\n").encode())
    elif not arguments.times.is_file():
        raise SystemExit(f"{arguments.times}: no such file; --measure writes it")
    facts = json.loads(arguments.times.read_text("utf-8"))
    print(facts["machine"], facts["entry"], sep="; ")
    for name, text in tables(facts, assumed).items():
        print(f"\n{name}\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
