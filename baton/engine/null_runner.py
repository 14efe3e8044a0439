"""A runner without a model: an engine, a gateway bench or a simulation at full speed, no torch.

Its KV pool holds one integer per slot and layer: a hash of the token chain up to that position. A
sampled token is a function of *every* value in the row's context, so KV that is missing, stale,
someone else's or in the wrong place becomes a wrong token, which `NullModel.generate`, the oracle
that knows no blocks, shows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from baton.engine.batch import Batch, OnLayers, Sampled, SampleRequest, ScheduledRow
from baton.engine.stopping import check_stop
from baton.types import BlockId, Logprobs, SamplingParams

_MASK = (1 << 61) - 1  # a prime: Python hashes integers below it to themselves
_GOLDEN, _FACTOR = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9
_START = 0x5EED
_EMPTY = -2  # a slot that nobody has written


def _mix(a: int, b: int) -> int:
    return ((a ^ (b + _GOLDEN)) * _FACTOR + (a >> 29)) & _MASK


@dataclass(frozen=True, slots=True)
class NullModel:
    """What the next token is: a fixed function of the chain, the seed (unless greedy) and the
    position. EOS comes with probability `eos_rate`."""

    vocab_size: int = 1000
    eos_token_ids: tuple[int, ...] = ()
    eos_rate: float = 0.0

    def chain(self, value: int | None, token_ids: Iterable[int]) -> list[int]:
        """Slot values of `token_ids`, which follow the slot value `value` (None = nothing)."""
        value, values = _START if value is None else value, []
        for token_id in token_ids:  # _mix, without a call for each
            mixed = (value ^ (token_id + _GOLDEN)) * _FACTOR + (value >> 29)
            value = mixed & _MASK
            values.append(value)
        return values

    def sample(self, context: Sequence[int], request: SampleRequest) -> Sampled:
        """`context`: the slot values of all tokens so far, in order."""
        params = request.params
        noise = request.seed if params.temperature > 0 else 0
        draw = _mix(_mix(hash(tuple(context)) & _MASK, noise), request.position)
        token_id = self._token(draw)
        if len(request.output_token_ids) < params.min_tokens:
            while token_id in self.eos_token_ids or token_id in params.stop_token_ids:
                token_id = (token_id + 1) % self.vocab_size
        if params.logprobs is None:
            return Sampled(token_id)
        top = tuple((token_id, -1.0 - rank) for rank in range(params.logprobs))
        return Sampled(token_id, Logprobs(-1.0, 1, top))

    def _token(self, draw: int) -> int:
        if self.eos_token_ids and draw % 10_000 < self.eos_rate * 10_000:
            return self.eos_token_ids[draw % len(self.eos_token_ids)]
        return (draw >> 20) % self.vocab_size

    def generate(
        self,
        prompt_token_ids: tuple[int, ...],
        params: SamplingParams,
        choice: int = 0,
        max_model_len: int = 1 << 30,
    ) -> tuple[int, ...]:
        """The tokens that any correct engine produces for one choice."""
        seed = 0 if params.seed is None else params.choice_seed(choice)
        output: list[int] = []
        context = self.chain(None, prompt_token_ids)
        while True:
            position = len(context)
            request = SampleRequest(choice, seed, position, params, prompt_token_ids, output)
            token_id = self.sample(context, request).token_id
            output.append(token_id)
            num_prompt, eos = len(prompt_token_ids), self.eos_token_ids
            if check_stop(params, eos, output, num_prompt, max_model_len)[0]:
                return tuple(output)
            context += self.chain(context[-1], (token_id,))


class NullRunner:
    """A `Runner` over a pool of integers: the chain's in layer 0, the same plus n in layer n."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        model: NullModel | None = None,
        num_layers: int = 1,
    ) -> None:
        self.model = model or NullModel()
        self.block_size = block_size
        self.num_layers = num_layers
        self.num_tokens_computed = 0
        self._layers = [[_EMPTY] * (num_blocks * block_size) for _ in range(num_layers)]

    def run(
        self, batch: Batch, on_layers: OnLayers | None = None
    ) -> dict[int, tuple[Sampled, ...]]:
        size = self.block_size
        for slots in self._layers:
            copied = [slots[source * size : (source + 1) * size] for source, _ in batch.copies]
            for (_, target), values in zip(batch.copies, copied, strict=True):
                slots[target * size : (target + 1) * size] = values
        chains: dict[int, tuple[int | None, list[int]]] = {}
        for layer in range(self.num_layers):
            for row in batch.rows:
                self.import_kv(row.block_ids, row.start, self._values(row, layer, chains), layer)
            if on_layers is not None:
                on_layers(layer + 1)
        self.num_tokens_computed += batch.num_tokens
        return {row.row_id: self._answer(row) for row in batch.rows if row.num_answers}

    def _answer(self, row: ScheduledRow) -> tuple[Sampled, ...]:
        targets = row.scoring.token_ids if row.scoring is not None else ()
        scored = (Sampled(token_id, Logprobs(-1.0, 1, ())) for token_id in targets)
        return (*scored, *self._sample(row))

    def _values(
        self, row: ScheduledRow, layer: int, chains: dict[int, tuple[int | None, list[int]]]
    ) -> list[int]:
        """What a row adds to a layer. `chains`: of each row, what another layer's last slot led to;
        unless something is wrong all layers say the same."""
        last = None
        if row.start:
            block = row.block_ids[(row.start - 1) // self.block_size]
            slot = block * self.block_size + (row.start - 1) % self.block_size
            last = self._layers[layer][slot] - layer
        if row.row_id not in chains or chains[row.row_id][0] != last:
            chains[row.row_id] = last, self.model.chain(last, row.token_ids)
        return [value + layer for value in chains[row.row_id][1]]

    def _sample(self, row: ScheduledRow) -> tuple[Sampled, ...]:
        context = self.export_kv(row.block_ids, 0, row.num_context_tokens)
        for layer in range(1, self.num_layers):
            values = self.export_kv(row.block_ids, 0, row.num_context_tokens, layer)
            if values != [value + layer for value in context]:
                context = values  # wrong in this layer: wrong tokens
        return tuple(self.model.sample(context, request) for request in row.samples)

    def export_kv(
        self, block_ids: Sequence[BlockId], start: int, stop: int, layer: int = 0
    ) -> list[int]:
        """The "KV" of tokens [start, stop) of a sequence with these blocks."""
        values: list[int] = []
        size, slots = self.block_size, self._layers[layer]
        first = start // size
        for index in range(first, -(-stop // size)):
            base = block_ids[index] * size
            values += slots[base : base + size]
        return values[start - first * size : stop - first * size]

    def import_kv(
        self, block_ids: Sequence[BlockId], start: int, values: Sequence[int], layer: int = 0
    ) -> None:
        """Write the "KV" of tokens [start, start + len(values))."""
        size = self.block_size
        if len(values) == 1:  # as a decode writes it
            self._layers[layer][block_ids[start // size] * size + start % size] = values[0]
            return
        done = 0
        while done < len(values):
            index, offset = divmod(start + done, size)
            num = min(size - offset, len(values) - done)
            base = block_ids[index] * size + offset
            self._layers[layer][base : base + num] = values[done : done + num]
            done += num
