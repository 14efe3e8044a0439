"""Every setting of Baton, declared once: name, type, default, bounds and help.

Names and meanings are vLLM's where vLLM has them.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?) ?(?P<unit>[kmg]i?|)b?")


def _parse_size(value: object) -> object:
    """'512MiB', '2g' or a plain number → bytes; pydantic refuses what is no string either."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip().lower())
    if match is None:
        raise ValueError("must be a number of bytes, e.g. 512MiB or 2g")
    return int(float(match["number"]) * _UNITS[match["unit"]])


def _split_list(value: object) -> object:
    return [part for part in value.split(",") if part] if isinstance(value, str) else value


def _json_object(value: object) -> object:
    """JSON text of an object; YAML may have the object itself."""
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        parsed = json.loads(text)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise ValueError("must be a JSON object")
    return text


def _redis_url(url: str) -> str:
    from baton.redis_client import check_url  # half as long to import as the command line

    check_url(url)
    return url


ByteSize = Annotated[int, BeforeValidator(_parse_size), Field(gt=0)]
JsonText = Annotated[str, BeforeValidator(_json_object)]
RedisUrl = Annotated[str, AfterValidator(_redis_url)]
StrList = Annotated[tuple[str, ...], BeforeValidator(_split_list)]
SecretList = Annotated[tuple[SecretStr, ...], BeforeValidator(_split_list)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelSettings(Section):
    """Model"""

    model: str | None = Field(None, description="Directory or hub id; the bundled demo if absent.")
    served_model_name: str | None = Field(None, description="Name in the API; --model if absent.")
    tokenizer: str | None = Field(None, description="Directory or hub id; --model if absent.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="Of weights, activations and KV; auto = the checkpoint's, or float32 on a CPU "
        "that only emulates it.",
    )
    max_model_len: int | None = Field(None, gt=0, description="Tokens of prompt + output.")
    load_format: Literal["auto", "safetensors", "dummy"] = Field(
        "auto", description="dummy = random weights of the configured shape."
    )
    seed: int = Field(
        0, description="Of dummy weights, and of the seeds that LLM draws; requests carry theirs."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the model runs.")
    runner: Literal["auto", "generate", "pooling"] = Field(
        "auto",
        description="What the model is for: text, or embeddings and scores; auto = as its files "
        "say.",
    )
    hf_overrides: JsonText | None = Field(
        None, description="JSON put over the model's config.json, e.g. to say what it leaves out."
    )
    pooler_config: JsonText | None = Field(
        None,
        description="JSON with pooling_type (CLS, LAST, MEAN) and use_activation of a pooling "
        "model, over its files.",
    )

    @property
    def model_source(self) -> str:
        """Directory or hub id of the weights; without `model`, the bundled demo."""
        return self.model or str(Path(__file__).parent / "demo_model")

    @property
    def tokenizer_source(self) -> str:
        return self.tokenizer or self.model_source


class EngineSettings(Section):
    """Engine and KV cache"""

    block_size: int = Field(16, gt=0, multiple_of=16, description="Tokens in a KV block.")
    kv_cache_memory_bytes: ByteSize | None = Field(
        None, description="Size of the KV pool, e.g. 2GiB; derived from free memory if absent."
    )
    gpu_memory_utilization: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Share of the GPU's memory for weights, KV and activations of one worker; "
        "`baton serve` divides it among the workers on one GPU.",
    )
    enable_prefix_caching: bool = Field(True, description="Reuse the KV of equal prefixes.")
    max_num_seqs: int = Field(64, gt=0, le=4096, description="Sequences in one step.")
    max_num_batched_tokens: int = Field(
        512, gt=0, description="Tokens in one step; longer prefills are cut into chunks."
    )
    batch_invariant: bool | None = Field(
        None,
        description="Results do not depend on batch, chunk or padding, bit for bit; on where it "
        "costs little if absent.",
    )
    enforce_eager: bool = Field(
        False, description="On CUDA: launch each kernel of a decode step; no CUDA graphs."
    )
    threads: int | None = Field(
        None, gt=0, description="CPU threads of one worker; its share of the cores if absent."
    )


class ClusterSettings(Section):
    """Cluster"""

    cluster: str = Field(
        "default", pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="Name that separates fleets."
    )
    redis_url: RedisUrl | None = Field(
        None, description="redis://, rediss:// or unix://; `baton serve` starts its own if absent."
    )
    cluster_token: SecretList = Field(
        (), description="Secret between gateways and workers; two, comma-separated, while rotating."
    )


class WorkerSettings(Section):
    """Worker"""

    worker_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_.-]{1,64}$",
        description="Name in logs and in /v1/cluster; made from role and host if absent.",
    )
    worker_host: str = Field("127.0.0.1", description="Address the worker listens on.")
    worker_port: int = Field(0, ge=0, le=65535, description="gRPC port; 0 = any free one.")
    advertise_host: str | None = Field(
        None,
        description="Address others reach it at; --worker-host, or this host's own, if absent.",
    )
    metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus port; 0 = any free one.")
    transports: StrList = Field(
        ("shm", "ucx", "grpc"),
        description="KV transports to offer and use, in order of preference.",
    )
    kv_staging_memory_bytes: ByteSize = Field(
        ByteSize(512 << 20),
        gt=0,
        description="KV on its way, packed and not yet unpacked, in each direction; beyond, "
        "fetches wait.",
    )
    lease_ms: int = Field(
        30_000, gt=0, description="How long KV is kept for a decode worker that shows no progress."
    )
    lease_watermark: float = Field(
        0.8, gt=0, le=1, description="Share of the KV pool that leases may pin."
    )
    worker_drain_timeout_s: float = Field(
        30.0, gt=0, description="How long running work may go on after SIGTERM."
    )
    failpoint: StrList = Field(
        (), description="NAME:COUNT=kill|stop|error, for fault tests; refused without --test-hooks."
    )
    test_hooks: bool = Field(False, description="Allow --failpoint. Never in production.")


