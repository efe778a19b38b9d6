"""A run folder: its recipe, its images, and the checkpoints of its stages."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from entry.files import write_atomically
from prg.checkpoint import Facts, Stage, Trained, read_facts
from prg.errors import DataError, RecipeError
from prg.images.decoded import Decoding
from prg.images.material import Material
from prg.images.sets import Images, check_classes_were_seen
from prg.images.source import Source, standard_name
from prg.images.splits import choose_evaluated, choose_split, rename_classes, splits
from prg.recipe import Recipe, load_recipe
from prg.training import processes
from prg.training.start import Start


@dataclass(frozen=True)
class Run:
    """One experiment's folder."""

    folder: Path
    recipe: Recipe

    def checkpoint(self, stage: Stage) -> Path:
        """Where the checkpoint of a stage is, or will be."""
        return self.folder / stage / "checkpoint.safetensors"

    @property
    def pretrained(self) -> Path:
        return self.checkpoint("pretrain")

    @property
    def finetuned(self) -> Path:
        return self.checkpoint("finetune")

    def remember(self) -> None:
        """Write the recipe into the folder; a run that was refused leaves none."""
        path, content = self.folder / "recipe.json", self.recipe.model_dump_json(indent=2).encode() + b"\n"
        if not path.is_file() or path.read_bytes() != content:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)

    @cached_property
    def found(self) -> dict[str, Source]:
        """All splits by name, undecoded, under the recipe's class names. Raises DataError."""
        data = self.recipe.data
        if not data.source:
            raise DataError("the recipe names no images: say where they are with --data")
        found = splits(data.source, data.image_column, data.label_column)
        return rename_classes(found, data.train, data.labels, data.source)

    @property
    def sources(self) -> tuple[str, dict[str, Source]]:
        """(the name of the training split, all splits). Raises DataError where there is none to train on."""
        data = self.recipe.data
        return choose_split(self.found, data.train, data.source), self.found

    @property
    def evaluated(self) -> str:
        """The split to evaluate on; the training split itself where that is what is held out of it."""
        train, found = self.sources
        return choose_evaluated(found, self.recipe.data.test, self.recipe.data.source, train)

    def training_images(self) -> Images:
        """All images of the training split."""
        train, found = self.sources
        return self.load(found[train])

    def labelled_images(self) -> Images:
        """The same where their labels are learned.

        What is wrong with the classes, or with the images to evaluate on, shows here: before hours of training.
        Raises DataError.
        """
        self.check_classes()
        images = self.training_images()
        self.check_test_images()
        return images

    def load(self, source: Source) -> Images:
        """A split, decoded; kept in the folder for the next time. Of several processes, each decodes a part."""
        data = self.recipe.data
        decoding = Decoding(
            source, self.recipe.image.spec, self.folder / "data", data.skip_unreadable, data.enlarge
        )
        parts = processes.count()
        if parts > 1 and not processes.on_main_process(lambda: decoding.done):
            decoding.part(processes.rank(), parts)
            processes.barrier()
        return processes.main_process_first(lambda: decoding.whole(parts))

    def material(self, stage: Stage, seen: bool = False) -> Material:
        """The images that the run's model of that stage may be evaluated on."""
        facts, data = read_facts(self.checkpoint(stage)), self.recipe.data
        known = facts.held_out, facts.trained_on
        return Material(data.source, self.found, data.train, data.test, *known, seen, self.load)

    def check_classes(self) -> None:
        """Raise DataError, before any work, where labels lack, or a split has a class that training lacks."""
        data, (train, found) = self.recipe.data, self.sources
        source = found[train]
        if not source.classes:
            why = f": {source.why_unlabelled}" if source.why_unlabelled else ""
            raise DataError(
                f"{data.source}: no labels; fine-tuning needs one sub-folder of images a class, or a column of "
                f"labels{why}"
            )
        seen = source.labels()
        if len(seen) < 2:
            raise DataError(
                f"{data.source}: all images to train on are of one class, {source.classes[min(seen)]!r}; "
                "fine-tuning needs two classes at least: name the folder whose sub-folders are the classes"
            )
        if data.test and not found[self.evaluated].classes:
            raise DataError(
                f"{data.source}: data.test = {data.test!r} has no labels, so nothing can be evaluated on it; "
                "name another split, or none"
            )
        others = {standard_name(k) for k in (data.test, "test", "validation")}
        evaluated = {k: v for k, v in found.items() if k != train and standard_name(k) in others}
        check_classes_were_seen(source.classes, seen, evaluated)

    def check_test_images(self) -> None:
        """Decode the split to evaluate on, if there is one. Raises DataError."""
        train, found = self.sources
        if self.evaluated != train:
            self.load(found[self.evaluated])

    def first_facts(self, stage: Stage, trained: Trained, images: Images, start: Start | None) -> Facts:
        """Of a training on `images` that begins now; start: None for random weights, or where it goes on."""
        frozen = stage == "finetune" and self.recipe.finetune.freeze
        own = 0.0 if frozen else self.recipe.data.validation
        before = start.held_out if start else own
        return Facts(
            stage=stage,
            recipe=self.recipe.without_source(),
            trained=trained,
            classes=images.classes,
            init=start.sha256 if start else "",
            held_out=None if before is None else min(own, before),
            trained_on=tuple(dict.fromkeys((*(start.trained_on if start else ()), images.kept_keys))),
            history=start.history if start else (),
        )


def open_run(folder: Path, recipe: str | None = None, changes: Sequence[str] = ()) -> Run:
    """The run in `folder`, by the recipe of that name or file, or else the one it was begun with.

    changes: of keys, as `--set` has them. Raises RecipeError.
    """
    own = folder / "recipe.json"
    if recipe is None and not own.is_file():
        raise RecipeError(
            f"{own}: no run here yet; begin one by `prg pretrain` or `prg finetune` with --recipe"
        )
    return Run(folder, load_recipe(recipe or str(own), changes))
