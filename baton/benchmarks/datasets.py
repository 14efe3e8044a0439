"""What a benchmark asks. Prompts are token ids, so lengths are exact whatever the tokenizer."""

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

NAMES = ("random", "sharegpt", "prefix_repetition", "timed_trace")
_MIN_LEN = 4  # of a conversation's turn, as vLLM filters them
_MAX_INPUT_LEN = 1024
_MAX_TOTAL_LEN = 2048


class DatasetError(Exception):
    """A file or a length that cannot be used."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request."""

    prompt: list[int]  # token ids
    output_len: int
    at_s: float | None = None  # after the start; None: the request rate says


@dataclass(frozen=True, slots=True)
class Options:
    """vLLM's names; lengths in tokens."""

    dataset_name: str = "random"
    dataset_path: Path | None = None
    num_prompts: int = 1000
    seed: int = 0
    disable_shuffle: bool = False
    random_input_len: int = 1024
    random_output_len: int = 128
    random_range_ratio: float = 0.0
    random_prefix_len: int = 0
    sharegpt_output_len: int | None = None
    prefix_repetition_prefix_len: int = 256
    prefix_repetition_suffix_len: int = 256
    prefix_repetition_num_prefixes: int = 10
    prefix_repetition_output_len: int = 128
    timed_trace_chunk_hash_size: int = 512
    timed_trace_sec_multiplier: float = 0.001
    timed_trace_len_multiplier: float = 1.0


class Texts(Protocol):
    """A tokenizer, wherever it is."""

    async def encode(self, text: str) -> list[int]:
        """Without special tokens."""

    async def decode(self, token_ids: Sequence[int]) -> str: ...


