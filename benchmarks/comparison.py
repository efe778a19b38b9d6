"""Does pretraining help? PRG and what it is compared with, by share of the labels. Prints one JSON line last.

Every arm that is trained sees images for the same FLOPs (one of them: as many images), on the same labelled images,
with the same optimiser, augmentation and averaging; its learning rate is chosen on images held out from training. The
test split is read once per run of the table. Results are kept in the folder, so that the same command goes on where it
was stopped.

PYTHONPATH=. python benchmarks/comparison.py FOLDER --data IMAGES [--images N] [--out docs/results]
"""

import argparse
import json
import shlex
import shutil
import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.arms import ARMS, flops
from entry.files import write_atomically
from prg.checkpoint import Facts
from prg.console import track
from prg.errors import Interrupted
from prg.images.augmentation import normalise
from prg.images.held_out import hold_out
from prg.images.sets import Images
from prg.machine import choose_device
from prg.recipe import Recipe, load_recipe
from prg.studies.probes import linear_probe, top1
from prg.studies.report import Cell, Report, conditions, draw_axes, table, write
from prg.studies.subject import Subject
from prg.training.finetune import finetuning_batch
from prg.training.loop import Batch, Job, not_begun, steps_of, train
from prg.training.run import Run

RECIPE, ENTRY = "cifar10-small", Path("model_repository/prg-cifar10-pretrained")
SHARES = (0.01, 0.1, 1.0)
SEEDS = 3
RATES = (1e-3, 3e-3)
RATES_AT = 0.1
"""The share of labels at which each arm's learning rate is chosen, with the first seed."""
PROBES = {"state": "PRG, frozen, linear probe on STATE", "hidden": "PRG, frozen, linear probe on HIDDEN"}


@dataclass(frozen=True)
class Extent:
    """How much is trained."""

    images: int
    """That each run trains on, repeats counted: PRG's; one of equal FLOPs sees more."""
    tuning: int
    """Likewise, of the runs that choose a learning rate."""
    shares: tuple[float, ...]
    seeds: int

    def probes(self, share: float) -> range:
        """Seeds of a probe: with all labels nothing is drawn, and its fit is convex."""
        return range(1 if share == 1 else self.seeds)


def key(name: str, share: float, seed: int) -> str:
    """Under which a run is kept."""
    return f"{name}/{share:g}/{seed}"


def labelled_share(images: Images, share: float, seed: int) -> Images:
    """So large a share of each class's images, at least one, the same for the same seed."""
    if share == 1:
        return images
    assert images.labels is not None
    random = np.random.default_rng([seed, 0xC0])
    chosen = []
    for label in range(len(images.classes)):
        index = random.permutation(np.flatnonzero(images.labels == label))
        chosen.append(index[: max(1, round(share * len(index)))])
    return images.subset(np.sort(np.concatenate(chosen)))


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, recipe: Recipe) -> float:
    """Top-1 over all images."""
    right = 0
    assert images.labels is not None
    for start in range(0, len(images), 250):
        pixels = torch.from_numpy(np.ascontiguousarray(images.pixels[start : start + 250]))
        x = normalise(pixels.to(choose_device()), recipe.image.mean, recipe.image.std)
        right += int((model(x).argmax(1).cpu().numpy() == images.labels[start : start + 250]).sum())
    return right / len(images)


