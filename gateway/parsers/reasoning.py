"""Where a model's reasoning ends and its answer begins: `--reasoning-parser`."""

from collections.abc import Callable, Mapping

from baton.gateway.parsers.pieces import Piece, Reasoning, content, held_back

_START, _END = "<think>", "</think>"


class ThinkParser:
    """<think>…</think>, then the answer.

    The start tag is often part of the prompt, and then not of the output. Without an end tag, all
    of it is reasoning.
    """

    def __init__(self, *, inside: bool) -> None:
        """`inside`: the output begins with reasoning, whether or not it says so."""
        self._expects_start = True
        self._inside = inside
        self._held = ""

    @property
    def is_reasoning(self) -> bool:
        return self._inside

    def push(self, text: str) -> list[Piece]:
        if not self._expects_start and not self._inside:
            return content(text)
        self._held += text
        if self._expects_start:
            begun = self._held.lstrip()
            if not begun or (begun != _START and _START.startswith(begun)):
                return []
            self._expects_start = False
            if begun.startswith(_START):
                self._held, self._inside = begun[len(_START) :], True
        return self._read()

    def _read(self) -> list[Piece]:
        held, self._held = self._held, ""
        if not self._inside:
            return content(held)
        thought, end, rest = held.partition(_END)
        if end:
            self._inside = False
            return [*_reasoning(thought), *content(rest)]
        keep = held_back(held, _END)
        self._held = held[len(held) - keep :]
        return _reasoning(held[: len(held) - keep])

    def finish(self) -> list[Piece]:
        held, self._held = self._held, ""
        return _reasoning(held) if self._inside else content(held)


def _reasoning(text: str) -> list[Piece]:
    return [Reasoning(text)] if text else []


def _deepseek_r1(prompt: str) -> ThinkParser:
    return ThinkParser(inside=not prompt.rstrip().endswith(_END))


def _qwen3(prompt: str) -> ThinkParser:
    return ThinkParser(inside=prompt.rstrip().endswith(_START))


# By name: the end of the prompt says whether the template has opened, or closed, the reasoning.
REASONING_PARSERS: Mapping[str, Callable[[str], ThinkParser]] = {
    "deepseek_r1": _deepseek_r1,
    "qwen3": _qwen3,
}
