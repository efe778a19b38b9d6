"""Embeddings by a running service; needs nothing but the client."""

from typing import Any

import numpy as np

from prg.client import Client, EmbedOptions, ServiceError
from prg.errors import DataError


class Remote:
    """A running service."""

    batch = 128  # four requests of the client, which has as many in flight

    def __init__(self, url: str, key: str | None, options: EmbedOptions) -> None:
        self._client = Client(url, key)
        self._options = options
        try:
            facts = self._facts(url, options.get("model"))
        except BaseException:
            self.close()
            raise
        feature = options.get("feature", facts["feature"])
        self.identity = {
            "fingerprint": facts["fingerprints"][facts["default_version"]]["encoder"],
            "feature": feature,
            "t_end": options.get("t_end", facts["t_end"]),
            "dim": facts["features"].get(feature, {}).get("dim"),
            "normalize": options.get("normalize", False),
        }

    def _facts(self, url: str, name: str | None) -> dict[str, Any]:
        """What the service says of the model."""
        try:
            models = self._client.models()
        except ServiceError as error:
            if error.status in (401, 403):
                raise DataError(
                    f"{url}: {error}; put a key of the service into the variable PRG_KEY"
                ) from None
            raise
        name = name or models["default"]
        facts: dict[str, Any] = next((m for m in models["data"] if m["name"] == name), {})
        if "fingerprints" not in facts:
            raise DataError(f"{url}: serves no model {name!r} ({facts.get('reason', 'it is not there')})")
        return facts

    def prepare(self, content: bytes) -> bytes:
        """The bytes themselves: the service decodes them."""
        return content

    def embed(self, prepared: list[bytes]) -> list[np.ndarray | str]:
        """For each image its embedding, float32 [D], or why it has none."""
        try:
            found = self._client.embed(prepared, **self._options)
        except ServiceError as error:
            if error.status != 413:  # each of these is larger than the service takes
                raise
            return [str(error)] * len(prepared)
        if found.fingerprint != self.identity["fingerprint"]:
            raise DataError(
                f"the service's model was replaced meanwhile (encoder {self.identity['fingerprint']} by "
                f"{found.fingerprint}), and vectors of two must not be mixed; begin again, with another --out"
            )
        return [found.errors.get(row, vector) for row, vector in enumerate(found.vectors)]

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
