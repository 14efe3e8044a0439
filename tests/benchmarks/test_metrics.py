import pytest

from baton.benchmarks.measure import Outcome
from baton.benchmarks.metrics import detailed, summarize, tokens_per_second


def served(start: float, ttft: float, *itl: float, output_len: int | None = None) -> Outcome:
    return Outcome(
        input_len=10,
        start=start,
        ttft=ttft,
        latency=ttft + sum(itl),
        itl=list(itl),
        output_len=1 + len(itl) if output_len is None else output_len,
    )


def failed(kind: str) -> Outcome:
    outcome = Outcome(input_len=10, start=5.0)
    outcome.fail(kind, "no")
    return outcome


OUTCOMES = [
    served(0.0, 0.1, 0.02, 0.04),
    served(0.1, 0.3, 0.1, output_len=5),  # two chunks, five tokens
    served(2.5, 0.2),
    failed("429 server_is_overloaded"),
    failed("429 server_is_overloaded"),
]


def test_figures() -> None:
    found = summarize(
        OUTCOMES,
        4.0,
        percentile_metrics=("ttft", "tpot", "itl", "e2el"),
        percentiles=(50.0, 99.9),
        goodput={"ttft": 250.0, "tpot": 31.0},
    )
    expected = {
        "completed": 3,
        "failed": 2,
        "total_input_tokens": 30,
        "total_output_tokens": 9,
        "request_throughput": 0.75,
        "output_throughput": 2.25,
        "total_token_throughput": 9.75,
        "request_goodput": 0.5,  # the second is late
        "max_concurrent_requests": 2,
        "max_output_tokens_per_s": 8.0,
        "failures": {"429 server_is_overloaded": 2},
        "mean_ttft_ms": pytest.approx(200.0),
        "median_ttft_ms": pytest.approx(200.0),
        "p50_ttft_ms": pytest.approx(200.0),
        "p99.9_ttft_ms": pytest.approx(299.8),
        # (60 ms / 2 + 100 ms / 4) / 2: by tokens, not by chunks; one token has none.
        "mean_tpot_ms": pytest.approx(27.5),
        "mean_itl_ms": pytest.approx(160 / 3),
        "mean_e2el_ms": pytest.approx((160 + 400 + 200) / 3),
    }
    assert {name: found[name] for name in expected} == expected


def test_only_what_is_asked_for() -> None:
    found = summarize(OUTCOMES, 1.0, percentile_metrics=("ttft",), percentiles=(99.0,), goodput={})
    assert found["request_goodput"] is None
    assert "p99_ttft_ms" in found
    assert not [name for name in found if "tpot" in name or "itl" in name]


def test_nobody_was_served() -> None:
    found = summarize(
        [failed("timeout")], 1.0, percentile_metrics=("ttft",), percentiles=(99.0,), goodput={}
    )
    assert found["completed"] == 0
    assert found["mean_ttft_ms"] == 0.0
    assert found["max_concurrent_requests"] == 0
    assert tokens_per_second([]) == []


def test_details_are_in_the_order_of_sending() -> None:
    found = detailed(OUTCOMES)
    assert found["start_times"] == [0.0, 0.1, 2.5, 5.0, 5.0]
    assert found["output_lens"] == [3, 5, 1, 0, 0]
    assert found["itls"][1] == [0.1]
    assert found["errors"] == ["", "", "", "no", "no"]
