"""Which score tells that an image is of no class the model knows: measured by leaving classes out.

`split` takes every fifth class out of a parquet data set. Train a classifier on what is left; `score` then compares
scores of the classes it knows with those of the classes left out, on the validation images of both, which are of one
source and one compression. AUROC: the share of pairs in which the known one has the larger score. What each score
needs is fitted to training images of the known classes, at most 4,000 as a training does.

python benchmarks/known_scores.py split tiny-imagenet-160x64/ left-out/
prg finetune RUN --recipe everyday-small --data left-out/known --init PRETRAINED --set finetune.epochs=2
python benchmarks/known_scores.py score RUN left-out/
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.known import auroc
from entry.config import ImageSpec
from prg.images.augmentation import normalise
from prg.images.decoded import load_split
from prg.images.sets import Images, sample_evenly
from prg.images.splits import splits
from prg.trained import load_trained
from prg.training.fitted import MOST, features
from prg.unet import UNet

EVERY = 5
NEAREST = 10
DENSITY_IMAGES = 500
DENSITY_STEPS = 8
SPACES = ("embedding", "read")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    split = commands.add_parser("split")
    split.add_argument("data", type=Path, help="a folder of parquet files, as `datasets` writes them")
    split.add_argument("out", type=Path)
    score = commands.add_parser("score")
    score.add_argument("run", type=Path)
    score.add_argument("data", type=Path, help="what `split` wrote")
    arguments = parser.parse_args(argv)
    if arguments.command == "split":
        for file in sorted(arguments.data.glob("*.parquet")):
            leave_out(file, arguments.out)
    else:
        print(json.dumps(compare(arguments.run, arguments.data)))
    return 0


def leave_out(file: Path, out: Path) -> None:
    """The rows of a file, dealt by class to out/known and out/others."""
    table = pq.read_table(file)
    facts = json.loads(table.schema.metadata[b"huggingface"])
    names = facts["info"]["features"]["label"]["names"]
    others = np.arange(len(names)) % EVERY == EVERY - 1
    for folder, wanted in (("known", ~others), ("others", others)):
        ids = np.flatnonzero(wanted)
        rows = table.filter(pc.is_in(table["label"], pa.array(ids)))
        labels = pa.array(np.searchsorted(ids, rows["label"].to_numpy()))
        facts["info"]["features"]["label"]["names"] = [names[i] for i in ids]
        rows = rows.set_column(rows.schema.get_field_index("label"), "label", labels)
        (out / folder).mkdir(parents=True, exist_ok=True)
        pq.write_table(
            rows.replace_schema_metadata({"huggingface": json.dumps(facts)}), out / folder / file.name
        )


def compare(run: Path, data: Path) -> dict[str, object]:
    """The scores' AUROC, the best first."""
    extractor, facts = load_trained(run / "finetune" / "checkpoint.safetensors")
    image, level = facts.recipe.image.spec, facts.recipe.finetune.t_end[0]

    def read(folder: str, split: str) -> Images:
        return load_split(splits(str(data / folder))[split], image, run / "data")

    def parts(images: Images) -> Parts:
        assert extractor.projection
        assert extractor.head
        state, hidden = features(extractor.encoder, image, images.pixels, level, "features")
        seen = extractor.head.classifier[0](extractor.head.read(state, hidden))
        return Parts(extractor.projection(hidden), seen, extractor.head(state, hidden))

    train = sample_evenly(read("known", "train"), MOST)
    known, others = read("known", "validation"), read("others", "validation")
    with torch.no_grad():
        fitted = Fitted(parts(train), labels_of(train), len(train.classes))
        own = parts(known)
        scores, foreign = fitted.scores(own), fitted.scores(parts(others))
    scores["density of the flow"] = density(extractor.encoder.net, image, known)
    foreign["density of the flow"] = density(extractor.encoder.net, image, others)
    found = {name: auroc(scores[name], foreign[name]) for name in scores}
    return {
        "benchmark": "known_scores",
        "classes": [len(known.classes), len(others.classes)],
        "images": [len(known), len(others)],
        "top1": round(float((own.logits.argmax(1) == labels_of(known)).float().mean()), 4),
        "auroc": dict(sorted(found.items(), key=lambda item: -item[1])),
    }