class Words:
    """Draws prompts of ids that occur in ordinary texts."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        """
        Raises:
            DatasetError: no ids.
        """
        self._ids = sorted(set(token_ids))
        if not self._ids:
            raise DatasetError("the tokenizer makes no tokens of an ordinary text")

    def draw(self, rng: random.Random, num_tokens: int) -> list[int]:
        return rng.choices(self._ids, k=num_tokens)


def ordinary_text(seed: int = 0) -> str:
    """Something to tokenize for `Words`: words of all lengths, numbers, punctuation."""
    rng = random.Random(seed)
    letters = "etaoinshrdlcumwfgypbvkjxqz"
    words = ["".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(6000)]
    words += [str(rng.randrange(10_000)) for _ in range(500)]
    return " ".join(word + rng.choice(["", "", "", ",", ".", "\n"]) for word in words)


async def load(options: Options, texts: Texts) -> list[Sample]:
    """
    Raises:
        DatasetError
    """
    rng = random.Random(options.seed)
    if options.dataset_name == "sharegpt":
        return await _sharegpt(options, texts, rng)
    words = Words(await texts.encode(ordinary_text()))
    match options.dataset_name:
        case "random":
            return _random(options, words, rng)
        case "prefix_repetition":
            return _prefix_repetition(options, words, rng)
        case "timed_trace":
            return _timed_trace(options, words)
    raise DatasetError(f"dataset_name must be one of {', '.join(NAMES)}")


def _random(options: Options, words: Words, rng: random.Random) -> list[Sample]:
    """One prefix for all, then tokens of their own; lengths vary by ± `random_range_ratio`."""
    prefix = words.draw(rng, options.random_prefix_len)
    ratio = options.random_range_ratio

    def length(around: int) -> int:
        return rng.randint(max(1, int(around * (1 - ratio))), max(1, int(around * (1 + ratio))))

    return [
        Sample(
            [*prefix, *words.draw(rng, length(options.random_input_len))],
            length(options.random_output_len),
        )
        for _ in range(options.num_prompts)
    ]


def _prefix_repetition(options: Options, words: Words, rng: random.Random) -> list[Sample]:
    """The same number of prompts for each prefix, shuffled."""
    num_prefixes = options.prefix_repetition_num_prefixes
    per_prefix = options.num_prompts // num_prefixes
    if per_prefix == 0:
        raise DatasetError(f"--num-prompts must be at least the {num_prefixes} prefixes")
    samples: list[Sample] = []
    for _ in range(num_prefixes):
        prefix = words.draw(rng, options.prefix_repetition_prefix_len)
        for _ in range(per_prefix):
            suffix = words.draw(rng, options.prefix_repetition_suffix_len)
            samples.append(Sample([*prefix, *suffix], options.prefix_repetition_output_len))
    if not options.disable_shuffle:
        rng.shuffle(samples)
    return samples


# ── files ────────────────────────────────────────────────────────────────────────────────────────


def _path(options: Options) -> Path:
    if options.dataset_path is None:
        raise DatasetError(f"--dataset-name {options.dataset_name} needs --dataset-path")
    return options.dataset_path


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _timed_trace(options: Options, words: Words) -> list[Sample]:
    """A line each: `timestamp`, `input_length`, `output_length`, `hash_ids` (one for each chunk of
    the prompt; equal ids are equal tokens)."""
    path = _path(options)
    chunk_len = options.timed_trace_chunk_hash_size
    scale = options.timed_trace_len_multiplier
    short_len = max(1, round(chunk_len * scale))
    samples: list[Sample] = []
    start: float | None = None
    for number, line in enumerate(_read(path).splitlines(), 1):
        if len(samples) == options.num_prompts:
            break
        if not line.strip():
            continue
        at, input_len, output_len, hash_ids = _trace_line(line, f"{path}, line {number}")
        if not (len(hash_ids) - 1) * chunk_len < input_len <= len(hash_ids) * chunk_len:
            raise DatasetError(
                f"{path}, line {number}: {len(hash_ids)} hash_ids are not {input_len} tokens with "
                f"--timed-trace-chunk-hash-size {chunk_len}"
            )
        start = at if start is None else start
        tokens = [
            token
            for hash_id in hash_ids
            for token in words.draw(random.Random(f"{options.seed} {hash_id}"), short_len)
        ]
        samples.append(
            Sample(
                tokens[: max(1, round(input_len * scale))],
                max(1, round(output_len * scale)),
                max(0.0, at - start) * options.timed_trace_sec_multiplier,
            )
        )
    if not samples:
        raise DatasetError(f"{path} has no request")
    return samples


def _trace_line(line: str, where: str) -> tuple[float, int, int, list[int]]:
    try:
        entry = json.loads(line)
        at = float(entry["timestamp"])
        lengths = int(entry["input_length"]), int(entry["output_length"])
        hash_ids = [int(hash_id) for hash_id in entry["hash_ids"]]
    except (ValueError, LookupError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise DatasetError(f"{where}: no request of a trace ({what})") from None
    return at, *lengths, hash_ids


async def _sharegpt(options: Options, texts: Texts, rng: random.Random) -> list[Sample]:
    """First questions of conversations, shuffled; outputs as long as the answers were, or
    `sharegpt_output_len`. As in vLLM, what is very short or very long is left out."""
    pairs = _conversations(_path(options))
    if not options.disable_shuffle:
        rng.shuffle(pairs)
    fixed_len = options.sharegpt_output_len
    samples: list[Sample] = []
    for question, answer in pairs:
        if len(samples) == options.num_prompts:
            break
        prompt, answered = await asyncio.gather(texts.encode(question), texts.encode(answer))
        output_len = fixed_len or len(answered)
        is_short = len(prompt) < _MIN_LEN or (fixed_len is None and output_len < _MIN_LEN)
        is_long = len(prompt) > _MAX_INPUT_LEN or len(prompt) + output_len > _MAX_TOTAL_LEN
        if not is_short and not is_long:
            samples.append(Sample(prompt, output_len))
    if not samples:
        raise DatasetError(f"{options.dataset_path} has no conversation of a usable length")
    return samples


def _conversations(path: Path) -> list[tuple[str, str]]:
    """(first question, first answer) of each with two turns."""
    try:
        entries = json.loads(_read(path))
        turns: list[list[Any]] = [entry.get("conversations") or [] for entry in entries]
        return [(str(q["value"]), str(a["value"])) for q, a in (t[:2] for t in turns if len(t) > 1)]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise DatasetError(f"{path}: no list of ShareGPT conversations") from None