class Comparison:
    """The runs of the table, each kept in results.json as soon as it is known."""

    def __init__(self, folder: Path, recipe: Recipe, entry: Path, extent: Extent) -> None:
        self.folder, self.recipe, self.entry, self.extent = folder, recipe, entry, extent
        run = Run(folder, recipe)
        self.training, self.held = hold_out(run.training_images(), recipe.data.validation)
        self.test_name = f"{Path(recipe.data.source).name}/{run.evaluated}"
        self.test = run.load(run.sources[1][run.evaluated])
        self.path = folder / "results.json"
        told = {
            "recipe": recipe.model_dump(mode="json"),
            "images": extent.images,
            "tuning": extent.tuning,
            "entry": Subject(entry).prg.versions["1"].sha256,
        }
        fresh: dict[str, Any] = {"settings": json.loads(json.dumps(told)), "rates": {}, "runs": {}}
        self.kept = json.loads(self.path.read_text()) if self.path.exists() else fresh
        if self.kept["settings"] != fresh["settings"]:
            raise SystemExit(f"{self.path}: of other settings; use those, or another folder")

    @property
    def precision(self) -> Any:
        """The recipe's, and from the first run on what that one was trained in."""
        return self.kept.get("precision", self.recipe.finetune.precision)

    @cached_property
    def whole(self) -> int:
        """FLOPs of an image through the whole of PRG, which all arms are given for each image."""
        return flops(ARMS["scratch"].build(self.recipe, len(self.training.classes), self.entry), self.recipe)

    def keep(self) -> None:
        """Write what is known so far."""
        write_atomically(self.path, (json.dumps(self.kept, indent=1) + "\n").encode())

    def train(
        self, name: str, share: float, seed: int, rate: float, count: int, judged: Images
    ) -> dict[str, Any]:
        """One run of an arm, from its beginning or its checkpoint; how right it is on `judged`."""
        images = labelled_share(self.training, share, seed)
        classes = len(images.classes)
        whole = self.whole
        torch.manual_seed(seed)
        model = ARMS[name].build(self.recipe, classes, self.entry)
        cost = flops(model, self.recipe)
        seen = count if ARMS[name].equal == "images" else round(count * whole / cost)
        batch = min(self.recipe.finetune.batch, len(images))
        steps_per_epoch = max(1, len(images) // batch)
        steps = max(1, round(seen / batch))
        changed = {
            "lr": rate,
            "batch": batch,
            "epochs": steps / steps_per_epoch,
            "precision": self.precision,
        }
        config = self.recipe.finetune.model_copy(update=changed)
        recipe = self.recipe.model_copy(update={"seed": seed, "finetune": config}).without_source()
        device = choose_device()
        folder = self.folder / f"{name}-{share:g}-{seed}-{rate:g}"
        job = Job(
            facts=Facts(
                stage="finetune",
                recipe=recipe,
                trained=not_begun(images, steps_of(config, len(images)), "fp32", device),
                classes=images.classes,
            ),
            model=model,
            prepare=finetuning_batch(recipe, classes),
            loss=lambda m, parts: supervised(m, parts, config.label_smoothing),
            validate=lambda m: {},
            images=images,
            config=config,
            seed=seed + 1,
            checkpoint=folder / "checkpoint.safetensors",
            device=device,
            begun=lambda: None,
        )
        trainer = train(job)
        self.kept["precision"] = trainer.precision
        with trainer.averaged() as averaged:
            found = accuracy(averaged, judged, recipe)
        shutil.rmtree(folder)
        return {"top1": found, "images": steps * batch, "seconds": trainer.seconds, "gflop": cost / 1e9}

    def rate(self, name: str) -> float:
        """The arm's learning rate, chosen on images held out from training."""
        if name not in self.kept["rates"]:
            count = self.extent.tuning
            tried = {r: self.train(name, RATES_AT, 0, r, count, self.held)["top1"] for r in RATES}
            self.kept["rates"][name] = {"tried": tried, "chosen": max(tried, key=lambda r: tried[r])}
            self.keep()
        return float(self.kept["rates"][name]["chosen"])

    def frozen(self) -> None:
        """Linear probes on both frozen features: features once, then a fit for each share and seed."""
        wanted = [
            (name, share, seed)
            for name in PROBES
            for share in self.extent.shares
            for seed in self.extent.probes(share)
        ]
        if all(key(*one) in self.kept["runs"] for one in wanted):
            return
        subject = Subject(self.entry)
        level = self.recipe.finetune.t_end[0]
        started = time.monotonic()
        work = (len(self.training) + len(self.test)) * subject.evaluations(level, subject.own)
        with track("features", work, "evaluations") as bar:
            features = [
                subject.features(i.pixels, level, subject.own, bar) for i in (self.training, self.test)
            ]
        seconds = time.monotonic() - started
        everything = replace(self.training, pixels=np.arange(len(self.training)))
        assert self.test.labels is not None
        for name, share, seed in wanted:
            fitted, judged = (f[name.upper()] for f in features)
            some = labelled_share(everything, share, seed)
            assert some.labels is not None
            logits = linear_probe(fitted[some.pixels], some.labels, judged, len(some.classes))
            found = top1(logits, self.test.labels)
            self.kept["runs"][key(name, share, seed)] = {"top1": found, "seconds": seconds}
        self.keep()

    def trained(self) -> None:
        """Every arm that is trained, the small shares first."""
        for share in self.extent.shares:
            for name in ARMS:
                rate = self.rate(name)
                for seed in range(self.extent.seeds):
                    run = key(name, share, seed)
                    if run not in self.kept["runs"]:
                        self.kept["runs"][run] = self.train(
                            name, share, seed, rate, self.extent.images, self.test
                        )
                        self.keep()
                        print(f"{run}: {self.kept['runs'][run]['top1']:.4f}", file=sys.stderr)

    def report(self) -> Report:
        """The table: mean and spread (standard deviation) over the seeds."""
        shares, seeds = self.extent.shares, self.extent.seeds
        averaged = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "of one seed"
        titles = {**{k: a.title for k, a in ARMS.items()}, **PROBES}
        order = ("resnet", "scratch", "at-one", "at-one-images", "state", "hidden", "finetuned")
        found = {
            (name, share): [
                self.kept["runs"][run]["top1"]
                for seed in range(seeds)
                if (run := key(name, share, seed)) in self.kept["runs"]
            ]
            for name in order
            for share in shares
        }
        rows: list[tuple[Cell, ...]] = [
            (titles[name], *(cell(found[name, share]) for share in shares)) for name in order
        ]
        return Report(
            title="Does pretraining help?",
            about=f"Top-1 accuracy in per cent on the test split, {averaged} (a seed draws the labelled images, the "
            "initial weights of what is not pretrained, and the order), by the share of the training split's "
            "labels. All trained arms but one spend the same FLOPs "
            "on labelled images; all share optimiser, augmentation and averaging; each arm's learning rate is "
            "the better of two on images held out. Pretraining on the same images without their labels comes "
            "on top, and is spent once. A probe's fit is convex, so with all labels nothing in it is random.",
            columns=("arm", *(f"{100 * share:g} % of labels" for share in shares)),
            rows=rows,
            figures={"": draw_axes(lambda axes: paint(axes, found, titles, shares), width=7.5)},
            facts={"rates": self.kept["rates"], "runs": self.kept["runs"]},
            conditions={
                "data": self.test_name,
                "images_judged": len(self.test),
                "images_labelled": ", ".join(f"{len(labelled_share(self.training, s, 0)):,}" for s in shares),
                "images_seen_in_training": self.extent.images,
                "images_seen_in_choosing_a_rate": self.extent.tuning,
                "pretrained": f"{self.entry.name}, {self.kept['settings']['entry'][:12]}",
                "precision": self.precision,
                **conditions(),
            },
        )


def supervised(model: nn.Module, batch: Batch, smoothing: float) -> Tensor:
    """Label-smoothed cross-entropy of the logits."""
    x, labels, *_ = batch
    return F.cross_entropy(model(x).float(), labels, label_smoothing=smoothing)


def cell(found: list[float]) -> str:
    """62.1 ± 0.3."""
    mean = f"{100 * statistics.mean(found):.1f}"
    return f"{mean} ± {100 * statistics.stdev(found):.1f}" if len(found) > 1 else mean


def paint(
    axes: Any, found: dict[tuple[str, float], list[float]], titles: dict[str, str], shares: tuple[float, ...]
) -> None:
    """A line an arm over the number of labels."""
    for name in dict.fromkeys(name for name, _ in found):
        points = [found[name, share] for share in shares]
        mean = [100 * statistics.mean(p) for p in points]
        spread = [100 * statistics.stdev(p) if len(p) > 1 else 0.0 for p in points]
        axes[0].errorbar(
            [100 * s for s in shares], mean, spread, marker="o", markersize=4, capsize=3, label=titles[name]
        )
    axes[0].set_xscale("log")
    axes[0].set_xticks([100 * s for s in shares], [f"{100 * s:g} %" for s in shares])
    axes[0].set_xlabel("share of the labels")
    axes[0].set_ylabel("top-1, %")
    axes[0].grid(alpha=0.3)
    axes[0].legend(fontsize=7)


def command(arguments: argparse.Namespace) -> str:
    """What makes this table again, its folders by their names."""
    parts = ["PYTHONPATH=. python benchmarks/comparison.py FOLDER", f"--data {Path(arguments.data).name}/"]
    if arguments.recipe != RECIPE:
        parts.append(f"--recipe {arguments.recipe}")
    if arguments.entry != ENTRY:
        parts.append(f"--entry {arguments.entry.name}")
    parts.append(f"--images {arguments.images}")
    if arguments.tuning:
        parts.append(f"--tuning {arguments.tuning}")
    if tuple(arguments.shares) != SHARES:
        parts.append("--shares " + " ".join(f"{share:g}" for share in arguments.shares))
    if arguments.seeds != SEEDS:
        parts.append(f"--seeds {arguments.seeds}")
    parts += [f"--set {shlex.quote(change)}" for change in arguments.set]
    return " ".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where results are kept while the table is made")
    parser.add_argument("--data", required=True, help="labelled images, with a test split")
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--entry", type=Path, default=ENTRY)
    parser.add_argument("--images", type=int, default=19200, help="that each run trains on, repeats counted")
    parser.add_argument(
        "--tuning", type=int, metavar="N", help="likewise, to choose a learning rate (default: as many)"
    )
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the labels")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    parser.add_argument("--out", type=Path, help="write comparison.md, .json and .png here")
    arguments = parser.parse_args(argv)
    overrides = [f'data.source="{arguments.data}"', "finetune.batch=128", *arguments.set]
    extent = Extent(
        arguments.images, arguments.tuning or arguments.images, tuple(arguments.shares), arguments.seeds
    )
    comparison = Comparison(
        arguments.folder, load_recipe(arguments.recipe, overrides), arguments.entry, extent
    )
    try:
        comparison.frozen()
        comparison.trained()
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 130
    report = comparison.report()
    print(table(report))
    report.conditions["command"] = command(arguments)
    if arguments.out:
        write(report, arguments.out, "comparison")
    print(json.dumps({"benchmark": "comparison", "rows": report.rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
