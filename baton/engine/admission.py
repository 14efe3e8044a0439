"""The door: which requests can never be served, and whose blocks fit now."""

from baton.engine.block_pool import BlockPool
from baton.engine.config import EngineConfig
from baton.engine.sequence import LegKind, Sequence
from baton.errors import BatonError, Cause, InvalidRequest
from baton.types import Request


def check_request(config: EngineConfig, kind: LegKind, request: Request) -> None:
    """Refuse what this engine can never serve.

    Raises:
        BatonError: INVALID_REQUEST, CONTEXT_LENGTH_EXCEEDED or NEVER_FITS.
    """
    prompt, sampling = request.prompt_token_ids, request.sampling
    if not prompt:
        raise InvalidRequest("the prompt has no tokens", "prompt")
    if not any(True for _ in request.open_choices()):
        raise InvalidRequest("every choice is finished", "n")
    outputs = request.output_token_ids
    if outputs and len(outputs) != sampling.n:
        raise InvalidRequest("committed output must cover every choice", "n")
    for ids in (prompt, *outputs):
        if ids and not (min(ids) >= 0 and max(ids) < config.vocab_size):
            raise InvalidRequest("a token id is outside the vocabulary", "prompt")
    largest, param = sampling.max_token_id()
    if largest >= config.vocab_size:
        raise InvalidRequest(f"{param} has a token id outside the vocabulary", param)
    if sampling.seed is None and sampling.temperature > 0:
        raise InvalidRequest("a sampled request needs a seed", "seed")
    if len(prompt) >= config.max_model_len:
        raise InvalidRequest(
            f"{len(prompt)} prompt tokens leave no room for output in {config.max_model_len}",
            "prompt",
            Cause.CONTEXT_LENGTH_EXCEEDED,
        )
    num_blocks = max_blocks(config, kind, request)
    if num_blocks > config.num_blocks:
        message = f"needs {num_blocks} KV blocks; there are {config.num_blocks}"
        raise BatonError(Cause.NEVER_FITS, message)


def max_blocks(config: EngineConfig, kind: LegKind, request: Request) -> int:
    """Blocks without which the request cannot finish: its prompt's, one whole choice's (the others
    can wait their turn), or, for a decode leg, what it has to reserve at once."""
    num_prompt, max_tokens = len(request.prompt_token_ids), request.sampling.max_tokens
    if kind is LegKind.PREFILL:
        return config.num_blocks_for(num_prompt)
    longest = config.max_model_len if max_tokens is None else num_prompt + max_tokens
    # The last token is never run, so its KV needs no slot.
    whole = config.num_blocks_for(max(num_prompt, min(longest, config.max_model_len) - 1))
    if kind is LegKind.LOCAL:
        return whole
    growth = sum(growth_blocks(config, request, choice) for choice in request.open_choices())
    return max(whole, config.num_blocks_for(num_prompt) + growth)


def growth_blocks(config: EngineConfig, request: Request, choice: int) -> int:
    """What a choice needs beside the prompt's full blocks to hold its committed output, or its
    first token: one block, unless much is committed."""
    beyond = len(request.prompt_token_ids) % config.block_size
    return config.num_blocks_for(beyond + max(len(request.committed(choice)), 1))


_NOBODY = (-1, 0)


