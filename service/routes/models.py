"""GET /models: what is served, and how good it is."""

from typing import Any

from fastapi import APIRouter, Request

from service.auth import InferKey
from service.engines.contract import ModelStatus
from service.errors import NOT_FOUND, Problem
from service.openapi import KEYED, MODEL, MODELS, TEXT, answers, parameter, problems
from service.routes.answers import gateway_of
from service.schemas import ModelInfo, ModelList

router = APIRouter(tags=["Models"])


@router.get(
    "/models",
    summary="All models",
    response_model=ModelList,
    response_model_exclude_none=True,
    responses=answers(MODELS) | problems(*KEYED),
)
async def models(request: Request, _: InferKey) -> ModelList:
    """Every model of the repository, failed ones with the reason."""
    gateway = gateway_of(request)
    statuses = gateway.engine.models().values()
    return ModelList(default=gateway.default_model(), data=[describe(s) for s in statuses])


@router.get(
    "/models/{name}",
    summary="One model",
    response_model=ModelInfo,
    response_model_exclude_none=True,
    responses=answers(MODEL) | problems(*KEYED, NOT_FOUND),
    # As an argument of the function it would have FastAPI document a 422, which is never answered.
    openapi_extra={"parameters": [parameter("path", "name", TEXT)]},
)
async def model(request: Request, _: InferKey) -> ModelInfo:
    """One model by its name."""
    name = request.path_params["name"]
    known = gateway_of(request).engine.models()
    if name not in known:
        raise Problem(NOT_FOUND, f"no model {name!r} here; there are: {', '.join(known)}")
    return describe(known[name])


def describe(status: ModelStatus) -> ModelInfo:
    """A model's item; accuracy is that of its default version."""
    state = "ready" if status.ready else "failed"
    facts: dict[str, Any] = {"name": status.name, "state": state, "reason": status.reason}
    if status.entry is not None:
        prg, version = status.entry.prg, status.default_version
        # Most fields have the same name in both.
        facts |= prg.model_dump(include=set(ModelInfo.model_fields))
        facts |= {"versions": status.versions, "default_version": version, "image_size": prg.image.size}
        facts["accuracy"] = prg.versions[version].accuracy
        facts["precision"] = status.entry.precision
        facts |= {"fingerprints": status.fingerprints, "failed_versions": status.failed_versions}
    return ModelInfo(**facts)
