import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from baton.cli import main
from baton.config import (
    ConfigError,
    ServeConfig,
    WorkerConfig,
    describe,
    load_config,
    settings_of,
    to_env,
)


def test_precedence_is_defaults_yaml_environment_flags(tmp_path: Path) -> None:
    file = tmp_path / "baton.yaml"
    file.write_text("max-num-seqs: 1\nblock_size: 32\nport: 1\n")
    env = {"BATON_MAX_NUM_SEQS": "2", "BATON_PORT": "2"}
    config = load_config(ServeConfig, {"port": "3"}, env, str(file))
    assert (config.block_size, config.max_num_seqs, config.port) == (32, 2, 3)
    assert config.max_num_batched_tokens == ServeConfig().max_num_batched_tokens


@pytest.mark.parametrize(
    ("flags", "env", "yaml", "expected"),
    [
        ({"max_num_seqs": "0"}, {}, "", "--max-num-seqs (the command line)"),
        ({}, {"BATON_BLOCK_SIZE": "24"}, "", "--block-size (the environment)"),
        ({}, {"BATON_NO_SUCH": "1"}, "", "unknown setting BATON_NO_SUCH"),
        ({}, {}, "colour: red", "unknown setting 'colour'"),
        ({}, {}, "- a\n- b", "must hold"),
        ({}, {"BATON_MAX_NUM_SEQ": "1"}, "", "did you mean BATON_MAX_NUM_SEQS?"),
        ({}, {}, "prefill-worker: 2", "did you mean prefill_workers?"),
        ({}, {}, "seed: 1\na: [", "c.yaml, line 2 is not YAML: "),
        ({"dtype": "int7"}, {}, "", "--dtype"),
        ({"kv_cache_memory_bytes": "2 parsecs"}, {}, "", "must be a number of bytes, e.g. 512MiB"),
        ({"kv_cache_memory_bytes": "-1g"}, {}, "", "must be a number of bytes"),
        ({"redis_url": "host:6379"}, {}, "", "--redis-url (the command line): is no URL of a Red"),
        ({}, {"BATON_REDIS_URL": "redis://h/x"}, "", "redis://host:6379/0"),
        ({"hf_overrides": "[1]"}, {}, "", "--hf-overrides (the command line): must be a JSON obj"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(
    flags: dict[str, str], env: dict[str, str], yaml: str, expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml)
    with pytest.raises(ConfigError) as error:
        load_config(ServeConfig, flags, env, str(file))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cannot read /no/such/file\.yaml"):
        load_config(ServeConfig, {}, {}, "/no/such/file.yaml")


@pytest.mark.parametrize(
    ("text", "size"), [("512MiB", 512 * 2**20), ("2g", 2 * 10**9), ("1.5Ki", 1536), ("77", 77)]
)
def test_sizes_take_units(text: str, size: int) -> None:
    config = load_config(WorkerConfig, {"kv_cache_memory_bytes": text}, {})
    assert config.kv_cache_memory_bytes == size


def test_secrets_are_lists_and_never_shown() -> None:
    config = load_config(ServeConfig, {}, {"BATON_API_KEY": "hunter2,swordfish"})
    assert [key.get_secret_value() for key in config.api_key] == ["hunter2", "swordfish"]
    assert "hunter2" not in describe(config)
    assert "hunter2" not in repr(config)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (
            "rediss://user:hunter2@host:1/0?ssl_ca_certs=/ca",
            "rediss://***@host:1/0?ssl_ca_certs=/ca",
        ),
        ("redis://:hunter2@host", "redis://***@host"),
        ("redis://host?password=hunter2&db=1", "redis://host?password=***&db=1"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
    ],
)
def test_passwords_in_urls_are_never_shown(url: str, shown: str) -> None:
    config = load_config(ServeConfig, {"redis_url": url}, {})
    assert f"redis_url={shown}" in describe(config)
    assert to_env(config)["BATON_REDIS_URL"] == url


def test_children_get_the_same_settings_through_the_environment() -> None:
    flags = {"max_num_seqs": "7", "transports": "grpc", "enable_prefix_caching": False}
    config = load_config(ServeConfig, flags, {"BATON_CLUSTER_TOKEN": "a,b"})
    child = load_config(WorkerConfig, {}, to_env(config))
    assert child.max_num_seqs == 7
    assert child.transports == ("grpc",)
    assert child.enable_prefix_caching is False
    assert [t.get_secret_value() for t in child.cluster_token] == ["a", "b"]


def test_every_setting_says_what_it_does_and_stands_in_one_group() -> None:
    settings = list(settings_of(ServeConfig))
    assert {s.name for s in settings} == set(ServeConfig.model_fields)
    assert len({s.name for s in settings}) == len(settings)
    assert all(s.info.description and s.group for s in settings)


@pytest.mark.parametrize("command", ["serve", "gateway", "prefill-worker", "decode-worker"])
def test_help_names_flags_and_environment(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--help"], env={**os.environ, "COLUMNS": "200"})
    assert result.exit_code == 0
    assert "--log-level" in result.output
    assert "BATON_LOG_LEVEL" in result.output


def test_a_bad_flag_exits_with_2_and_one_line() -> None:
    result = CliRunner().invoke(main, ["serve", "--max-num-seqs", "minus"])
    assert result.exit_code == 2
    assert "--max-num-seqs (the command line)" in result.output
