"""The images that a trained model may be evaluated on: none that it was trained on, unless that is asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prg.errors import DataError
from prg.images.held_out import are_others, hold_out, knows
from prg.images.sets import Images
from prg.images.source import Source, standard_name
from prg.images.splits import choose_evaluated, choose_split

OTHERS = "name a test split or other images with --data, or evaluate on these all the same with --seen"
SHARE = 0.2
"""Held out from the training split of a model that may have seen all of it, where that is asked for."""


@dataclass(frozen=True)
class Material:
    """Splits of images, beside what is known of the model's training."""

    source: str
    """Where they are: a folder, or a dataset's name."""
    found: dict[str, Source]
    train: str
    """The name of the training split, or another name for it."""
    test: str
    """The split to evaluate on where none is asked for; empty: test, else validation, else what was held out."""
    held_out: float | None
    """The share held out by every training of the model; 0 where none was, None where that is not known."""
    trained_on: tuple[tuple[str, ...], ...]
    """Keys of some images of each training of the model, as a checkpoint has them."""
    seen: bool
    """Whether images that the model may have been trained on are asked for all the same."""
    load: Callable[[Source], Images]

    @property
    def name(self) -> str:
        """What a person calls them."""
        return Path(self.source).name

    def evaluated(self, wanted: str = "") -> tuple[str, Images]:
        """(name, images) to evaluate on: the split `wanted`, else the one for that.

        Of images trained on, what was held out. They are known by their keys, whatever the name of their split. One
        that is called as the training split is taken for it unless the keys show that it is not.
        Raises DataError where it is not known what was held out.
        """
        chosen = choose_evaluated(self.found, wanted or self.test, self.source, self.train)
        images = self.load(self.found[chosen])
        trained_on = standard_name(chosen) == standard_name(self.train)
        # Where the share is not known, neither are all trainings.
        if trained_on and self.held_out is not None and are_others(self.trained_on, images):
            return f"{self.name}/{chosen} (not trained on)", images
        if not trained_on and not any(knows(kept, images) for kept in self.trained_on):
            return f"{self.name}/{chosen}", images
        if self.seen:
            return f"{self.name}/{chosen} (seen in training)", images
        name = "held-out" if trained_on else f"{chosen} (held out)"
        return f"{self.name}/{name}", self._divide(images)[1]

    def training(self) -> tuple[Images, Images]:
        """(what was trained on, what was held out) of the training split.

        Raises DataError where none was held out, or it is not known which, unless `seen`.
        """
        return self._divide(self.load(self.found[choose_split(self.found, self.train, self.source)]))

    def _divide(self, images: Images) -> tuple[Images, Images]:
        share = self.held_out or (SHARE if self.seen else None)
        if share is None:
            fitted = " (with --freeze, the head is fitted to all it is given)" if self.held_out == 0 else ""
            raise DataError(
                f"{self.source}: the model may have been trained on these images, and holds none of them out{fitted}; "
                f"{OTHERS}"
            )
        return hold_out(images, share, OTHERS)