class GatewaySettings(Section):
    """Gateway"""

    host: str = Field("127.0.0.1", description="Address of the HTTP server.")
    port: int = Field(8000, ge=0, le=65535, description="Port of the HTTP server.")
    api_key: SecretList = Field((), description="Keys that clients must present; comma-separated.")
    slo_ttft_ms: float | None = Field(
        None, gt=0, description="Refuse requests predicted to miss this time to first token."
    )
    slo_tpot_ms: float = Field(
        200.0, gt=0, description="Decode workers prefill locally only within this time per token."
    )
    prefix_fetch: Literal["auto", "always", "off"] = Field(
        "auto",
        description="A worker takes a prefix that another one holds: auto = when that is predicted "
        "to be faster than computing it; always = whenever there is one.",
    )
    local_prefill: Literal["auto", "fallback"] = Field(
        "auto",
        description="auto = also when a decode worker is predicted to be faster; fallback = only "
        "when no prefill worker can.",
    )
    rebalance: bool = Field(
        True,
        description="Move running requests between decode workers when that is predicted to pay.",
    )
    max_pending_requests: int = Field(
        1024, gt=0, description="Open requests before new ones get 429."
    )
    request_timeout_s: float = Field(600.0, gt=0, description="Deadline of one request.")
    tokenizer_threads: int = Field(2, gt=0, description="Threads that tokenize and render.")
    drain_timeout_s: float = Field(
        30.0, gt=0, description="How long streams may go on after SIGTERM."
    )
    enable_auto_tool_choice: bool = Field(
        False, description="Find calls of tools in what the model writes; needs a parser."
    )
    tool_call_parser: Literal["hermes", "llama3_json", "mistral", "pythonic", "qwen3"] | None = (
        Field(None, description="The format in which the model calls tools.")
    )
    reasoning_parser: Literal["deepseek_r1", "qwen3"] | None = Field(
        None, description="How the model sets its reasoning apart."
    )
    metrics_compat: Literal["vllm", "none"] = Field(
        "vllm", description="Whose names /metrics has besides Baton's own."
    )
    generation_config: str = Field(
        "auto",
        description="Defaults of sampling: auto = the model's generation_config.json; vllm = none; "
        "else a folder or file.",
    )
    override_generation_config: JsonText = Field(
        "{}", description='JSON put over it, e.g. {"temperature": 0.5}.'
    )
    return_tokens_as_token_ids: bool = Field(
        False, description="Show tokens of logprobs as token_id:N."
    )
    stream_interval: int = Field(1, gt=0, description="Tokens in one chunk of a stream, at least.")
    response_redis_url: RedisUrl | None = Field(
        None, description="Where /v1/responses stores; --redis-url if absent."
    )
    response_ttl_s: float = Field(
        86_400.0, ge=0, description="How long a response is stored; 0 = not at all."
    )
    response_store_bytes: ByteSize = Field(
        32 * 2**20, description="Stored responses of one API key; the oldest make room."
    )
    max_response_bytes: ByteSize = Field(4 * 2**20, description="One stored response.")
    max_background_responses: int = Field(
        256, gt=0, description="Responses that one gateway runs in the background."
    )


class LimitSettings(Section):
    """Limits of one HTTP request"""

    max_body_bytes: ByteSize = Field(16 * 2**20, description="Largest request body.")
    max_buffered_body_bytes: ByteSize = Field(
        256 * 2**20, description="Bodies of all requests that are being read or answered."
    )
    max_header_bytes: ByteSize = Field(64 * 2**10, description="Request line and headers together.")
    max_headers: int = Field(100, gt=0, description="Number of headers.")
    max_json_depth: int = Field(64, gt=0, le=200, description="Nesting of a JSON body.")
    max_json_keys: int = Field(2**17, gt=0, description="Keys of all objects of a JSON body.")
    max_json_values: int = Field(2**20, gt=0, description="Values of a JSON body.")
    max_choices: int = Field(128, gt=0, le=4096, description="Prompts × n.")
    max_inputs: int = Field(
        2048, gt=0, le=4096, description="Texts of one request for embeddings or scores."
    )
    max_request_tokens: int = Field(
        4 * 2**20,
        gt=0,
        description="Tokens that one request may take: prompts, and n × max_tokens.",
    )
    max_text_chars: int = Field(4 * 2**20, gt=0, description="Characters of a text to tokenize.")
    header_timeout_s: float = Field(10.0, gt=0, description="To receive the headers.")
    body_timeout_s: float = Field(30.0, gt=0, description="To receive the body.")
    slow_client_timeout_s: float = Field(
        60.0, gt=0, description="How long a client may take nothing of an answer."
    )
    sse_keep_alive_interval: float = Field(
        15.0, ge=0, description="Seconds of silence until a stream gets a comment; 0 = never."
    )


class LogSettings(Section):
    """Logging"""

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Level.")
    log_format: Literal["text", "json"] = Field("text", description="Lines for people or machines.")
    print_config: bool = Field(True, description="Print the resolved settings at start.")
    otlp_traces_endpoint: str | None = Field(
        None, description="OTLP collector (gRPC) for spans, http://host:4317; needs baton[otel]."
    )


class FleetSettings(Section):
    """Fleet"""

    prefill_workers: int = Field(1, ge=0, description="Prefill workers on this host.")
    decode_workers: int = Field(1, ge=0, description="Decode workers on this host.")
    pooling_workers: int = Field(
        1, ge=0, description="Workers on this host of a pooling model, which has no others."
    )
