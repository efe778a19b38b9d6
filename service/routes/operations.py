"""GET /health/live, /health/ready and /metrics: for whoever keeps the service up."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service.auth import Key, needs
from service.documented import METRICS_ANSWER, answers, problems
from service.errors import overloaded
from service.routes.answers import gateway_of
from service.schemas import Health

router = APIRouter()


@router.get(
    "/health/live",
    summary="Is the process alive",
    response_model=Health,
    responses=answers({"Alive": {"status": "live"}}) | problems(500),
)
async def live() -> Health:
    """Good as long as the process answers."""
    return Health(status="live")


@router.get(
    "/health/ready",
    summary="Can it serve",
    response_model=Health,
    responses=answers({"Ready": {"status": "ready"}}) | problems(500, 503),
)
async def ready(request: Request) -> Health:
    """Good where the default model answered within the last 30 seconds, a request or a canary."""
    reason = gateway_of(request).readiness.reason()
    if reason:
        raise overloaded(f"not ready: {reason}", 5)
    return Health(status="ready")


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses=METRICS_ANSWER | problems(401, 403, 500),
)
async def metrics(request: Request, _: Annotated[Key | None, Depends(needs("metrics"))]) -> Response:
    """Metrics in Prometheus' text format."""
    gateway = gateway_of(request)
    gateway.metrics.ready.set(
        gateway.readiness.reason() is None
    )  # as it is now, not as it was last looked at
    return Response(generate_latest(gateway.metrics.registry), media_type=CONTENT_TYPE_LATEST)
