"""POST /v1/embeddings: the same embeddings in the shape that OpenAI's clients speak."""

from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.auth import Key, needs
from service.documented import HEADERS, OPENAI_ANSWERS, OPENAI_REQUESTS, openai_problems
from service.errors import Problem
from service.intake import Base64, DataUri, Intake, Item
from service.limits import deadline
from service.routes.answers import gateway_of
from service.routes.embed import shown, unit_length
from service.schemas import Level, Options

router = APIRouter()


class EmbeddingsRequest(BaseModel):
    """OpenAI's fields, `input` being images, and three of ours."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input: str | list[str] = Field(description="data URIs or base64 strings of images, one or a list")
    model: str
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, description="only the model's own")
    user: str | None = Field(None, description="ignored")
    feature: Literal["state", "hidden"] | None = None
    t_end: Level | None = None
    normalize: bool = False


class Embedding(BaseModel):
    """One image's embedding."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsAnswer(BaseModel):
    """OpenAI's answer; images have no tokens."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: dict[str, int]


@router.post(
    "/v1/embeddings",
    summary="Embeddings of images, OpenAI style",
    response_model=EmbeddingsAnswer,
    responses=OPENAI_ANSWERS | openai_problems(),
    openapi_extra={
        "parameters": HEADERS,
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": EmbeddingsRequest.model_json_schema(),
                    "examples": OPENAI_REQUESTS,
                }
            },
        },
    },
)
async def embeddings(request: Request, key: Annotated[Key | None, Depends(needs("infer"))]) -> Response:
    """What the `openai` package's `client.embeddings.create` calls. Errors are in OpenAI's shape."""
    gateway = gateway_of(request)
    settings = gateway.settings
    async with deadline(request, settings.request_timeout_s) as due:
        asked = _parse(await request.body())
        chosen = gateway.choose(Options(model=asked.model, model_version=None))
        prg = chosen.entry.prg
        feature = asked.feature or prg.feature
        dim = prg.features.state.dim if feature == "state" else prg.features.hidden.dim
        if asked.dimensions not in (None, dim):
            raise Problem(
                422, "Wrong option", f"dimensions is {asked.dimensions}, {feature} of this model has {dim}"
            )
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        if not 1 <= len(texts) <= settings.max_images:
            raise Problem(
                422, "Wrong option", f"input has {len(texts)} images, must be 1 to {settings.max_images}"
            )
        intake = Intake([_item(text, settings.max_image_bytes) for text in texts])
        levels = (prg.t_end if asked.t_end is None else asked.t_end,)
        results = await gateway.infer(request, key, intake, chosen, levels, feature.upper(), due)
    if results.errors:
        index = min(results.errors)
        raise Problem(422, "No usable image", f"input[{index}]: {results.errors[index]}")
    values = (unit_length(results.values) if asked.normalize else results.values)[:, 0]
    data = [
        {"object": "embedding", "index": i, "embedding": shown(vector, asked.encoding_format)}
        for i, vector in enumerate(values)
    ]
    body: dict[str, Any] = {
        "object": "list",
        "model": chosen.entry.name,
        "data": data,
        "usage": {"prompt_tokens": 0, "total_tokens": 0},
    }
    return Response(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


def _parse(body: bytes) -> EmbeddingsRequest:
    try:
        return EmbeddingsRequest.model_validate(orjson.loads(body))
    except orjson.JSONDecodeError as error:
        raise Problem(422, "Malformed body", f"the JSON does not parse: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        known = ", ".join(EmbeddingsRequest.model_fields)
        more = f" (known fields: {known})" if first["type"] == "extra_forbidden" else ""
        raise Problem(422, "Malformed body", f"{where}: {first['msg']}{more}") from None


def _item(text: str, max_bytes: int) -> Item:
    return DataUri(text, max_bytes) if text[:5].lower() == "data:" else Base64(text, max_bytes)
