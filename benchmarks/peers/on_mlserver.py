"""MLServer: images as BYTES of its V2 protocol, decoded and computed in its worker."""

import asyncio
import os
import sys
import tempfile
from types import ModuleType

import tritonclient
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import Base64Codec, NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

# tritonclient.grpc registers the messages of the V2 protocol once more, which protobuf refuses; an entry is read with
# another module of that package alone.
package = ModuleType("tritonclient.grpc")
package.__path__ = [f"{tritonclient.__path__[0]}/grpc"]
sys.modules["tritonclient.grpc"] = package

from benchmarks.peers.engine import MAX_BATCH, Engine  # noqa: E402


class Embed(MLModel):
    async def load(self) -> bool:
        self.engine = Engine()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        images = [self.engine.decode(data) for data in Base64Codec.decode_input(payload.inputs[0])]
        output = NumpyCodec.encode_output("embedding", self.engine.embed(images))
        return InferenceResponse(model_name=self.name, outputs=[output])


async def main(metrics: str) -> None:
    port = int(os.environ["PEERS_PORT"])
    settings = Settings(
        host="127.0.0.1",
        http_port=port,
        grpc_port=port + 1,
        metrics_port=port + 2,
        metrics_dir=metrics,
        parallel_workers=1,
    )
    model = ModelSettings(
        name="embed",
        implementation="benchmarks.peers.on_mlserver.Embed",
        max_batch_size=MAX_BATCH,
        max_batch_time=0.01,
    )
    await MLServer(settings).start([model])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(folder))
