"""The OpenAPI document: each route's options, forms of a body, answers and errors, with an example of each."""

from typing import Any, get_args

from fastapi import FastAPI
from pydantic import BaseModel

from entry.config import Accuracy, EmbeddingFeature, Features, Fingerprints, HiddenFeature, StateFeature
from service import errors, schemas

Responses = dict[int | str, dict[str, Any]]
NPY = "application/x-npy"

# A ship, in 8 x 8 pixels.
IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAIAgMAAAC5YVYYAAAADFBMVEXm5uF4qtw8MjwUPG5JBjioAAAAHElEQVR42mMMZWBiYGBi2MDEwMAkuoTx"
    "P4TLAAAiuQLM6GamBAAAAABJRU5ErkJggg=="
)
DATA_URI = f"data:image/png;base64,{IMAGE}"
NUMBERS = [2.795, -0.849, -1.832, 0.571]
LAYERS = (*(f"input_blocks.{i}" for i in range(6)), "middle_block")
BROKEN = schemas.ProblemBody(**errors.problem_body(errors.NOT_AN_IMAGE, errors.NOT_AN_IMAGE.when))
SHIP = schemas.Prediction(label="ship", class_id=8, probability=0.917, logit=4.375)
PLANE = schemas.Prediction(label="airplane", class_id=0, probability=0.017, logit=0.409)
FINGERPRINTS = Fingerprints(encoder="c6fe54d8a065", model="c38522af228e")
FACTS: dict[str, Any] = {
    **{"model": "prg-cifar10", "model_version": "1", "t_end": 0.8},
    "usage": schemas.Usage(images=2, failed=1),
}
EMBED = schemas.EmbedAnswer(
    **FACTS,
    fingerprint=FINGERPRINTS.encoder,
    feature="embedding",
    dim=256,
    data=[schemas.EmbedItem(index=0, embedding=NUMBERS), schemas.EmbedItem(index=1, error=BROKEN)],
)
CLASSIFY = schemas.ClassifyAnswer(
    **FACTS,
    fingerprint=FINGERPRINTS.model,
    data=[
        schemas.ClassifyItem(index=0, known=0.41, predictions=[SHIP, PLANE]),
        schemas.ClassifyItem(index=1, error=BROKEN),
    ],
)
OPENAI = schemas.EmbeddingsAnswer(
    object="list",
    model="prg-cifar10",
    data=[schemas.Embedding(object="embedding", index=0, embedding=NUMBERS)],
    usage={"prompt_tokens": 0, "total_tokens": 0},
)
MODEL = schemas.ModelInfo(
    name="prg-cifar10",
    state="ready",
    versions=["1"],
    default_version="1",
    image_size=32,
    feature="embedding",
    t_end=0.8,
    features=Features(
        state=StateFeature(dim=768),
        hidden=HiddenFeature(dim=1920, layers=LAYERS, pooling=("mean", "std")),
        embedding=EmbeddingFeature(dim=256),
    ),
    labels=["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    classify_t_end=[0.8],
    path="icfm",
    solver="euler",
    steps=1,
    nfe=2,
    precision="fp32",
    accuracy=[Accuracy(data="cifar10/test", images=10000, top1=0.9482, top5=0.9949)],
    fingerprints={"1": FINGERPRINTS},
    failed_versions={},
)
FAILED = schemas.ModelInfo(name="broken", state="failed", reason="1/model.pt: No such file or directory")
OPENAI_MODELS = schemas.OpenAIModels(data=[schemas.OpenAIModel(id="prg-cifar10")])
MODELS = schemas.ModelList(default="prg-cifar10", data=[MODEL, FAILED])
METRICS: Responses = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}, "example": "prg_ready 1.0\n"}}}
}

KEYED = (errors.KEY_NEEDED, errors.SCOPE_MISSING, errors.INTERNAL_ERROR)
"""Problems of every route that may need a key."""
ROUTING = (
    *(errors.BAD_REQUEST, errors.NOT_FOUND, errors.METHOD_NOT_ALLOWED),
    *(errors.REQUEST_TIMEOUT, errors.HEAD_TOO_LARGE),
)
CLASSIFIED = [row for row in errors.PROBLEMS if row.of == "request" and row not in ROUTING]
"""Of /classify: all but those of requests that never reach a route."""
EMBEDDED = [row for row in CLASSIFIED if row is not errors.NO_CLASSES]
FORMS = (
    *(errors.CONTENT_TYPE_NOT_ACCEPTED, errors.NO_IMAGE, errors.UNKNOWN_FIELD, errors.UNKNOWN_OPTION),
    *(errors.CONTRADICTING_OPTIONS, errors.UNKNOWN_MODEL_VERSION),
)
OPENAI_PROBLEMS = [row for row in EMBEDDED if row not in FORMS]
"""Of /v1/embeddings, which has one form of a body, each field once, and no version."""

