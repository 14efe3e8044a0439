"""What the scheduling half of an engine needs to know. No torch."""

from dataclasses import dataclass
from typing import Literal

from baton.types import HASH_TOKENS, Role


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits and policy of one engine. Names are the command line's.

    Raises:
        ValueError: a value makes no sense.
    """

    num_blocks: int
    block_size: int = 16  # tokens; a multiple of HASH_TOKENS
    max_model_len: int = 4096  # tokens of prompt + output
    max_num_seqs: int = 128  # rows of one step
    max_num_batched_tokens: int = 2048  # tokens of one step
    max_num_waiting: int = 4096  # sequences; beyond it a leg fails with OVERLOADED
    enable_prefix_caching: bool = True
    eos_token_ids: tuple[int, ...] = ()
    vocab_size: int = 2**31  # ids at or above it are refused at the door
    num_layers: int = 1  # of the model; see `EngineCore.on_kv_ready`
    fingerprint: bytes = b""  # roots the prefix hashes
    role: Role = Role.BOTH  # goes into snapshots; the worker replaces it when its role changes
    scheduling_policy: Literal["fcfs", "deadline"] = "fcfs"  # within one priority

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_model_len", "max_num_seqs", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.block_size % HASH_TOKENS:
            raise ValueError(f"block_size must be a multiple of {HASH_TOKENS}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs")

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold the KV of `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)
