"""The exact gate with KV pools in CUDA memory: disaggregated equals aggregated on the same device.
`pytest -m gpu`, with TRITON_INTERPRET=0."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from baton.engine.commands import AddLocal
from baton.engine.events import LegFailed, LegTokens
from baton.engine.runner import ModelRunner
from baton.kvtransfer.local import LocalNetwork
from baton.types import LegId, Request, SamplingParams
from tests.engine.tiny_models import load_tiny_runner, make_core, random_prompts, save_tiny_model
from tests.worker.fleet import Client, start_worker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SAMPLINGS = {
    "greedy": {"temperature": 0.0, "seed": 0},
    "seeded": {"temperature": 1.0, "seed": 5},
    "four choices": {"temperature": 1.0, "seed": 5, "n": 4, "top_p": 0.9},
    "penalties": {"temperature": 1.0, "seed": 6, "frequency_penalty": 0.8, "n": 2},
}


@pytest.fixture(params=["qwen3", "mistral-window"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path, request.param)


@pytest.fixture
def runners(folder: Path) -> Iterator[list[ModelRunner]]:
    """Of P, D and the aggregated run; D's blocks are twice as long."""
    made = [
        load_tiny_runner(
            folder, device="cuda", dtype="float32", block_size=block_size, max_num_seqs=16
        )
        for block_size in (16, 32, 16)
    ]
    yield made
    for runner in made:
        runner.close()


def aggregated(runner: ModelRunner, request: Request) -> dict[int, list[int]]:
    core = make_core(runner, enable_prefix_caching=False, max_num_seqs=16)
    core.apply(AddLocal(LegId(request.request_id, 0), request))
    token_ids: dict[int, list[int]] = {choice: [] for choice in range(request.sampling.n)}
    while core.has_work:
        output = core.step()
        for event in output.events if output is not None else ():
            assert not isinstance(event, LegFailed), event
            if isinstance(event, LegTokens):
                token_ids[event.chunk.choice] += event.chunk.token_ids
    return token_ids


async def test_disaggregated_equals_aggregated(runners: list[ModelRunner]) -> None:
    """Chunks of 32 tokens, so that KV leaves while later chunks and layers are computed; some
    prompts share a prefix."""
    client, network = Client(), LocalNetwork()
    limits = {"max_num_batched_tokens": 32, "max_num_seqs": 16}
    p = await start_worker(network, "p", runners[0], **limits)
    d = await start_worker(network, "d", runners[1], **limits)
    try:
        shared, *others = random_prompts(64, 5, 40, 100)
        prompts = [shared + others[0], others[1], others[2], shared + others[1]]
        for prompt, sampling in zip(prompts, SAMPLINGS.values(), strict=True):
            params = SamplingParams(max_tokens=24, ignore_eos=True, **sampling)  # type: ignore[arg-type]
            request = client.request(prompt, params)
            answer = await client.disaggregated(p, d, request)
            assert answer.token_ids == aggregated(runners[2], request)
            assert answer.stats is not None
            assert answer.stats.num_bytes > answer.stats.num_tokens * 100
        await p.assert_clean()
        await d.assert_clean()
    finally:
        await p.close()
        await d.close()
