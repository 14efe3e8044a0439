"""Ready means proven: a route counts once a tiny request has gone over it, KV bytes included."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from baton.compat import pair_conflict
from baton.errors import BatonError, Cause
from baton.gateway.backend import PairConflict, PrefillPath, RequestStream
from baton.gateway.legs import Planner
from baton.gateway.router import DecodeDecision, Need, Refusal, RouteDecision, transfer_bytes
from baton.gateway.workers import Fleet, Worker
from baton.types import Request, SamplingParams, WorkerInfo

log = logging.getLogger(__name__)

_NUM_PROBE_TOKENS = 8  # less than a block, so that no cache can spare the transfer
_PROBE_TIMEOUT_MS = 30_000
_RETRY_S = 1.0
_MAX_RETRY_S = 15.0


@dataclass(frozen=True, slots=True)
class Route:
    """From P to D; the same worker twice = it computes alone."""

    source_id: str
    target_id: str
    incarnations: tuple[bytes, bytes]

    @property
    def is_remote(self) -> bool:
        return self.source_id != self.target_id


class FixedPlanner:
    """A planner for which there is only one route."""

    def __init__(self, fleet: Fleet, route: Route) -> None:
        self._fleet = fleet
        self._route = route

    def plan(self, need: Need) -> RouteDecision | Refusal:
        source, target = self._find(self._route.source_id), self._find(self._route.target_id)
        if source is None or target is None:
            return Refusal(Cause.NO_WORKER, "the route is not up")
        return RouteDecision(
            self._route.is_remote, source.worker_id, target.worker_id, 0, 0.0, 0.0, "probe"
        )

    def pick_decode(self, need: Need, source_id: str) -> DecodeDecision | Refusal:
        source, target = self._find(source_id), self._find(self._route.target_id)
        if source is None or target is None:
            return Refusal(Cause.NO_WORKER, "the route is not up")
        num_bytes = transfer_bytes(need, source, target)
        return DecodeDecision(target.worker_id, 0, num_bytes, lead_ms=float("inf"))

    def local_ms(self, need: Need, worker_id: str, num_cached_tokens: int) -> float:
        return 0.0

    def info(self, worker_id: str) -> WorkerInfo:
        worker = self._fleet.get(worker_id)
        assert worker is not None, "named by this planner a moment ago"
        return worker.info

    def _find(self, worker_id: str) -> Worker | None:
        worker = self._fleet.get(worker_id)
        return worker if worker is not None and worker.accepts else None


class Readiness:
    """Proves routes, one after the other, as workers come; forgets nothing while they live.

    open_probe: starts a request that only this planner routes.
    """

    def __init__(
        self, fleet: Fleet, open_probe: Callable[[Request, Planner], RequestStream]
    ) -> None:
        self._fleet = fleet
        self._open_probe = open_probe
        self._proven: set[tuple[bytes, bytes]] = set()
        self._conflicts: dict[tuple[bytes, bytes], PairConflict] = {}
        self._changed = asyncio.Event()
        self._num_probes = 0

    def fleet_changed(self) -> None:
        self._changed.set()

    def is_ready(self) -> bool:
        """A proven route is up now."""
        return any(route.incarnations in self._proven for route in self._routes())

    def conflicts(self) -> tuple[PairConflict, ...]:
        """Of workers that are up now."""
        up = {worker.info.incarnation for worker in self._fleet if worker.accepts}
        return tuple(found for pair, found in self._conflicts.items() if up.issuperset(pair))

    async def run(self) -> None:
        """Until cancelled."""
        retry_s = _RETRY_S
        while True:
            self._changed.clear()
            failed = 0
            for route in list(self._routes()):
                if route.incarnations not in self._proven:
                    failed += not await self._prove(route)
            retry_s = min(2 * retry_s, _MAX_RETRY_S) if failed else _RETRY_S
            with suppress(TimeoutError):
                async with asyncio.timeout(retry_s if failed else None):
                    await self._changed.wait()

    def _routes(self) -> Iterator[Route]:
        """Every pair that may be used. Workers compute alone if that is their role, or if there is
        no pair: then that is how requests are served."""
        workers = [worker for worker in self._fleet if worker.accepts]
        pairs = [
            _route(source, target)
            for source in workers
            for target in workers
            if source.role.can_prefill and target.role.can_decode and source is not target
            if self._may_pair(source, target)
        ]
        alone = [w for w in workers if not pairs or (w.role.can_prefill and w.role.can_decode)]
        yield from pairs
        yield from (_route(worker, worker) for worker in alone)

    def _may_pair(self, source: Worker, target: Worker) -> bool:
        conflict = pair_conflict(source.info, target.info)
        pair = (source.info.incarnation, target.info.incarnation)
        if conflict is not None and pair not in self._conflicts:
            found = PairConflict(source.worker_id, target.worker_id, *conflict)
            self._conflicts[pair] = found
            log.warning("%s and %s are never paired: %s", found.source, found.target, found.reason)
        return conflict is None

    async def _prove(self, route: Route) -> bool:
        self._num_probes += 1
        sampling = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, seed=0)
        request = Request(
            request_id=f"probe-{self._num_probes}",
            prompt_token_ids=tuple(range(_NUM_PROBE_TOKENS)),
            sampling=sampling,
            salt=b"baton-probe",
            deadline_ms=_PROBE_TIMEOUT_MS,
        )
        try:
            stream = self._open_probe(request, FixedPlanner(self._fleet, route))
            num_tokens = sum([len(chunk.token_ids) async for chunk in stream])
        except BatonError as error:
            log.warning("%s is not proven: %s", _name(route), error.message)
            return False
        report = stream.report
        num_bytes = sum(stats.num_bytes for stats in report.transfers)
        expected = PrefillPath.REMOTE if route.is_remote else PrefillPath.LOCAL
        if num_tokens != 2 or report.path is not expected or (route.is_remote and not num_bytes):
            log.warning("%s is not proven: the request took another path", _name(route))
            return False
        how = f", {num_bytes} bytes over {report.transfers[-1].transport}" if num_bytes else ""
        log.info("%s is proven%s", _name(route), how)
        self._proven.add(route.incarnations)
        return True


def _route(source: Worker, target: Worker) -> Route:
    incarnations = (source.info.incarnation, target.info.incarnation)
    return Route(source.worker_id, target.worker_id, incarnations)


def _name(route: Route) -> str:
    return f"route {route.source_id} → {route.target_id}" if route.is_remote else route.source_id
