"""From a RunnerConfig to a PoolingRunner."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from baton.engine import checkpoint
from baton.engine.device import describe_device, select_device, select_dtype
from baton.engine.encoder_config import EncoderConfig
from baton.engine.layers.packed_attention import PackedAttention
from baton.engine.models.decoder import Decoder
from baton.engine.models.encoder import Encoder
from baton.engine.pooler import Pooler
from baton.engine.pooling_config import PoolingConfig, load_pooling_config
from baton.engine.pooling_runner import PoolingModelInfo, PoolingRunner
from baton.engine.runner_config import RunnerConfig
from baton.engine.weights import DummyWeights, SafetensorsWeights
from baton.errors import InvalidRequest

_FORMER_NAMES = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))


class _Weights(Protocol):
    def has(self, name: str) -> bool: ...

    def take(self, name: str, *shape: int) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class _AnyName:
    """Checkpoints differ in whether a backbone's tensors have a prefix, and in names of norms."""

    source: _Weights
    prefix: str

    def take(self, name: str, *shape: int) -> Tensor:
        """See `WeightSource`."""
        bare = name.removeprefix(self.prefix)
        candidates = [name, self.prefix + bare, bare]
        for new, old in _FORMER_NAMES:
            candidates += [n.replace(new, old) for n in candidates if n.endswith(new)]
        found = next(filter(self.source.has, candidates), name)
        return self.source.take(found, *shape)


def load_pooling_runner(config: RunnerConfig) -> PoolingRunner:
    """
    Raises:
        InvalidRequest: the model cannot be had, is not supported, or is damaged; `param` names the
            setting.
    """
    path = checkpoint.resolve_checkpoint(config.model, config.revision, weights=False)
    pooling = load_pooling_config(path, config.pooler_config, config.hf_overrides)
    max_model_len = config.max_model_len or pooling.max_len
    if max_model_len > pooling.backbone.max_len:
        raise InvalidRequest(
            f"the model was trained for {pooling.backbone.max_len} tokens, not {max_model_len}",
            "max_model_len",
        )
    device = select_device(config.device)
    dtype = select_dtype(config.dtype, pooling.backbone.dtype, device)
    if config.load_format == "dummy":
        identity = hashlib.sha256(b"dummy" + str(config.seed).encode()).digest()
        source = DummyWeights(dtype, device, config.seed)
        model, pooler = _build(pooling, source, max_model_len, device)
    else:
        path = checkpoint.resolve_checkpoint(config.model, config.revision, weights=True)
        files = checkpoint.weight_files(path)
        with ThreadPoolExecutor(max_workers=1) as pool:
            digest = pool.submit(checkpoint.weights_digest, files)
            with SafetensorsWeights(
                files, dtype, device, show_progress=config.show_progress
            ) as weights:
                model, pooler = _build(pooling, weights, max_model_len, device)
            identity = digest.result()
    info = PoolingModelInfo(
        name=config.model,
        fingerprint=_fingerprint(pooling, str(dtype), identity),
        max_model_len=max_model_len,
        vocab_size=pooling.backbone.vocab_size,
        pooling=pooling.info,
        device=describe_device(device),
    )
    return PoolingRunner(info, model, _attention(pooling), pooler, device)


def _build(
    pooling: PoolingConfig, source: _Weights, max_model_len: int, device: torch.device
) -> tuple[Decoder | Encoder, Pooler]:
    backbone = pooling.backbone
    if isinstance(backbone, EncoderConfig):
        weights = _AnyName(source, backbone.prefix)
        return Encoder(backbone, weights), Pooler(pooling, weights)
    weights = _AnyName(source, "model.")
    decoder = Decoder(backbone, weights, max_model_len, device, has_head=False)
    return decoder, Pooler(pooling, weights)


def _attention(pooling: PoolingConfig) -> PackedAttention:
    backbone = pooling.backbone
    if isinstance(backbone, EncoderConfig):
        return PackedAttention((0,) * backbone.num_layers, causal=False)
    return PackedAttention(backbone.windows, causal=True)


def _fingerprint(pooling: PoolingConfig, dtype: str, weights: bytes) -> bytes:
    """SHA-256 of everything that results depend on."""
    canonical = json.dumps([asdict(pooling), dtype], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(b"baton-pooling-1" + canonical.encode() + weights).digest()
