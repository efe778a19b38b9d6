"""GET /models: what is served, and how good it is."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request

from service.auth import Key, needs
from service.documented import FAILED, MODEL, answers, problems
from service.errors import Problem
from service.inference import ModelStatus
from service.routes.answers import gateway_of
from service.schemas import ModelInfo, ModelList

router = APIRouter()
Caller = Annotated[Key | None, Depends(needs("infer"))]


@router.get(
    "/models",
    summary="All models",
    response_model=ModelList,
    response_model_exclude_none=True,
    responses=answers({"One ready, one failed": {"default": "prg-cifar10", "data": [FAILED, MODEL]}})
    | problems(401, 403, 500),
)
async def models(request: Request, _: Caller) -> ModelList:
    """Every model of the repository, failed ones with the reason."""
    gateway = gateway_of(request)
    statuses = gateway.engine.models().values()
    return ModelList(default=gateway.default_model(), data=[describe(s) for s in statuses])


@router.get(
    "/models/{name}",
    summary="One model",
    response_model=ModelInfo,
    response_model_exclude_none=True,
    responses=answers({"A ready model": MODEL, "A failed one": FAILED}) | problems(401, 403, 404, 500),
)
async def model(request: Request, name: str, _: Caller) -> ModelInfo:
    """One model by its name."""
    known = gateway_of(request).engine.models()
    if name not in known:
        raise Problem(404, "Not found", f"no model {name!r} here; there are: {', '.join(known)}")
    return describe(known[name])


def describe(status: ModelStatus) -> ModelInfo:
    """A model's item; accuracy is that of its default version."""
    state: Literal["ready", "failed"] = "ready" if status.ready else "failed"
    if status.entry is None:
        return ModelInfo(name=status.name, state=state, reason=status.reason)
    prg = status.entry.prg
    shared: dict[str, Any] = {
        key: getattr(prg, key) for key in ("feature", "t_end", "features", "path", "solver", "steps", "nfe")
    }
    return ModelInfo(
        name=status.name,
        state=state,
        reason=status.reason,
        versions=list(status.versions),
        default_version=status.default_version,
        image_size=prg.image.size,
        labels=list(prg.labels) if prg.labels else None,
        classify_t_end=list(prg.classify_t_end) if prg.classify_t_end else None,
        accuracy=list(prg.versions[status.default_version].accuracy),
        **shared,
    )
