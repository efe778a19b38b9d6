"""The Triton engine beside the embedded one, on a real tritonserver serving the very same entries."""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException

from entry.config import ImageSpec, read_entry, write_entry
from entry.runner import Runner
from prg.classifier import Head, HeadConfig
from prg.encoder import Encoder, EncoderConfig
from prg.export import Export, export
from prg.extractor import Extractor
from prg.fitting import fit_projection
from prg.unet import PRESETS, UNet
from service.engines.contract import DeadlineExceeded, EngineOverloaded, EngineUnavailable, Job, ModelStatus
from service.engines.triton import TritonEngine, translate_error
from service.telemetry import Metrics
from tests.real_triton.conftest import Serve
from tests.real_triton.server import TritonServer
from tests.tiny import tiny_digest, write_tiny_entry

pytestmark = pytest.mark.slow


@asynccontextmanager
async def engine(*servers: TritonServer, chosen: Any = None) -> AsyncIterator[TritonEngine]:
    running = TritonEngine([server.url for server in servers], chosen, Metrics())
    await running.start()
    try:
        yield running
    finally:
        await running.close()


def job(
    name: str, images: np.ndarray, t_end: np.ndarray, *outputs: str, version: str = "1", **more: Any
) -> Job:
    return Job(name, version, "", images, t_end.astype(np.float32), outputs, due=1e6, **more)


async def infer(running: TritonEngine, asked: Job) -> dict[str, np.ndarray]:
    """Of the weights that are served."""
    sha256 = running.models()[asked.model].modules[asked.version]
    return await running.infer(replace(asked, sha256=sha256))


def random_images(count: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, size, size), np.uint8)


def write_real_entry(directory: Path) -> None:
    """An exported network, its weights random and none of them zero."""
    torch.manual_seed(0)
    net = UNet(PRESETS["tiny16"])
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    encoder = Encoder(net, EncoderConfig(steps=2, layers=("input_blocks.1", "middle_block")))
    image = ImageSpec(size=16, resize=16, preprocessing="v2", mean=(0.5,) * 3, std=(0.5,) * 3)
    projection = fit_projection(torch.randn(100, encoder.hidden_dim))
    head = Head(encoder, HeadConfig(3, ("state", "middle_block.std")))
    extractor = Extractor(encoder, image, projection, head)
    export(extractor, Export(image, 0.7, "embedding", {}, None, ("a", "b", "c"), (0.7,)), directory)


async def test_both_engines_agree_on_every_feature_and_on_mixed_levels(serve: Serve, tmp_path: Path) -> None:
    write_real_entry(tmp_path / "models" / "real")
    images, levels = random_images(150, 16), np.linspace(0, 1, 150, dtype=np.float32)  # three batches
    runner = Runner(tmp_path / "models" / "real")
    tolerance, outputs = runner.entry.prg.tolerance, tuple(runner.entry.outputs())
    async with engine(serve(tmp_path / "models")) as running:
        found = await infer(running, job("real", images, levels, *outputs))
    expected = runner.run(images, levels)
    for output in outputs:
        a, b = found[output], expected[output]
        relative = np.abs(a - b).max(1) / np.abs(b).max(1)
        assert relative.max() < tolerance.relative, output
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert cosine.min() > tolerance.cosine, output


async def test_calls_one_after_the_other_do_not_stall(serve: Serve) -> None:
    """With one instance some of them would wait for Triton's timer of 500 ms: six of 150 here."""
    server = serve()
    (server.repository / "tiny" / "slow-ms").write_text("2")
    taken = []
    async with engine(server) as running:
        for _ in range(150):
            started = time.monotonic()
            await infer(running, job("tiny", random_images(1), np.zeros(1), "EMBEDDING"))
            taken.append(time.monotonic() - started)
    stalled = [seconds for seconds in taken if 0.45 < seconds < 0.6]
    assert len(stalled) < 2, stalled


