"""The CPU paths (C and numpy), the torch reference and the Triton kernel (interpreted) draw the
same tokens, and the tokens follow the distribution."""

import os
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from baton.kernels import sampling, sampling_cpu
from baton.kernels.logprobs import Wanted, token_logprobs, token_logprobs_torch
from baton.kernels.sampling import Draw, draw_tokens, draw_tokens_torch, noise_key

GREEDY = {"temperature": 0.0}
# Sharpness from "all equal" to "one token has it all"; some rows have many exact ties.
SPREADS = (0.0, 0.3, 2.0, 8.0)


def random_case(rng: random.Random) -> tuple[torch.Tensor, list[Draw]]:
    vocab_size = rng.choice((1, 7, 300, 2048, 5003, 20011))
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    logits = torch.randn(4, vocab_size, generator=generator) * rng.choice(SPREADS)
    if rng.random() < 0.3:
        logits = logits.round()
    if rng.random() < 0.2:
        logits[torch.rand(logits.shape, generator=generator) < 0.5] = -torch.inf
        logits[:, -1] = 0.0
    draws = [
        Draw(
            row=rng.randrange(4),
            key=noise_key(rng.randrange(2**32), rng.randrange(10_000)),
            temperature=rng.choice((0.0, 0.2, 1.0, 1.7)),
            top_k=rng.choice((0, 0, 1, 5, 50, 1000, 30_000)),
            top_p=rng.choice((1.0, 1.0, 0.1, 0.5, 0.9, 0.999)),
            min_p=rng.choice((0.0, 0.0, 0.05, 0.3, 1.0)),
        )
        for _ in range(6)
    ]
    return logits, draws


needs_native = pytest.mark.skipif(
    sampling_cpu._draw_token is None,
    reason="draw_token.c was not built, or is not for this machine",
)


