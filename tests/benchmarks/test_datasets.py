import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from baton.benchmarks.datasets import DatasetError, Options, Sample, load, ordinary_text


class Characters:
    """A tokenizer whose tokens are characters."""

    async def encode(self, text: str) -> list[int]:
        return [ord(char) for char in text]

    async def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))


async def samples(name: str, **options: Any) -> list[Sample]:
    return await load(Options(dataset_name=name, **options), Characters())


async def test_random() -> None:
    options = {"num_prompts": 200, "random_input_len": 100, "random_output_len": 20}
    fixed = await samples("random", **options)
    assert {(len(s.prompt), s.output_len) for s in fixed} == {(100, 20)}
    assert len({tuple(s.prompt[:8]) for s in fixed}) == 200
    assert {token for s in fixed for token in s.prompt} <= set(map(ord, ordinary_text()))
    assert fixed == await samples("random", **options)
    assert fixed != await samples("random", seed=1, **options)
    varied = await samples("random", random_range_ratio=0.5, random_prefix_len=7, **options)
    lengths = [len(s.prompt) - 7 for s in varied]
    assert min(lengths) >= 50
    assert max(lengths) <= 150
    assert len(set(lengths)) > 50
    assert len({tuple(s.prompt[:7]) for s in varied}) == 1


async def test_prefix_repetition() -> None:
    found = await samples(
        "prefix_repetition",
        num_prompts=43,
        prefix_repetition_num_prefixes=4,
        prefix_repetition_prefix_len=30,
        prefix_repetition_suffix_len=5,
        prefix_repetition_output_len=9,
    )
    assert {(len(s.prompt), s.output_len) for s in found} == {(35, 9)}
    prefixes = Counter(tuple(s.prompt[:30]) for s in found)
    assert sorted(prefixes.values()) == [10] * 4
    assert len({tuple(s.prompt) for s in found}) == 40
    with pytest.raises(DatasetError, match="at least the 10 prefixes"):
        await samples("prefix_repetition", num_prompts=9)


def trace(path: Path, *lines: tuple[float, int, int, list[int]]) -> Path:
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    path.write_text("\n".join(json.dumps(dict(zip(names, line, strict=True))) for line in lines))
    return path


async def test_timed_trace(tmp_path: Path) -> None:
    path = trace(
        tmp_path / "trace.jsonl",
        (5000, 1100, 7, [1, 2, 3]),
        (5500, 600, 3, [1, 9]),
        (9000, 512, 1, [4]),
    )
    first, second, third = await samples("timed_trace", dataset_path=path)
    assert [s.at_s for s in (first, second, third)] == [0.0, 0.5, 4.0]
    assert [len(s.prompt) for s in (first, second, third)] == [1100, 600, 512]
    assert [s.output_len for s in (first, second, third)] == [7, 3, 1]
    assert first.prompt[:512] == second.prompt[:512]
    assert first.prompt[512:600] != second.prompt[512:600]
    assert first.prompt[:512] != third.prompt
    scaled = await samples(
        "timed_trace",
        dataset_path=path,
        num_prompts=2,
        timed_trace_len_multiplier=0.125,
        timed_trace_sec_multiplier=0.01,
    )
    assert [len(s.prompt) for s in scaled] == [138, 75]
    assert scaled[0].prompt[:64] == scaled[1].prompt[:64]
    assert scaled[1].at_s == 5.0


async def test_traces_that_cannot_be_replayed(tmp_path: Path) -> None:
    path = trace(tmp_path / "trace.jsonl", (0, 1100, 7, [1, 2, 3]))
    # Too short a chunk cuts every prompt, too long a chunk takes away what prompts share.
    for size in (16, 2048):
        with pytest.raises(DatasetError, match="line 1: 3 hash_ids are not 1100 tokens"):
            await samples("timed_trace", dataset_path=path, timed_trace_chunk_hash_size=size)
    path.write_text('{"timestamp": 1}\n')
    with pytest.raises(DatasetError, match="line 1: no request of a trace"):
        await samples("timed_trace", dataset_path=path)
    path.write_text("\n")
    with pytest.raises(DatasetError, match="no request"):
        await samples("timed_trace", dataset_path=path)
    with pytest.raises(DatasetError, match="needs --dataset-path"):
        await samples("timed_trace")
    with pytest.raises(DatasetError, match="No such file"):
        await samples("timed_trace", dataset_path=tmp_path / "none")


async def test_sharegpt(tmp_path: Path) -> None:
    def talk(*texts: str) -> dict[str, Any]:
        return {"conversations": [{"from": "human", "value": text} for text in texts]}

    path = tmp_path / "sharegpt.json"
    talks = [
        talk("question one", "answer"),
        talk("only one turn"),
        talk("hm", "too short a question"),
        talk("too short an answer", "ok"),
        talk("x" * 1025, "too long a question"),
        talk("x" * 1000, "y" * 1049),
        talk("question two", "another answer", "more"),
        {"id": "nothing"},
    ]
    path.write_text(json.dumps(talks))
    found = await samples("sharegpt", dataset_path=path, disable_shuffle=True)
    texts = ["".join(map(chr, s.prompt)) for s in found]
    assert texts == ["question one", "question two"]
    assert [s.output_len for s in found] == [6, 14]
    fixed = await samples("sharegpt", dataset_path=path, sharegpt_output_len=3, num_prompts=1)
    assert [s.output_len for s in fixed] == [3]
    path.write_text("[1]")
    with pytest.raises(DatasetError, match="no list of ShareGPT conversations"):
        await samples("sharegpt", dataset_path=path)
