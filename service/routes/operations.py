"""GET /health/live, /health/ready and /metrics: for whoever keeps the service up."""

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service.auth import MetricsKey
from service.errors import INTERNAL_ERROR, SERVICE_UNAVAILABLE, unavailable
from service.openapi import KEYED, METRICS, answers, problems
from service.routes.answers import gateway_of
from service.schemas import Health

router = APIRouter(tags=["Operations"])


@router.get(
    "/health/live",
    summary="Is the process alive",
    response_model=Health,
    responses=answers(Health(status="live")) | problems(INTERNAL_ERROR),
)
async def live() -> Health:
    """Good as long as the process answers."""
    return Health(status="live")


@router.get(
    "/health/ready",
    summary="Can it serve",
    response_model=Health,
    responses=answers(Health(status="ready")) | problems(INTERNAL_ERROR, SERVICE_UNAVAILABLE),
)
async def ready(request: Request) -> Health:
    """Good where the default model answered within the last 30 seconds, a request or a canary."""
    reason = gateway_of(request).readiness.reason()
    if reason:
        raise unavailable(f"not ready: {reason}", 5)
    return Health(status="ready")


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses=METRICS | problems(*KEYED),
)
async def metrics(request: Request, _: MetricsKey) -> Response:
    """Metrics in Prometheus' text format."""
    gateway = gateway_of(request)
    # As it is now: nothing else updates this gauge.
    gateway.metrics.ready.set(gateway.readiness.reason() is None)
    return Response(generate_latest(gateway.metrics.registry), media_type=CONTENT_TYPE_LATEST)
