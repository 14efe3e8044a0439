"""From settings to an engine's own configs: what `LLM` and workers have in common."""

from baton.engine.config import EngineConfig
from baton.engine.runner import ModelRunner
from baton.engine.runner_config import RunnerConfig
from baton.errors import Cause, InvalidRequest
from baton.settings import EngineSettings, ModelSettings
from baton.text import Tokenizer
from baton.types import Role


def runner_config(model: ModelSettings, engine: EngineSettings) -> RunnerConfig:
    return RunnerConfig(
        model=model.model_source,
        revision=model.revision,
        load_format=model.load_format,
        dtype=model.dtype,
        device=model.device,
        block_size=engine.block_size,
        max_model_len=model.max_model_len,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_num_seqs=engine.max_num_seqs,
        kv_cache_memory_bytes=engine.kv_cache_memory_bytes,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        batch_invariant=engine.batch_invariant,
        enforce_eager=engine.enforce_eager,
        hf_overrides=model.hf_overrides,
        pooler_config=model.pooler_config,
        seed=model.seed,
    )


def load_tokenizer(model: ModelSettings) -> Tokenizer:
    """
    Raises:
        InvalidRequest: UNSUPPORTED: there is none.
    """
    try:
        return Tokenizer.from_pretrained(model.tokenizer_source, revision=model.revision)
    except ValueError as error:
        message = "this worker has no tokenizer for structured output"
        raise InvalidRequest(message, "structured_outputs", Cause.UNSUPPORTED) from error


def engine_config(
    settings: EngineSettings, runner: ModelRunner, role: Role = Role.BOTH
) -> EngineConfig:
    """
    Raises:
        ValueError: the settings contradict each other.
    """
    info = runner.info
    return EngineConfig(
        num_blocks=runner.kv_cache.num_blocks,
        block_size=settings.block_size,
        max_model_len=info.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=max(settings.max_num_batched_tokens, settings.max_num_seqs),
        enable_prefix_caching=settings.enable_prefix_caching,
        eos_token_ids=info.eos_token_ids,
        vocab_size=info.vocab_size,
        num_layers=info.num_layers,
        fingerprint=info.fingerprint,
        role=role,
    )
