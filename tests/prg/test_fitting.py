"""What is fitted to an encoder: the projection, class means, the calibration."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from entry.config import ImageSpec
from entry.vectors import unit_length
from prg.encoder import Encoder, EncoderConfig
from prg.errors import ExportError, FittingError
from prg.export import Export, export
from prg.extractor import Extractor, known
from prg.fitting import calibrate, fit_projection, principal, temperature
from prg.images.sets import Images, sample_evenly
from prg.unet import PRESETS, UNet


def correlated(n: int, dim: int) -> Tensor:
    """Features of very different sizes, each a mixture of a few causes, all of them positive."""
    generator = torch.Generator().manual_seed(0)
    causes = torch.randn(n, 24, generator=generator) * torch.linspace(3, 0.1, 24)
    mixed = causes @ torch.randn(24, dim, generator=generator) + 0.05 * torch.randn(
        n, dim, generator=generator
    )
    return 50 + mixed * torch.logspace(-3, 2, dim)


@pytest.mark.parametrize(("n", "dim", "length"), [(400, 40, 40), (4000, 300, 256), (100, 300, 25)])
def test_an_embedding_has_uncorrelated_numbers_each_with_the_root_of_its_spread(
    n: int, dim: int, length: int
) -> None:
    hidden = correlated(n, dim)
    found = fit_projection(hidden)(hidden).double()
    assert found.shape == (n, length)
    assert float(found.mean(0).abs().max()) < 1e-2
    variance = found.var(0, correction=0)
    _, expected = principal(((hidden - hidden.mean(0)) / hidden.std(0, correction=0)).double(), length)
    assert torch.allclose(variance[:20], expected[:20].sqrt(), rtol=0.02)
    correlation = torch.corrcoef(found[:, :20].t()) - torch.eye(20)
    assert float(correlation.abs().max()) < 0.02


def test_directions_are_those_of_most_variance_with_the_largest_component_positive() -> None:
    x = torch.randn(500, 30, generator=torch.Generator().manual_seed(1)).double() * torch.linspace(1, 4, 30)
    x = x - x.mean(0)
    directions, variances = principal(x, 5)
    assert torch.allclose((x @ directions.t()).var(0, correction=0), variances)
    assert bool((variances.diff() <= 0).all())
    assert bool((directions.gather(1, directions.abs().argmax(1, keepdim=True)) > 0).all())
    # by the matrix of images, as where there are more numbers than images
    few, spread = principal(torch.cat([x, torch.zeros(500, 600)], 1).double(), 5)
    assert torch.allclose(few[:, :30], directions, atol=1e-8)
    assert torch.allclose(spread, variances)


def test_whole_numbers_of_8_bits_hardly_turn_a_vector() -> None:
    turn, _ = torch.linalg.qr(torch.randn(300, 300, generator=torch.Generator().manual_seed(0)))
    hidden = torch.randn(4000, 300) * torch.logspace(1, -1, 300) @ turn
    projection = fit_projection(hidden)
    x = (hidden - hidden.mean(0)) / hidden.std(0, correction=0)
    directions, variances = principal(x.double(), 256)
    exact = (x.double() @ directions.t() / variances.sqrt().sqrt()).numpy()
    cosine = (unit_length(exact) * unit_length(projection(hidden).numpy())).sum(1)
    assert cosine.min() > 0.999


@pytest.mark.parametrize(
    "features", [torch.randn(63, 10), torch.full((100, 10), 0.3), torch.full((100, 10), np.nan)]
)
def test_what_no_embedding_can_be_fitted_to_is_refused(features: Tensor) -> None:
    with pytest.raises(FittingError):
        fit_projection(features)


def test_an_export_of_numbers_that_are_none_is_refused(tmp_path: Path) -> None:
    encoder = Encoder(UNet(PRESETS["tiny16"]), EncoderConfig())
    projection = fit_projection(torch.randn(64, encoder.hidden_dim))
    projection.scale[3] = np.nan
    image = ImageSpec(size=16, resize=16, preprocessing="v2", mean=(0.5,) * 3, std=(0.5,) * 3)
    extractor, new = Extractor(encoder, image, projection), tmp_path / "new"
    with pytest.raises(ExportError, match="projection.scale"):
        export(extractor, Export(image, 0.8, "embedding", {}, None), new)
    assert not new.exists()


def test_known_is_the_largest_logit_and_calibrated_by_its_quantiles() -> None:
    logits = torch.eye(2)[[0, 1] * 50] * torch.linspace(1, 3, 100)[:, None]
    assert known(logits).flatten().tolist() == pytest.approx(torch.linspace(1, 3, 100).tolist())
    found = calibrate(logits.numpy(), np.array([0, 1] * 50))
    assert (found.images, len(found.known_quantiles)) == (100, 101)
    assert found.known_quantiles[::50] == pytest.approx((1, 2, 3))


@pytest.mark.parametrize("right", [0.4, 1.0, 3.0])
def test_the_temperature_is_the_one_that_the_labels_were_drawn_by(right: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 5))
    shares = np.exp(logits / right)
    labels = np.array([rng.choice(5, p=p / p.sum()) for p in shares])
    assert temperature(logits, labels) == pytest.approx(right, rel=0.05)


def test_a_head_that_is_right_a_few_times_is_not_certain() -> None:
    few, many = (temperature(np.eye(3)[np.arange(n) % 3] * 9, np.arange(n) % 3) for n in (9, 9000))
    shares = np.exp(np.array([9, 0, 0]) / few)
    assert shares[0] / shares.sum() == pytest.approx(1 - 2 / 30, rel=1e-3)
    assert many < few


def test_what_is_constant_and_directions_without_variance_say_nothing() -> None:
    hidden = correlated(200, 30)
    hidden[:, 3], hidden[:, 7] = 5.0, 0.0
    projection = fit_projection(hidden)
    moved = hidden.clone()
    moved[:, 3] += 100
    assert torch.equal(projection(moved), projection(hidden))
    assert bool(projection(hidden).isfinite().all())
    few = torch.randn(400, 10, generator=torch.Generator().manual_seed(0)) @ torch.randn(10, 100)
    assert float(fit_projection(few)(few)[:, 10:].abs().max()) == 0


def test_a_sample_has_as_many_of_each_class_while_they_last() -> None:
    labels, rows = np.repeat([0, 1, 2], [5, 50, 100]), np.arange(155)
    some = sample_evenly(Images(rows, labels, ("a", "b", "c"), rows.astype(np.uint64)), 45)
    assert np.bincount(some.labels).tolist() == [5, 20, 20]  # type: ignore[arg-type]
    assert np.array_equal(np.unique(some.keys), some.keys)
