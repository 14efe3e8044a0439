"""When each request wants to be woken."""

import heapq

_SLACK = 64  # outdated entries that are not worth a clean-up


class Timers:
    """One time per request. A heap with outdated entries, which never outnumber the others by much:
    a stream sets its timer with every token."""

    def __init__(self) -> None:
        self._at_ms: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._at_ms)

    @property
    def num_entries(self) -> int:
        """Of the heap, outdated ones too."""
        return len(self._heap)

    def set(self, request_id: str, at_ms: float) -> None:
        """Instead of the time it had; infinity for none."""
        if self._at_ms.get(request_id) == at_ms:
            return
        if at_ms == float("inf"):
            self._at_ms.pop(request_id, None)
        else:
            self._at_ms[request_id] = at_ms
            heapq.heappush(self._heap, (at_ms, request_id))
        if len(self._heap) > 2 * len(self._at_ms) + _SLACK:
            self._heap = [(at_ms, request_id) for request_id, at_ms in self._at_ms.items()]
            heapq.heapify(self._heap)

    @property
    def next_ms(self) -> float:
        """The earliest time; infinity when there is none."""
        while self._heap:
            at_ms, request_id = self._heap[0]
            if self._at_ms.get(request_id) == at_ms:
                return at_ms
            heapq.heappop(self._heap)
        return float("inf")

    def pop_due(self, now_ms: float) -> list[str]:
        """Requests whose time has come; they have none from now on."""
        due = []
        while self.next_ms <= now_ms:
            _, request_id = heapq.heappop(self._heap)
            del self._at_ms[request_id]
            due.append(request_id)
        return due
