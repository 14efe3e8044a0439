"""A prompt of one chunk is fetched while that chunk is computed."""

import asyncio
import threading
from functools import partial
from typing import Any

import pytest

from baton.engine.batch import Batch, OnLayers
from baton.messages import Bound, Imported, Release
from baton.types import SamplingParams
from baton.worker import worker as worker_module
from baton.worker.layer_marks import LayerMarks
from tests.worker import gate
from tests.worker.fleet import Client
from tests.worker.gate import SEEDED, Oracle, Runners, pair, prompt

runners, oracle = gate.runners, gate.oracle


@pytest.mark.parametrize("block_sizes", gate.BLOCK_SIZES, ids=str)
async def test_layers_arrive_before_their_step_has_ended(
    runners: Runners,
    oracle: Oracle,
    block_sizes: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_module, "LayerMarks", partial(LayerMarks, min_bytes=1))
    runner = runners.p[block_sizes[0]]
    run, go_on, arrived = runner.run, threading.Event(), asyncio.Event()
    num_frames = 0

    def run_until_two_layers_are_done(batch: Batch, on_layers: OnLayers | None = None) -> Any:
        def tell(num_ready: int) -> None:
            assert on_layers is not None
            on_layers(num_ready)
            if num_ready == 2:
                assert go_on.wait(20)

        return run(batch, None if on_layers is None else tell)

    def count(_: object) -> None:
        nonlocal num_frames
        num_frames += 1
        arrived.set()

    client = Client()
    async with pair(runners, block_sizes) as (p, d):
        monkeypatch.setattr(runner, "run", run_until_two_layers_are_done)
        monkeypatch.setattr(d.worker.runtime, "fetch_progress", count)
        request = client.request(prompt(30, 1), SamplingParams(**SEEDED))
        answer = client.answer(request)
        p_leg = await client.prefill(p, answer)  # while the step hangs
        d_leg = client.bind(p, d, answer)
        await d.expect(d_leg, Bound)
        async with asyncio.timeout(20):
            await arrived.wait()
        before = num_frames
        go_on.set()
        answer.stats = (await d.expect(d_leg, Imported)).stats
        assert num_frames > before, "the last layer, and the end"
        await client.first_tokens(p, p_leg, answer)
        await client.tokens(d, d_leg, answer)
        assert answer.token_ids == oracle(request)[0]
        p.send(Release(p_leg))
