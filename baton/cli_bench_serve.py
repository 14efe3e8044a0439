"""`baton bench serve`, with vLLM's option names."""

import asyncio
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich_click as click

from baton.cli_client import Url, api_key_option
from baton.cli_datasets import dataset_options, option_names, take_dataset

Command = Callable[..., Any]
_METRICS = ("ttft", "tpot", "itl", "e2el")
_GOODPUT = ("ttft", "tpot", "e2el")
_SAMPLING = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "frequency_penalty": float,
    "presence_penalty": float,
    "repetition_penalty": float,
}


class ManyValues(click.RichCommand):
    """A command some of whose options take several values behind one name, as argparse's
    `nargs="+"`."""

    several = ("--goodput", "--metadata", "--header")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        name, is_first = "", False
        for arg in args:
            if arg.startswith("-"):
                name, is_first = arg if arg in self.several else "", True
            elif name and not is_first:
                spread.append(name)
            else:
                is_first = False
            spread.append(arg)
        return super().parse_args(ctx, spread)


def _pairs(values: Sequence[str], separator: str, flag: str) -> dict[str, str]:
    """ "a:1", "b:2", or both in one text."""
    found: dict[str, str] = {}
    for value in (part for text in values for part in text.split()):
        name, found_separator, rest = value.partition(separator)
        if not found_separator or not name:
            raise click.UsageError(f"{flag}: {value!r} is not NAME{separator}VALUE")
        found[name] = rest
    return found


def _goodput(values: Sequence[str]) -> dict[str, float]:
    limits: dict[str, float] = {}
    for name, value in _pairs(values, ":", "--goodput").items():
        if name not in _GOODPUT:
            raise click.UsageError(f"--goodput: {name!r} is none of {', '.join(_GOODPUT)}")
        try:
            limits[name] = float(value)
        except ValueError:
            raise click.UsageError(f"--goodput: {value!r} is no number") from None
    return limits


