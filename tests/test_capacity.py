"""benchmarks/capacity: the simulation agrees with queueing theory, and docs/scaling.md has its tables."""

import json
from pathlib import Path

import pytest

from benchmarks.capacity.__main__ import TIMES, assumed_by, main, parser
from benchmarks.capacity.simulate import Site, Times, simulate
from benchmarks.capacity.tables import tables

ROOT = Path(__file__).parents[1]


def test_one_decoder_is_the_queue_of_pollaczek_and_khinchine() -> None:
    """Poisson arrivals, one server, a constant time of service: its mean time in the system is known."""
    service_s, busy = 0.01, 0.7
    times = Times(0.0, (service_s,), 0.0, 0.0)
    found = simulate(times, Site(engines=1, queue=10_000), busy / service_s, 300.0)
    expected = service_s + busy * service_s / (2 * (1 - busy))
    assert sum(found.latencies) / len(found.latencies) == pytest.approx(expected, rel=0.05)


def test_over_its_limit_an_engine_gives_full_batches_and_a_gateway_refuses() -> None:
    times, site, seconds = Times(1e-4, (1e-4,), 0.1, 0.0), Site(engines=1, max_batch=8, queue=64), 20.0
    found = simulate(times, site, 200.0, seconds)
    assert len(found.latencies) / seconds == pytest.approx(8 / 0.1, rel=0.05)
    assert found.refused / seconds == pytest.approx(200 - 80, rel=0.05)


@pytest.mark.slow
def test_the_page_has_the_tables_of_the_script() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text("utf-8")
    facts = json.loads((ROOT / TIMES).read_text("utf-8"))
    for name, text in tables(facts, assumed_by(parser().parse_args([]))).items():
        assert text in page, name


@pytest.mark.parametrize(
    ("option", "named"),
    [("--busy=1", "--busy"), ("--cores=0", "--cores"), ("--times=none.json", "none.json")],
)
def test_what_can_not_be_is_refused(option: str, named: str) -> None:
    with pytest.raises(SystemExit, match=named):
        main([option])
