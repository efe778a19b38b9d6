"""POST /classify: images in, class predictions out."""

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Request, Response

from service.auth import Key, needs
from service.documented import CLASSIFY_ANSWERS, POSTED, posted, problems
from service.errors import Problem
from service.gateway import near
from service.intake import parse_options, read_request
from service.limits import deadline
from service.routes.answers import answer, gateway_of
from service.schemas import ClassifyAnswer, ClassifyOptions

router = APIRouter()


@router.post(
    "/classify",
    summary="Classes of images",
    response_model=ClassifyAnswer,
    responses=CLASSIFY_ANSWERS | problems(*POSTED),
    openapi_extra=posted(ClassifyOptions, {"t_end": 0.8, "top_k": 2}),
)
async def classify(request: Request, key: Annotated[Key | None, Depends(needs("infer"))]) -> Response:
    """The most probable classes of each image."""
    gateway = gateway_of(request)
    settings = gateway.settings
    async with (
        deadline(request, settings.request_timeout_s) as due,
        read_request(request, settings) as intake,
    ):
        options = parse_options(ClassifyOptions, intake.options)
        chosen = gateway.choose(options)
        prg = chosen.entry.prg
        if prg.labels is None or prg.classify_t_end is None:
            raise Problem(
                422, "No classes", f"{chosen.entry.name} was exported without a head; /embed works with it"
            )
        levels = prg.classify_t_end
        level = levels[0] if options.t_end is None else near(options.t_end, levels)
        if level is None:
            allowed = ", ".join(map(str, levels))
            raise Problem(
                422, "Wrong option", f"t_end is {options.t_end}, must be one that the head knows: {allowed}"
            )
        results = await gateway.infer(request, key, intake, chosen, (level,), "LOGITS", due)
    labels = prg.labels

    def item(row: int) -> dict[str, Any]:
        logits = results.values[row, 0]
        ranked = predictions(logits, labels, options.top_k)
        return {"predictions": ranked} | ({"logits": logits} if options.return_logits else {})

    return answer(chosen.facts() | {"t_end": level}, results, item)


def predictions(logits: np.ndarray, labels: tuple[str, ...], top_k: int) -> list[dict[str, Any]]:
    """The first `top_k` classes (all, if there are fewer), most probable first."""
    exact = logits.astype(np.float64)
    weights = np.exp(exact - exact.max())
    probabilities = weights / weights.sum()
    order = np.argsort(-exact, kind="stable")[:top_k]
    return [
        {"label": labels[k], "class_id": int(k), "probability": float(probabilities[k]), "logit": logits[k]}
        for k in order
    ]
