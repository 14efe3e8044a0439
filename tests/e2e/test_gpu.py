"""A fleet whose workers share a GPU: tokens are those of one aggregated engine on it, and the KV
really travelled. `pytest -m gpu`, with TRITON_INTERPRET=0."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from baton import LLM, SamplingParams
from baton.config import ServeConfig
from tests.e2e.test_exact import CASES, Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),  # every process compiles kernels, where none are cached
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ON_CUDA = {"BATON_DEVICE": "cuda", "BATON_BATCH_INVARIANT": "false"}
Oracle = Callable[[list[int], SamplingParams], dict[int, list[int]]]


@pytest.fixture(
    scope="module",
    params=[
        "shm",
        "grpc",
        *(pytest.param(name, marks=pytest.mark.ucx) for name in ("ucx", "cuda")),
    ],
)
def fleet(request: pytest.FixtureRequest, make_fleet) -> Iterator[Any]:
    if request.param in ("ucx", "cuda"):
        pytest.importorskip("ucxx")
    with make_fleet("prefill-0", BATON_TRANSPORTS=request.param, **ON_CUDA) as running:
        # Not the prefill worker's block size: both ends convert.
        running.start_worker("decode-0", BATON_BLOCK_SIZE="32")
        running.wait_workers("prefill-0", "decode-0")
        running.transport = request.param
        yield running


@pytest.fixture(scope="module")
def cuda_oracle() -> Iterator[Oracle]:
    """The same request in one process on the same device, alone: choice → token ids."""
    llm = LLM(
        ServeConfig().model_source,
        device="cuda",
        dtype="float32",
        max_model_len=1024,
        max_num_batched_tokens=128,
        kv_cache_memory_bytes=32 << 20,
        enable_prefix_caching=False,
    )

    def generate(prompt_token_ids: list[int], params: SamplingParams) -> dict[int, list[int]]:
        (output,) = llm.generate([prompt_token_ids], params, use_tqdm=False)
        return {choice.index: list(choice.token_ids) for choice in output.outputs}

    yield generate
    llm.close()


def test_tokens_are_those_of_one_engine(fleet: Any, cuda_oracle: Oracle) -> None:
    """One after the other, then all at once."""
    wanted = [cuda_oracle(case.prompt, SamplingParams(**case.sampling)) for case in CASES]
    remote = fleet.metric("baton_remote_prefills_total")
    moved = fleet.metric("baton_kv_transfer_bytes_total", transport=fleet.transport)

    def token_ids(case: Case) -> dict[int, list[int]]:
        result = fleet.complete({"prompt": case.prompt, **case.sampling})
        assert result.error is None
        assert result.done
        return dict(result.token_ids)

    for case, expected in zip(CASES, wanted, strict=True):
        assert token_ids(case) == expected, case.name
    num_handed_over = sum(case.is_handed_over for case in CASES)
    assert fleet.metric("baton_remote_prefills_total") == remote + num_handed_over
    assert fleet.metric("baton_kv_transfer_bytes_total", transport=fleet.transport) > moved
    with ThreadPoolExecutor(len(CASES)) as pool:
        together = list(pool.map(token_ids, CASES))
    for case, expected, got in zip(CASES, wanted, together, strict=True):
        assert got == expected, case.name
