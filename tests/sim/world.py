"""A virtual clock, nodes that crash and pause, and a network that delays and breaks: all from one
seed."""

import heapq
import itertools
import random
from collections.abc import Callable
from typing import Any, Protocol


class Died(Exception):
    """Raised in the middle of an event of a node that has just crashed."""


class Node:
    """Something that runs. A crash ends its life: whatever was scheduled for it is void."""

    def __init__(self, world: "World", name: str) -> None:
        self.world = world
        self.name = name
        self.life = 0
        self.is_alive = False
        self.paused_until = 0.0
        self.conns: dict[Conn, None] = {}

    def check(self) -> None:
        """Invariants that hold between any two events of this node."""


class World:
    """Runs events in order of time; events of a paused node wait, in order, until it goes on."""

    def __init__(self, seed: int, trace: Callable[[str], None] | None = None) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.num_events = 0
        self.max_delay = 2.0  # ms, one way
        self._trace = trace
        self._events: list[tuple[float, int, Node | None, int, Callable[..., None], Any]] = []
        self._seq = itertools.count()

    @property
    def now_ms(self) -> int:
        return int(self.now)

    def log(self, who: str, *what: object) -> None:
        if self._trace is not None:
            self._trace(f"{self.now:9.2f}  {who:4}  {' '.join(map(str, what))}")

    def after(self, ms: float, node: Node | None, call: Callable[..., None], *args: Any) -> None:
        life = node.life if node is not None else 0
        event = (self.now + ms, next(self._seq), node, life, call, args)
        heapq.heappush(self._events, event)

    def at(self, when: float, node: Node | None, call: Callable[..., None], *args: Any) -> None:
        life = node.life if node is not None else 0
        heapq.heappush(self._events, (when, next(self._seq), node, life, call, args))

    def delay(self) -> float:
        """One way over the network: mostly short, sometimes long."""
        random = self.rng.random
        scale = 1.0 if random() < 0.95 else 20.0
        return random() * self.max_delay * scale

    def run_one(self) -> bool:
        """Run the next event; False when there is none."""
        if not self._events:
            return False
        at, seq, node, life, call, args = heapq.heappop(self._events)
        self.now = max(self.now, at)
        if node is None:
            call(*args)
        elif node.life == life and node.is_alive:
            if node.paused_until > self.now:
                event = (node.paused_until, seq, node, life, call, args)
                heapq.heappush(self._events, event)
                return True
            try:
                call(*args)
            except Died:
                assert not node.is_alive
            else:
                node.check()
        self.num_events += 1
        return True


class End(Protocol):
    """One end's view of a connection."""

    def received(self, message: Any) -> None: ...

    def closed(self, reason: str) -> None: ...


class Conn:
    """A stream like TCP: in order each way, or broken. The two ends are 0 (who connected) and 1.

    Different connections reorder against each other; one never does.
    """

    def __init__(self, world: World, nodes: tuple[Node, Node]) -> None:
        self.world = world
        self.nodes = nodes
        self.ends: list[End | None] = [None, None]
        self.is_open = [True, True]
        self._arrival = [0.0, 0.0]
        self._broken = False
        for node in nodes:
            node.conns[self] = None

    def send(self, side: int, message: Any) -> None:
        if self.is_open[side] and not self._broken:
            self._schedule(1 - side, self._deliver, 1 - side, message)

    def close(self, side: int, reason: str = "closed by the other end") -> None:
        """An orderly end: the other side hears of it after everything sent before."""
        if not self.is_open[side]:
            return
        self.is_open[side] = False
        self.nodes[side].conns.pop(self, None)
        if not self._broken:
            self._schedule(1 - side, self._close, 1 - side, reason)

    def cut(self, told: tuple[bool, bool] = (True, True)) -> None:
        """The network breaks it: what is under way is lost; who is told hears of it by and by."""
        self._broken = True
        for side in (0, 1):
            if told[side]:
                delay = self.world.delay()
                self.world.after(delay, self.nodes[side], self._close, side, "connection reset")

    def _schedule(self, side: int, call: Callable[..., None], *args: Any) -> None:
        at = max(self._arrival[side], self.world.now + self.world.delay())
        self._arrival[side] = at
        self.world.at(at, self.nodes[side], call, *args)

    def _deliver(self, side: int, message: Any) -> None:
        end = self.ends[side]
        if self.is_open[side] and not self._broken and end is not None:
            end.received(message)

    def _close(self, side: int, reason: str) -> None:
        if self.is_open[side]:
            self.is_open[side] = False
            self.nodes[side].conns.pop(self, None)
            end = self.ends[side]
            if end is not None:
                end.closed(reason)


def crash(node: Node) -> None:
    """The process is gone; its peers' kernels hear so, after what it had sent."""
    node.life += 1
    node.is_alive = False
    node.paused_until = 0.0
    conns, node.conns = list(node.conns), {}
    for conn in conns:
        side = 0 if conn.nodes[0] is node else 1
        if conn.is_open[side]:
            conn.is_open[side] = False
            conn._schedule(1 - side, conn._close, 1 - side, "connection reset")
