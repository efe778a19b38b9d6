"""A run folder: its recipe, its images, and the checkpoints of its stages."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entry.config import ImageSpec
from prg.recipe import Recipe, RecipeError, parse_recipe, recipe_table
from prg.training.data import DataError, Images, hold_out, load_split, splits

TEST_SPLITS = ("test", "validation")


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

        Where the images lie is left out: a folder may move, and a path is nobody else's business.
        """
        table = recipe_table(self.recipe)
        del table["data"]["source"]
        return {k: table[k] for k in ("seed", "network", "image", "data", *sections)} | {
            "images": len(images)
        }

    def training_images(self) -> tuple[Images, Images]:
        """(training, validation), the same whenever the recipe is."""
        data = self.recipe.data
        if not data.source:
            raise DataError("the recipe names no images: say where they are with --data")
        found = splits(data.source)
        if data.train not in found:
            raise DataError(f"{data.source}: no split {data.train!r} (there are: {', '.join(found)})")
        images = load_split(found[data.train], self.image_spec, self.folder / "data")
        return hold_out(self._named(images), data.validation, self.recipe.seed)

    def test_images(self) -> tuple[str, Images]:
        """(name of the split, images) to be judged by: the test split, or else what was held back."""
        data = self.recipe.data
        found = splits(data.source)
        names = (data.test,) if data.test else TEST_SPLITS
        split = next((n for n in names if n in found), None)
        if split is None and data.test:
            raise DataError(f"{data.source}: no split {data.test!r} (there are: {', '.join(found)})")
        if split is None:
            return "held-out", self.training_images()[1]
        images = self._named(load_split(found[split], self.image_spec, self.folder / "data"))
        trained = self._named(load_split(found[data.train], self.image_spec, self.folder / "data"))
        return split, _same_classes(images, trained.classes, f"{data.source}, split {split}")

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


def _same_classes(images: Images, trained: tuple[str, ...], where: str) -> Images:
    """The images with their labels numbered as in training. Raises DataError for a class training never saw."""
    unknown = [c for c in images.classes if c not in trained]
    if unknown:
        raise DataError(f"{where}: classes that training never saw: {', '.join(unknown)}")
    if images.labels is None:
        return images
    number = np.array([trained.index(c) for c in images.classes])
    return Images(images.pixels, number[images.labels], trained)


def open_run(folder: Path, recipe: Recipe | None) -> Run:
    """The run in `folder`; a recipe given is written there as recipe.json, none given is read from there."""
    path = folder / "recipe.json"
    if recipe is None:
        if not path.is_file():
            raise RecipeError(f"{path}: no run here yet; begin one with --recipe")
        return Run(folder, parse_recipe(json.loads(path.read_text("utf-8")), str(path)))
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(recipe_table(recipe), indent=2) + "\n", "utf-8")
    os.replace(temporary, path)
    return Run(folder, recipe)


def choose_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
