"""Workers in this process, over the local transport, and a client that plays the gateway."""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from baton.engine.core import EngineCore
from baton.engine.events import LegPreempted, StepOutput
from baton.engine.runner import ModelRunner
from baton.errors import Cause
from baton.grants import GrantKeys
from baton.kvtransfer.base import Transport
from baton.kvtransfer.local import LocalNetwork, LocalTransport
from baton.kvtransfer.memory import KVMemory
from baton.messages import (
    Admitted,
    Bind,
    Bound,
    ComputeLocally,
    GatewayMessage,
    Hello,
    Imported,
    LegMessage,
    Progress,
    Queued,
    Release,
    Submit,
    WorkerMessage,
)
from baton.types import (
    KVTicket,
    LegId,
    Logprobs,
    Request,
    Role,
    TokenChunk,
    TransferStats,
    WorkerInfo,
    WorkerSnapshot,
)
from baton.worker.data_plane import DataPlane
from baton.worker.effects import SessionId
from baton.worker.policy import WorkerPolicy
from baton.worker.worker import Worker
from tests.engine.tiny_models import make_core

PATIENCE_S = 30.0
GRANT_KEYS = GrantKeys("test", ())
T = TypeVar("T", bound=LegMessage)


class Recorder:
    """An observer that counts."""

    def __init__(self) -> None:
        self.num_preempted = 0
        self.num_prefill_tokens = 0

    def stepped(self, output: StepOutput) -> None:
        if output.timing is not None:
            self.num_prefill_tokens += output.timing.num_prefill_tokens
        self.num_preempted += sum(isinstance(event, LegPreempted) for event in output.events)

    def received(self, message: GatewayMessage) -> None:
        pass

    def sent(self, message: WorkerMessage) -> None:
        pass


class Port:
    """The worker's end of a session with a `Client`."""

    def __init__(self) -> None:
        self.inbox: dict[LegId, asyncio.Queue[LegMessage]] = defaultdict(asyncio.Queue)
        self.snapshot: WorkerSnapshot | None = None
        self.closed: tuple[Cause, str] | None = None

    def send(self, message: WorkerMessage) -> None:
        if isinstance(message, Hello):
            return
        self.snapshot = message.snapshot
        for item in message.messages:
            self.inbox[item.leg].put_nowait(item)

    def close(self, cause: Cause, detail: str) -> None:
        self.closed = (cause, detail)


class LocalWorker:
    """One worker with its session to the client."""

    def __init__(self, name: str, worker: Worker, recorder: Recorder) -> None:
        self.name = name
        self.worker = worker
        self.recorder = recorder
        self.is_open = True
        self.port = Port()
        self.session: SessionId = worker.runtime.session_opened(self.port)

    @property
    def core(self) -> EngineCore:
        return self.worker.core

    def send(self, message: GatewayMessage) -> None:
        self.worker.runtime.receive(self.session, message)

    async def receive(self, leg: LegId) -> LegMessage:
        async with asyncio.timeout(PATIENCE_S):
            return await self.port.inbox[leg].get()

    async def expect(self, leg: LegId, kind: type[T]) -> T:
        """The next message of this kind; progress before it is skipped, failures are not."""
        while True:
            message = await self.receive(leg)
            if isinstance(message, kind):
                return message
            assert isinstance(message, Queued | Progress | Admitted | Bound), message

    def lose_session(self) -> None:
        self.worker.runtime.session_lost(self.session)
        self.port = Port()
        self.session = self.worker.runtime.session_opened(self.port)

    async def close(self) -> None:
        self.is_open = False
        await self.worker.close()

    async def assert_clean(self) -> None:
        """Nothing is held once everything is over."""
        self.lose_session()
        async with asyncio.timeout(PATIENCE_S):
            while not (self.worker.is_idle and self._is_whole()):
                assert not self.worker.runtime.failed.done(), self.worker.runtime.failed.result()
                await asyncio.sleep(0.01)
        self.worker.runtime.machine.check_integrity()

    def _is_whole(self) -> bool:
        pool = self.core.pool
        return pool.num_free == self.core.config.num_blocks and pool.num_quarantined == 0


async def start_worker(
    network: LocalNetwork,
    name: str,
    runner: ModelRunner,
    policy: WorkerPolicy | None = None,
    transport: Transport | None = None,
    **engine_options: object,
) -> LocalWorker:
    core = make_core(runner, **engine_options)
    layout = runner.kv_cache.layout
    transport = transport or LocalTransport(network, name)
    plane = DataPlane(KVMemory(runner.kv_cache.tensor, layout), [transport])
    info = WorkerInfo(
        worker_id=name,
        incarnation=name.encode().ljust(16)[:16],
        role=Role.BOTH,
        model="tiny",
        fingerprint=runner.info.fingerprint,
        layout=layout,
        address=name,
        transports=await plane.start(),
        host_id="here",
        pid=1,
        device=runner.info.device,
        num_blocks=core.config.num_blocks,
        max_model_len=core.config.max_model_len,
        max_num_seqs=core.config.max_num_seqs,
        vocab_size=core.config.vocab_size,
        eos_token_ids=core.config.eos_token_ids,
    )
    recorder = Recorder()
    # The client's heart does not beat.
    policy = replace(policy or WorkerPolicy(), session_timeout_ms=10**9)
    worker = Worker(info, policy, core, plane, GRANT_KEYS, (recorder,), grammars=runner.grammars)
    worker.start()
    return LocalWorker(name, worker, recorder)


