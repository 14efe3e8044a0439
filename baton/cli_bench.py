"""`baton bench`: measures a running server, or `LLM`; commands and option names are vLLM's."""

import asyncio
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import rich_click as click

from baton.cli_bench_serve import serve
from baton.cli_client import Url, api_key_option
from baton.cli_datasets import dataset_options, option_names, take_dataset
from baton.cli_options import option, option_groups
from baton.config import ConfigError, OfflineConfig, load_config, settings_of
from baton.errors import BatonError

Command = Callable[..., Any]
_LEN = click.IntRange(min=1)


def _llm_options(command: Command) -> Command:
    """Those of `LLM`: in process, or of a running fleet."""
    for setting in reversed(list(settings_of(OfflineConfig))):
        command = option(setting)(command) if setting.name != "seed" else command
    command = api_key_option()(command)
    text = "Measure a running fleet through LLM(base_url=…) instead."
    return click.option("--base-url", type=Url(), default=None, help=text)(command)


def _output_options(command: Command) -> Command:
    command = click.option("--disable-tqdm", is_flag=True, help="No progress bar.")(command)
    text = "Write the figures as JSON."
    return click.option("--output-json", type=click.Path(path_type=Path), help=text)(command)


def _open_llm(given: dict[str, Any]) -> Any:
    """Takes `_llm_options` out of `given`.

    Raises:
        click.UsageError
    """
    from baton.llm import LLM

    base_url, api_key = given.pop("base_url"), given.pop("api_key")
    names = [setting.name for setting in settings_of(OfflineConfig) if setting.name != "seed"]
    flags = {name: value for name in names if (value := given.pop(name)) is not None}
    try:
        if base_url is not None:
            model = flags.pop("model", None)
            return LLM(
                model, base_url=base_url, **({"api_key": api_key} if api_key else {}), **flags
            )
        config = load_config(OfflineConfig, flags, os.environ)
        return LLM(**config.model_dump(exclude_unset=True))
    except (ConfigError, ValueError) as error:
        raise click.UsageError(str(error)) from None


def _figures(given: dict[str, Any], measure: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Of an LLM that is opened and closed; a failure is a line and an exit status."""
    try:
        with _open_llm(given) as llm:
            return measure(llm)
    except BatonError as error:
        click.echo(error.message, err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(130)


def _write(figures: Mapping[str, Any], path: Path | None) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(figures, indent=2))
    except OSError as error:
        click.echo(f"{path}: {error.strerror}", err=True)
        sys.exit(1)


@click.command()
@click.option("--input-len", type=_LEN, default=32, show_default=True, help="Tokens of a prompt.")
@click.option("--output-len", type=_LEN, default=128, show_default=True, help="Of an answer.")
@click.option("--batch-size", type=_LEN, default=8, show_default=True, help="Prompts at once.")
@click.option("--n", type=click.IntRange(1, 128), default=1, show_default=True, help="Choices.")
@click.option("--num-iters-warmup", type=click.IntRange(min=0), default=10, show_default=True)
@click.option("--num-iters", type=_LEN, default=30, show_default=True)
@_output_options
@_llm_options
def latency(output_json: Path | None, disable_tqdm: bool, **given: Any) -> None:
    """How long one batch takes from its start to its end."""
    from baton.benchmarks.offline import Latency, measure_latency

    fields = {name: given.pop(name) for name in Latency.__slots__ if name in given}
    options = Latency(**fields, use_tqdm=not disable_tqdm)
    figures = _figures(given, lambda llm: measure_latency(llm, options))
    click.echo(f"Avg latency: {figures['avg_latency']:.4f} seconds")
    for percentile, seconds in figures["percentiles"].items():
        click.echo(f"{percentile}% percentile latency: {seconds:.4f} seconds")
    _write(figures, output_json)


@click.command()
@dataset_options
@click.option("--input-len", type=_LEN, default=None, help="As --random-input-len.")
@click.option("--output-len", type=_LEN, default=None, help="As --random-output-len.")
@_output_options
@_llm_options
def throughput(
    output_json: Path | None,
    disable_tqdm: bool,
    input_len: int | None,
    output_len: int | None,
    **given: Any,
) -> None:
    """Requests and tokens a second, with everything at once."""
    from baton.benchmarks.datasets import DatasetError, load
    from baton.benchmarks.offline import LLMTexts, measure_throughput

    given["random_input_len"] = input_len or given["random_input_len"]
    given["random_output_len"] = output_len or given["random_output_len"]
    dataset = take_dataset(given)

    def measure(llm: Any) -> dict[str, Any]:
        try:
            samples = asyncio.run(load(dataset, LLMTexts(llm)))
        except DatasetError as error:
            raise click.UsageError(str(error)) from None
        return measure_throughput(llm, samples, use_tqdm=not disable_tqdm)

    figures = _figures(given, measure)
    click.echo(
        f"Throughput: {figures['requests_per_second']:.2f} requests/s, "
        f"{figures['tokens_per_second']:.2f} total tokens/s, "
        f"{figures['output_tokens_per_second']:.2f} output tokens/s"
    )
    _write(figures, output_json)


@click.group()
def bench() -> None:
    """Measure a running server, or the engine in process."""


for _command in (serve, latency, throughput):
    bench.add_command(_command)

_ENGINE = option_groups(OfflineConfig)
click.rich_click.OPTION_GROUPS["baton bench latency"] = [
    {
        "name": "Load",
        "options": [
            *("--input-len", "--output-len", "--batch-size", "--n"),
            *("--num-iters-warmup", "--num-iters"),
        ],
    },
    *_ENGINE,
]
click.rich_click.OPTION_GROUPS["baton bench throughput"] = [
    {"name": "What is asked", "options": [*option_names(), "--input-len", "--output-len"]},
    *_ENGINE,
]
