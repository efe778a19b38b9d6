"""The studies by name, a row each; what answers them is imported when it is asked."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from prg.studies.report import Report
    from prg.target import Target


@dataclass(frozen=True)
class Study:
    """One question to a model."""

    question: str
    stage: Literal["pretrain", "finetune"]
    """Of a run, whose model is asked unless another is named."""
    limit: int
    """Images, unless told otherwise: what two processor cores do in some minutes."""
    test: bool = False
    """Whether it reads the test split, and so takes --split; the others read the training split alone."""


STUDIES: dict[str, Study] = {
    "levels": Study("how much do features say about the class, by t_end and steps?", "pretrain", 2000),
    "steps": Study("how many evaluations, and which solver, does it need?", "finetune", 1000),
    "robustness": Study("how accurate is it on corrupted images?", "finetune", 1000, test=True),
    "round-trip": Study("how much is lost by reversing and generating again?", "pretrain", 64),
    "samples": Study("what does it generate, and how near is that to the data?", "pretrain", 1000),
}


def answer(name: str, target: "Target", judge: Path | None, split: str, limit: int) -> "Report":
    """The study's answer. Raises EntryError, DataError for a model or images that it can't be made on."""
    from prg.studies.subject import Subject

    subject, material = Subject(target.entry, target.version, target.name), target.material
    match name:
        case "levels":
            from prg.studies.levels import levels

            report = levels(subject, material, limit)
        case "steps":
            from prg.studies.steps import steps

            report = steps(subject, material, limit)
        case "robustness":
            from prg.studies.robustness import robustness

            report = robustness(subject, material, split, limit)
        case "round-trip":
            from prg.studies.round_trip import round_trip

            report = round_trip(subject, material, limit)
        case _:
            from prg.studies.samples import samples

            report = samples(subject, Subject(judge) if judge else subject, material, limit)
    # An export of a run is gone by now, so its checkpoint is named.
    training = subject.prg.versions[subject.version].training
    weights = {"fingerprint": subject.entry.fingerprints(subject.version).model}
    if target.exported:
        weights = {"checkpoint": training["checkpoint"][:12]}
    known = {"model": subject.name, **weights, "data": material.name}
    if not STUDIES[name].test:
        known["held_out"] = str(
            material.held_out or "not from training: the model may have seen these images"
        )
    return replace(report, conditions=known | report.conditions)
