"""A run folder: its recipe, its images, and the checkpoints of its stages."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from entry.config import ImageSpec, write_atomically
from prg.checkpoint import CheckpointError, differences, read_facts
from prg.recipe import Recipe, RecipeError, load_recipe, recipe_table, with_defaults
from prg.training import processes
from prg.training.data import (
    Images,
    as_dealt,
    check_classes_were_seen,
    hold_out,
    load_split,
    trained_on,
)
from prg.training.sources import DataError, Source, split_named, splits


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

    def sources(self) -> dict[str, Source]:
        """The splits of the run's images, undecoded, under the class names that the recipe gives."""
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
        return {"train": renamed.pop(train)} | renamed

    def training_images(self) -> tuple[Images, Images]:
        """(training, validation), the same whenever the recipe is."""
        images = self._load(self.sources()["train"])
        return hold_out(images, self.recipe.data.validation, self.recipe.seed)

    def judged_images(self) -> tuple[Images, Images]:
        """(training, validation), as they were when the run's model was trained.

        Raises DataError where the images are others now: which of them were held back can't be told then.
        """
        path = self.finetuned if self.finetuned.is_file() else self.pretrained
        settings: dict[str, Any] = read_facts(path)["settings"] if path.is_file() else {}
        if "images" not in settings:  # as of what was imported
            return self.training_images()
        images = self._load(self.sources()["train"])
        dealt = as_dealt(images, trained_on(settings))
        if dealt is None:
            raise DataError(
                f"{self.recipe.data.source}: {len(images):,} images, not those of which {path} was trained on "
                f"{settings['images']:,}: which were held back from it can't be told; "
                "name a split that it never saw with --split"
            )
        return dealt

    def check_held_back_before(self, earlier: dict[str, Any], init: Path) -> None:
        """Raise DataError where a fine-tuning before this one learned labels of what is held back from this one.

        earlier: its record, as of `trained_on`; nothing is refused where it has no digest.
        """
        here = self.recipe.data.validation, self.recipe.seed
        if "digest" not in earlier or (earlier["validation"], earlier["seed"]) == here:
            return
        if as_dealt(self._load(self.sources()["train"]), earlier):
            raise DataError(
                f"{init}: was fine-tuned on a share of these same images, and saw some of those held back now; "
                f"hold back the same: --set data.validation={earlier['validation']} --set seed={earlier['seed']}"
            )

    def check_test_images(self) -> None:
        """Decode the split to be judged by, if there is one: so what is wrong with it is said before any training."""
        found = self.sources()
        split = choose_test(found, self.recipe.data.test, self.recipe.data.source)
        if split is not None:
            self._load(found[split])

    def test_images(self, wanted: str | None = None) -> tuple[str, Images]:
        """(name, images) to be judged by: `wanted`, else the recipe's test split, else the images held back."""
        data, found = self.recipe.data, self.sources()
        split = choose_test(found, wanted or data.test, data.source)
        name = Path(data.source).name
        if split is None:
            return f"{name}/held-out", self.judged_images()[1]
        return f"{name}/{split}", self._load(found[split])

    def check_classes(self) -> None:
        """Raise DataError, before any work, where there are no labels, or a split has a class that training lacks."""
        data, found = self.recipe.data, self.sources()
        choose_test(found, data.test, data.source)
        train = found.pop("train")
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
        others = {split_named(k) for k in (data.test, "test", "validation")}
        judged = {k: v for k, v in found.items() if split_named(k) in others}
        check_classes_were_seen(train.classes, seen, judged)

    def _load(self, source: Source) -> Images:
        data = self.recipe.data
        with processes.writer_first():
            return load_split(
                source, self.image_spec, self.folder / "data", data.skip_unreadable, data.enlarge
            )


def choose_split(found: dict[str, Source], wanted: str, source: str) -> str:
    """The split of that name, or of another name for it. Raises DataError where there is none."""
    same = [name for name in found if split_named(name) == split_named(wanted)]
    if not same:
        raise DataError(f"{source}: no split {wanted!r} (there are: {', '.join(found)}); name one of them")
    return wanted if wanted in found else same[0]


def choose_test(found: dict[str, Source], wanted: str, source: str) -> str | None:
    """The split to judge by: `wanted` if named, else test, else validation, else None. Raises DataError.

    One without labels, such as a competition's, is passed over where others have some.
    """
    if wanted:
        return choose_split(found, wanted, source)
    labelled = {name: split for name, split in found.items() if split.classes} or found
    return next(
        (name for one in ("test", "validation") for name in labelled if split_named(name) == one), None
    )


def open_run(folder: Path, recipe: Recipe | None) -> Run:
    """The run in `folder`, by the recipe given, or else by the one it was begun with."""
    path = folder / "recipe.json"
    if recipe is None:
        if not path.is_file():
            raise RecipeError(f"{path}: no run here yet; begin one with --recipe")
        return Run(folder, load_recipe(str(path)))
    return Run(folder, recipe)


def choose_device() -> torch.device:
    """The GPU where there is one; of several, this process's own."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
