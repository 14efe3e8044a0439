import json

import pytest
from click.testing import CliRunner

import baton
from baton import environment
from baton.cli import main


def test_a_report_says_what_matters_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_API_KEY", "s3cret")
    monkeypatch.setenv("BATON_REDIS_URL", "redis://user:s3cret@host")
    monkeypatch.setenv("BATON_BLOCK_SIZE", "32")
    monkeypatch.setenv("BATON_MAX_NUM_BATCHED_TOKENS", "64")
    monkeypatch.setenv("HOME_ADDRESS", "s3cret")
    result = CliRunner().invoke(main, ["collect-env", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["Baton"]["version"] == baton.__version__
    assert found["Packages"]["torch"]
    assert found["Machine"]["cores"] >= 1
    assert found["Environment"]["BATON_API_KEY"] == "(hidden)"
    assert found["Environment"]["BATON_BLOCK_SIZE"] == "32"
    assert found["Environment"]["BATON_MAX_NUM_BATCHED_TOKENS"] == "64"
    assert "s3cret" not in result.output
    text = environment.as_text(found)
    assert "BATON_BLOCK_SIZE" in text
    assert "s3cret" not in text


def test_what_is_absent_is_none() -> None:
    assert environment._version("no-such-package") is None
    assert environment._first_line("no-such-program") is None
    assert environment._first_line("false") is None
    assert environment._text_of("/no/such/file") == ""
