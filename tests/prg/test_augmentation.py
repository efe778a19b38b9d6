"""Augmentations: each image its own, the same for the same seed, and what they say they are."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import random_net
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from prg.classifier import Classifier
from prg.encoder import Encoder
from prg.images.augmentation import AUGMENTATIONS, mix
from prg.images.randaugment import OPERATIONS
from prg.paths import PATHS, flow_matching_loss
from prg.recipe import Recipe, load_recipe
from prg.training.finetune import finetuning_batch, finetuning_loss


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(count: int = 16, side: int = 16, seed: int = 1) -> Tensor:
    """Smooth images with some noise, so that no operation leaves them as they are."""
    coarse = torch.rand(count, 3, 4, 4, generator=generator(seed)) * 200 + 20
    fine = torch.rand(count, 3, side, side, generator=generator(seed + 1)) * 30
    return (F.interpolate(coarse, (side, side), mode="bilinear") + fine).clamp(0, 255).byte()


def alike(count: int) -> Tensor:
    return pixels(1).expand(count, -1, -1, -1).contiguous()


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_shape_type_determinism_and_a_draw_for_each_image(name: str) -> None:
    for side in (16, 32, 64):
        images = pixels(32, side)
        before = images.clone()
        first, again, other = (AUGMENTATIONS[name](images, generator(s)) for s in (3, 3, 4))
        assert (first.shape, first.dtype) == (images.shape, torch.uint8)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert torch.equal(images, before)
    out = AUGMENTATIONS[name](alike(64), generator())
    assert len(torch.unique(out.flatten(1), dim=0)) >= (2 if name == "flip" else 10)


def test_erased_is_a_rectangle_of_the_size_that_is_said() -> None:
    images = torch.zeros(2000, 3, 32, 32, dtype=torch.uint8)
    changed = (AUGMENTATIONS["erase"](images, generator()) > 0).any(1)
    shares = []
    for mask in changed[changed.flatten(1).any(1)]:
        (top, left), (bottom, right) = mask.nonzero().amin(0), mask.nonzero().amax(0)
        box = (bottom - top + 1) * (right - left + 1)
        assert mask.sum() >= 0.95 * box  # noise may be 0 too
        shares.append(box.item() / 32**2)
    assert 0.01 < min(shares) < max(shares) < 0.36
    assert np.mean(shares) == pytest.approx(0.175, abs=0.02)


def test_a_resized_crop_shows_a_part_of_the_image() -> None:
    ramp = torch.arange(64, dtype=torch.uint8).repeat(64, 1).expand(500, 3, 64, 64).contiguous()
    out = AUGMENTATIONS["resized_crop"](ramp, generator()).float()[:, 0, 32]
    span = (out[:, -1] - out[:, 0]) / 63  # of the width
    assert out.diff(dim=1).min() >= 0
    assert span.min() > 0.2
    assert span.max() <= 1
    assert span.std() > 0.1


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_changes_an_image_and_one_of_two_directions_none_at_strength_0(name: str) -> None:
    images = pixels(6)
    out = OPERATIONS[name](images, torch.tensor([0.9, -0.9, 0.8, -0.8, 1.0, -1.0]))
    assert (out.shape, out.dtype) == (images.shape, torch.uint8)
    assert (out != images).flatten(1).any(1).all()
    if name in ("colour", "contrast", "brightness", "sharpness", "rotate", "shear_x", "translate_y"):
        assert torch.equal(OPERATIONS[name](images, torch.zeros(6)), images)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        *((name, getattr(ImageOps, name)) for name in ("autocontrast", "equalize", "invert")),
        *((name, getattr(ImageEnhance, name.title())) for name in ("contrast", "brightness", "sharpness")),
        ("colour", ImageEnhance.Color),
    ],
)
def test_operations_are_pillows(name: str, reference: Any) -> None:
    images = pixels(4, 24)
    out = OPERATIONS[name](images, torch.full((4,), 0.8))
    for mine, image in zip(out, images, strict=True):
        picture = reference(Image.fromarray(image.permute(1, 2, 0).numpy()))
        theirs = np.asarray(picture.enhance(1.72) if hasattr(picture, "enhance") else picture)
        assert np.abs(mine.permute(1, 2, 0).numpy().astype(int) - theirs).max() <= 2  # of rounding


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_labels_are_the_shares_of_mixed_images(mixup: float, cutmix: float) -> None:
    """Each image is of one value of its own, so that the mixture's mean tells its parts."""
    values = torch.arange(8.0)
    x = values[:, None, None, None].expand(8, 3, 32, 32).contiguous()
    mixed, targets = mix(x, torch.arange(8), 8, mixup, cutmix, generator())
    assert torch.equal(mixed, mix(x, torch.arange(8), 8, mixup, cutmix, generator())[0])
    assert torch.allclose(targets.sum(1), torch.ones(8))
    assert (targets >= 0).all()
    assert ((targets > 0).sum(1) <= 2).all()
    assert torch.allclose(mixed.mean((1, 2, 3)), targets @ values, atol=1e-4)
    assert cutmix or [len(torch.unique(image)) for image in mixed] == [1] * 8
    assert mixup or set(torch.unique(mixed).tolist()) <= set(values.tolist())


def test_the_share_of_a_mixture_is_beta_distributed() -> None:
    labels = torch.arange(20_000) % 2
    _, targets = mix(torch.zeros(20_000, 3, 1, 1), labels, 2, 0.4, 0.0, generator())
    share = targets[(targets > 0).all(1), 0]
    assert share.var().item() == pytest.approx(0.25 / (2 * 0.4 + 1), abs=0.01)


def finetuning_recipe(*settings: str) -> Recipe:
    return load_recipe("images-32", ["network=tiny16", "image.size=16", "image.resize=16", *settings])


def test_beta_adds_flow_matching() -> None:
    recipes = [finetuning_recipe(f"finetune.beta={b}") for b in (0.0, 0.1)]
    net = random_net()
    model = Classifier(Encoder(net, recipes[0].encoder), recipes[0].head(3))
    images, labels = pixels(8), torch.arange(8) % 3
    batches = [finetuning_batch(r, 3)(images, labels, generator()) for r in recipes]
    assert [len(b) for b in batches] == [3, 6]
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=False))
    plain, both = (finetuning_loss(r)(model, b) for r, b in zip(recipes, batches, strict=True))
    flow = flow_matching_loss(net, PATHS["icfm"], *batches[1][3:])
    assert torch.allclose(both, plain + 0.1 * flow)


def test_mixing_is_part_of_the_batch() -> None:
    recipe = finetuning_recipe("finetune.mixup=0.8", "finetune.cutmix=1.0")
    images, labels = pixels(8), torch.arange(8) % 3
    x, targets, levels = finetuning_batch(recipe, 3)(images, labels, generator())
    assert targets.shape == (8, 3)
    assert torch.allclose(targets.sum(1), torch.ones(8))
    model = Classifier(Encoder(random_net(), recipe.encoder), recipe.head(3))
    assert finetuning_loss(recipe)(model, (x, targets, levels)).isfinite()
