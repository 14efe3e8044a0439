"""`baton run-batch`: a file of requests for a fleet, its answers written as they come."""

import asyncio
import json
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from baton.client.api import ApiClient, ApiError
from baton.client.batch_file import BatchFileError, BatchRequest, open_output, read, scan
from baton.errors import BatonError


class _Stopped(Exception):
    """What is left would fail alike: no connection for longer than patience lasts, a full disk."""


class BatchRun:
    """Sends requests, `max_inflight` at a time. Each answer is on disk before the next is read."""

    def __init__(
        self, client: ApiClient, output: BinaryIO, model: str | None, patience_s: float
    ) -> None:
        """`model`: of requests that name none."""
        self._client = client
        self._output = output
        self._model = model
        self._patience_s = patience_s
        self.outcomes: Counter[str] = Counter()  # "ok", or the kind of failure

    async def run(
        self, requests: Iterator[BatchRequest], max_inflight: int, bar: "tqdm[Any]"
    ) -> None:
        """
        Raises:
            _Stopped, BatchFileError
        """

        async def work() -> None:
            for request in requests:  # shared: each takes the next
                await self._one(request)
                bar.update()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(max_inflight):
                    group.create_task(work())
        except* (_Stopped, BatchFileError) as stopped:
            raise stopped.exceptions[0] from None

    async def _one(self, request: BatchRequest) -> None:
        body = request.body
        if self._model is not None:
            body = {"model": self._model, **body}
        try:
            answer = await self._client.post_patiently(request.url, body, self._patience_s)
        except ApiError as error:
            if error.status is None:
                raise _Stopped(error.message) from error
            self.outcomes[error.kind] += 1
            refusal = error.body or {"error": {"message": error.message}}
            self._write(request.custom_id, error.status, refusal)
        else:
            self.outcomes["ok"] += 1
            self._write(request.custom_id, 200, answer)

    def _write(self, custom_id: str, status: int, body: Any) -> None:
        line = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": custom_id,
            "response": {
                "status_code": status,
                "request_id": body.get("id") if isinstance(body, dict) else None,
                "body": body,
            },
            "error": None,
        }
        try:
            self._output.write(json.dumps(line).encode() + b"\n")
            self._output.flush()
        except OSError as error:
            raise _Stopped(f"{self._output.name}: {error.strerror}") from error


def run_batch(
    server: str | AbstractContextManager[str],
    input_file: Path,
    output_file: Path,
    *,
    max_inflight: int,
    api_key: str | None = None,
    model: str | None = None,
    patience_s: float = 60.0,
    use_tqdm: bool = True,
) -> int:
    """Answer what the output does not have yet; the exit status: 0 = every request was served, 1 =
    some were refused or the server is gone, 2 = bad input, 130 = interrupted.

    Run it again to go on: nothing that was answered is asked again.

    Args:
        server: URL of a fleet, or what gives it, and is entered once the input is checked.
    """
    try:
        lines = scan(input_file)
        output, done = open_output(output_file)
    except (BatchFileError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    left = [line for line in lines if line.custom_id not in done]
    before = Counter(done[line.custom_id] for line in lines if line.custom_id in done)
    num_done = before.total()
    outcomes: Counter[str] = Counter()
    if not left:
        output.close()
        return _report(outcomes, before, 0, None, output_file)
    problem = None
    try:
        with output, nullcontext(server) if isinstance(server, str) else server as url:
            client = ApiClient(url, api_key=api_key)
            run = BatchRun(client, output, model, patience_s)
            outcomes = run.outcomes
            requests = read(input_file, left)
            with tqdm(total=len(lines), initial=num_done, unit="req", disable=not use_tqdm) as bar:
                asyncio.run(_run(run, client, requests, max_inflight, bar))
    except (_Stopped, BatchFileError, ApiError) as error:
        problem = str(error)
    except BatonError as error:
        problem = error.message
    except KeyboardInterrupt:
        problem = "interrupted"
    return _report(outcomes, before, len(left), problem, output_file)


async def _run(
    run: BatchRun,
    client: ApiClient,
    requests: Iterator[BatchRequest],
    max_inflight: int,
    bar: "tqdm[Any]",
) -> None:
    async with client:
        await client.models()  # nobody there, or the wrong key: before anything is sent
        await run.run(requests, max_inflight, bar)


def _report(
    outcomes: Counter[str], before: Counter[int], num_left: int, problem: str | None, output: Path
) -> int:
    """`before`: statuses that the output had already."""
    refused = {kind: count for kind, count in outcomes.most_common() if kind != "ok"}
    num_refused_before = before.total() - before[200]
    parts = [f"{outcomes['ok']} answered"]
    parts += [f"{before.total()} were done before"] if before else []
    parts += [f"{num_refused_before} of them refused"] if num_refused_before else []
    parts += [f"{sum(refused.values())} refused"] if refused else []
    missing = num_left - outcomes.total()
    parts += [f"{missing} left"] if missing else []
    print(f"{', '.join(parts)}: {output}", file=sys.stderr)
    for kind, count in refused.items():
        print(f"  {count} × {kind}", file=sys.stderr)
    if problem is not None:
        print(f"{problem}; the same command goes on where this ended", file=sys.stderr)
        return 130 if problem == "interrupted" else 1
    return 1 if refused or num_refused_before else 0
