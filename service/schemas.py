"""What a request may say and what an answer holds; the OpenAPI page is made of these."""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from entry.config import Accuracy, FeatureName, Features, Fingerprints


def _whole(value: object) -> object:
    """To JSON Schema 3.0 is a whole number too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


MAX_LEVELS = 8
Priority = Literal["interactive", "bulk"]
"""Which queue a request waits in."""
FromOne = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
Level = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Options(BaseModel):
    """Options of both POST routes. A description completes the sentence "it must be …"."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    lists: ClassVar[frozenset[str]] = frozenset()
    """Options that mean a list where they are repeated."""

    model: str | None = Field(None, description="the name of a model of GET /models")
    model_version: str | None = Field(None, description="a version of that model")

    @field_validator("model_version", mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class EmbedOptions(Options):
    """Options of POST /embed."""

    lists = frozenset({"t_end"})

    t_end: Level | Annotated[list[Level], Field(min_length=1, max_length=MAX_LEVELS)] | None = Field(
        None, description=f"a number from 0 (noise) to 1 (the image), or up to {MAX_LEVELS} of them"
    )
    feature: FeatureName | None = Field(None, description="embedding, hidden or state")
    dimensions: FromOne | None = Field(
        None, description="a whole number: so many of the first numbers of embedding"
    )
    normalize: bool = Field(False, description="true or false; true scales each embedding to length 1")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="float (numbers) or base64 (of little-endian float32)"
    )


class ClassifyOptions(Options):
    """Options of POST /classify."""

    t_end: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        None, description="one number, one of the model's classify_t_end (GET /models)"
    )
    top_k: FromOne = Field(5, description="a whole number from 1")
    return_logits: bool = Field(False, description="true or false; true adds the logits of all classes")


class EmbeddingsRequest(BaseModel):
    """OpenAI's fields, `input` being images, and three of ours."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input: str | Annotated[list[str], Field(json_schema_extra={"minItems": 1})] = Field(
        description="data URIs or base64 strings of images, one or a list"
    )
    model: str
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: FromOne | None = Field(None, description="so many of the first numbers of embedding")
    user: str | None = Field(None, description="ignored")
    feature: FeatureName | None = None
    t_end: Level | None = None
    normalize: bool = False


class ProblemBody(BaseModel):
    """An error, RFC 9457."""

    type: str
    title: str
    status: int
    detail: str


class OpenAIError(BaseModel):
    """What OpenAI's clients read of an error."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = None
    code: str


class OpenAIProblem(BaseModel):
    """An error of /v1, in OpenAI's shape."""

    error: OpenAIError


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


class OpenAIModel(BaseModel):
    """A model that is ready, as OpenAI's clients list it."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "prg"


class OpenAIModels(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[OpenAIModel]


class Usage(BaseModel):
    """How many images came, and how many of them have an error instead of a result."""

    images: int
    failed: int


class LevelEmbedding(BaseModel):
    """The embedding at one of several levels."""

    t_end: float
    embedding: list[float] | str


class EmbedItem(BaseModel):
    """One image's result; `embeddings` where several levels were asked for."""

    index: int
    embedding: list[float] | str | None = None
    embeddings: list[LevelEmbedding] | None = None
    error: ProblemBody | None = None


class Answer(BaseModel):
    """What both POST routes answer; embeddings with different fingerprints must not be compared."""

    model: str
    model_version: str
    fingerprint: str
    usage: Usage


class EmbedAnswer(Answer):
    """Answer of POST /embed, items in the order of the input."""

    feature: FeatureName
    t_end: float | list[float]
    dim: int
    data: list[EmbedItem]


class Prediction(BaseModel):
    """One class, most probable first."""

    label: str
    class_id: int
    probability: float
    logit: float


class ClassifyItem(BaseModel):
    """One image's classes."""

    index: int
    known: float | None = None
    predictions: list[Prediction] | None = None
    logits: list[float] | None = None
    error: ProblemBody | None = None


class ClassifyAnswer(Answer):
    """Answer of POST /classify, items in the order of the input."""

    t_end: float
    data: list[ClassifyItem]


class ModelInfo(BaseModel):
    """One model; of one that is not ready only name, state and reason are known for sure."""

    model_config = ConfigDict(protected_namespaces=())

    name: str
    state: Literal["ready", "failed"]
    reason: str | None = None
    versions: list[str] | None = None
    default_version: str | None = None
    image_size: int | None = None
    feature: str | None = None
    t_end: float | None = None
    features: Features | None = None
    labels: list[str] | None = None
    classify_t_end: list[float] | None = None
    path: str | None = None
    solver: str | None = None
    steps: int | None = None
    nfe: int | None = None
    precision: str | None = None
    accuracy: list[Accuracy] | None = None
    fingerprints: dict[str, Fingerprints] | None = None
    failed_versions: dict[str, str] | None = None


class ModelList(BaseModel):
    """All models, and the one that answers when none is named."""

    default: str | None
    data: list[ModelInfo]


class Health(BaseModel):
    """A good state; a bad one is a problem."""

    status: Literal["live", "ready"]
