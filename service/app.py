"""The application and the command prg-serve."""

import argparse
import asyncio
import contextlib
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator
from itertools import filterfalse

from fastapi import FastAPI
from prometheus_client import disable_created_metrics
from starlette.middleware.cors import CORSMiddleware

from entry.errors import DeviceError
from entry.files import is_hidden
from service import errors, openapi, tracing
from service.admission import Admission
from service.auth import Keys, new_key
from service.connections import Connections
from service.cores import cores
from service.engines.contract import Engine
from service.engines.embedded import EmbeddedEngine
from service.engines.triton import TritonEngine
from service.gateway import Gateway
from service.limits import BodyLimit, HeadAsGet
from service.routes import classify, embed, models, openai, operations, pages
from service.server import Server, bind
from service.settings import Settings, SettingsError, load_settings, unknown_variables
from service.telemetry import Metrics, Telemetry, configure_logs, log

DESCRIPTION = """Image features and classes out of a generative model reversed (PRG).

Images come as multipart files, as a raw body, or as base64 in JSON; options as form fields, query parameters or
JSON fields. Errors are problem+json (RFC 9457)."""


def create_app(settings: Settings) -> FastAPI:
    """The service with these settings. Raises SettingsError where it could never serve."""
    metrics = Metrics()
    keys = Keys(settings.api_keys_file)
    admission = Admission(settings.queue_images, metrics)
    connections = Connections(admission, keys, metrics, settings.max_connections, settings.cors_origins)
    check_repository(settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tracing.start()
        gateway = Gateway(settings, make_engine(settings, metrics), keys, admission, metrics)
        app.state.gateway = gateway
        await gateway.engine.start()
        async with asyncio.TaskGroup() as tasks:
            watches = [tasks.create_task(part.watch()) for part in (gateway.readiness, connections)]
            _on_hangup(tasks, gateway)
            log.info("serving", models=gateway.states())
            yield
            gateway.readiness.stopping = True
            for watch in watches:
                watch.cancel()
        await gateway.close()
        await asyncio.to_thread(tracing.stop)

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
    app.state.connections = connections
    errors.install(app)
    for module in (embed, classify, openai, models, operations, pages):
        app.include_router(module.router)
    openapi.install(app)
    app.add_middleware(HeadAsGet)
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
    return EmbeddedEngine(settings, metrics)


def check_repository(settings: Settings) -> None:
    """Refuse at start what no later rescan is meant to mend. Raises SettingsError.

    Under Triton there is nothing to look at: it may come later than this service.
    """
    if settings.engine != "embedded":
        for name, default in (("device", "auto"), ("precision", "entry")):
            if getattr(settings, name) != default:
                raise SettingsError(
                    f"PRG_{name.upper()}={getattr(settings, name)} is of the embedded engine; "
                    "PRG_ENGINE=triton computes where Triton does"
                )
        return
    if importlib.util.find_spec("torch") is None:
        raise SettingsError(
            "PRG_ENGINE=embedded: the package torch is missing; pip install 'prg-service[embedded]', "
            "or say PRG_ENGINE=triton"
        )
    from entry.runner import find_device  # imports torch

    try:
        find_device(settings.device)
    except DeviceError as error:
        raise SettingsError(f"PRG_DEVICE: {error}") from None
    repository = settings.model_repository
    if not repository.is_dir():
        raise SettingsError(f"PRG_MODEL_REPOSITORY={repository}: no such folder")
    found = (path.parent.name for path in repository.glob("*/config.pbtxt"))
    names = set(filterfalse(is_hidden, found))
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


def _on_hangup(tasks: asyncio.TaskGroup, gateway: Gateway) -> None:
    """SIGHUP: rescan the repository and the keys, while serving goes on."""
    # Signals belong to the main thread.
    if threading.current_thread() is not threading.main_thread():
        return

    async def reload() -> None:
        log.info("reloading")
        # One that fails leaves what there was, and does not keep the other from being read.
        failures = []
        try:
            gateway.keys.reload()
        except SettingsError as error:
            failures.append(str(error))
        try:
            await gateway.engine.rescan()
        except Exception as error:
            failures.append(str(error))
        if failures:
            log.error("reload failed", reason="; ".join(failures), models=gateway.states())
        else:
            log.info("reloaded", models=gateway.states())

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
    parser.add_argument(
        "--scopes",
        nargs="+",
        choices=("infer", "metrics"),
        default=["infer"],
        help="of the new key; by default infer",
    )
    arguments = parser.parse_args(argv)
    if arguments.new_key is not None:
        if not arguments.new_key.strip() or not arguments.new_key.isprintable():
            parser.error("--new-key needs a name of printable characters")
        key, row = new_key(arguments.new_key, arguments.scopes)
        # The row alone on stdout, so that `>> keys.toml` does not store the key.
        print(f"Give this key to its user; it is kept nowhere:\n{key}", file=sys.stderr)
        print("and add this to the file that PRG_API_KEYS_FILE names:", file=sys.stderr)
        print(row)
        return 0
    # PyTorch, which is imported later, knows nothing of a container's quota.
    os.environ.setdefault("OMP_NUM_THREADS", str(cores()))
    # So often its threads look for work before they sleep: enough from one operator to the next. By default it is 150
    # times as much, and decoding large photos lacks the core meanwhile.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        settings = load_settings()
        app = create_app(settings)
        sockets = asyncio.run(bind(settings))
    except SettingsError as error:
        print(f"prg-serve: {error}", file=sys.stderr)
        return 2
    configure_logs()
    disable_created_metrics()  # type: ignore[no-untyped-call]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"http://{host}:{settings.port}"
    for variable, meant in unknown_variables(os.environ).items():
        log.warning("unknown setting", variable=variable, reason="it changes nothing", perhaps_meant=meant)
    models = ", ".join(settings.triton_url) if settings.engine == "triton" else settings.model_repository
    print(f"models from {models}; serving on {address} once they are loaded", file=sys.stderr)
    Server(app, settings).run(sockets)
    return 0


def _settings_help() -> str:
    lines = []
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        default = ",".join(default) if isinstance(default, tuple) else default
        lines.append(
            f"  PRG_{name.upper()}={'' if default is None else default}\n      {field.description or ''}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
