"""The oracle of the engine's tests must itself notice wrong KV."""

from collections.abc import Sequence

import pytest

from baton.engine.batch import Batch, SampleRequest, ScheduledRow
from baton.engine.null_runner import NullModel, NullRunner
from baton.types import BlockId, SamplingParams
from tests.engine.driver import prompt

GREEDY = SamplingParams(temperature=0.0)


def blocks(*ids: int) -> list[BlockId]:
    return [BlockId(i) for i in ids]


def row(
    ids: Sequence[int], start: int, block_ids: list[BlockId], params: SamplingParams = GREEDY
) -> ScheduledRow:
    request = SampleRequest(0, 1, start + len(ids), params, (), [])
    return ScheduledRow(0, ids, start, block_ids, (request,))


def run(runner: NullRunner, *rows: ScheduledRow, copies: tuple[tuple[int, int], ...] = ()) -> int:
    pairs = tuple((BlockId(source), BlockId(target)) for source, target in copies)
    return runner.run(Batch(rows, pairs))[0][0].token_id


def test_chunks_and_blocks_do_not_matter() -> None:
    ids = prompt(40)
    whole = run(NullRunner(8, 16), row(ids, 0, blocks(0, 1, 2)))
    runner = NullRunner(8, 32)
    run(runner, row(ids[:7], 0, blocks(5, 3)))
    assert run(runner, row(ids[7:], 7, blocks(5, 3))) == whole
    assert (whole,) == NullModel().generate(ids, SamplingParams(temperature=0.0, max_tokens=1))


@pytest.mark.parametrize("position", [0, 17, 31])
def test_one_wrong_slot_anywhere_makes_a_wrong_token(position: int) -> None:
    ids = prompt(33)
    runner = NullRunner(8, 16)
    run(runner, row(ids[:32], 0, blocks(0, 1)))
    right = run(runner, row(ids[32:], 32, blocks(0, 1, 2)))
    assert run(runner, row(ids[32:], 32, blocks(0, 1, 2))) == right
    runner.import_kv(blocks(0, 1), position, [12345])
    assert run(runner, row(ids[32:], 32, blocks(0, 1, 2))) != right


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_every_layer_counts(layer: int) -> None:
    ids = prompt(33)
    runner = NullRunner(8, 16, num_layers=3)
    run(runner, row(ids[:32], 0, blocks(0, 1)))
    right = run(runner, row(ids[32:], 32, blocks(0, 1, 2)))
    assert (right,) == NullModel().generate(ids, SamplingParams(temperature=0.0, max_tokens=1))
    runner.import_kv(blocks(0, 1), 20, [12345], layer)
    assert run(runner, row(ids[32:], 32, blocks(0, 1, 2))) != right


def test_exported_kv_works_elsewhere() -> None:
    ids = prompt(50)
    source, target = NullRunner(8, 16), NullRunner(4, 32)
    run(source, row(ids[:49], 0, blocks(6, 2, 0, 1)))
    right = run(source, row(ids[49:], 49, blocks(6, 2, 0, 1)))
    for start, stop in [(20, 49), (0, 20)]:
        target.import_kv(blocks(3, 1), start, source.export_kv(blocks(6, 2, 0, 1), start, stop))
    assert run(target, row(ids[49:], 49, blocks(3, 1))) == right


def test_copies_are_made_before_anything_is_computed() -> None:
    ids = prompt(20)
    runner = NullRunner(8, 16)
    run(runner, row(ids[:19], 0, blocks(0, 1)))
    right = run(runner, row(ids[19:], 19, blocks(0, 1)))
    assert run(runner, row(ids[19:], 19, blocks(0, 2)), copies=((1, 2),)) == right
    overwriting = row((1, 2, 3), 0, blocks(1))
    run(runner, overwriting, row(ids[19:], 19, blocks(0, 3)), copies=((1, 3),))
    assert runner.export_kv(blocks(0, 3), 0, 20) == runner.model.chain(None, ids)


def test_copies_read_before_they_write() -> None:
    runner = NullRunner(8, 16)
    runner.import_kv(blocks(0), 0, range(16))
    runner.import_kv(blocks(1), 0, range(16, 32))
    runner.run(Batch((), ((BlockId(0), BlockId(2)), (BlockId(1), BlockId(0)))))
    assert runner.export_kv(blocks(2, 0), 0, 32) == list(range(32))


def test_greedy_ignores_the_seed_and_sampling_does_not() -> None:
    ids = prompt(20)
    greedy = {NullModel().generate(ids, SamplingParams(temperature=0, seed=s)) for s in range(4)}
    sampled = {NullModel().generate(ids, SamplingParams(seed=s)) for s in range(4)}
    assert (len(greedy), len(sampled)) == (1, 4)


def test_eos_comes_at_its_rate_and_not_before_min_tokens() -> None:
    model = NullModel(eos_token_ids=(7,), eos_rate=0.25)
    lengths = [
        len(model.generate(prompt(9, seed), SamplingParams(seed=seed, max_tokens=60, min_tokens=3)))
        for seed in range(300)
    ]
    assert min(lengths) == 4
    assert 6 < sum(lengths) / 300 < 8, "3 and the mean of a geometric distribution"


def test_logprobs_come_when_asked_for() -> None:
    runner = NullRunner(8, 16)
    params = SamplingParams(temperature=0.0, logprobs=2)
    (sampled,) = runner.run(Batch((row(prompt(5), 0, blocks(0), params),)))[0]
    assert sampled.logprobs is not None
    assert len(sampled.logprobs.top) == 2
