"""Embeddings by a running service; needs nothing but the client."""

from pathlib import Path
from typing import Any

from prg.client import Client, EmbedOptions
from prg.embed.engines import Rows


class Remote:
    """A running service."""

    def __init__(self, url: str, key: str | None, options: EmbedOptions) -> None:
        self._client = Client(url, key)
        self._options = options
        models = self._client.models()
        name = options.get("model", models["default"])
        facts: dict[str, Any] = next((m for m in models["data"] if m["name"] == name), {})
        self.identity = {
            "model": name,
            "encoder": facts.get("fingerprints", {}).get(facts.get("default_version"), {}).get("encoder"),
            "t_end": facts.get("t_end"),
            "feature": facts.get("feature"),
            **options,
        }

    def embed(self, files: list[Path]) -> Rows:
        """Embeddings of these files."""
        found = self._client.embed(files, **self._options)
        return Rows(found.vectors, found.errors, found.fingerprint)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