@pytest.mark.parametrize("is_native", [pytest.param(True, marks=needs_native), False])
@pytest.mark.parametrize("seed", range(80))
def test_cpu_equals_torch(seed: int, is_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_native:
        monkeypatch.setattr(sampling_cpu, "_draw_token", None)
    logits, draws = random_case(random.Random(seed))
    assert draw_tokens(logits, draws) == draw_tokens_torch(logits, draws)


@needs_native
@pytest.mark.parametrize("spread", SPREADS)
def test_c_equals_numpy_on_a_large_vocabulary(
    spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the winner among all ids lies outside of the nucleus."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 50_021, generator=generator) * spread
    logits[2] = (4 * logits[2]).round() / 4
    draws = [
        Draw(row, noise_key(seed, 9), temperature, top_p=top_p)
        for row in range(3)
        for seed in range(12)
        for temperature in (0.01, 0.7, 3.0)
        for top_p in (0.999, 0.95, 0.4, 0.02)
    ]
    got = draw_tokens(logits, draws)
    monkeypatch.setattr(sampling_cpu, "_draw_token", None)
    assert got == draw_tokens(logits, draws)


@needs_native
@pytest.mark.parametrize(
    "changes",
    [
        {"logits": np.zeros(9, np.float32)},
        {"words": np.zeros(9, np.uint32)},
        {"mass": np.zeros(9, np.int32)},
        {"likeliest": 10},
        {"likeliest": -1},
        {"temperature": 0.0},
        {"top_p": 0.0},
        {"top_p": 1.0},
        {"logits": b"", "words": b"", "mass": bytearray(), "likeliest": 0},
    ],
    ids=str,
)
def test_c_refuses_what_does_not_fit(changes: dict[str, object]) -> None:
    arguments: dict[str, object] = {
        "logits": np.zeros(10, np.float32),
        "words": np.zeros(10, np.uint32),
        "mass": np.zeros(10, np.int32),
        "likeliest": 0,
        "key": 1,
        "temperature": 1.0,
        "top_p": 0.9,
    }
    native = sampling_cpu._draw_token
    assert native is not None
    assert native.draw_token(*arguments.values()) in range(10)
    with pytest.raises(ValueError, match="do not fit together"):
        native.draw_token(*(arguments | changes).values())


def test_rows_divided_among_threads_draw_what_one_thread_draws() -> None:
    logits, draws = random_case(random.Random(1))
    draws = [replace(draw, temperature=1.0) for draw in draws] * 5
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(draw_tokens(logits, draws))
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1]


@pytest.mark.parametrize("vocab_size", [5, 1000, 3001])
@pytest.mark.parametrize("spread", SPREADS)
def test_triton_equals_torch_bit_for_bit(vocab_size: int, spread: float) -> None:
    from baton.kernels.sampling_triton import gumbel_argmax_triton

    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(5, vocab_size, generator=generator) * spread
    logits[0] = logits[0].round()
    logits[1, 2] = torch.nan
    logits[2] = -torch.inf
    logits[3, 1] = torch.inf
    temperatures = torch.tensor([1.0, 1.0, 0.7, 0.0, 0.3])
    keys = torch.tensor([noise_key(seed, 7) for seed in (0, 1, 2, 2**32 - 1, 99)])
    expected = sampling.gumbel_argmax_torch(logits, temperatures, keys)
    assert gumbel_argmax_triton(logits, temperatures, keys).tolist() == expected.tolist()
    assert expected[1:4].tolist() == [-1, -1, -1]
    temperatures[4] = 0.0
    assert gumbel_argmax_triton(logits, temperatures, keys)[4] == logits[4].argmax()


def test_triton_noise_is_the_reference_s() -> None:
    """With equal logits the noise alone decides, so any wrong bit of the hash would show."""
    from baton.kernels.sampling_triton import gumbel_argmax_triton

    keys = torch.tensor([noise_key(seed, 3) for seed in range(64)])
    logits, temperatures = torch.zeros(64, 1500), torch.ones(64)
    noise = sampling.gumbel(sampling.token_hash(keys[:, None], torch.arange(1500)))
    winners = gumbel_argmax_triton(logits, temperatures, keys)
    assert winners.tolist() == noise.argmax(-1).tolist()


def test_noise_is_the_same_in_numpy_and_torch() -> None:
    words = torch.arange(0, 2**32, 4099)
    assert np.array_equal(
        sampling_cpu.gumbel(words.numpy().astype(np.uint32)), sampling.gumbel(words).numpy()
    )
    ids = torch.arange(0, 2**18, 37)
    for seed, position in ((0, 0), (2**32 - 1, 2**31), (12345, 678)):
        key = noise_key(seed, position)
        hashes = sampling_cpu.token_hash(key, sampling_cpu.token_words(ids.numpy()))
        assert hashes.tolist() == sampling.token_hash(torch.tensor(key), ids).tolist()


def test_noise_is_finite_and_grows_with_the_hash() -> None:
    ends = sampling.gumbel(torch.tensor([0, 255, 256, 2**31, 2**32 - 1]))
    assert ends.isfinite().all()
    assert (ends[1:] >= ends[:-1]).all()
    assert ends[-1] < sampling_cpu.MAX_NOISE


def test_domains_do_not_share_noise() -> None:
    assert noise_key(1, 2) != noise_key(1, 2, sampling.ACCEPTANCE)


@pytest.mark.parametrize(
    ("bad", "ok"), [(torch.nan, False), (torch.inf, False), (-torch.inf, True)]
)
@pytest.mark.parametrize("options", [GREEDY, {}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_a_row_that_is_not_finite_fails_alone(bad: float, ok: bool, options: dict) -> None:
    logits = torch.randn(3, 3000, generator=torch.Generator().manual_seed(0))
    clean = draw_tokens(logits, [Draw(row, 1, **options) for row in range(3)])
    logits[1, 2999 if clean[1] != 2999 else 0] = bad
    for draw in (draw_tokens, draw_tokens_torch):
        tokens = draw(logits, [Draw(row, 1, **options) for row in range(3)])
        assert tokens == [clean[0], clean[1] if ok else -1, clean[2]]
    logits[1] = -torch.inf
    assert draw_tokens(logits, [Draw(1, 1, **options)]) == [-1]


@pytest.mark.parametrize("options", [GREEDY, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_ties_go_to_the_lower_id(options: dict) -> None:
    logits = torch.zeros(1, 9000)
    logits[0, 4000:4100] = 1.0
    if "min_p" in options:  # keeps all equals; the noise decides
        logits[0, 4001:4100] = 0.5
    for draw in (draw_tokens, draw_tokens_torch):
        assert draw(logits, [Draw(0, key, **options) for key in range(5)]) == [4000] * 5


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Of the fit, in standard deviations (Wilson and Hilferty 1931)."""
    expected = probabilities * counts.sum()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    spread = 2 / (9 * (len(counts) - 1))
    return ((statistic / (len(counts) - 1)) ** (1 / 3) - (1 - spread)) / spread**0.5


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"top_k": 12}, {"top_p": 0.8}, {"min_p": 0.2, "temperature": 1.5}],
)
def test_tokens_follow_the_distribution(options: dict) -> None:
    num_draws, vocab_size = 20_000, 40
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(3)) * 1.5
    draws = [Draw(0, noise_key(7, position), **options) for position in range(num_draws)]
    counts = torch.bincount(torch.tensor(draw_tokens(logits, draws)), minlength=vocab_size)
    values, order = (logits[0] / options.get("temperature", 1.0)).softmax(0).sort(descending=True)
    values[options.get("top_k", vocab_size) :] = 0
    values[values.cumsum(0) - values >= options.get("top_p", 1.0) * values.sum()] = 0
    values[values < options.get("min_p", 0.0) * values[0]] = 0
    counts, kept = counts[order], values > 0
    assert counts[~kept].sum() == 0
    assert chi_square(counts[kept].double(), (values / values.sum())[kept].double()) < 3.5


def test_choices_and_positions_are_independent() -> None:
    """Pairs of neighbouring seeds and positions hit each cell of a 2-token table equally often."""
    logits = torch.zeros(1, 2)
    for step in ((1, 0), (0, 1)):
        first = [Draw(0, noise_key(i, 9)) for i in range(8000)]
        second = [Draw(0, noise_key(i + step[0], 9 + step[1])) for i in range(8000)]
        pairs = torch.tensor(draw_tokens(logits, first)) * 2 + torch.tensor(
            draw_tokens(logits, second)
        )
        counts = torch.bincount(pairs, minlength=4).double()
        assert chi_square(counts, torch.full((4,), 0.25).double()) < 3.5


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("logprobs", [token_logprobs, token_logprobs_torch])
def test_logprobs(spread: float, logprobs) -> None:
    logits = torch.randn(2, 6000, generator=torch.Generator().manual_seed(5)) * spread
    logits[0, 17] = logits[0, 5000]
    expected = logits.double().log_softmax(-1)
    wanted = [Wanted(0, 5000, 20), Wanted(1, 3, 0), Wanted(0, int(logits[0].argmax()), 1)]
    for want, got in zip(wanted, logprobs(logits, wanted), strict=True):
        row = expected[want.row]
        assert got.logprob == pytest.approx(float(row[want.token_id]), abs=1e-5)
        assert got.rank == 1 + int((logits[want.row] > logits[want.row, want.token_id]).sum())
        order = np.lexsort((np.arange(6000), -logits[want.row].numpy()))[: want.num_top]
        assert [i for i, _ in got.top] == order.tolist()
        assert [p for _, p in got.top] == pytest.approx(row[order.tolist()].tolist(), abs=1e-5)


@pytest.mark.parametrize("num_likeliest", [1, 8, 64])
@pytest.mark.parametrize("seed", range(10))
def test_few_likeliest_tokens_are_enough_or_known_not_to_be(
    seed: int, num_likeliest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, draws = random_case(random.Random(seed))
    expected = draw_tokens_torch(logits, draws)
    monkeypatch.setattr(sampling, "_NUM_LIKELIEST", num_likeliest)
    assert draw_tokens_torch(logits, draws) == expected


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_usual_cuts_need_no_sort(cut: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    likeliest = sampling._draw_likeliest

    def watched(rows: torch.Tensor, draws: list[Draw], width: int) -> object:
        widths.append(width)
        return likeliest(rows, draws, width)

    monkeypatch.setattr(sampling, "_draw_likeliest", watched)
    logits = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0)) * 5
    draw_tokens_torch(logits, [Draw(0, 1, **cut), Draw(1, 2, **cut)])  # type: ignore[arg-type]
    assert widths == [1024]
    draw_tokens_torch(logits * 0, [Draw(0, 1, top_p=0.9), Draw(1, 2, **cut)])  # type: ignore[arg-type]
    assert widths[1:] == [1024, 20_000]
