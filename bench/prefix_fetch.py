"""The next turn of a chat, with what the decode worker holds of it fetched by hash, and computed.

python -m bench.prefix_fetch --turns 5 --history 700

One fleet of real processes, two gateways on it: one lets prefill workers fetch (`--prefix-fetch
always`), the other does not. The first turn's answer is long, so that the decode worker holds far
more of the chat than the prefill worker; what is timed is the first token of the second turn. Each
chat is new; the gateways take turns.
"""

import argparse
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from baton.config import ServeConfig
from baton.redis_server import redis_command, redis_url

NUM_FIRST, NUM_NEXT = 32, 32  # prompt tokens of the first turn; those that the second adds
START_S = 120.0
LOCALITY_S = 1.0  # for what the decode worker publishes to reach the gateways
MODES = ("off", "always")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(command: list[str], env: dict[str, str]) -> Iterator[None]:
    running = subprocess.Popen(
        command, env=os.environ | env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        running.terminate()
        running.wait(60)


@contextmanager
def fleet(transport: str) -> Iterator[dict[str, httpx.Client]]:
    """A client per mode."""
    with tempfile.TemporaryDirectory(prefix="bt-") as folder, ExitStack() as stack:
        directory = Path(folder)
        env = {
            "BATON_MODEL": str(ServeConfig().model_source),
            "BATON_REDIS_URL": redis_url(directory),
            "BATON_TRANSPORTS": transport,
            "BATON_LOCAL_PREFILL": "fallback",
            "BATON_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        stack.enter_context(process(redis_command(directory), {}))
        for name in ("prefill-worker", "decode-worker"):
            stack.enter_context(process([sys.executable, "-m", "baton.cli", name], env))
        clients = {}
        for mode in MODES:
            port = free_port()
            options = {**env, "BATON_PREFIX_FETCH": mode, "BATON_PORT": str(port)}
            stack.enter_context(process([sys.executable, "-m", "baton.cli", "gateway"], options))
            clients[mode] = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120.0)
        for client in clients.values():
            wait_ready(client)
        yield clients


def wait_ready(client: httpx.Client) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit("the fleet does not get ready")


def complete(client: httpx.Client, prompt: list[int], max_tokens: int) -> tuple[list[int], int]:
    """(output ids, prompt tokens that nobody computed)."""
    body = {
        "model": client.get("/v1/models").json()["data"][0]["id"],
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer: dict[str, Any] = client.post("/v1/completions", json=body).raise_for_status().json()
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return answer["choices"][0]["token_ids"], int(cached)


def second_turn(client: httpx.Client, rng: random.Random, history: int) -> tuple[float, int, int]:
    """(ms to an answer of one token, prompt tokens computed, prompt tokens)."""
    prompt = [rng.randrange(20, 1900) for _ in range(NUM_FIRST)]
    output, _ = complete(client, prompt, history)
    time.sleep(LOCALITY_S)
    chat = [*prompt, *output, *(rng.randrange(20, 1900) for _ in range(NUM_NEXT))]
    started = time.monotonic()
    _, cached = complete(client, chat, 1)
    return (time.monotonic() - started) * 1e3, len(chat) - cached, len(chat)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=5, help="chats per mode")
    parser.add_argument("--history", type=int, default=700, help="tokens of the first answer")
    parser.add_argument("--transport", default="grpc")
    args = parser.parse_args()
    rng = random.Random(1)
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    computed: dict[str, int] = {}
    with fleet(args.transport) as clients:
        for turn in range(args.turns + 1):
            for mode, client in clients.items():
                ms, num_computed, num_tokens = second_turn(client, rng, args.history)
                if turn:  # the first pays for warm-up
                    times[mode].append(ms)
                    computed[mode] = num_computed
    print(f"second turn of {num_tokens} tokens over {args.transport}, {args.turns} chats each")
    for mode in MODES:
        best, middle = min(times[mode]), statistics.median(times[mode])
        print(
            f"{mode:7} computed {computed[mode]:5} tokens  {best:8.1f} ms best {middle:8.1f} median"
        )
    ratio = statistics.median(times["off"]) / statistics.median(times["always"])
    print(f"computing takes {ratio:.1f} times as long")


if __name__ == "__main__":
    main()
