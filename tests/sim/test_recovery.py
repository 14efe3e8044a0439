"""A worker that was slow for a while is used again when it is fast, with nobody to help."""

import pytest

from baton import latency
from baton.types import Request, Role, SamplingParams
from tests.sim.fleet import SimFleet
from tests.sim.oracle import Client, expected_output
from tests.sim.plan import CALM
from tests.sim.worker import MAX_MODEL_LEN, WorkerSpec

HALF_LIFE_MS = 4_000.0  # so that the test is short
EVERY_MS = 700.0  # one request at a time, so there is never a queue that would do it
SLOW_MS, SLOWNESS = 7_000.0, 3.0
END_MS = 32_000.0


class Steady(SimFleet):
    """Two workers of each role, and a request every now and then."""

    def _draw_workers(self) -> list[WorkerSpec]:
        roles = {"p0": Role.PREFILL, "p1": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE}
        return [WorkerSpec(name, role, 128, 16, 64, 4) for name, role in roles.items()]

    def _draw_clients(self) -> list[Client]:
        clients = [self._client(number) for number in range(int(END_MS / EVERY_MS))]
        for client in clients:
            self.world.after(client.arrives_ms, None, self._arrive, self.gateways["g0"], client)
        return clients

    def _client(self, number: int) -> Client:
        sampling = SamplingParams(n=1, temperature=1.0, seed=number, max_tokens=6)
        request = Request(f"r{number}", self._tokens(48), sampling)
        return Client(
            gateway="g0",
            request=request,
            arrives_ms=100.0 + EVERY_MS * number,
            abort_after_ms=None,
            stop_modulo=None,
            expected=expected_output(self.model, request, MAX_MODEL_LEN),
            got=[[]],
        )

    def used(self, role: str) -> list[str]:
        """Which worker of a role each request used, in order."""
        reports = [client.machine.report for client in self.clients if client.machine is not None]
        names = [getattr(report, f"{role}_worker") for report in reports]
        return [name for name in names if name]  # a first token that ends everything is not decoded


def run() -> Steady:
    fleet = Steady(5, CALM)
    while fleet.world.now < END_MS + 1_000.0:
        for name in ("p0", "d0"):
            fleet.workers[name].slowness = SLOWNESS if fleet.world.now < SLOW_MS else 1.0
        assert fleet.world.run_one()
    assert all(client.is_over for client in fleet.clients)
    return fleet


def test_workers_that_were_slow_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "HALF_LIFE_MS", HALF_LIFE_MS)
    fleet = run()
    for role, slow in ("prefill", "p0"), ("decode", "d0"):
        used = fleet.used(role)
        first, last = used[: int(SLOW_MS / EVERY_MS)], used[-int(8_000 / EVERY_MS) :]
        assert 1 <= first.count(slow) <= 6, "tried until it is known, and left alone"
        assert last.count(slow) >= 1
