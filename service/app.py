"""The application and the command prg-serve."""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator
from types import FrameType

import uvicorn
from fastapi import FastAPI
from prometheus_client import disable_created_metrics
from starlette.middleware.cors import CORSMiddleware

from service import documented, errors
from service.auth import Keys, new_key
from service.engines.embedded import EmbeddedEngine
from service.engines.triton import TritonEngine
from service.fetch import Fetcher
from service.gateway import Gateway, default_model
from service.inference import Engine, Inference
from service.limits import BodyLimit
from service.readiness import Readiness
from service.routes import classify, embed, models, openai, operations, pages
from service.settings import Settings, SettingsError, load_settings, unknown_variables
from service.telemetry import Metrics, Telemetry, configure_logs, log

DESCRIPTION = """Image features and classes out of a generative model reversed (PRG).

Images come as multipart files, as a raw body, or as base64 in JSON; options as form fields, query parameters or
JSON fields. Errors are problem+json (RFC 9457)."""


def create_app(settings: Settings) -> FastAPI:
    """The service with these settings. Raises SettingsError where it could never serve."""
    metrics = Metrics()
    keys = Keys(settings.api_keys_file)
    check_repository(settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = make_engine(settings, metrics)
        readiness = Readiness(engine, lambda: default_model(settings, engine))
        fetcher = Fetcher(settings.allow_urls, settings.max_image_bytes)
        inference = Inference(engine, fetcher, settings.image_limits, settings.queue_images, metrics)
        gateway = Gateway(settings, engine, inference, readiness, keys, metrics)
        app.state.gateway = gateway
        await engine.start()
        async with asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(readiness.watch())
            _on_hangup(tasks, gateway)
            log.info("serving", models={n: s.state for n, s in engine.models().items()})
            yield
            readiness.stopping = True
            watch.cancel()
        await engine.close()
        inference.close()
        await fetcher.close()

    app = FastAPI(
        title="PRG",
        version="1",
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.keys = keys
    errors.install(app)
    for module in (embed, classify, openai, models, operations, pages):
        app.include_router(module.router)
    documented.install(app)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "Priority", "Request-Timeout", "X-Request-ID"],
            expose_headers=["Retry-After", "X-Request-ID", *embed.NPY_HEADERS],
        )
    app.add_middleware(Telemetry, metrics=metrics)
    return app


def make_engine(settings: Settings, metrics: Metrics) -> Engine:
    """The engine that PRG_ENGINE names."""
    if settings.engine == "triton":
        return TritonEngine(settings.triton_url, settings.chosen_models, metrics)
    return EmbeddedEngine(
        settings.model_repository,
        settings.chosen_models,
        settings.max_batch,
        settings.max_delay_ms / 1e3,
        settings.queue_images,
        metrics,
    )


def check_repository(settings: Settings) -> None:
    """Refuse at start what no later rescan is meant to mend. Raises SettingsError.

    Under Triton there is nothing to look at: it may come later than this service.
    """
    if settings.engine != "embedded":
        return
    repository = settings.model_repository
    if not repository.is_dir():
        raise SettingsError(f"PRG_MODEL_REPOSITORY={repository}: no such folder")
    names = {path.parent.name for path in repository.glob("*/config.pbtxt")}
    if not names:
        raise SettingsError(
            f"PRG_MODEL_REPOSITORY={repository}: no entry in it; write one with `prg export RUN {repository}/NAME`"
        )
    chosen = settings.chosen_models
    there = ", ".join(sorted(names))
    for name in chosen or ():
        if name not in names:
            raise SettingsError(f"PRG_MODELS names {name!r}, {repository} has: {there}")
    if settings.default_model and settings.default_model not in (chosen or names):
        raise SettingsError(f"PRG_DEFAULT_MODEL={settings.default_model!r} is not served; there are: {there}")


async def check_address(settings: Settings) -> None:
    """Bind, as the server will once the models are loaded, which takes a while. Raises SettingsError."""
    loop = asyncio.get_running_loop()
    try:
        server = await loop.create_server(asyncio.Protocol, settings.host, settings.port, start_serving=False)
    except OSError as error:
        raise SettingsError(f"PRG_HOST={settings.host} PRG_PORT={settings.port}: {error}") from None
    server.close()


def _on_hangup(tasks: asyncio.TaskGroup, gateway: Gateway) -> None:
    """SIGHUP: rescan the repository and the keys, while serving goes on."""
    if threading.current_thread() is not threading.main_thread():
        return  # signals belong to the main thread

    async def reload() -> None:
        log.info("reloading")
        try:
            gateway.keys.reload()
        except SettingsError as error:  # the old keys stay, and the models are looked at all the same
            log.error("reload failed", reason=str(error))
        try:
            await gateway.engine.rescan()
        except Exception as error:  # serving goes on with what there was
            log.error("reload failed", reason=str(error))
        else:
            states = {n: s.state for n, s in gateway.engine.models().items()}
            log.info("reloaded", models=states)

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: tasks.create_task(reload()))


def main(argv: list[str] | None = None) -> int:
    """Entry point of prg-serve."""
    parser = argparse.ArgumentParser(
        prog="prg-serve",
        description="Serve the models of a repository by REST. Settings come from the environment:",
        epilog=_settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--new-key", metavar="NAME", help="print a new API key and its row for the keys file")
    arguments = parser.parse_args(argv)
    if arguments.new_key is not None:
        if not arguments.new_key.strip() or not arguments.new_key.isprintable():
            parser.error("--new-key needs a name of printable characters")
        key, row = new_key(arguments.new_key)
        print(
            f"# Give this key to its user; it is kept nowhere:\n# {key}\n# and add this to PRG_API_KEYS_FILE:\n{row}"
        )
        return 0
    try:
        settings = load_settings()
        app = create_app(settings)
        asyncio.run(check_address(settings))
    except SettingsError as error:
        print(f"prg-serve: {error}", file=sys.stderr)
        return 2
    configure_logs()
    disable_created_metrics()  # type: ignore[no-untyped-call]
    address = f"http://{settings.host}:{settings.port}"
    for variable, meant in unknown_variables(os.environ).items():
        log.warning("unknown setting", variable=variable, reason="it changes nothing", perhaps_meant=meant)
    models = ", ".join(settings.triton_url) if settings.engine == "triton" else settings.model_repository
    print(f"models from {models}; serving on {address} once they are loaded", file=sys.stderr)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,  # longer than the usual balancer's, or it would reuse a connection just closed
        timeout_graceful_shutdown=int(settings.request_timeout_s) + 5,
    )
    Server(config, app, settings.drain_s).run()
    return 0


class Server(uvicorn.Server):
    """uvicorn that says it is not ready before it stops listening; a second signal does not wait."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_s: float) -> None:
        super().__init__(config)
        self._app = app
        self._drain_s = drain_s
        self._draining = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain_s and self.started and not self._draining:
            self._draining = True
            self._app.state.gateway.readiness.stopping = True
            threading.Timer(self._drain_s, super().handle_exit, (sig, None)).start()
        else:
            super().handle_exit(sig, frame)


def _settings_help() -> str:
    lines = []
    for name, field in Settings.model_fields.items():
        default = "" if field.default in ("", None, ()) else field.default
        default = ",".join(default) if isinstance(default, tuple) else default
        lines.append(f"  PRG_{name.upper()}={default}\n      {field.description or ''}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
