"""A run folder: its recipe, its images, and the checkpoints of its stages."""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from entry.config import ImageSpec, write_atomically
from prg.checkpoint import CheckpointError, differences, read_facts
from prg.recipe import Recipe, RecipeError, load_recipe, recipe_table, with_defaults
from prg.training import processes
from prg.training.data import Images, check_classes_were_seen, deal, hold_out, load_split
from prg.training.held_back import Record, behind, held_back_by, never_seen
from prg.training.processes import note
from prg.training.sources import DataError, Source, split_named, splits

Stage = Literal["pretrain", "finetune"]


@dataclass(frozen=True)
class Run:
    """One experiment's folder."""

    folder: Path
    recipe: Recipe

    @property
    def pretrained(self) -> Path:
        return self.folder / "pretrain" / "checkpoint.safetensors"

    @property
    def finetuned(self) -> Path:
        return self.folder / "finetune" / "checkpoint.safetensors"

    @property
    def image_spec(self) -> ImageSpec:
        """The image facts, as they go into an entry."""
        image = self.recipe.image
        return ImageSpec(
            size=image.size, resize=image.resize, preprocessing="v1", mean=image.mean, std=image.std
        )

    def settings(self, images: Images, *sections: str) -> dict[str, Any]:
        """What a stage's result depends on: those sections of the recipe, and the images, by number and digest.

        Where the images lie is left out: a folder may move, and a path is nobody else's business. So is which
        of them would have been refused, and labels where they are not learned.
        """
        table = recipe_table(self.recipe)
        for key in ("source", "skip_unreadable", "enlarge"):
            del table["data"][key]
        digests = images.digests()
        if "finetune" not in sections:
            digests.pop("labels", None)
        told = {k: table[k] for k in ("seed", "network", "image", "data", *sections)}
        return told | {"images": len(images), "digests": digests}

    def remember(self) -> None:
        """Write the recipe into the folder: once a stage was found to be able to go on by it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps(recipe_table(self.recipe), indent=2) + "\n"
        write_atomically(self.folder / "recipe.json", content.encode())

    def check(self, facts: dict[str, Any], path: Path, *sections: str) -> None:
        """Raise CheckpointError where a checkpoint was trained by another recipe than the run has now."""
        table, then = recipe_table(self.recipe), with_defaults(facts["settings"])
        changed = differences({k: then[k] for k in sections}, {k: table[k] for k in sections})
        if changed:
            raise CheckpointError(
                f"{path}: trained by another recipe than the run has now ({'; '.join(changed)})"
            )

    def check_trained_here(self, path: Path) -> None:
        """Raise CheckpointError where there is a checkpoint that was imported: it has no training to go on with."""
        if path.is_file() and "imported" in read_facts(path)["settings"]:
            raise CheckpointError(
                f"{path}: was imported, so there is no training to continue; "
                f"fine-tune in a new run: prg finetune NEW --recipe … --init {self.pretrained}"
            )

    @cached_property
    def sources(self) -> tuple[Source, dict[str, Source]]:
        """What is trained on, and all the other splits by name, undecoded, under the recipe's class names."""
        data = self.recipe.data
        if not data.source:
            raise DataError("the recipe names no images: say where they are with --data")
        found = splits(data.source)
        train = choose_split(found, data.train, data.source)
        own = found[train].classes
        if data.labels and len(data.labels) != len(own):
            raise DataError(
                f"data.labels has {len(data.labels)} names, but {data.source} has {len(own)} classes"
            )
        names = dict(zip(own, data.labels or own, strict=True))
        renamed = {k: replace(v, classes=tuple(names.get(c, c) for c in v.classes)) for k, v in found.items()}
        return renamed.pop(train), renamed

    def training_images(self) -> tuple[Images, Images]:
        """(training, validation), the same whenever the recipe is."""
        images = self._load(self.sources[0])
        return hold_out(images, self.recipe.data.validation, self.recipe.seed)

    def judged_images(self, stage: Stage) -> tuple[Images, Images]:
        """(training, validation), as they were when the run's model of that stage was trained.

        Where it was trained on other images, as the recipe deals these; that is said.
        """
        path, records = self._seen(stage)
        return self._judged(self._load(self.sources[0]), path, records)

    def _judged(self, images: Images, path: Path, records: list[Record]) -> tuple[Images, Images]:
        data = self.recipe.data
        where = f"{Path(data.source).name}/{data.train}"
        return never_seen(images, records, str(path), where, data.validation, self.recipe.seed)

    def check_held_back_before(self, records: list[Record], init: Path) -> None:
        """Raise DataError where a fine-tuning before this one learned labels of what is held back from this one.

        records: of the trainings behind `init`; nothing is said of those without a digest.
        """
        images = self._load(self.sources[0])
        share, seed = self.recipe.data.validation, self.recipe.seed
        _, now = deal(len(images), share, seed)
        for record in (r for r in records if "digest" in r):
            then = held_back_by(images, record)
            saw_some = then is not None and len(np.setdiff1d(now, then)) > 0
            with_labels = record["kind"] == "finetune"
            same = f"--set data.validation={record['validation']} --set seed={record['seed']}"
            if saw_some and with_labels:
                raise DataError(
                    f"{init}: was fine-tuned on a share of these same images, and saw some of those held back now; "
                    f"hold back the same: {same}"
                )
            if saw_some:
                note(
                    f"{init} was pretrained on some of the images held back now, without their labels; "
                    f"to hold back the same: {same}"
                )
            if then is None and with_labels:
                note(
                    f"{init} was fine-tuned on other images than these; should it have seen some of those held back "
                    "now, what is chosen by them is chosen less well"
                )

    def test_split(self, others: dict[str, Source], wanted: str | None = None) -> str | None:
        """The name of the one to be judged by, None where it is the images held back. Raises DataError."""
        data = self.recipe.data
        return choose_test(others, wanted or data.test, data.source, data.train)

    def check_test_images(self) -> None:
        """Decode the split to be judged by, if there is one: so what is wrong with it is said before any training."""
        _, others = self.sources
        split = self.test_split(others)
        if split is not None:
            self._load(others[split])

    def test_images(self, wanted: str | None = None, stage: Stage = "finetune") -> tuple[str, Images]:
        """(name, images) to be judged by: `wanted`, else the recipe's test split, else the images held back.

        Named, it may be the training split too, as where --data names other images than those trained on. Raises
        DataError where which images were held back can't be told, for the model was trained on others.
        """
        data, (train, others) = self.recipe.data, self.sources
        name = Path(data.source).name
        if wanted and split_named(wanted) == split_named(data.train):
            return f"{name}/{wanted}", self._load(train)
        split = self.test_split(others, wanted)
        if split is not None:
            return f"{name}/{split}", self._load(others[split])
        path, records = self._seen(stage)
        images = self._load(train)
        if records and "images" in records[-1] and held_back_by(images, records[-1]) is None:
            raise DataError(
                f"{data.source}: {len(images):,} images, not those of which {path} was trained on "
                f"{records[-1]['images']:,}: which were held back from it can't be told; name those again with --data, "
                f"or, if it has seen none of these, judge by all of them: prg evaluate … --split {data.train}"
            )
        return f"{name}/held-out", self._judged(images, path, records)[1]

    def _seen(self, stage: Stage) -> tuple[Path, list[Record]]:
        """The checkpoint of that stage, or the one before it, and the trainings behind it; none where there is none."""
        path = self.finetuned if stage == "finetune" and self.finetuned.is_file() else self.pretrained
        return path, behind(read_facts(path)) if path.is_file() else []

    def check_classes(self) -> None:
        """Raise DataError, before any work, where labels lack, or a split has a class that training lacks."""
        data, (train, found) = self.recipe.data, self.sources
        test = self.test_split(found)
        if not train.classes:
            why = f": {train.why_unlabelled}" if train.why_unlabelled else ""
            raise DataError(
                f"{data.source}: no labels; fine-tuning needs one sub-folder of images a class{why}"
            )
        seen = train.labels()
        if len(seen) < 2:
            raise DataError(
                f"{data.source}: all images to train on are of one class, {train.classes[min(seen)]!r}; "
                "fine-tuning tells classes apart: name the folder whose sub-folders are the classes"
            )
        if data.test and test and not found[test].classes:
            raise DataError(
                f"{data.source}: data.test = {data.test!r} has no labels, so nothing can be judged by it; "
                "name another split, or none"
            )
        others = {split_named(k) for k in (data.test, "test", "validation")}
        judged = {k: v for k, v in found.items() if split_named(k) in others}
        check_classes_were_seen(train.classes, seen, judged)

    def _load(self, source: Source) -> Images:
        data = self.recipe.data
        with processes.writer_first():
            return load_split(
                source, self.image_spec, self.folder / "data", data.skip_unreadable, data.enlarge
            )


