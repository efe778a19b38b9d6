"""Requests that schemathesis makes of the OpenAPI document, right and wrong ones: every answer is as documented."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.auth import new_key
from service.settings import Settings
from tests.serving import served
from tests.tiny import write_tiny_entry

EXAMPLES = 20
ROOT = Path(__file__).parents[2]
STRING = {"type": "string", "format": "image-b64"}


def form(name: str) -> dict[str, Any]:
    """An item of `inputs`."""
    image = {"type": "string", "format": f"image-{name}"}
    return {"type": "object", "required": [name], "properties": {name: image}, "additionalProperties": False}


OF_THE_TINY_MODEL: dict[str, dict[str, Any]] = {
    "model": {"enum": ["prg-cifar10"]},
    "model_version": {"enum": ["1"]},
    "dimensions": {"type": "integer", "minimum": 1, "maximum": 4},
    "input": {"anyOf": [STRING, {"type": "array", "minItems": 1, "items": STRING}]},
    "inputs": {"type": "array", "minItems": 1, "items": {"anyOf": [*map(form, ("b64", "data_uri"))]}},
}
"""A field -> what it may be in this service, which the document of any service can't say."""


def narrowed(document: dict[str, Any], place: str) -> dict[str, Any]:
    """The document of a service that has the tiny model alone, and keys; options are in one place, as given twice they
    would have to be equal."""
    for path, methods in document["paths"].items():
        fields = OF_THE_TINY_MODEL | ({"t_end": {"enum": [0.8, 0.5]}} if path == "/classify" else {})
        for operation in methods.values():
            if "security" in operation:
                operation["security"] = [{"key": []}]
            if place == "body" and "parameters" in operation:
                operation["parameters"] = [p for p in operation["parameters"] if p["in"] != "query"]
            for parameter in operation.get("parameters", ()):
                narrow({parameter["name"]: parameter["schema"]}, fields)
            for kind, media in operation.get("requestBody", {}).get("content", {}).items():
                if kind != "application/json":
                    # It names files instead of being one.
                    media.pop("example", None)
                properties = media["schema"].get("properties", {})
                if place == "query" and path != "/v1/embeddings":
                    for name in properties.keys() - {"files", "inputs"}:
                        del properties[name]
                    media.pop("example", None)
                narrow(properties, fields)
    return document


def narrow(properties: dict[str, Any], fields: dict[str, dict[str, Any]]) -> None:
    """These fields, null where it was allowed."""
    for name in properties.keys() & fields:
        schema = properties[name]
        null = [kind for kind in schema.get("anyOf", ()) if kind == {"type": "null"}]
        schema.clear()
        schema["anyOf"] = [fields[name], *null]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["query", "body"])
def test_answers_are_as_documented(tmp_path: Path, place: str) -> None:
    """Its phases and checks, all of them."""
    write_tiny_entry(tmp_path / "models", "prg-cifar10")
    key, row = new_key("generated", ("infer", "metrics"))
    (tmp_path / "keys.toml").write_text(row.replace("images_per_minute = 6000", ""))
    with served(
        Settings(model_repository=tmp_path / "models", api_keys_file=tmp_path / "keys.toml")
    ) as address:
        document = httpx.get(f"http://{address}/openapi.json").json()
        (tmp_path / "openapi.json").write_text(json.dumps(narrowed(document, place)))
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", f"http://{address}"),
            *("--checks", "all", "--continue-on-failure"),
            *("--generation-deterministic", "--max-examples", str(EXAMPLES)),
        ]
        environment = {
            "SCHEMATHESIS_HOOKS": "tests.service.schemathesis_hooks",
            "PYTHONPATH": str(ROOT),
            "GENERATED_KEY": key,
        }
        ended = subprocess.run(
            command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True
        )
    assert ended.returncode == 0, ended.stdout[-20_000:] + ended.stderr[-2000:]