def labels_of(images: Images) -> Tensor:
    assert images.labels is not None
    return torch.from_numpy(images.labels)


class Parts(NamedTuple):
    """Of images: EMBEDDING, what the head reads as its first layer normalises it, LOGITS."""

    embedding: Tensor
    read: Tensor
    logits: Tensor


class Fitted:
    """What the scores need of training images."""

    def __init__(self, parts: Parts, labels: Tensor, classes: int) -> None:
        self.embedding = parts.embedding
        self.spaces = {}
        one_hot = F.one_hot(labels, classes).double()
        for name in SPACES:
            x = getattr(parts, name).double()
            means = one_hot.t() @ x / one_hot.sum(0)[:, None]
            within, whole = x - means[labels], x - x.mean(0)
            self.spaces[name] = (means, x.mean(0), whitening(within), whitening(whole))

    def scores(self, parts: Parts) -> dict[str, np.ndarray]:
        """Each score of each image; larger is more known."""
        z, embedding = parts.logits.double(), parts.embedding
        p = z.softmax(1)
        nearest = torch.cdist(embedding, self.embedding).kthvalue(NEAREST, 1).values
        unit = F.normalize(self.embedding, dim=1)
        cosine = (F.normalize(embedding, dim=1) @ unit.t()).topk(NEAREST).values[:, -1]
        found = {
            "largest probability": p.amax(1),
            "largest logit": z.amax(1),
            "energy": z.logsumexp(1),
            "minus entropy": (p * p.clamp(min=1e-12).log()).sum(1),
            "tenth nearest": -nearest,
            "tenth nearest by cosine": cosine,
        }
        for name in SPACES:
            means, mean, within, whole = self.spaces[name]
            x = getattr(parts, name).double()
            distance = torch.cdist(x, means).amin(1)
            mahalanobis = torch.cdist(x @ within, means @ within).amin(1)
            found |= {
                f"distance to means, {name}": -distance,
                f"Mahalanobis, {name}": -mahalanobis,
                f"relative Mahalanobis, {name}": ((x - mean) @ whole).square().sum(1) - mahalanobis.square(),
                f"relative distance, {name}": (x - mean).square().sum(1) - distance.square(),
                f"cosine to means, {name}": (
                    F.normalize(x - mean, dim=1) @ F.normalize(means - mean, dim=1).t()
                ).amax(1),
            }
        scale = {name: (v - v.mean()) / v.std() for name, v in found.items()}
        found["energy + relative Mahalanobis, embedding"] = (
            scale["energy"] + scale["relative Mahalanobis, embedding"]
        )
        return {name: value.detach().numpy() for name, value in found.items()}


def whitening(x: Tensor) -> Tensor:
    """A matrix W for which x W has unit covariance, a tenth of the mean variance added to each."""
    covariance = x.t() @ x / len(x)
    variance = covariance.diagonal().mean()
    values, vectors = torch.linalg.eigh(covariance + 0.1 * variance * torch.eye(len(covariance)).double())
    return vectors / values.sqrt()


def density(net: UNet, image: ImageSpec, images: Images) -> np.ndarray:
    """log p of the flow for some of the images, by Hutchinson's estimate over Euler steps (Chen et al. 2018)."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)[:DENSITY_IMAGES].numpy()
    parts = []
    for start in range(0, len(order), 50):
        pixels = torch.from_numpy(np.ascontiguousarray(images.pixels[np.sort(order)[start : start + 50]]))
        x = normalise(pixels, image.mean, image.std)
        noise = torch.randint(0, 2, x.shape, generator=generator).float() * 2 - 1
        change = torch.zeros(len(x))
        for step in range(DENSITY_STEPS):
            t = x.new_full((len(x),), 1 - step / DENSITY_STEPS)
            x = x.detach().requires_grad_()
            v = net(x, t)
            (slope,) = torch.autograd.grad((v * noise).sum(), x)
            change = change + (slope * noise).sum((1, 2, 3)).detach() / DENSITY_STEPS
            x = (x - v / DENSITY_STEPS).detach()
        parts.append(-x.square().sum((1, 2, 3)) / 2 - change)
    return torch.cat(parts).numpy()


if __name__ == "__main__":
    sys.exit(main())