def _list(text: str, flag: str, convert: Callable[[str], Any]) -> tuple[Any, ...]:
    try:
        return tuple(convert(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise click.UsageError(f"{flag}: {error}") from None


def _metric(name: str) -> str:
    if name not in _METRICS:
        raise ValueError(f"{name!r} is none of {', '.join(_METRICS)}")
    return name


def _percentile(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 100:
        raise ValueError(f"{text} is no percentile")
    return value


def _extra_body(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        body = json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"--extra-body: no JSON ({error})") from None
    if not isinstance(body, dict):
        raise click.UsageError("--extra-body: no JSON object")
    return body


def _sampling_options(command: Command) -> Command:
    for name, kind in reversed(_SAMPLING.items()):
        text = "The server's default if absent."
        command = click.option("--" + name.replace("_", "-"), name, type=kind, help=text)(command)
    return command


@click.command(cls=ManyValues)
@click.option(
    "--backend",
    type=click.Choice(("openai", "openai-chat", "vllm")),
    default="openai",
    show_default=True,
    help="openai (and vllm): completions of token ids; openai-chat: chats of their text.",
)
@click.option("--base-url", type=Url(), default=None, help="The server; instead of host and port.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option("--endpoint", default=None, help="Path; the backend's if absent.")
@click.option("--model", default=None, help="Model name; the first one served if absent.")
@click.option("--tokenizer", default=None, help="Directory or hub id; the server's if absent.")
@click.option("--header", "headers", multiple=True, metavar="NAME=VALUE", help="Sent along.")
@api_key_option()
@dataset_options
@click.option(
    "--request-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=float("inf"),
    show_default=True,
    help="Requests a second; inf = all at once.",
)
@click.option(
    "--burstiness",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Shape of the gaps' gamma distribution: 1 = Poisson, less = burstier.",
)
@click.option(
    "--max-concurrency",
    type=click.IntRange(min=1),
    default=None,
    help="Requests under way at most.",
)
@click.option(
    "--self-timed/--no-self-timed",
    default=True,
    show_default=True,
    help="timed_trace: send at the trace's times, not at the request rate.",
)
@click.option("--num-warmups", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--ready-check-timeout-sec",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="How long to wait for the server.",
)
@click.option("--ignore-eos", is_flag=True, help="Every answer has its full length.")
@_sampling_options
@click.option("--extra-body", metavar="JSON", default=None, help="More fields of every request.")
@click.option("--percentile-metrics", default="ttft,tpot,itl", show_default=True, metavar="LIST")
@click.option("--metric-percentiles", default="99", show_default=True, metavar="LIST")
@click.option(
    "--goodput",
    multiple=True,
    metavar="METRIC:MS...",
    help="What a good request keeps to: ttft, tpot, e2el in milliseconds.",
)
@click.option("--save-result", is_flag=True, help="Write a JSON file.")
@click.option("--save-detailed", is_flag=True, help="And in it every request.")
@click.option("--append-result", is_flag=True, help="To the file's end.")
@click.option("--result-dir", type=click.Path(path_type=Path), default=None)
@click.option("--result-filename", default=None)
@click.option("--label", default=None, help="Begins the file's name; the backend if absent.")
@click.option("--metadata", multiple=True, metavar="KEY=VALUE...", help="Into the file.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Picture of the run (.png, .svg, .pdf); needs `pip install 'baton[plot]'`.",
)
@click.option("--disable-tqdm", is_flag=True, help="No progress bar.")
def serve(**given: Any) -> None:
    """Send requests to a running server, and measure TTFT, TPOT, ITL, throughput and goodput."""
    from baton.benchmarks.serve import Settings

    plot = given.pop("plot")
    _check_plot(plot)
    names = ("save_result", "save_detailed", "append_result", "result_dir", "result_filename")
    files = {name: given.pop(name) for name in names}
    base_url, host, port = (given.pop(name) for name in ("base_url", "host", "port"))
    sampling = {name: value for name in _SAMPLING if (value := given.pop(name)) is not None}
    settings = Settings(
        url=base_url or f"http://{host}:{port}",
        dataset=take_dataset(given),
        headers=_pairs(given.pop("headers"), "=", "--header"),
        sampling=sampling | _extra_body(given.pop("extra_body")),
        percentile_metrics=_list(given.pop("percentile_metrics"), "--percentile-metrics", _metric),
        metric_percentiles=_list(
            given.pop("metric_percentiles"), "--metric-percentiles", _percentile
        ),
        goodput=_goodput(given.pop("goodput")),
        metadata=_pairs(given.pop("metadata"), "=", "--metadata"),
        use_tqdm=not given.pop("disable_tqdm"),
        keep_text=files["save_detailed"],
        **given,
    )
    sys.exit(_serve(settings, files, plot))


def _check_plot(path: Path | None) -> None:
    from baton.benchmarks import plot

    if path is not None and path.suffix not in plot.SUFFIXES:
        raise click.UsageError(f"--plot: {path} ends in none of {', '.join(plot.SUFFIXES)}")
    if path is not None and not plot.is_available():
        raise click.UsageError("--plot needs matplotlib: pip install 'baton[plot]'")


def _serve(settings: Any, files: Mapping[str, Any], plot_path: Path | None) -> int:
    import uvloop

    from baton.benchmarks import metrics, plot, report, serve
    from baton.benchmarks.datasets import DatasetError
    from baton.client.api import ApiError

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            run = runner.run(serve.run(settings))
    except (DatasetError, ValueError) as error:
        raise click.UsageError(str(error)) from None
    except ApiError as error:
        click.echo(error.message, err=True)
        return 1
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        return 130
    click.echo(report.table(run.result))
    for warning in report.warnings(run.result):
        click.echo(f"warning: {warning}", err=True)
    try:
        if files["save_result"] or files["save_detailed"] or files["append_result"]:
            details = metrics.detailed(run.outcomes) if files["save_detailed"] else {}
            path = report.result_path(run.result, files["result_dir"], files["result_filename"])
            report.save({**run.result, **details}, path, append=files["append_result"])
            click.echo(path)
        if plot_path is not None:
            plot.save(run.result, run.outcomes, plot_path)
            click.echo(plot_path)
    except OSError as error:
        click.echo(f"{error.filename}: {error.strerror}", err=True)
        return 1
    return 0 if run.result["completed"] else 1


click.rich_click.OPTION_GROUPS["baton bench serve"] = [
    {
        "name": "Server",
        "options": [
            *("--backend", "--base-url", "--host", "--port", "--endpoint", "--model"),
            *("--tokenizer", "--header", "--api-key", "--ready-check-timeout-sec"),
        ],
    },
    {"name": "What is asked", "options": option_names()},
    {
        "name": "When",
        "options": [
            *("--request-rate", "--burstiness", "--max-concurrency", "--self-timed"),
            "--num-warmups",
        ],
    },
    {
        "name": "How it is answered",
        "options": [
            "--ignore-eos",
            *("--" + name.replace("_", "-") for name in _SAMPLING),
            "--extra-body",
        ],
    },
    {
        "name": "Result",
        "options": [
            *("--percentile-metrics", "--metric-percentiles", "--goodput", "--save-result"),
            *("--save-detailed", "--append-result", "--result-dir", "--result-filename"),
            *("--label", "--metadata", "--plot", "--disable-tqdm"),
        ],
    },
]
