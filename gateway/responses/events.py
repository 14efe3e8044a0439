"""A response as it grows: what the model says → items, and the events that tell of them."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from baton.gateway.generation import Usage

Event = dict[str, Any]
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
TERMINAL = frozenset({"completed", "incomplete", "failed", "cancelled"})


class ResponseWriter:
    """One response. Fed the fields of `ChoiceMessage.push` in order; every method gives the events
    that it makes.

    Items open and close one after the other, at most one is open.
    """

    def __init__(self, response_id: str, echoed: Mapping[str, Any], *, store: bool) -> None:
        """`echoed`: the fields that repeat the request."""
        self.response: dict[str, Any] = {
            "id": response_id,
            "object": "response",
            "created_at": int(time.time()),  # for people; nothing is measured with it
            "completed_at": None,
            "status": "queued",
            "error": None,
            "incomplete_details": None,
            **echoed,
            "store": store,
            "output": [],
            "usage": None,
        }
        self._hex = response_id.rpartition("_")[2]
        self._num_events = 0
        self._open: dict[str, Any] | None = None

    @property
    def _output(self) -> list[dict[str, Any]]:
        return self.response["output"]  # type: ignore[no-any-return]

    def _event(self, kind: str, **fields: Any) -> Event:
        self._num_events += 1
        return {"type": f"response.{kind}", "sequence_number": self._num_events - 1, **fields}

    def _whole(self, kind: str) -> Event:
        """An event with the response as it is now."""
        return self._event(kind, response={**self.response, "output": list(self._output)})

    # ── before the first token ───────────────────────────────────────────────────────────────────

    def queued(self) -> list[Event]:
        """Of a response in the background."""
        return [self._whole("created"), self._whole("queued")]

    def started(self) -> list[Event]:
        created = [] if self._num_events else ["created"]
        self.response["status"] = "in_progress"
        return [self._whole(kind) for kind in (*created, "in_progress")]

    # ── what the model says ──────────────────────────────────────────────────────────────────────

    def push(self, fields: Mapping[str, Any], logprobs: Sequence[Any] = ()) -> list[Event]:
        """`logprobs`: of content, one entry for each token."""
        if "content" in fields:
            return self._grow("message", fields["content"], logprobs)
        if "reasoning" in fields:
            return self._grow("reasoning", fields["reasoning"], ())
        (call,) = fields["tool_calls"]
        function = call["function"]
        if "id" not in call:
            return self._add_arguments(function["arguments"])
        item = {"call_id": call["id"], "name": function["name"], "arguments": ""}
        return [*self._close(), *self._open_item("function_call", item)]

    def _grow(self, kind: str, text: str, logprobs: Sequence[Any]) -> list[Event]:
        events: list[Event] = []
        if self._open is None or self._open["type"] != kind:
            events = [*self._close(), *self._open_text(kind)]
        item = self._item()
        part = item["content"][0]
        part["text"] += text
        where = {"item_id": item["id"], "output_index": self._index, "content_index": 0}
        if kind == "reasoning":
            return [*events, self._event("reasoning_text.delta", **where, delta=text)]
        part["logprobs"] += logprobs
        delta = self._event("output_text.delta", **where, delta=text, logprobs=list(logprobs))
        return [*events, delta]

    def _open_text(self, kind: str) -> list[Event]:
        if kind == "reasoning":
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            events = self._open_item(kind, {"summary": [], "content": []})
        else:
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            events = self._open_item(kind, {"role": "assistant", "content": []})
        item = self._item()
        item["content"] = [part]
        where = {"item_id": item["id"], "output_index": self._index, "content_index": 0}
        return [*events, self._event("content_part.added", **where, part=_copy(part))]

    def _open_item(self, kind: str, fields: dict[str, Any]) -> list[Event]:
        item_id = f"{_PREFIXES[kind]}_{self._hex}{len(self._output)}"
        self._open = {"id": item_id, "type": kind, "status": "in_progress", **fields}
        self._output.append(self._open)
        added = {**self._open}
        return [self._event("output_item.added", output_index=self._index, item=added)]

    def _add_arguments(self, text: str) -> list[Event]:
        item = self._item()
        item["arguments"] += text
        where = {"item_id": item["id"], "output_index": self._index}
        return [self._event("function_call_arguments.delta", **where, delta=text)]

    def _item(self) -> dict[str, Any]:
        assert self._open is not None, "an item is open"
        return self._open

    @property
    def _index(self) -> int:
        return len(self._output) - 1

    def _close(self, status: str = "completed") -> list[Event]:
        """Whatever is open."""
        item = self._open
        if item is None:
            return []
        self._open = None
        item["status"] = status
        where = {"item_id": item["id"], "output_index": self._index}
        match item["type"]:
            case "function_call":
                said = {"name": item["name"], "arguments": item["arguments"]}
                done = [self._event("function_call_arguments.done", **where, **said)]
            case kind:
                (part,) = item["content"]
                where["content_index"] = 0
                name = "reasoning_text" if kind == "reasoning" else "output_text"
                said = {key: part[key] for key in ("text", "logprobs") if key in part}
                done = [
                    self._event(f"{name}.done", **where, **said),
                    self._event("content_part.done", **where, part=part),
                ]
        return [*done, self._event("output_item.done", output_index=self._index, item=item)]

    # ── the end ──────────────────────────────────────────────────────────────────────────────────

    def ended(self, usage: Usage, num_reasoning_tokens: int, *, cut: bool) -> list[Event]:
        """The model is done; `cut` by max_output_tokens. The last event has the response itself."""
        status = "incomplete" if cut else "completed"
        events = [] if self._output else self._open_text("message")
        events += self._close(status)
        self._set_usage(usage, num_reasoning_tokens)
        if cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        return [*events, self._end(status, status)]

    def failed(self, code: str, message: str) -> list[Event]:
        self.response["error"] = {"code": code, "message": message}
        return [*self._close("incomplete"), self._end("failed", "failed")]

    def cancelled(self, usage: Usage, num_reasoning_tokens: int) -> list[Event]:
        """No event is called that: the stream ends with `response.incomplete`."""
        self._set_usage(usage, num_reasoning_tokens)
        return [*self._close("incomplete"), self._end("cancelled", "incomplete")]

    def _end(self, status: str, kind: str) -> Event:
        self.response["status"] = status
        if status == "completed":
            self.response["completed_at"] = int(time.time())
        return self._event(kind, response=self.response)

    def _set_usage(self, usage: Usage, num_reasoning_tokens: int) -> None:
        self.response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": num_reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }


def _copy(part: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, list) else value for key, value in part.items()}


def is_last(event: Mapping[str, Any]) -> bool:
    """Nothing follows it in a stream."""
    return event["type"] in ("response.completed", "response.incomplete", "response.failed")