async def test_entries_that_are_none_are_refused_by_name_and_the_others_serve(
    serve: Serve, tmp_path: Path
) -> None:
    strange = {
        "prg": lambda c: c.parameters.pop("prg"),
        "KNOWN": lambda c: c.output.pop(),
        "HIDDEN": lambda c: c.output[1].dims.__setitem__(0, 7),
    }
    for name, edit in strange.items():
        path = write_tiny_entry(tmp_path / "models", f"without-{name}") / "config.pbtxt"
        config = text_format.Parse(path.read_text(), ModelConfig())
        edit(config)
        path.write_text(text_format.MessageToString(config))
    write_tiny_entry(tmp_path / "models", "good")
    async with engine(serve(tmp_path / "models")) as running:
        for name in strange:
            status = running.models()[f"without-{name}"]
            assert not status.ready
            assert f"without-{name}" in (status.reason or "")
            assert name in (status.reason or "").replace(f"without-{name}", "")
        await infer(running, job("good", random_images(1), np.zeros(1), "STATE"))


async def test_the_list_of_models_follows_tritons_index(serve: Serve, tmp_path: Path) -> None:
    write_tiny_entry(tmp_path / "models")
    server = serve(tmp_path / "models")
    write_tiny_entry(tmp_path / "models", "late")
    (write_tiny_entry(tmp_path / "models", "broken") / "config.pbtxt").write_text("nonsense {")

    def states() -> dict[str, str]:
        return {name: status.state for name, status in running.models().items()}

    async with engine(server, chosen={"late": None, "nowhere": None}) as running:
        assert states() == {"late": "not loaded", "nowhere": "failed"}
        assert running.models()["nowhere"].reason
    async with engine(server) as running:
        assert states() == {"broken": "not loaded", "late": "not loaded", "tiny": "ready"}
        [replica] = running._replicas
        load_model, seen = replica.client.load_model, []

        async def watched(*what: Any, **named: Any) -> None:
            seen.append(states())
            await load_model(*what, **named)

        replica.client.load_model = watched
        await running.rescan()
        assert seen[0] == {"broken": "loading", "late": "loading", "tiny": "ready"}
        assert states() == {"broken": "failed", "late": "ready", "tiny": "ready"}
        assert "'broken'" in (running.models()["broken"].reason or "")
        for name in ("late", "broken"):
            shutil.rmtree(tmp_path / "models" / name)
        await running._look(replica)
        assert states() == {"tiny": "ready"}
        await asyncio.to_thread(server.kill)
        await running._look(replica)
        assert states() == {"tiny": "failed"}


async def test_answers_of_another_shape_than_promised_are_refused(serve: Serve, tmp_path: Path) -> None:
    directory = write_tiny_entry(tmp_path / "models")
    entry = read_entry(directory)
    hidden = entry.prg.features.hidden.model_copy(update={"dim": 7})
    features = entry.prg.features.model_copy(update={"hidden": hidden})
    write_entry(directory, type(entry)(entry.name, entry.prg.model_copy(update={"features": features})))
    server = serve(tmp_path / "models")
    async with engine(server) as running:
        with pytest.raises(EngineUnavailable, match=r"HIDDEN.*\[1, 5\].*\[1, 7\]"):
            await infer(running, job("tiny", random_images(1), np.zeros(1), "HIDDEN"))


