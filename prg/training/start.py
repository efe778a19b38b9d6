"""What a fine-tuning begins from: the network of a pretraining, of another fine-tuning, or of an entry."""

from dataclasses import dataclass
from pathlib import Path

import torch

from entry.config import check_weights, read_entry
from entry.files import sha256
from prg.checkpoint import FittedOn, differences, load_checkpoint, load_strictly
from prg.console import note
from prg.encoder import Encoder
from prg.errors import CheckpointError
from prg.recipe import Image
from prg.reopen import NET, part
from prg.trained import projection_of
from prg.training.fitted import Fitted
from prg.unet import PRESETS, UNet, UNetConfig, fitting_presets, shapes_of

Solve = tuple[str, str, int, tuple[str, ...], tuple[str, ...], float]
"""Path, solver, steps, layers, pooling, and the level."""


@dataclass(frozen=True)
class Start:
    """What is known of the weights that a training began from, as `prg.checkpoint.Facts` has it."""

    sha256: str
    held_out: float | None
    trained_on: tuple[tuple[str, ...], ...]
    history: tuple[str, ...]
    solve: Solve
    """That its projection, if it has one, was fitted to."""
    fitted: Fitted

    def projection_for(self, encoder: Encoder, t_end: float) -> Fitted | None:
        """Its projection, where this unchanged network is reversed in the very same way."""
        fits = self.fitted.projection is not None and self.solve == solve_of(encoder, t_end)
        return self.fitted if fits else None


def solve_of(encoder: Encoder, t_end: float) -> Solve:
    """What decides HIDDEN beside the weights."""
    config = encoder.config
    return config.path, config.solver, config.steps, encoder.layers, config.pooling, t_end


def load_start(init: Path, network: str | UNetConfig, image: Image, path: str) -> tuple[UNet, Start]:
    """The network of `init`, and what is known of it.

    init: a checkpoint of `prg pretrain` or `prg finetune` (its averaged weights), or the folder of an entry (its
    highest version). network, image, path: what the recipe asks for.
    Raises CheckpointError or EntryError where it is something else, of another network, of other image facts, or of
    another probability path.
    """
    if not (init / "config.pbtxt").is_file():
        return _from_checkpoint(init, network, image, path)
    entry = read_entry(init)
    version = entry.default_version
    module = check_weights(init, entry, version)
    there = entry.prg.image
    changed = [
        f"image.{key} is {getattr(there, key)} there, {getattr(image, key)} in the recipe"
        for key in ("size", "mean", "std")
        if getattr(there, key) != getattr(image, key)
    ]
    if entry.prg.path != path:
        changed.append(f"encoder.path is {entry.prg.path!r} there, {path!r} in the recipe")
    if changed:
        raise CheckpointError(
            f"{init}: its network takes something else than the recipe's ({'; '.join(changed)}); "
            "change the recipe, such as by --set"
        )
    state = torch.jit.load(str(module), map_location="cpu").state_dict()
    weights = part(state, NET)
    shapes = {k: v.shape for k, v in weights.items()}
    shape = PRESETS[network] if isinstance(network, str) else network
    if shapes_of(shape) != shapes:
        fitting = "".join(f": --set network={name}" for name in fitting_presets(weights)[:1])
        raise CheckpointError(f"{init}: its network is another than the recipe's{fitting}")
    net = UNet(shape)
    net.load_state_dict(weights)
    facts = entry.prg.versions[version]
    line = f"entry: {entry.name} version {version} ({facts.sha256[:12]})"
    training = facts.training
    on = training.get("fitted_on")
    prg, hidden = entry.prg, entry.prg.features.hidden
    return net, Start(
        sha256=facts.sha256,
        held_out=facts.held_out,
        trained_on=tuple(map(tuple, training.get("trained_on", ()))),
        history=(*training.get("history", ()), line),
        solve=(prg.path, prg.solver, prg.steps, hidden.layers, hidden.pooling, prg.t_end),
        fitted=Fitted(projection_of(state), FittedOn.model_validate(on) if on else None),
    )


def _from_checkpoint(init: Path, network: str | UNetConfig, image: Image, path: str) -> tuple[UNet, Start]:
    _refuse_what_lies_beside(init)
    saved = load_checkpoint(init)
    facts = saved.facts
    wanted = facts.recipe.model_copy(update={"network": network, "image": image})
    then, now = (r.model_dump(mode="json", include={"network", "image"}) for r in (facts.recipe, wanted))
    changed = differences(
        then | {"encoder": {"path": facts.recipe.encoder.path}}, now | {"encoder": {"path": path}}
    )
    if changed:
        raise CheckpointError(f"{init}: trained with other settings ({'; '.join(changed)})")
    if facts.trained and not facts.complete:
        note(f"{init} is unfinished, step {facts.trained.step} of {facts.trained.steps}")
    net = UNet(facts.recipe.unet)
    load_strictly(net, saved.part("average" if facts.stage == "pretrain" else f"average.{NET}"), init)
    recipe = facts.recipe
    return net, Start(
        sha256=sha256(init),
        held_out=facts.held_out,
        trained_on=facts.trained_on,
        history=(*facts.history, facts.summary()),
        solve=solve_of(Encoder(net, recipe.encoder), recipe.serve.t_end),
        fitted=Fitted(projection_of(saved.tensors), facts.fitted_on),
    )


def _refuse_what_lies_beside(init: Path) -> None:
    """Raise CheckpointError that names what was meant, where `init` is near it."""
    inside = [init / stage / "checkpoint.safetensors" for stage in ("pretrain", "finetune", ".")]
    checkpoints = [str(path) for path in inside if path.is_file()]
    if checkpoints:
        raise CheckpointError(f"{init}: a folder; name a checkpoint in it: {' or '.join(checkpoints)}")
    entries = [str(path.parent) for path in sorted(init.glob("*/config.pbtxt"))]
    if entries:
        raise CheckpointError(f"{init}: a folder of entries; name one: {' or '.join(entries)}")
    for entry in (init.parent, init.parent.parent):
        if (entry / "config.pbtxt").is_file():
            raise CheckpointError(f"{init}: a part of an entry; name the entry's folder: {entry}")
