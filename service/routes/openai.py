"""POST /v1/embeddings: the same embeddings in the shape that OpenAI's clients speak."""

from functools import partial

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

from service.auth import InferKey
from service.errors import MALFORMED_BODY, NO_USABLE_IMAGE, WRONG_OPTION, Problem
from service.intake import Item, read_base64, read_data_uri
from service.limits import deadline
from service.openapi import KEYED, OPENAI, OPENAI_MODELS, OPENAI_PROBLEMS, answers, posted_openai, problems
from service.routes.answers import as_json, choose_feature, encode_vector, gateway_of
from service.schemas import EmbeddingsAnswer, EmbeddingsRequest, OpenAIModel, OpenAIModels

router = APIRouter(tags=["OpenAI style"])


@router.post(
    "/v1/embeddings",
    summary="Embeddings of images, OpenAI style",
    response_model=EmbeddingsAnswer,
    responses=answers(OPENAI) | problems(*OPENAI_PROBLEMS, openai=True),
    openapi_extra=posted_openai(),
)
async def embeddings(request: Request, key: InferKey) -> Response:
    """What the `openai` package's `client.embeddings.create` calls. Errors are in OpenAI's shape."""
    gateway = gateway_of(request)
    settings = gateway.settings
    async with deadline(request, settings.request_timeout_s) as due:
        asked = _parse(await request.body())
        chosen = gateway.choose(asked.model)
        feature, dim = choose_feature(chosen, asked.feature, asked.dimensions)
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        if not 1 <= len(texts) <= settings.max_images:
            raise Problem(WRONG_OPTION, f"input has {len(texts)} images, must be 1 to {settings.max_images}")
        items = [_item(text, settings.max_image_bytes) for text in texts]
        level = chosen.entry.prg.t_end if asked.t_end is None else asked.t_end
        results = await gateway.infer(request, key, items, chosen, (level,), (feature.upper(),), due)
    if results.errors:
        index = min(results.errors)
        raise Problem(NO_USABLE_IMAGE, f"input[{index}]: {results.errors[index]}")
    results = results.vectors(dim, asked.normalize)
    data = [
        {"object": "embedding", "index": i, "embedding": encode_vector(vector, asked.encoding_format)}
        for i, vector in enumerate(results.values[:, 0])
    ]
    usage = {"prompt_tokens": 0, "total_tokens": 0}
    return as_json({"object": "list", "model": chosen.entry.name, "data": data, "usage": usage})


@router.get(
    "/v1/models",
    summary="Models that are ready, OpenAI style",
    response_model=OpenAIModels,
    responses=answers(OPENAI_MODELS) | problems(*KEYED, openai=True),
)
async def models(request: Request, _: InferKey) -> OpenAIModels:
    """What the `openai` package's `client.models.list` calls. More is said of each by /models."""
    statuses = gateway_of(request).engine.models().values()
    return OpenAIModels(data=[OpenAIModel(id=status.name) for status in statuses if status.ready])


def _parse(body: bytes) -> EmbeddingsRequest:
    try:
        return EmbeddingsRequest.model_validate(orjson.loads(body))
    except orjson.JSONDecodeError as error:
        raise Problem(MALFORMED_BODY, f"the JSON does not parse: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        known = ", ".join(EmbeddingsRequest.model_fields)
        more = f" (known fields: {known})" if first["type"] == "extra_forbidden" else ""
        raise Problem(MALFORMED_BODY, f"{where}: {first['msg']}{more}") from None


def _item(text: str, max_bytes: int) -> Item:
    return partial(read_data_uri if text[:5].lower() == "data:" else read_base64, text, max_bytes)
