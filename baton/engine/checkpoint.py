"""Where a model's files are, and what they are: download, shards, digests. No torch."""

import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from baton.engine.model_config import ModelConfig
from baton.errors import InvalidRequest

log = logging.getLogger(__name__)

_CONFIG_FILES = ["*.json", "*.jinja", "tokenizer*", "*.txt"]
_WEIGHT_FILES = ["*.safetensors"]
_NOT_OURS = ["consolidated*", "*/*"]  # other formats of the same weights
_POOLING_FILES = ["*_Pooling/config.json"]  # of sentence-transformers
_INDEX = "model.safetensors.index.json"


def resolve_checkpoint(model: str, revision: str | None, *, weights: bool) -> Path:
    """The local directory of a model, downloaded from the hub when it is not a directory.

    weights: whether the weight files are needed too.

    Raises:
        InvalidRequest: neither a directory nor a repository that can be read.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists() or model.startswith(("/", ".", "~")):
        raise InvalidRequest(f"{model} is not a directory", "model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = _CONFIG_FILES + (_WEIGHT_FILES if weights else [])
    try:
        found = snapshot_download(
            model, revision=revision, allow_patterns=patterns, ignore_patterns=_NOT_OURS
        )
        if Path(found, "modules.json").exists():
            snapshot_download(model, revision=revision, allow_patterns=_POOLING_FILES)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        message = f"{model} is neither a directory nor a model that can be downloaded: {reason}"
        raise InvalidRequest(message, "model") from error
    return Path(found)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory, in order of their names.

    Raises:
        InvalidRequest: there are none, or one that the index names is missing.
    """
    index = path / _INDEX
    if index.exists():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InvalidRequest(f"{index} is not usable: {error!r}", "model") from error
        files = [path / Path(name).name for name in names]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise InvalidRequest(f"{path} lacks the shards {', '.join(missing)}", "model")
        return files
    files = [f for f in sorted(path.glob("*.safetensors")) if not f.name.startswith("consolidated")]
    if not files:
        raise InvalidRequest(f"{path} holds no safetensors weights (pickles are not read)", "model")
    return files


def model_fingerprint(config: ModelConfig, dtype: str, weights: bytes) -> bytes:
    """SHA-256 of everything that the values in the KV cache depend on (ARCHITECTURE, definitions).

    weights: identity of the weights, see `weights_digest`. KV has the compute dtype.
    """
    fields = asdict(config)
    for irrelevant in ("dtype", "eos_token_ids", "max_len"):
        del fields[irrelevant]
    described = {"config": fields, "dtype": dtype, "kv_dtype": dtype, "quantization": None}
    canonical = json.dumps(described, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(b"baton-model-1" + canonical + weights).digest()


def weights_digest(files: list[Path]) -> bytes:
    """SHA-256 over the SHA-256 of each file, headers included; large files are read in parallel."""
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="digest") as pool:
        return hashlib.sha256(b"".join(pool.map(_file_digest, files))).digest()


@dataclass(frozen=True, slots=True)
class _CachedDigest:
    size: int
    mtime_ns: int
    sha256: str


def _file_digest(file: Path) -> bytes:
    """SHA-256 of a file's content, cached by its path, size and modification time."""
    real = file.resolve()
    stat = real.stat()
    cache = _cache_dir() / f"{hashlib.sha256(os.fsencode(real)).hexdigest()}.json"
    try:
        cached = _CachedDigest(**json.loads(cache.read_text(encoding="utf-8")))
        if (cached.size, cached.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            return bytes.fromhex(cached.sha256)
    except (OSError, ValueError, TypeError):
        log.debug("no cached digest of %s", file.name)
    with real.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    _write(cache, _CachedDigest(stat.st_size, stat.st_mtime_ns, digest.hexdigest()))
    return digest.digest()


def _write(cache: Path, cached: _CachedDigest) -> None:
    temporary = cache.with_suffix(f".{os.getpid()}.tmp")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(asdict(cached)), encoding="utf-8")
        temporary.replace(cache)
    except OSError as error:
        log.debug("the digest is not cached: %s", error)


def _cache_dir() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "baton" / "digests"
