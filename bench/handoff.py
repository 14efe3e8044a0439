"""What the hand-over costs, and what separation is worth.

    python -m bench.handoff [--only hand-overs|streams] [--seconds 100] [--lengths 1,512,2000]

Real processes on this host: gateway, workers of one thread each, Redis (`bench.small_fleet`).

Hand-overs: the bench plays the gateway on the wire. Of each prompt: from "prefill has the first
token" to "decode has the second", minus the decode step that computes it (as D's engine times it),
over the bare move, which is the fetch alone when all of the KV is there (pack, checksum, move,
verify, unpack, between the same processes). D is bound *early*, when P admits the prompt, then a
second time, *late*, when everything is there; *routed* is the gateway's own choice, as a client
sees it over HTTP, minus the median of its later gaps. The prompt of one token shows what a call
costs that has next to nothing to move.

Streams: long prompts arrive into running streams, at one prefill and one decode worker (apart), and
at two workers that do both (together): as many cores. TTFT is of the long prompts, ITL and TPOT of
the streams that they run into. Mixes with two long prompts at a time, and with none, are where
separation has to lose.

Milliseconds and *ratio* are medians. *best* is the same ratio of the shortest of each: what
there is to see on a machine that is busy with other things. Both parts stop when their time is up,
with as many repeats as there were; the whole takes about five minutes.
"""

import argparse
import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from statistics import median

import httpx

from bench.handoff_streams import Streams, quantile, routed_gaps, run_streams, warm_up
from bench.handoff_wire import HandOver, Prompt, WireGateway, hand_over
from bench.small_fleet import small_fleet

MIN_REPEATS = 2
NUM_ROUTED_OUTPUTS = 8
CALL_TOKENS = 256  # a hand-over takes about as long as so many tokens do, and its tokens
COLUMNS = "tokens,MiB,over,bound,repeats,prefill ms,step ms,bare ms,overhead ms,ratio,best"


async def measure_hand_overs(
    transports: Sequence[str], lengths: Sequence[int], seconds: float
) -> None:
    names = COLUMNS.split(",")
    print(f"\n| {' | '.join(names)} |\n|{'---|' * len(names)}", flush=True)
    async with small_fleet(1, 1, transports) as fleet:
        gateway = WireGateway(fleet.redis_url)
        try:
            await gateway.connect("prefill-0", "decode-0")
            async with httpx.AsyncClient(base_url=fleet.base_url, timeout=60) as client:
                weights = [length + CALL_TOKENS for length in lengths]
                now = time.perf_counter()
                for length, weight in zip(lengths, accumulate(weights), strict=True):
                    stop_at = now + seconds * weight / sum(weights)
                    await _measure_length(gateway, client, transports, length, stop_at)
        finally:
            await gateway.close()


async def _measure_length(
    gateway: WireGateway,
    client: httpx.AsyncClient,
    transports: Sequence[str],
    length: int,
    stop_at: float,
) -> None:
    """In turn, so that a busy machine hits all alike; at least MIN_REPEATS, then until the time is
    up."""
    for over in transports:
        await hand_over(gateway, length, over)  # connections, buffers
    made: dict[str, list[Prompt]] = defaultdict(list)
    routed: list[HandOver] = []
    while len(routed) < MIN_REPEATS or time.perf_counter() < stop_at:
        for over in transports:
            made[over].append(await hand_over(gateway, length, over))
        routed.append(HandOver(*await routed_gaps(client, length, NUM_ROUTED_OUTPUTS)))
    for over, prompts in made.items():
        print_row(length, over, "early", prompts, [prompt.early for prompt in prompts])
        print_row(length, over, "late", prompts, [prompt.late for prompt in prompts])
    print_row(length, transports[0], "routed", made[transports[0]], routed)


def print_row(
    length: int, over: str, bound: str, prompts: list[Prompt], made: list[HandOver]
) -> None:
    overhead, bare = median(x.between - x.step for x in made), median(x.bare for x in prompts)
    best = min(x.between - x.step for x in made)
    columns = [
        f"{length:5} | {prompts[0].num_bytes / 2**20:5.1f} | {over:4} | {bound:6}",
        f"{len(made):3}",
        f"{median(x.prefill for x in prompts):6.0f}",
        f"{median(x.step for x in made):6.1f}",
        f"{bare:6.1f}",
        f"{overhead:6.1f}",
        f"{overhead / bare:5.2f}",
        f"{best / min(x.bare for x in prompts):5.2f}",
    ]
    print(f"| {' | '.join(columns)} |", flush=True)


Mix = tuple[int, int]  # streams, long prompts at a time


async def measure_streams(
    transports: Sequence[str], seconds: float, mixes: Sequence[Mix], length: int
) -> None:
    got: dict[Mix, dict[str, Streams]] = {mix: {} for mix in mixes}
    for name, workers in (("apart", (1, 1)), ("together", (0, 2))):
        async with small_fleet(*workers, transports) as fleet:
            await warm_up(fleet.base_url, length)
            for mix in mixes:
                got[mix][name] = await run_streams(fleet.base_url, seconds, *mix, length)
    print("\n| streams | long prompts | ms | apart | together | ratio |")
    print(f"|{'---|' * 6}", flush=True)
    for mix, made in got.items():
        for metric in ("ttft", "tpot", "itl"):
            for share in (0.5, 0.99):
                print_quantile(mix, made, metric, share)


def print_quantile(mix: Mix, made: dict[str, Streams], metric: str, share: float) -> None:
    samples: list[list[float]] = [getattr(one, metric) for one in made.values()]
    if all(samples):
        apart, together = (quantile(values, share) for values in samples)
        label = (
            f"{metric.upper()} p{share * 100:.0f} (of {', '.join(str(len(x)) for x in samples)})"
        )
        columns = f"{mix[0]} | {mix[1]} | {label} | {apart:.1f} | {together:.1f}"
        print(f"| {columns} | {apart / together:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("hand-overs", "streams"))
    parser.add_argument("--seconds", type=float, default=100.0, help="for hand-overs")
    parser.add_argument("--lengths", default="1,512,2000", help="tokens of a prompt")
    parser.add_argument("--transports", default="shm,ucx,grpc")
    parser.add_argument("--stream-seconds", type=float, default=15.0, help="per mix")
    parser.add_argument("--mixes", default="4x1,4x2,8x0", help="streams x long prompts at a time")
    parser.add_argument("--long", type=int, default=1024, help="tokens of a long prompt")
    args = parser.parse_args()
    transports = args.transports.split(",")
    if args.only != "streams":
        lengths = [int(length) for length in args.lengths.split(",")]
        asyncio.run(measure_hand_overs(transports, lengths, args.seconds))
    if args.only != "hand-overs":
        mixes = [(int(n), int(k)) for n, _, k in (m.partition("x") for m in args.mixes.split(","))]
        asyncio.run(measure_streams(transports, args.stream_seconds, mixes, args.long))


if __name__ == "__main__":
    main()