@dataclass(slots=True)
class Answer:
    """What the client has of one request."""

    request: Request
    token_ids: dict[int, list[int]]
    logprobs: dict[int, list[Logprobs]]
    finished: set[int] = field(default_factory=set)
    num_cached_on_p: int = 0
    num_cached_on_d: int = 0
    stats: TransferStats | None = None
    ticket: KVTicket | None = None

    @property
    def is_complete(self) -> bool:
        return len(self.finished) == self.request.sampling.n

    def commit(self, chunk: TokenChunk) -> None:
        """In order; what is there already must be the same."""
        tokens = self.token_ids[chunk.choice]
        known = tokens[chunk.start : chunk.start + len(chunk.token_ids)]
        assert list(chunk.token_ids[: len(known)]) == known, "another token at a committed index"
        assert chunk.start <= len(tokens), "a gap"
        num_new = chunk.start + len(chunk.token_ids) - len(tokens)
        if num_new > 0:
            tokens += chunk.token_ids[-num_new:]
            self.logprobs[chunk.choice] += chunk.logprobs[-num_new:]
        if chunk.finish_reason is not None:
            self.finished.add(chunk.choice)

    def resumed(self) -> Request:
        """The request with what is committed."""
        outputs = tuple(tuple(self.token_ids[c]) for c in range(self.request.sampling.n))
        return replace(
            self.request,
            output_token_ids=outputs if any(outputs) else (),
            finished_choices=frozenset(self.finished),
        )


class Client:
    """Plays the gateway for one request after the other."""

    def __init__(self) -> None:
        self._num_requests = 0
        self._num_attempts = 0

    def request(self, prompt: Sequence[int], sampling: object) -> Request:
        self._num_requests += 1
        return Request(f"r{self._num_requests}", tuple(prompt), sampling)  # type: ignore[arg-type]

    def leg(self, request: Request) -> LegId:
        self._num_attempts += 1
        return LegId(request.request_id, self._num_attempts)

    def answer(self, request: Request) -> Answer:
        choices = range(request.sampling.n)
        return Answer(request, {c: [] for c in choices}, {c: [] for c in choices})

    async def prefill(self, p: LocalWorker, answer: Answer) -> LegId:
        """Submit; on return the ticket is here. First tokens may come later."""
        leg = self.leg(answer.request)
        p.send(Submit(leg, answer.resumed()))
        admitted = await p.expect(leg, Admitted)
        answer.num_cached_on_p = admitted.num_cached_tokens
        answer.ticket = admitted.ticket
        return leg

    async def first_tokens(self, p: LocalWorker, leg: LegId, answer: Answer) -> None:
        for _ in tuple(answer.resumed().open_choices()):
            answer.commit(await p.expect(leg, TokenChunk))

    def bind(self, p: LocalWorker, d: LocalWorker, answer: Answer) -> LegId:
        leg = self.leg(answer.request)
        assert answer.ticket is not None
        info = p.worker.info
        d.send(Bind(leg, answer.resumed(), answer.ticket, info.transports, info.host_id))
        return leg

    async def imported(self, d: LocalWorker, leg: LegId, answer: Answer) -> None:
        answer.num_cached_on_d = (await d.expect(leg, Bound)).num_cached_tokens
        answer.stats = (await d.expect(leg, Imported)).stats

    async def tokens(
        self, d: LocalWorker, leg: LegId, answer: Answer, at_least: int | None = None
    ) -> None:
        """Until every choice is finished, or has `at_least` tokens."""
        while not answer.is_complete:
            answer.commit(await d.expect(leg, TokenChunk))
            if at_least is not None and min(map(len, answer.token_ids.values())) >= at_least:
                return

    async def disaggregated(self, p: LocalWorker, d: LocalWorker, request: Request) -> Answer:
        """The whole way: prefill on P, decode on D (bound at once), release."""
        answer = self.answer(request)
        p_leg = await self.prefill(p, answer)
        d_leg = self.bind(p, d, answer)
        await self.imported(d, d_leg, answer)
        await self.first_tokens(p, p_leg, answer)
        await self.tokens(d, d_leg, answer)
        p.send(Release(p_leg))
        return answer

    async def local(self, w: LocalWorker, request: Request) -> Answer:
        answer = self.answer(request)
        leg = self.leg(request)
        w.send(ComputeLocally(leg, request))
        answer.num_cached_on_p = (await w.expect(leg, Admitted)).num_cached_tokens
        await self.tokens(w, leg, answer)
        return answer
