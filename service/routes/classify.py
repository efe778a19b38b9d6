"""POST /classify: images in, class predictions out."""

import math
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from service.auth import InferKey
from service.errors import NO_CLASSES, WRONG_OPTION, Problem
from service.intake import read_request
from service.limits import deadline
from service.openapi import CLASSIFIED, CLASSIFY, answers, posted, problems
from service.routes.answers import answer, gateway_of
from service.schemas import ClassifyAnswer, ClassifyOptions

router = APIRouter(tags=["Images"])


@router.post(
    "/classify",
    summary="Classes of images",
    response_model=ClassifyAnswer,
    responses=answers(CLASSIFY) | problems(*CLASSIFIED),
    openapi_extra=posted(ClassifyOptions, {"t_end": 0.8, "top_k": 2}),
)
async def classify(request: Request, key: InferKey) -> Response:
    """The most probable classes of each image."""
    gateway = gateway_of(request)
    settings = gateway.settings
    async with deadline(request, settings.request_timeout_s) as due:
        items, options = await read_request(request, ClassifyOptions, settings)
        chosen = gateway.choose(options.model, options.model_version)
        prg = chosen.entry.prg
        if prg.labels is None or prg.classify_t_end is None:
            detail = f"{chosen.entry.name} was exported without a head; /embed works with it"
            raise Problem(NO_CLASSES, detail)
        levels = prg.classify_t_end
        asked = levels[0] if options.t_end is None else options.t_end
        level = next((known for known in levels if math.isclose(known, asked, abs_tol=1e-6)), None)
        if level is None:
            allowed = ", ".join(map(str, levels))
            raise Problem(WRONG_OPTION, f"t_end is {asked}, must be one that the head knows: {allowed}")
        # It was measured at the first level, and holds there alone.
        calibration = prg.versions[chosen.version].calibration if level == levels[0] else None
        outputs = ("LOGITS", "KNOWN") if calibration else ("LOGITS",)
        results = await gateway.infer(request, key, items, chosen, (level,), outputs, due)
    labels = prg.labels

    def item(values: np.ndarray) -> dict[str, Any]:
        logits = values[0, : len(labels)]
        found: dict[str, Any] = {}
        if calibration:
            found["known"] = share_below(values[0, -1], calibration.known_quantiles)
        temperature = calibration.temperature if calibration else 1.0
        found["predictions"] = predictions(logits, temperature, labels, options.top_k)
        return found | ({"logits": logits} if options.return_logits else {})

    return answer(chosen.facts("model") | {"t_end": level}, results, item)


def share_below(known: float, quantiles: tuple[float, ...]) -> float:
    """The share of held-out images that were less typical, from their quantiles: a p-value."""
    return float(np.interp(known, quantiles, np.linspace(0, 1, len(quantiles))))


def predictions(
    logits: np.ndarray, temperature: float, labels: tuple[str, ...], top_k: int
) -> list[dict[str, Any]]:
    """The first `top_k` classes (all, if there are fewer), most probable first."""
    exact = logits.astype(np.float64) / temperature
    weights = np.exp(exact - exact.max())
    probabilities = weights / weights.sum()
    order = np.argsort(-exact, kind="stable")[:top_k]
    return [
        {"label": labels[k], "class_id": int(k), "probability": float(probabilities[k]), "logit": logits[k]}
        for k in order
    ]
