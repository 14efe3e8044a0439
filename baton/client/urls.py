"""How a user may write where the fleet is."""

from urllib.parse import urlsplit


def server_root(url: str) -> str:
    """`url` without a trailing `/` or `/v1`, which OpenAI's and vLLM's clients are given.

    Raises:
        ValueError: no HTTP URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no http:// or https:// URL")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
