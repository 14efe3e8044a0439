"""The `baton` command. Every option is a field of `baton.config`; this module only spells them for
a shell.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import rich_click as click
from pydantic import BaseModel

import baton
from baton.cli_bench import bench
from baton.cli_client import chat, collect_env, complete, run_batch
from baton.cli_options import option, option_groups
from baton.config import (
    Config,
    ConfigError,
    GatewayConfig,
    ServeConfig,
    WorkerConfig,
    describe,
    load_config,
    settings_of,
)
from baton.errors import BatonError, InvalidRequest
from baton.settings import LogSettings
from baton.telemetry import setup_logging

log = logging.getLogger(__name__)

_WORKERS = ("prefill-worker", "decode-worker", "pooling-worker")


def _configured(
    config: type[Config], process: str
) -> Callable[[Callable[[Config], int]], click.Command]:
    """Make a command that takes every setting of `config`, resolves and prints them, then runs."""

    def decorate(run: Callable[[Config], int]) -> click.Command:
        def callback(config_file: str | None, **given: Any) -> None:
            model = given.pop("model_argument", None)
            flags = {name: value for name, value in given.items() if value is not None}
            if model is not None:
                flags["model"] = model
            try:
                resolved = load_config(config, flags, os.environ, config_file)
                _check_redis(resolved)
            except ConfigError as error:
                raise click.UsageError(str(error)) from None
            _start(resolved, process)
            sys.exit(_run(run, resolved))

        command: Any = callback
        for setting in reversed(list(settings_of(config))):
            command = option(setting)(command)
        command = click.option(
            "--config", "config_file", metavar="FILE", help="YAML with the same settings."
        )(command)
        if config is ServeConfig:
            command = click.argument("model_argument", metavar="[MODEL]", required=False)(command)
        command.__doc__ = run.__doc__
        return click.command(run.__name__.replace("_", "-"), help=run.__doc__)(command)

    return decorate


def _check_redis(config: BaseModel) -> None:
    """Here, since a worker imports for seconds before it could tell."""
    if isinstance(config, GatewayConfig | WorkerConfig) and config.redis_url is None:
        raise ConfigError("--redis-url is missing: it is where gateways find workers")


def _start(config: BaseModel, process: str) -> None:
    assert isinstance(config, LogSettings)
    name = getattr(config, "worker_id", None) if process.endswith("worker") else None
    setup_logging(config, name or process)
    settings = f"\n{describe(config)}" if config.print_config else ""
    log.info("baton %s %s%s", baton.__version__, process, settings)


def _run(run: Callable[[Config], int], config: Config) -> int:
    try:
        return run(config)
    except BatonError as error:
        log.error("%s", error.message)
        return 2 if isinstance(error, InvalidRequest) else 1
    except KeyboardInterrupt:
        return 130


@_configured(ServeConfig, "serve")
def serve(config: ServeConfig) -> int:
    """Serve MODEL (or the bundled demo) with a local fleet: gateway, workers, private Redis."""
    from baton.fleet import serve as run_fleet

    return asyncio.run(run_fleet(config))


@_configured(GatewayConfig, "gateway")
def gateway(config: GatewayConfig) -> int:
    """The HTTP gateway alone."""
    from baton.gateway.server import run

    return run(config)


@_configured(WorkerConfig, "prefill-worker")
def prefill_worker(config: WorkerConfig) -> int:
    """A prefill worker alone."""
    from baton.prefill_worker import run

    return run(config)


@_configured(WorkerConfig, "decode-worker")
def decode_worker(config: WorkerConfig) -> int:
    """A decode worker alone."""
    from baton.decode_worker import run

    return run(config)


@_configured(WorkerConfig, "pooling-worker")
def pooling_worker(config: WorkerConfig) -> int:
    """A worker of a pooling model alone: embeddings or scores."""
    from baton.worker.main import run_pooling

    return run_pooling(config)


@click.command()
@click.argument("address")
def health(address: str) -> None:
    """Exit with 0 if the worker at ADDRESS (host:port) says it serves."""
    from baton.rpc import is_serving

    sys.exit(0 if asyncio.run(is_serving(address)) else 1)


click.rich_click.COMMAND_GROUPS = {
    "baton": [
        {"name": "Serve", "commands": ["serve"]},
        {"name": "One process", "commands": ["gateway", *_WORKERS]},
        {"name": "Use", "commands": ["chat", "complete", "run-batch"]},
        {"name": "Measure", "commands": ["bench"]},
        {"name": "Look", "commands": ["health", "collect-env"]},
    ]
}


for _name, _config in (
    ("serve", ServeConfig),
    ("gateway", GatewayConfig),
    *((worker, WorkerConfig) for worker in _WORKERS),
):
    click.rich_click.OPTION_GROUPS[f"baton {_name}"] = option_groups(_config)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(baton.__version__, prog_name="baton")
def main() -> None:
    """LLM serving with prefill and decode separated."""


for _command in (
    serve,
    gateway,
    prefill_worker,
    decode_worker,
    pooling_worker,
    chat,
    complete,
    run_batch,
    bench,
    health,
    collect_env,
):
    main.add_command(_command)

if __name__ == "__main__":
    main(prog_name="baton")