def choose_split(found: dict[str, Source], wanted: str, source: str, *more: str) -> str:
    """The split of that name, or of another name for it; `more` are names of others, to be told.

    Raises DataError where there is none.
    """
    same = [name for name in found if split_named(name) == split_named(wanted)]
    if not same:
        there = ", ".join([*more, *found])
        raise DataError(f"{source}: no split {wanted!r} (there are: {there}); name one of them")
    return wanted if wanted in found else same[0]


def choose_test(found: dict[str, Source], wanted: str, source: str, *more: str) -> str | None:
    """The split to judge by: `wanted` if named, else test, else validation, else None. Raises DataError.

    One without labels, such as a competition's, is passed over unless it is named.
    """
    if wanted:
        return choose_split(found, wanted, source, *more)
    labelled = {name: split for name, split in found.items() if split.classes}
    return next(
        (name for one in ("test", "validation") for name in labelled if split_named(name) == one), None
    )


def demand_test(found: dict[str, Source], wanted: str, source: str) -> str:
    """The same, where there has to be one. Raises DataError that says what there is."""
    chosen = choose_test(found, wanted, source)
    if chosen is None:
        there = ", ".join(f"{name}{'' if split.classes else ' (no labels)'}" for name, split in found.items())
        raise DataError(
            f"{source}: no split test or validation to judge by (there are: {there}); name one with --split"
        )
    return chosen


def open_run(folder: Path, recipe: Recipe | None) -> Run:
    """The run in `folder`, by the recipe given, or else by the one it was begun with."""
    path = folder / "recipe.json"
    if recipe is None:
        if not path.is_file():
            raise RecipeError(
                f"{path}: no run here yet; begin one by `prg pretrain` or `prg finetune` with --recipe"
            )
        return Run(folder, load_recipe(str(path)))
    return Run(folder, recipe)


def choose_device() -> torch.device:
    """The GPU where there is one; of several, this process's own."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
