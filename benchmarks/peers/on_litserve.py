"""LitServe: images by multipart, decoded and computed in its worker."""

import os

import litserve
import numpy as np
from fastapi import Request

from benchmarks.peers.engine import MAX_BATCH, Engine


class Embed(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.engine = Engine()

    def decode_request(self, request: Request) -> np.ndarray:
        return self.engine.decode(request["image"].file.read())

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, images: np.ndarray) -> np.ndarray:
        return self.engine.embed(images)

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict[str, list[float]]:
        return {"embedding": output.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Embed(max_batch_size=MAX_BATCH), accelerator="cpu")
    server.run(host="127.0.0.1", port=int(os.environ["PEERS_PORT"]), generate_client_file=False)