class Admission:
    """Gives sequences the blocks that they start with, all at once or none."""

    def __init__(self, config: EngineConfig, pool: BlockPool) -> None:
        self._config = config
        self._pool = pool
        # Who did not fit, and how many free blocks it takes while nothing but decoding goes on:
        # looking up a long prompt in every step would cost more than the step.
        self._blocked = _NOBODY

    def admit(self, seq: Sequence, headroom: int) -> bool:
        """Blocks for all known tokens of `seq`, `headroom` of the free ones left over.

        What the prefix cache has, or what another sequence is computing, is shared; at least the
        last token stays to be run.
        """
        pool, num_tokens = self._pool, seq.num_tokens
        seq_id, num_needed = self._blocked
        if seq_id == seq.seq_id and pool.num_free - headroom < num_needed:
            return False
        if pool.cache.enabled:
            seq.hash_known()
        num_free = pool.num_free
        # Who scores its prompt has to compute it.
        max_hits = 0 if seq.leg.is_to_be_scored else (num_tokens - 1) // self._config.block_size
        hits = pool.cache.find(seq.hashes, max_hits, ready=False)
        pool.acquire(hits)
        missing = self._config.num_blocks_for(num_tokens) - len(hits)
        if missing + headroom > pool.num_free:
            self._blocked = seq.seq_id, missing + num_free - pool.num_free
            pool.release(hits)
            return False
        seq.block_ids = hits + pool.allocate(missing, hits[-1] if hits else None)
        self.announce(seq, len(hits))
        self.skip_computed(seq)
        self.retry()
        return True

    def retry(self) -> None:
        """Something else than decoding happened: whoever did not fit may fit now."""
        self._blocked = _NOBODY

    def reserve(self, seq: Sequence, headroom: int) -> int | None:
        """Blocks for the prompt of a decode leg, and for what else is fetched, plus its growth; the
        number of tokens that its own prefix cache has, or None when there is no room."""
        pool, leg = self._pool, seq.leg
        num_fetched, block_size = leg.num_fetched_tokens, self._config.block_size
        if pool.cache.enabled:
            seq.hash_known()
        hits = pool.cache.find(seq.hashes, num_fetched // block_size, ready=True)
        pool.acquire(hits)
        num_blocks = self._config.num_blocks_for(max(num_fetched, leg.num_prompt_tokens))
        missing = num_blocks - len(hits)
        if num_fetched > leg.num_prompt_tokens:  # one choice: it appends, and shares nothing
            growth = self._config.num_blocks_for(seq.num_tokens) - num_blocks
        else:
            growth = sum(growth_blocks(self._config, leg.request, c) for c in leg.open_choices)
        if missing + growth + headroom > pool.num_free:
            pool.release(hits)
            return None
        seq.block_ids = hits + pool.allocate(missing, hits[-1] if hits else None)
        seq.reserve = pool.allocate(growth, seq.block_ids[-1])
        seq.num_computed_tokens = len(hits) * block_size
        seq.num_published_blocks = len(hits)
        return seq.num_computed_tokens

    def announce(self, seq: Sequence, first_block: int) -> None:
        """Let others find the full blocks from `first_block` on: `seq` is going to compute them."""
        cache = self._pool.cache
        stop = min(seq.num_tokens // self._config.block_size, len(seq.block_ids))
        for index in range(first_block, stop if cache.enabled else first_block):
            if self._pool.is_shared(seq.block_ids[index]):
                break  # it will be copied before it is written
            hashes = seq.block_hashes(index, cache.hashes_per_block)
            cache.announce(seq.block_ids[index], hashes, seq)

    def claim_prefix(self, seq: Sequence) -> int:
        """Become the writer of what may be fetched of the prompt, up to the first block that is
        here or that another sequence computes; where that ends, or 0 for less than a block."""
        pool, block_size = self._pool, self._config.block_size
        start = seq.num_computed_tokens
        stop = min(seq.leg.num_fetch_tokens, seq.num_prompt_tokens - 1)
        if not pool.cache.enabled or stop - start < block_size:
            return 0
        for index in range(start // block_size, self._config.num_blocks_for(stop)):
            block = seq.block_ids[index]
            if pool.cache.is_ready(block) or not pool.cache.claim(block, seq):
                stop = index * block_size
                break
        return stop if stop - start >= block_size else 0

    def skip_computed(self, seq: Sequence) -> None:
        """Move past blocks whose KV is there, computed by others."""
        cache, block_size = self._pool.cache, self._config.block_size
        index = seq.num_published_blocks
        while index < len(seq.block_ids) and cache.is_ready(seq.block_ids[index]):
            index += 1
        if index > seq.num_published_blocks:
            seq.num_published_blocks = index
            seq.num_computed_tokens = index * block_size

    def publish(self, seq: Sequence) -> None:
        """Tell the prefix cache of every block that `seq` has completed."""
        cache, block_size = self._pool.cache, self._config.block_size
        while (seq.num_published_blocks + 1) * block_size <= seq.num_computed_tokens:
            if cache.enabled:
                index = seq.num_published_blocks
                hashes = seq.block_hashes(index, cache.hashes_per_block)
                cache.publish(seq.block_ids[index], hashes)
            seq.num_published_blocks += 1
