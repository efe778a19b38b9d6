"""A tiny entry for tests: a scripted module whose answers show which image and level they are of."""

import hashlib
import io
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from entry.config import (
    Calibration,
    EmbeddingFeature,
    Entry,
    Features,
    HiddenFeature,
    ImageSpec,
    Prg,
    StateFeature,
    Tolerance,
    Version,
    write_entry,
)

LABELS = ("red", "green", "blue", "late")
TINY_CALIBRATION = Calibration(
    temperature=2.0, known_quantiles=tuple(i / 100 - 1 for i in range(101)), images=50
)


class Tiny(nn.Module):
    """EMBEDDING is (red, green, blue, t_end), each in [0, 1], HIDDEN that and a 1, LOGITS ten times that; KNOWN is
    minus the red; STATE the scaled pixels."""

    def __init__(self, head: bool, bias: float) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("bias", torch.tensor(bias))

    def embedding(self, IMAGE: Tensor, T_END: Tensor) -> Tensor:
        return torch.cat([IMAGE.float().mean((2, 3)) / 255, T_END], 1) + self.bias

    def state(self, IMAGE: Tensor, T_END: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(IMAGE.float() / 255, 16)
        return pooled.flatten(1) * T_END


class TinyFeatures(Tiny):
    def forward(self, IMAGE: Tensor, T_END: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        embedding = self.embedding(IMAGE, T_END)
        return self.state(IMAGE, T_END), hidden(embedding), embedding


class TinyClasses(Tiny):
    def forward(self, IMAGE: Tensor, T_END: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        embedding = self.embedding(IMAGE, T_END)
        state = self.state(IMAGE, T_END)
        return state, hidden(embedding), embedding, embedding * 10, -embedding[:, :1]


def hidden(embedding: Tensor) -> Tensor:
    return torch.cat([embedding, torch.ones_like(embedding[:, :1])], 1)


@cache
def tiny_module(head: bool, bias: float) -> bytes:
    kind = TinyClasses if head else TinyFeatures
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(kind(head, bias).eval()), buffer)
    return buffer.getvalue()


def write_tiny_entry(
    repository: Path,
    name: str = "tiny",
    *,
    head: bool = True,
    size: int = 32,
    versions: tuple[str, ...] = ("1",),
    t_end: float = 0.8,
    classify_t_end: tuple[float, ...] = (0.8, 0.5),
) -> Path:
    """Write an entry; version N adds (N - 1)/100 to HIDDEN. Returns its directory."""
    directory = repository / name
    described = {}
    for version in versions:
        content = tiny_module(head, (int(version) - 1) / 100)
        path = directory / version / "model.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        described[version] = Version(
            sha256=digest,
            encoder=digest,
            model=digest[::-1],
            training={},
            held_out=None,
            calibration=TINY_CALIBRATION if head else None,
            accuracy=(),
        )
    prg = Prg(
        format=2,
        path="icfm",
        solver="euler",
        steps=1,
        nfe=2,
        image=ImageSpec(size=size, resize=size, preprocessing="v2", mean=(0.5,) * 3, std=(0.5,) * 3),
        t_end=t_end,
        feature="embedding",
        features=Features(
            state=StateFeature(dim=768),
            hidden=HiddenFeature(dim=5, layers=("middle_block",), pooling=("mean",)),
            embedding=EmbeddingFeature(dim=4),
        ),
        classify_t_end=classify_t_end if head else None,
        labels=LABELS if head else None,
        precision="fp32",
        tolerance=Tolerance(cosine=0.9999, relative=5e-3),
        versions=described,
    )
    write_entry(directory, Entry(name, prg))
    return directory


def tiny_digest(version: str = "1", head: bool = True) -> str:
    """sha256 of a module that `write_tiny_entry` wrote; the encoder's digest too, and backwards the model's."""
    return hashlib.sha256(tiny_module(head, (int(version) - 1) / 100)).hexdigest()


def png(colour: tuple[int, int, int] = (255, 0, 0), size: tuple[int, int] = (40, 32)) -> bytes:
    """A one-coloured PNG."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def red_pictures(folder: Path, *numbers: int) -> Path:
    """A folder of `07.png` and so on: the larger the number, the redder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number:02}.png").write_bytes(png((number * 8, 0, 0)))
    return folder
