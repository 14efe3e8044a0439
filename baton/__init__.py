"""Baton: large-language-model serving with prefill and decode separated."""

from typing import TYPE_CHECKING, Any

from baton.beam_search import BeamSearchParams
from baton.pooling import PoolingParams
from baton.types import SamplingParams, StructuredOutput

if TYPE_CHECKING:
    from baton.llm import LLM

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "BeamSearchParams",
    "PoolingParams",
    "SamplingParams",
    "StructuredOutput",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # LLM pulls in torch; the gateway imports this package and must not.
    if name == "LLM":
        from baton.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
