import pytest

from baton.client.urls import server_root


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/"])
def test_roots(tail: str) -> None:
    assert server_root(f"http://host:8000{tail}") == "http://host:8000"
    assert server_root(f"https://host/behind{tail}") == "https://host/behind"


@pytest.mark.parametrize("url", ["", "host:8000", "ftp://host", "http://", "/v1"])
def test_no_roots(url: str) -> None:
    with pytest.raises(ValueError, match="no http"):
        server_root(url)
