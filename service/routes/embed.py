"""POST /embed: images in, embeddings out."""

import base64
import io
import re
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Request, Response

from service.auth import Key, needs
from service.documented import EMBED_ANSWERS, OF_CLASSIFY, POSTED, posted, problems
from service.intake import parse_options, read_request
from service.limits import deadline
from service.routes.answers import answer, failed, gateway_of
from service.schemas import EmbedAnswer, EmbedOptions

router = APIRouter()
NPY = "application/x-npy"
MEDIA_RANGE = re.compile(r"([^\s,;]+/[^\s,;]+)(?:\s*;\s*(?:q=(1(?:\.0*)?|0(?:\.\d*)?)|[^,;]*))*")
"""One of an Accept header: its kind, and its q if it has one."""
NPY_HEADERS = {"X-Model": "model", "X-Model-Version": "model_version", "X-Fingerprint": "fingerprint"}
"""Headers of a .npy answer -> the fact that each tells."""


@router.post(
    "/embed",
    summary="Embeddings of images",
    response_model=EmbedAnswer,
    responses=EMBED_ANSWERS | problems(*POSTED, without=OF_CLASSIFY),
    openapi_extra=posted(EmbedOptions, {"t_end": [0.9, 0.6], "feature": "state"}),
)
async def embed(request: Request, key: Annotated[Key | None, Depends(needs("infer"))]) -> Response:
    """The state or the hidden activations of each image at t_end, or at several levels of t_end.

    With `Accept: application/x-npy` the answer is one float32 .npy, [N, D] or [N, levels, D].
    """
    gateway = gateway_of(request)
    settings = gateway.settings
    async with (
        deadline(request, settings.request_timeout_s) as due,
        read_request(request, settings) as intake,
    ):
        options = parse_options(EmbedOptions, intake.options)
        chosen = gateway.choose(options)
        prg = chosen.entry.prg
        feature = options.feature or prg.feature
        t_end = prg.t_end if options.t_end is None else options.t_end
        levels = tuple(t_end) if isinstance(t_end, list) else (t_end,)
        results = await gateway.infer(request, key, intake, chosen, levels, feature.upper(), due)
    values = unit_length(results.values) if options.normalize else results.values
    dim = prg.features.state.dim if feature == "state" else prg.features.hidden.dim
    facts = chosen.facts() | {"feature": feature, "t_end": t_end, "dim": dim}

    def item(row: int) -> dict[str, Any]:
        if not isinstance(t_end, list):
            return {"embedding": shown(values[row, 0], options.encoding_format)}
        pairs = zip(levels, values[row], strict=True)
        return {
            "embeddings": [
                {"t_end": level, "embedding": shown(v, options.encoding_format)} for level, v in pairs
            ]
        }

    if not prefers_npy(request.headers.get("accept", "")):
        return answer(facts, results, item)
    if results.errors:
        raise failed(facts, results, item)
    return as_npy(values if isinstance(t_end, list) else values[:, 0], facts)


def prefers_npy(accept: str) -> bool:
    """Whether a client names .npy, and likes it no less than JSON (RFC 9110, 12.5.1)."""
    liked: dict[str, float] = {}
    for kind, q in MEDIA_RANGE.findall(accept.lower()):
        liked[kind] = float(q or 1)
    as_json = next((liked[k] for k in ("application/json", "application/*", "*/*") if k in liked), 0.0)
    return liked.get(NPY, 0.0) > 0 and liked[NPY] >= as_json


def shown(vector: np.ndarray, encoding_format: str) -> np.ndarray | str:
    """An embedding as it is written: numbers, or base64 of little-endian float32."""
    return (
        base64.b64encode(vector.astype("<f4").tobytes()).decode() if encoding_format == "base64" else vector
    )


def as_npy(values: np.ndarray, facts: dict[str, Any]) -> Response:
    """One .npy of little-endian float32; what JSON would say beside the vectors stands in headers."""
    buffer = io.BytesIO()
    np.save(buffer, values.astype("<f4"))
    headers = {header: facts[fact] for header, fact in NPY_HEADERS.items()}
    return Response(buffer.getvalue(), media_type=NPY, headers=headers)


def unit_length(values: np.ndarray) -> np.ndarray:
    """Each vector divided by its Euclidean length; a vector of zeros stays one."""
    length = np.linalg.norm(values, axis=-1, keepdims=True)
    unit: np.ndarray = np.divide(values, length, out=np.zeros_like(values), where=length > 0)
    return unit