async def test_what_the_caller_said_travels_along(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    sent: dict[str, Any] = {}
    async with engine(server) as running:
        client = running._replicas[0].client
        real = client.infer

        async def infer(*args: Any, **named: Any) -> Any:
            sent.update(named)
            return await real(*args, **named)

        monkeypatch.setattr(client, "infer", infer)
        trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
        due = asyncio.get_running_loop().time() + 3
        asked = job("tiny", random_images(1), np.zeros(1), "STATE", priority="bulk", headers=trace)
        await running.infer(replace(asked, sha256=tiny_digest(), due=due))
    assert sent["headers"] == trace
    assert sent["priority"] == 2
    assert 2.5 < sent["client_timeout"] <= 3
    assert sent["timeout"] == pytest.approx(sent["client_timeout"] * 1e6, rel=1e-3)
    assert [o.name() for o in sent["outputs"]] == ["STATE"]


async def test_rows_of_several_callers_go_in_one_call(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, list[str]]] = []
    async with engine(serve()) as running:
        client, go_on = running._replicas[0].client, asyncio.Event()
        real = client.infer

        async def infer_later(model: str, inputs: Any, **named: Any) -> Any:
            calls.append((named["priority"], inputs[0].shape()[0], [o.name() for o in named["outputs"]]))
            await go_on.wait()
            return await real(model, inputs, **named)

        monkeypatch.setattr(client, "infer", infer_later)
        due = asyncio.get_running_loop().time() + 10
        images = random_images(8)

        def ask(row: int, output: str, **more: Any) -> "asyncio.Task[dict[str, np.ndarray]]":
            asked = job("tiny", images[row : row + 1], np.array([row / 10]), output, **more)
            return asyncio.create_task(infer(running, replace(asked, due=due)))

        first = []
        for row in range(4):
            first.append(ask(row, "HIDDEN"))
            await asyncio.sleep(0.01)
        gone, *rest = ask(4, "HIDDEN"), ask(5, "STATE"), ask(6, "HIDDEN"), ask(7, "HIDDEN", priority="bulk")
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        large = replace(job("tiny", random_images(20), np.zeros(20), "HIDDEN"), due=due)
        whole = asyncio.create_task(infer(running, large))
        await asyncio.sleep(0.1)
        go_on.set()
        found = await asyncio.gather(*first, *rest)
        await whole
    assert calls[:4] == [(1, 1, ["HIDDEN"])] * 4
    assert calls[4:] == [(1, 2, ["STATE", "HIDDEN"]), (1, 20, ["HIDDEN"]), (2, 1, ["HIDDEN"])]
    for row, answer in zip((0, 1, 2, 3, 6, 7), [*found[:4], *found[5:]], strict=True):
        assert answer.keys() == {"HIDDEN"}
        assert answer["HIDDEN"][0, 3] == pytest.approx(row / 10)
    assert found[4].keys() == {"STATE"}


@pytest.mark.parametrize(
    ("status", "text", "kind"),
    [
        ("UNAVAILABLE", "[request id: 1] Exceeds maximum queue size", EngineOverloaded),
        ("UNAVAILABLE", "Request timeout expired", DeadlineExceeded),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", DeadlineExceeded),
        ("UNAVAILABLE", "failed to connect: Connection refused", EngineUnavailable),
        ("UNAVAILABLE", "Server is stopping, scheduler for model has stopped", EngineUnavailable),
        ("NOT_FOUND", "Request for unknown model: 'x' has no available versions", EngineUnavailable),
        ("INTERNAL", "Stub process 'x' is not healthy", EngineUnavailable),
        ("INVALID_ARGUMENT", "unexpected shape for input", RuntimeError),
    ],
)
def test_what_an_error_of_triton_means(status: str, text: str, kind: type[Exception]) -> None:
    found = translate_error(InferenceServerException(text, f"StatusCode.{status}"))
    assert type(found) is kind


def test_what_triton_says_of_its_folders_goes_no_further() -> None:
    text = "failed to open '/models/a/1/model.pt': /opt/x: no such file; see http://host/a/b and a/b/c"
    found = translate_error(InferenceServerException(text, "StatusCode.INTERNAL"))
    assert "failed to open 'model.pt': x: no such file; see http://host/a/b and a/b/c" in str(found)


async def test_the_choice_of_an_address(tmp_path: Path) -> None:
    running = TritonEngine(["a:1", "b:1", "c:1", "d:1"], None, Metrics())
    a, b, c, other = running._replicas
    entry = read_entry(write_tiny_entry(tmp_path))
    for replica, digest in ((a, "x"), (b, "x"), (c, "x"), (other, "y")):
        replica.seen = []
        version = entry.prg.versions["1"].model_copy(update={"sha256": digest})
        prg = entry.prg.model_copy(update={"versions": {"1": version}})
        replica.models = {"m": ModelStatus("m", replace(entry, prg=prg), ("1",))}
    a.in_flight, b.in_flight, c.in_flight, other.in_flight = 3, 1, 2, 0
    asked = replace(job("m", random_images(1), np.zeros(1)), sha256="x")
    assert running._choose(asked, []) is b  # not the idle one, whose weights are others
    assert running._choose(asked, [b]) is c
    now, waits = asyncio.get_running_loop().time(), []
    for _ in range(6):
        b.failed(now)
        waits.append(round(b.shunned_until - now, 3))
    assert waits == [0.5, 1.0, 2.0, 5.0, 5.0, 5.0]
    assert running._choose(asked, []) is c
    b.worked()
    assert running._choose(asked, []) is b
    b.seen = None
    assert running._choose(asked, []) is c
    with pytest.raises(EngineUnavailable):
        running._choose(replace(asked, sha256="z"), [])
    await running.close()
