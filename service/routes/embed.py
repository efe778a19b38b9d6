"""POST /embed: images in, embeddings out."""

import io
import re
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from service.auth import InferKey
from service.intake import read_request
from service.limits import deadline
from service.openapi import EMBED, EMBEDDED, NPY, answers, posted, problems
from service.routes.answers import answer, choose_feature, encode_vector, failed, gateway_of
from service.schemas import EmbedAnswer, EmbedOptions

router = APIRouter(tags=["Images"])
MEDIA_RANGE = re.compile(r"([^\s,;]+/[^\s,;]+)(?:\s*;\s*(?:q=(1(?:\.0*)?|0(?:\.\d*)?)|[^,;]*))*")
"""One of an Accept header: its kind, and its q if it has one."""
NPY_HEADERS = {"X-Model": "model", "X-Model-Version": "model_version", "X-Fingerprint": "fingerprint"}
"""Header of a .npy answer -> the fact it holds."""


@router.post(
    "/embed",
    summary="Embeddings of images",
    response_model=EmbedAnswer,
    responses=answers(EMBED, npy=True) | problems(*EMBEDDED),
    openapi_extra=posted(EmbedOptions, {"t_end": 0.8, "feature": "embedding"}),
)
async def embed(request: Request, key: InferKey) -> Response:
    """The embedding of each image at t_end, or at several levels; or its hidden activations, or the ODE's state.

    With `Accept: application/x-npy` the answer is one float32 .npy, [N, D] or [N, levels, D].
    """
    gateway = gateway_of(request)
    settings = gateway.settings
    async with deadline(request, settings.request_timeout_s) as due:
        items, options = await read_request(request, EmbedOptions, settings)
        chosen = gateway.choose(options.model, options.model_version)
        prg = chosen.entry.prg
        feature, dim = choose_feature(chosen, options.feature, options.dimensions)
        t_end = prg.t_end if options.t_end is None else options.t_end
        levels = tuple(t_end) if isinstance(t_end, list) else (t_end,)
        results = await gateway.infer(request, key, items, chosen, levels, (feature.upper(),), due)
    results = results.vectors(dim, options.normalize)
    facts = chosen.facts("encoder") | {"feature": feature, "t_end": t_end, "dim": dim}

    def item(values: np.ndarray) -> dict[str, Any]:
        vectors = [encode_vector(vector, options.encoding_format) for vector in values]
        if not isinstance(t_end, list):
            return {"embedding": vectors[0]}
        pairs = zip(levels, vectors, strict=True)
        return {"embeddings": [{"t_end": level, "embedding": vector} for level, vector in pairs]}

    if not prefers_npy(request.headers.get("accept", "")):
        return answer(facts, results, item)
    if results.errors:
        raise failed(facts, results, item)
    return as_npy(results.values if isinstance(t_end, list) else results.values[:, 0], facts)


def prefers_npy(accept: str) -> bool:
    """Whether a client names .npy, and likes it no less than JSON (RFC 9110, 12.5.1)."""
    liked: dict[str, float] = {}
    for kind, q in MEDIA_RANGE.findall(accept.lower()):
        liked[kind] = float(q or 1)
    as_json = next((liked[k] for k in ("application/json", "application/*", "*/*") if k in liked), 0.0)
    return liked.get(NPY, 0.0) > 0 and liked[NPY] >= as_json


def as_npy(values: np.ndarray, facts: dict[str, Any]) -> Response:
    """One .npy of little-endian float32; the headers have what JSON says beside the vectors."""
    buffer = io.BytesIO()
    np.save(buffer, values.astype("<f4"))
    headers = {header: facts[fact] for header, fact in NPY_HEADERS.items()}
    return Response(buffer.getvalue(), media_type=NPY, headers=headers)
