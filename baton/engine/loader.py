"""From a RunnerConfig to a ModelRunner: find the files, load the weights, size the pool."""

import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from baton.engine import checkpoint
from baton.engine.device import describe_device, num_kv_blocks, select_device, select_dtype
from baton.engine.graphs import DecodeGraphs, cuda_capture, graph_sizes
from baton.engine.invariance import pad_linears, probe_invariance
from baton.engine.kv_cache import KVCache, dtype_name, kv_layout
from baton.engine.layers.attention import AttentionBackend, KernelBackend, make_attention
from baton.engine.model_config import ModelConfig, load_model_config
from baton.engine.models.decoder import Decoder
from baton.engine.runner import ModelInfo, ModelRunner
from baton.engine.runner_config import RunnerConfig
from baton.engine.sampler import Sampler
from baton.engine.warmup import largest_batch, measure_workspace, num_warmup_blocks
from baton.engine.weights import DummyWeights, SafetensorsWeights
from baton.errors import InvalidRequest
from baton.grammar import Grammars
from baton.kernels.paged_attention_cpu import Invariance
from baton.kernels.paged_attention_native import is_native
from baton.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is decided before the weights are read."""

    model: ModelConfig
    dtype: torch.dtype
    device: torch.device
    max_model_len: int


def load_runner(
    config: RunnerConfig, load_tokenizer: Callable[[], Tokenizer] | None = None
) -> ModelRunner:
    """Load a model and allocate its KV pool.

    Args:
        load_tokenizer: called when the first structured output is asked for; None: there is none.

    Raises:
        InvalidRequest: the model cannot be had, is not supported, is damaged, or does not fit;
            `param` names the setting.
    """
    path = checkpoint.resolve_checkpoint(config.model, config.revision, weights=False)
    plan = _make_plan(config, load_model_config(path, config.hf_overrides))
    model, weights_id = _load_model(config, plan)
    invariance = _make_invariant(config, plan, model)
    workspace = _measure_workspace(config, plan, model, weights_id)
    cache, max_model_len = _make_cache(config, plan, workspace)
    info = _describe(config, plan, weights_id, max_model_len, invariance)
    attention = make_attention(plan.model, cache, invariance)
    grammars = Grammars(load_tokenizer, info.vocab_size, info.eos_token_ids)
    sampler = Sampler(info.eos_token_ids, grammars)
    graphs = _capture(config, plan, model, attention, max_model_len)
    return ModelRunner(info, model, cache, attention, sampler, grammars, graphs)


def _describe(
    config: RunnerConfig,
    plan: _Plan,
    weights_id: bytes,
    max_model_len: int,
    invariance: Invariance | None,
) -> ModelInfo:
    return ModelInfo(
        name=config.model,
        fingerprint=checkpoint.model_fingerprint(plan.model, dtype_name(plan.dtype), weights_id),
        max_model_len=max_model_len,
        vocab_size=plan.model.vocab_size,
        num_layers=plan.model.num_layers,
        eos_token_ids=plan.model.eos_token_ids,
        batch_invariant=invariance is not None,
        device=describe_device(plan.device),
    )


def _make_plan(config: RunnerConfig, model: ModelConfig) -> _Plan:
    longest = model.max_len
    max_model_len = config.max_model_len or longest
    if max_model_len > longest:
        raise InvalidRequest(
            f"the model was trained for {longest} tokens, not {max_model_len}", "max_model_len"
        )
    device = select_device(config.device)
    return _Plan(model, select_dtype(config.dtype, model.dtype, device), device, max_model_len)


def _load_model(config: RunnerConfig, plan: _Plan) -> tuple[Decoder, bytes]:
    """The model, and what identifies its weights."""
    if config.load_format == "dummy":
        random = DummyWeights(plan.dtype, plan.device, config.seed)
        identity = hashlib.sha256(b"dummy" + str(config.seed).encode()).digest()
        return Decoder(plan.model, random, plan.max_model_len, plan.device), identity
    path = checkpoint.resolve_checkpoint(config.model, config.revision, weights=True)
    files = checkpoint.weight_files(path)
    with ThreadPoolExecutor(max_workers=1) as pool:
        digest = pool.submit(checkpoint.weights_digest, files)
        with SafetensorsWeights(
            files, plan.dtype, plan.device, show_progress=config.show_progress
        ) as weights:
            model = Decoder(plan.model, weights, plan.max_model_len, plan.device)
        return model, digest.result()


def _make_invariant(config: RunnerConfig, plan: _Plan, model: Decoder) -> Invariance | None:
    """The padding for batch invariance, applied to the model's linear layers; None = not wanted, or
    not possible and not asked for by name."""
    if config.batch_invariant is False:
        return None
    try:
        if plan.device.type != "cpu":
            raise InvalidRequest("batch invariance is only there on CPU", "batch_invariant")
        shape = plan.model.num_heads, plan.model.num_kv_heads, plan.model.head_dim
        if is_native(*shape, plan.dtype):
            invariance = Invariance()  # nothing needs padding
        else:
            invariance = probe_invariance(plan.model.head_dim, plan.dtype)
        pad_linears(model.linears(), plan.dtype)
    except InvalidRequest as error:
        if config.batch_invariant:
            raise
        log.info("results may depend on the batch: %s", error)
        return None
    return invariance


def _measure_workspace(config: RunnerConfig, plan: _Plan, model: Decoder, weights_id: bytes) -> int:
    """On CUDA: bytes that the largest step takes beside weights and pool; compiles its kernels."""
    if plan.device.type != "cuda":
        return 0
    num_seqs, block_size = config.max_num_seqs, config.block_size
    num_tokens = max(config.max_num_batched_tokens, num_seqs)
    batch = largest_batch(num_tokens, num_seqs, plan.max_model_len, block_size)
    layout = kv_layout(plan.model, block_size, plan.dtype)
    cache = KVCache(layout, num_warmup_blocks(num_tokens, num_seqs, block_size), plan.device)
    attention = make_attention(plan.model, cache, None)
    info = _describe(config, plan, weights_id, plan.max_model_len, None)
    grammars = Grammars(None, info.vocab_size, info.eos_token_ids)
    runner = ModelRunner(info, model, cache, attention, Sampler(info.eos_token_ids), grammars)
    num_bytes = measure_workspace(runner, batch)
    del runner, attention, cache
    torch.cuda.empty_cache()
    log.info("the largest step takes %.2f GiB beside weights and KV", num_bytes / 2**30)
    return num_bytes


def _capture(
    config: RunnerConfig,
    plan: _Plan,
    model: Decoder,
    attention: AttentionBackend,
    max_model_len: int,
) -> DecodeGraphs | None:
    if config.enforce_eager or not isinstance(attention, KernelBackend):
        return None
    with torch.inference_mode():
        return DecodeGraphs(
            model,
            attention,
            config.block_size,
            max_model_len,
            graph_sizes(config.max_num_seqs),
            plan.device,
            cuda_capture(plan.device),
        )


def _make_cache(config: RunnerConfig, plan: _Plan, workspace: int) -> tuple[KVCache, int]:
    """The pool, and the longest sequence that is served with it."""
    layout = kv_layout(plan.model, config.block_size, plan.dtype)
    block_bytes = layout.token_bytes * layout.block_size
    num_blocks = num_kv_blocks(config, block_bytes, plan.max_model_len, plan.device, workspace)
    num_tokens = num_blocks * layout.block_size
    if num_tokens < plan.max_model_len and config.max_model_len is not None:
        raise InvalidRequest(
            f"the KV pool holds {num_tokens} tokens, fewer than max_model_len = "
            f"{plan.max_model_len}: raise kv_cache_memory_bytes or lower max_model_len",
            "kv_cache_memory_bytes",
        )
    if num_tokens < plan.max_model_len:
        log.warning("the KV pool limits sequences to %d tokens", num_tokens)
    cache = KVCache(layout, num_blocks, plan.device)
    log.info("KV pool: %d blocks, %.2f GiB", num_blocks, cache.num_bytes / 2**30)
    return cache, min(plan.max_model_len, num_tokens)
