"""A run folder: its recipe, its images, and the checkpoints of its stages."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from entry.config import ImageSpec, write_atomically
from prg.checkpoint import CheckpointError, differences, read_facts
from prg.recipe import Recipe, RecipeError, parse_recipe, recipe_table, with_defaults
from prg.training import processes
from prg.training.data import (
    DataError,
    Images,
    Source,
    check_classes_were_seen,
    hold_out,
    load_split,
    splits,
)


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
        """What a stage's result depends on: those sections of the recipe, and the images by their number.

        Where the images lie is left out: a folder may move, and a path is nobody else's business. So is which
        of them would have been refused.
        """
        table = recipe_table(self.recipe)
        for key in ("source", "skip_unreadable", "enlarge"):
            del table["data"][key]
        return {k: table[k] for k in ("seed", "network", "image", "data", *sections)} | {
            "images": len(images)
        }

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

    def training_images(self) -> tuple[Images, Images]:
        """(training, validation), the same whenever the recipe is."""
        data = self.recipe.data
        if not data.source:
            raise DataError("the recipe names no images: say where they are with --data")
        found = splits(data.source)
        if data.train not in found:
            raise DataError(f"{data.source}: no split {data.train!r} (there are: {', '.join(found)})")
        images = self._load(found[data.train])
        return hold_out(self._named(images), data.validation, self.recipe.seed)

    def test_images(self, wanted: str | None = None) -> tuple[str, Images]:
        """(name, images) to be judged by: `wanted`, else the recipe's test split, else the images held back."""
        data = self.recipe.data
        found = splits(data.source)
        split = choose_split(found, wanted or data.test, data.source)
        if split is None:
            return f"{Path(data.source).name}/held-out", self.training_images()[1]
        images = self._load(found[split])
        return f"{Path(data.source).name}/{split}", images

    def check_classes(self, training: Images, held_back: Images) -> None:
        """Raise DataError, before any work, for a class of the other splits that training never sees."""
        data = self.recipe.data
        others = (data.test, "test", "validation")
        found = {k: replace(v, classes=data.labels or v.classes) for k, v in splits(data.source).items()}
        check_classes_were_seen(
            training, held_back, {k: v for k, v in found.items() if k in others and k != data.train}
        )

    def _load(self, source: Source) -> Images:
        data = self.recipe.data
        with processes.writer_first():
            return load_split(
                source, self.image_spec, self.folder / "data", data.skip_unreadable, data.enlarge
            )

    def _named(self, images: Images) -> Images:
        """The images under the class names that the recipe gives, if it does."""
        labels = self.recipe.data.labels
        if not labels:
            return images
        if len(labels) != len(images.classes):
            raise DataError(
                f"data.labels has {len(labels)} names, but {self.recipe.data.source} has {len(images.classes)} classes"
            )
        return replace(images, classes=labels)


def choose_split(found: dict[str, Source], wanted: str, source: str) -> str | None:
    """The split to judge by: `wanted` if named, else test, else validation, else None. Raises DataError."""
    if wanted and wanted not in found:
        raise DataError(f"{source}: no split {wanted!r} (there are: {', '.join(found)})")
    return wanted or next((s for s in ("test", "validation") if s in found), None)


def open_run(folder: Path, recipe: Recipe | None) -> Run:
    """The run in `folder`, by the recipe given, or else by the one it was begun with."""
    path = folder / "recipe.json"
    if recipe is None:
        if not path.is_file():
            raise RecipeError(f"{path}: no run here yet; begin one with --recipe")
        return Run(folder, parse_recipe(json.loads(path.read_text("utf-8")), str(path)))
    return Run(folder, recipe)


def choose_device() -> torch.device:
    """The GPU where there is one; of several, this process's own."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
