"""What schemathesis can't read in the OpenAPI document: how an image looks, and what holds between two fields.

Not imported by tests: the program loads it.
"""

import base64
import os
from typing import Any

import schemathesis
from hypothesis import strategies as st

from tests.tiny import png

IMAGES = st.tuples(*[st.integers(0, 255)] * 3).map(lambda colour: png(colour, (8, 8)))
BASE64 = IMAGES.map(lambda image: base64.b64encode(image).decode())
SHORTEST_S = 5.0
TYPED = ("dimensions", "normalize", "return_logits", "t_end", "top_k")
WORDS = ("0", "1", "f", "t", "n", "y", "no", "yes", "off", "on")

schemathesis.openapi.format("binary", IMAGES)
schemathesis.openapi.format("image-b64", BASE64)
schemathesis.openapi.format("image-data_uri", BASE64.map("data:image/png;base64,{}".format))
schemathesis.openapi.media_type("image/*", IMAGES)


@schemathesis.auth()
class Bearer:
    """The service's key."""

    def get(self, case: Any, context: Any) -> str:
        return os.environ["GENERATED_KEY"]

    def set(self, case: Any, key: str, context: Any) -> None:
        case.headers["Authorization"] = f"Bearer {key}"


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:
    """Nothing that is right though the document says nothing of it: unknown headers, other words of true and false in
    text, the text of a number in a form, and values that vanish in text or look like their only element."""
    form = case.body if isinstance(case.body, dict) and case.media_type == "multipart/form-data" else {}
    query = case.query or {}
    for options in (query, case.body if isinstance(case.body, dict) else {}):
        # Only embeddings are cut.
        if options.get("feature") in ("hidden", "state") and "dimensions" in options:
            return False
    for name, value in (*form.items(), *query.items()):
        if name in ("normalize", "return_logits") and str(value).lower() in WORDS:
            return False
        if name != "files" and (value is None or (isinstance(value, (list, dict)) and len(value) < 2)):
            return False
        if name in form and name in TYPED and isinstance(value, str):
            return False
    return "x-schemathesis-unknown-property" not in (case.headers or {})


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """No deadline that always passes."""
    headers = case.headers or {}
    if 0 < number(headers.get("Request-Timeout")) < SHORTEST_S:
        headers["Request-Timeout"] = str(SHORTEST_S)


def number(text: Any) -> float:
    """Its value, 0 where it has none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return 0.0
