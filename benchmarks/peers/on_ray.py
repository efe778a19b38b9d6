"""Ray Serve: images as raw bodies, decoded and computed in its replica."""

import asyncio
import os

import numpy as np
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from benchmarks.peers.engine import MAX_BATCH, Engine


@serve.deployment(max_ongoing_requests=512)
class Embed:
    def __init__(self) -> None:
        self.engine = Engine()

    @serve.batch(max_batch_size=MAX_BATCH)
    async def embed(self, images: list[np.ndarray]) -> list[np.ndarray]:
        return list(await asyncio.to_thread(self.engine.embed, images))

    async def __call__(self, request: Request) -> JSONResponse:
        image = self.engine.decode(await request.body())
        return JSONResponse({"embedding": (await self.embed(image)).tolist()})


if __name__ == "__main__":
    ray.init(include_dashboard=False, logging_level="warning")
    serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["PEERS_PORT"])})
    serve.run(Embed.bind(), blocking=True)
