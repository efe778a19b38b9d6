"""What every import ends in: a run folder whose checkpoints the other commands take as their own.

Networks of others are rewritten once, in their weights: time that runs the other way is a rotation of the first time
layer and a sign of the last convolution. So no flag about the origin reaches training, export or serving.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entry.files import sha256
from prg.checkpoint import Checkpoint, Facts, Stage, load_strictly, save_checkpoint
from prg.checkpoint import Imported as Origin
from prg.encoder import Encoder
from prg.errors import CheckpointError
from prg.images.sets import same_classes
from prg.recipe import Recipe
from prg.trained import build_classifier, fitted_tensors
from prg.training.fitted import Fitted, fit
from prg.training.run import Run
from prg.unet import UNet


@dataclass(frozen=True)
class Imported:
    """A network under our parameter names and time convention, perhaps with a head."""

    recipe: Recipe
    source: Path
    """The file of the weights."""
    origin: str
    """Whose file it is."""
    version: str
    """Whatever the file says of its own version or epoch."""
    net: dict[str, Tensor]
    head: dict[str, Tensor] | None = None
    classes: tuple[str, ...] = ()


def read_tensors(path: Path) -> Any:
    """What torch.save wrote, if that is tensors and plain containers: no code of a pickle is ever run.

    Raises CheckpointError.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(
            f"{path}: not a file of tensors alone, so it is not loaded: unpickling anything else can run code "
            f"({reason})"
        ) from None
    except Exception as error:  # a broken archive makes the reader raise nearly anything
        reason = str(error).strip("() ") or type(error).__name__
        if "TorchScript" in reason:
            raise CheckpointError(
                f"{path}: a TorchScript module, not a file of tensors; where it is an entry's, there is nothing to "
                "import: `prg finetune … --init` takes the entry's folder"
            ) from None
        raise CheckpointError(f"{path}: not readable as a file of torch.save ({reason})") from None


def write_run(folder: Path, imported: Imported) -> Run:
    """Write the run. Its pretraining is the network; with a head, its fine-tuning is both.

    Where the recipe names images, the embedding is fitted to them; without, there is none. Raises CheckpointError
    where the weights do not fit the recipe's network, or the folder holds a run; FittingError, DataError for images
    that no embedding can be fitted to.
    """
    recipe = imported.recipe
    run = Run(folder, recipe)
    for path in (folder / "recipe.json", run.pretrained, run.finetuned):
        if path.exists():
            raise CheckpointError(f"{folder}: holds a run already ({path.name}); name a new folder")
    for name, tensor in (imported.net | (imported.head or {})).items():
        if not tensor.is_floating_point() or tensor.layout != torch.strided or not tensor.isfinite().all():
            raise CheckpointError(
                f"{imported.source}: {name} holds something else than finite numbers; it is no trained network's"
            )
    net = UNet(recipe.unet)
    load_strictly(net, imported.net, imported.source)
    encoder = Encoder(net.eval(), recipe.encoder)
    images = run.training_images() if recipe.data.source else None
    fitted = Fitted()
    if images is not None:
        fitted = fit(encoder, recipe.image.spec, recipe.serve.t_end, images)
    checkpoints = {run.pretrained: _checkpoint(imported, "pretrain", net, fitted)}
    if imported.head is not None:
        model = build_classifier(net, recipe, len(imported.classes)).eval()
        load_strictly(model.head, imported.head, imported.source)
        if images is not None:
            images = same_classes(images, imported.classes, recipe.data.source)
            level = recipe.finetune.t_end[0]
            fitted = fit(encoder, recipe.image.spec, recipe.serve.t_end, images, model.head, level)
        checkpoints[run.finetuned] = _checkpoint(imported, "finetune", model, fitted, imported.classes)
    try:
        for path, checkpoint in checkpoints.items():
            save_checkpoint(path, checkpoint)
        run.remember()
    except BaseException:  # such as a full disk: half a run would stand in the way of the next try
        for path in checkpoints:
            path.unlink(missing_ok=True)
        raise
    return run


def _checkpoint(
    imported: Imported, stage: Stage, model: nn.Module, fitted: Fitted, classes: tuple[str, ...] = ()
) -> Checkpoint:
    """Of a model that was not trained here: nothing is known of its images."""
    source = imported.source
    facts = Facts(
        stage=stage,
        recipe=imported.recipe.without_source(),
        imported=Origin(
            origin=imported.origin, file=source.name, sha256=sha256(source), version=imported.version
        ),
        classes=classes,
        fitted_on=fitted.on,
    )
    tensors = {f"average.{k}": v for k, v in model.state_dict().items()}
    return Checkpoint(tensors | fitted_tensors(fitted.projection), facts)
