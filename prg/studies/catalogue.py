"""The studies by name, a row each."""

from collections.abc import Callable
from dataclasses import dataclass

from prg.studies.levels import levels
from prg.studies.report import Report
from prg.studies.robustness import robustness
from prg.studies.round_trip import round_trip
from prg.studies.samples import samples
from prg.studies.steps import steps
from prg.studies.subject import Material, Subject
from prg.training.run import Stage


@dataclass(frozen=True)
class Study:
    """One question to a model."""

    question: str
    run: Callable[[Subject, Material, int | None], Report]
    """run(subject, material, at most so many images) -> the answer."""
    stage: Stage
    """Of a run, whose model is asked unless another is named."""
    limit: int
    """Images, unless told otherwise: what two processor cores do in some minutes."""
    test: bool = False
    """Whether it reads the test split, and so takes --split; the others read the training split alone."""


STUDIES: dict[str, Study] = {
    "levels": Study("what do features tell about the class, by t_end and steps?", levels, "pretrain", 2000),
    "steps": Study("how many evaluations, and which solver, does it need?", steps, "finetune", 1000),
    "robustness": Study("how right is it on corrupted images?", robustness, "finetune", 1000, test=True),
    "round-trip": Study("how much is lost there and back?", round_trip, "pretrain", 64),
    "samples": Study("what does it generate, and how near is that to the data?", samples, "pretrain", 1000),
}
