"""The two files of a batch: requests in, answers out; OpenAI's batch format, a JSON object a line.

What is done is in the output alone. A line that was cut off, or that tells of a failure that may
pass, counts as not done; `open_output` drops it.
"""

import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

URLS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/score",
    "/v1/score",
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
)


# What the same request would get again; any other failure may pass, and a rerun tries again.
_FINAL = frozenset({200, 400, 413, 415, 422})


class BatchFileError(Exception):
    """A file cannot be used; the message names file and line."""


@dataclass(frozen=True, slots=True)
class BatchRequest:
    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BatchLine:
    """Where a request is in the input, so that a large file need not be in memory."""

    custom_id: str
    offset: int  # bytes
    number: int  # from 1


def scan(path: Path) -> list[BatchLine]:
    """Every request of the input, checked.

    Raises:
        BatchFileError: nothing of it should be sent.
    """
    lines: list[BatchLine] = []
    seen: dict[str, int] = {}
    with _opened(path) as file:
        offset = 0
        for number, raw in enumerate(file, 1):
            if raw.strip():
                request = parse(raw, f"{path}, line {number}")
                if request.custom_id in seen:
                    raise BatchFileError(
                        f"{path}, line {number}: custom_id {request.custom_id!r} is that of line "
                        f"{seen[request.custom_id]} too"
                    )
                seen[request.custom_id] = number
                lines.append(BatchLine(request.custom_id, offset, number))
            offset += len(raw)
    if not lines:
        raise BatchFileError(f"{path} has no request")
    return lines


def read(path: Path, lines: Collection[BatchLine]) -> Iterator[BatchRequest]:
    with _opened(path) as file:
        for line in lines:
            file.seek(line.offset)
            yield parse(file.readline(), f"{path}, line {line.number}")


def parse(raw: bytes, where: str) -> BatchRequest:
    """
    Raises:
        BatchFileError
    """

    def check(ok: bool, rule: str) -> None:
        if not ok:
            raise BatchFileError(f"{where}: {rule}")

    try:
        line = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BatchFileError(f"{where}: no JSON ({error})") from None
    check(isinstance(line, dict), "no JSON object")
    custom_id, url, body = line.get("custom_id"), line.get("url"), line.get("body")
    check(isinstance(custom_id, str) and bool(custom_id), "custom_id must be a text")
    check(line.get("method", "POST") == "POST", "method must be POST")
    check(url in URLS, f"url must be one of {', '.join(URLS)}")
    check(isinstance(body, dict), "body must be an object")
    check(not body.get("stream"), "body.stream: an answer in a batch cannot be a stream")
    return BatchRequest(custom_id, url, body)


def open_output(path: Path) -> tuple[BinaryIO, dict[str, int]]:
    """The output to append to, and the custom_ids whose answers it has, with their statuses.

    Raises:
        BatchFileError: it exists and is no output of a batch.
    """
    done: dict[str, int] = {}
    if not path.exists():
        return _opened(path, "ab"), done
    kept = path.with_name(path.name + ".tmp")
    with _opened(path) as old, _opened(kept, "wb") as new:
        for number, raw in enumerate(old, 1):
            answered = _answered(raw, f"{path}, line {number}")
            if answered is not None and answered[0] not in done:
                done.update([answered])
                new.write(raw)
        new.flush()
        os.fsync(new.fileno())
    os.replace(kept, path)
    return _opened(path, "ab"), done


def _answered(raw: bytes, where: str) -> tuple[str, int] | None:
    """(custom_id, status) of a line that needs no other try."""
    if not raw.endswith(b"\n"):
        return None  # cut off
    try:
        line = json.loads(raw)
        custom_id, response = line["custom_id"], line["response"]
        status = 0 if response is None else int(response["status_code"])
    except (ValueError, LookupError, TypeError):
        raise BatchFileError(f"{where}: no answer of a batch; is this the right file?") from None
    return (str(custom_id), status) if status in _FINAL else None


def _opened(path: Path, mode: str = "rb") -> Any:
    try:
        return path.open(mode)
    except OSError as error:
        raise BatchFileError(f"{path}: {error.strerror}") from None
