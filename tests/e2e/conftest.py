"""Real fleets, and the aggregated engine that says which tokens are right."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from baton import LLM, SamplingParams
from baton.config import ServeConfig

DEMO_MODEL = ServeConfig().model_source

# importlib mode gives test modules no package to import each other from.
_spec = importlib.util.spec_from_file_location("harness", Path(__file__).with_name("harness.py"))
assert _spec is not None
assert _spec.loader is not None
harness: ModuleType = importlib.util.module_from_spec(_spec)
sys.modules["harness"] = harness
_spec.loader.exec_module(harness)

# Token equality is promised in this mode, and shown in it.
EXACT = {"BATON_BATCH_INVARIANT": "true", "BATON_DTYPE": "float32", "BATON_MAX_MODEL_LEN": "1024"}
# Which route is predicted to be faster depends on the machine's mood; a test says what it means.
EXACT |= {"BATON_LOCAL_PREFILL": "fallback"}
SMALL = {"BATON_KV_CACHE_MEMORY_BYTES": "32MiB", "BATON_MAX_NUM_BATCHED_TOKENS": "128"}

_LEASE_S = 40.0  # of a default lease, and some more

Fleet = harness.FleetUnderTest
FleetMaker = Callable[..., AbstractContextManager[Fleet]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A shared machine may stand still for seconds, which looks like a dead worker to those that
    watch it. One repetition, which the report shows; what fails twice in a row is our fault."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.flaky(reruns=1))


@contextmanager
def start_fleet(*workers: str, **env: str) -> Iterator[Fleet]:
    """Ends with a look for leaks, whatever was done to the fleet."""
    with harness.new_directory() as directory:
        fleet = Fleet(Path(directory), DEMO_MODEL, {**EXACT, **SMALL, **env})
        try:
            yield fleet.start(*workers)
            fleet.assert_no_leak(_LEASE_S)
        finally:
            fleet.close()


@pytest.fixture(scope="session")
def make_fleet() -> FleetMaker:
    """`with make_fleet("prefill-0", "decode-0", BATON_…="…") as fleet:`"""
    return start_fleet


@pytest.fixture(scope="session")
def plain_fleet() -> Iterator[Fleet]:
    """For all modules that need no other, and leave it as they found it."""
    with start_fleet("prefill-0", "decode-0") as fleet:
        fleet.wait_workers("prefill-0", "decode-0")
        yield fleet


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    """The aggregated engine, in this process."""
    with LLM(
        DEMO_MODEL,
        dtype="float32",
        max_model_len=1024,
        batch_invariant=True,
        kv_cache_memory_bytes=32 << 20,
        enable_prefix_caching=False,
        threads=1,  # with more, each step waits for the slowest thread of a busy machine
    ) as llm:
        yield llm


@pytest.fixture(scope="session")
def oracle(llm: LLM) -> Callable[[list[int], SamplingParams], dict[int, list[int]]]:
    """The same request in one process, alone: choice → token ids."""

    def generate(prompt_token_ids: list[int], params: SamplingParams) -> dict[int, list[int]]:
        (output,) = llm.generate([prompt_token_ids], params, use_tqdm=False)
        return {choice.index: list(choice.token_ids) for choice in output.outputs}

    return generate