BINARY = {"type": "string", "format": "binary"}
TEXT = {"type": "string"}
NULL = {"type": "null"}
INPUT = {
    "anyOf": [
        {"type": "object", "required": [form], "properties": {form: TEXT}, "additionalProperties": False}
        for form in ("b64", "data_uri", "url")
    ]
}
TIMEOUT = {"type": "number", "exclusiveMinimum": 0, "description": "seconds; shortens the deadline"}
QUEUE = {"enum": get_args(schemas.Priority), "default": "interactive", "description": "which queue"}
RETRY_AFTER = {
    "Retry-After": {"schema": {"type": "integer"}, "description": "seconds until it is worth trying again"}
}


def parameter(place: str, name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter in the path, the query or a header."""
    facts = {"name": name, "in": place, "required": place == "path", "schema": schema}
    return facts | {"description": schema.get("description", "")}


HEADERS = [parameter("header", "Request-Timeout", TIMEOUT), parameter("header", "Priority", QUEUE)]


def answers(example: BaseModel, npy: bool = False) -> Responses:
    """The 200 of a route, in JSON and where it can as .npy."""
    value = example.model_dump(mode="json", exclude_none=True)
    content: dict[str, Any] = {"application/json": {"example": value}}
    if npy:
        content[NPY] = {"schema": BINARY | {"description": "float32 .npy, [N, D] or [N, levels, D]"}}
    return {200: {"content": content}}


def problems(*kinds: errors.ProblemType, openai: bool = False) -> Responses:
    """The errors of a route, by status; their examples are made by the code that answers them."""
    # FastAPI puts a model's schema under application/json and nowhere else.
    model = schemas.OpenAIProblem if openai else None
    media = {} if openai else {"schema": {"$ref": "#/components/schemas/ProblemBody"}}
    responses: Responses = {}
    for kind in kinds:
        status, media_type, body = errors.rendered(kind, kind.when, openai)
        new = {"model": model, "content": {media_type: media | {"examples": {}}}}
        response = responses.setdefault(status, new)
        response["content"][media_type]["examples"][kind.title] = {"value": body}
        if status in (429, 503):
            response["headers"] = RETRY_AFTER
    return responses


def without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """An option's schema as text has it; in JSON a null is an option left out."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != NULL]
    return schema | {"anyOf": kinds} if kinds else schema


def posted(options: type[schemas.Options], example: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI of a POST route: its options in the query, and the three forms of a body; `example` are options."""
    properties = options.model_json_schema()["properties"]
    as_text = {name: without_null(schema) for name, schema in properties.items()}
    as_json = {name: {"anyOf": [schema, NULL]} for name, schema in as_text.items()}

    def form(name: str, image: dict[str, Any], images: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
        field = {name: {"type": "array", "minItems": 1, "items": image}}
        schema: dict[str, Any] = {"type": "object", "required": [name], "properties": field | fields}
        schema["additionalProperties"] = False
        return {"schema": schema, "example": {name: images} | example}

    query = [parameter("query", name, schema) for name, schema in as_text.items()]
    content = {
        "multipart/form-data": form("files", BINARY, ["cat.jpg", "dog.jpg"], as_text),
        "application/json": form("inputs", INPUT, [{"b64": IMAGE}, {"data_uri": DATA_URI}], as_json),
        "image/*": {"schema": BINARY, "example": "the bytes of a file (curl --data-binary @cat.jpg)"},
    }
    return {"parameters": query + HEADERS, "requestBody": {"required": True, "content": content}}


def posted_openai() -> dict[str, Any]:
    """OpenAPI of /v1/embeddings: OpenAI's form of a body."""
    schema = schemas.EmbeddingsRequest.model_json_schema()
    example = {"model": "prg-cifar10", "input": [DATA_URI, IMAGE], "normalize": True}
    content = {"application/json": {"schema": schema, "example": example}}
    return {"parameters": HEADERS, "requestBody": {"required": True, "content": content}}


def install(app: FastAPI) -> None:
    """Say in the application's OpenAPI where it is, and how a key travels."""
    plain = app.openapi

    def with_keys() -> dict[str, Any]:
        document = plain()
        # Beside this document, also behind a proxy that adds a prefix.
        document["servers"] = [{"url": "."}]
        document["components"]["securitySchemes"] = {
            "key": {"type": "http", "scheme": "bearer", "description": "only where the service has keys"}
        }
        for operation in (one for path in document["paths"].values() for one in path.values()):
            if "401" in operation["responses"]:
                operation["security"] = [{}, {"key": []}]
        return document

    app.openapi = with_keys  # type: ignore[method-assign]
