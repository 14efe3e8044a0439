from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]
    ROLE_BOTH: _ClassVar[Role]
    ROLE_POOLING: _ClassVar[Role]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_ABORT: _ClassVar[FinishReason]
    FINISH_REASON_REPETITION: _ClassVar[FinishReason]

class Cause(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CAUSE_UNSPECIFIED: _ClassVar[Cause]
    CAUSE_INVALID_REQUEST: _ClassVar[Cause]
    CAUSE_CONTEXT_LENGTH_EXCEEDED: _ClassVar[Cause]
    CAUSE_MODEL_NOT_FOUND: _ClassVar[Cause]
    CAUSE_UNAUTHENTICATED: _ClassVar[Cause]
    CAUSE_NEVER_FITS: _ClassVar[Cause]
    CAUSE_NO_ROOM: _ClassVar[Cause]
    CAUSE_OVERLOADED: _ClassVar[Cause]
    CAUSE_DRAINING: _ClassVar[Cause]
    CAUSE_NO_WORKER: _ClassVar[Cause]
    CAUSE_WORKER_LOST: _ClassVar[Cause]
    CAUSE_SESSION_LOST: _ClassVar[Cause]
    CAUSE_DEADLINE_EXCEEDED: _ClassVar[Cause]
    CAUSE_CANCELLED: _ClassVar[Cause]
    CAUSE_STEP_FAILED: _ClassVar[Cause]
    CAUSE_NON_FINITE_LOGITS: _ClassVar[Cause]
    CAUSE_TICKET_FORGED: _ClassVar[Cause]
    CAUSE_TICKET_EXPIRED: _ClassVar[Cause]
    CAUSE_EPOCH_MISMATCH: _ClassVar[Cause]
    CAUSE_TENANT_MISMATCH: _ClassVar[Cause]
    CAUSE_MODEL_MISMATCH: _ClassVar[Cause]
    CAUSE_TOKENS_MISMATCH: _ClassVar[Cause]
    CAUSE_LEASE_UNKNOWN: _ClassVar[Cause]
    CAUSE_LAYOUT_INCOMPATIBLE: _ClassVar[Cause]
    CAUSE_FRAME_CORRUPT: _ClassVar[Cause]
    CAUSE_FRAME_ORDER: _ClassVar[Cause]
    CAUSE_FRAME_TRUNCATED: _ClassVar[Cause]
    CAUSE_TRANSPORT_FAILED: _ClassVar[Cause]
    CAUSE_TRANSFER_STALLED: _ClassVar[Cause]
    CAUSE_PROTOCOL: _ClassVar[Cause]
    CAUSE_UNSUPPORTED: _ClassVar[Cause]
    CAUSE_INTERNAL: _ClassVar[Cause]

class KVKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KV_KIND_UNSPECIFIED: _ClassVar[KVKind]
    KV_KIND_FULL: _ClassVar[KVKind]
    KV_KIND_WINDOW: _ClassVar[KVKind]
    KV_KIND_LATENT: _ClassVar[KVKind]
    KV_KIND_STATE: _ClassVar[KVKind]

class StructuredKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STRUCTURED_KIND_UNSPECIFIED: _ClassVar[StructuredKind]
    STRUCTURED_KIND_JSON_OBJECT: _ClassVar[StructuredKind]
    STRUCTURED_KIND_JSON_SCHEMA: _ClassVar[StructuredKind]
    STRUCTURED_KIND_REGEX: _ClassVar[StructuredKind]
    STRUCTURED_KIND_CHOICE: _ClassVar[StructuredKind]
    STRUCTURED_KIND_GRAMMAR: _ClassVar[StructuredKind]
    STRUCTURED_KIND_STRUCTURAL_TAG: _ClassVar[StructuredKind]

class PoolingTask(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POOLING_TASK_UNSPECIFIED: _ClassVar[PoolingTask]
    POOLING_TASK_EMBED: _ClassVar[PoolingTask]
    POOLING_TASK_SCORE: _ClassVar[PoolingTask]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role
ROLE_BOTH: Role
ROLE_POOLING: Role
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_ABORT: FinishReason
FINISH_REASON_REPETITION: FinishReason
CAUSE_UNSPECIFIED: Cause
CAUSE_INVALID_REQUEST: Cause
CAUSE_CONTEXT_LENGTH_EXCEEDED: Cause
CAUSE_MODEL_NOT_FOUND: Cause
CAUSE_UNAUTHENTICATED: Cause
CAUSE_NEVER_FITS: Cause
CAUSE_NO_ROOM: Cause
CAUSE_OVERLOADED: Cause
CAUSE_DRAINING: Cause
CAUSE_NO_WORKER: Cause
CAUSE_WORKER_LOST: Cause
CAUSE_SESSION_LOST: Cause
CAUSE_DEADLINE_EXCEEDED: Cause
CAUSE_CANCELLED: Cause
CAUSE_STEP_FAILED: Cause
CAUSE_NON_FINITE_LOGITS: Cause
CAUSE_TICKET_FORGED: Cause
CAUSE_TICKET_EXPIRED: Cause
CAUSE_EPOCH_MISMATCH: Cause
CAUSE_TENANT_MISMATCH: Cause
CAUSE_MODEL_MISMATCH: Cause
CAUSE_TOKENS_MISMATCH: Cause
CAUSE_LEASE_UNKNOWN: Cause
CAUSE_LAYOUT_INCOMPATIBLE: Cause
CAUSE_FRAME_CORRUPT: Cause
CAUSE_FRAME_ORDER: Cause
CAUSE_FRAME_TRUNCATED: Cause
CAUSE_TRANSPORT_FAILED: Cause
CAUSE_TRANSFER_STALLED: Cause
CAUSE_PROTOCOL: Cause
CAUSE_UNSUPPORTED: Cause
CAUSE_INTERNAL: Cause
KV_KIND_UNSPECIFIED: KVKind
KV_KIND_FULL: KVKind
KV_KIND_WINDOW: KVKind
KV_KIND_LATENT: KVKind
KV_KIND_STATE: KVKind
STRUCTURED_KIND_UNSPECIFIED: StructuredKind
STRUCTURED_KIND_JSON_OBJECT: StructuredKind
STRUCTURED_KIND_JSON_SCHEMA: StructuredKind
STRUCTURED_KIND_REGEX: StructuredKind
STRUCTURED_KIND_CHOICE: StructuredKind
STRUCTURED_KIND_GRAMMAR: StructuredKind
STRUCTURED_KIND_STRUCTURAL_TAG: StructuredKind
POOLING_TASK_UNSPECIFIED: PoolingTask
POOLING_TASK_EMBED: PoolingTask
POOLING_TASK_SCORE: PoolingTask

class LegId(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class LogitBias(_message.Message):
    __slots__ = ("token_id", "bias")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    bias: float
    def __init__(self, token_id: _Optional[int] = ..., bias: _Optional[float] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class RepetitionDetection(_message.Message):
    __slots__ = ("max_pattern_size", "min_pattern_size", "min_count")
    MAX_PATTERN_SIZE_FIELD_NUMBER: _ClassVar[int]
    MIN_PATTERN_SIZE_FIELD_NUMBER: _ClassVar[int]
    MIN_COUNT_FIELD_NUMBER: _ClassVar[int]
    max_pattern_size: int
    min_pattern_size: int
    min_count: int
    def __init__(self, max_pattern_size: _Optional[int] = ..., min_pattern_size: _Optional[int] = ..., min_count: _Optional[int] = ...) -> None: ...

class StructuredOutput(_message.Message):
    __slots__ = ("kind", "text", "compact")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    COMPACT_FIELD_NUMBER: _ClassVar[int]
    kind: StructuredKind
    text: str
    compact: bool
    def __init__(self, kind: _Optional[_Union[StructuredKind, str]] = ..., text: _Optional[str] = ..., compact: _Optional[bool] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "max_tokens", "min_tokens", "ignore_eos", "stop_token_ids", "logprobs", "logit_bias", "allowed_token_ids", "bad_words", "prompt_logprobs", "logprob_token_ids", "repetition_detection", "structured_outputs", "processed_logprobs")
    N_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    REPETITION_DETECTION_FIELD_NUMBER: _ClassVar[int]
    STRUCTURED_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    PROCESSED_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    n: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    max_tokens: int
    min_tokens: int
    ignore_eos: bool
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: int
    logit_bias: _containers.RepeatedCompositeFieldContainer[LogitBias]
    allowed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    bad_words: _containers.RepeatedCompositeFieldContainer[TokenIds]
    prompt_logprobs: int
    logprob_token_ids: _containers.RepeatedScalarFieldContainer[int]
    repetition_detection: RepetitionDetection
    structured_outputs: StructuredOutput
    processed_logprobs: bool
    def __init__(self, n: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., ignore_eos: _Optional[bool] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[int] = ..., logit_bias: _Optional[_Iterable[_Union[LogitBias, _Mapping]]] = ..., allowed_token_ids: _Optional[_Iterable[int]] = ..., bad_words: _Optional[_Iterable[_Union[TokenIds, _Mapping]]] = ..., prompt_logprobs: _Optional[int] = ..., logprob_token_ids: _Optional[_Iterable[int]] = ..., repetition_detection: _Optional[_Union[RepetitionDetection, _Mapping]] = ..., structured_outputs: _Optional[_Union[StructuredOutput, _Mapping]] = ..., processed_logprobs: _Optional[bool] = ...) -> None: ...

class Committed(_message.Message):
    __slots__ = ("token_ids", "finished")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finished: bool
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., finished: _Optional[bool] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("prompt_token_ids", "sampling", "committed", "salt", "priority", "deadline_ms", "traceparent")
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: SamplingParams
    committed: _containers.RepeatedCompositeFieldContainer[Committed]
    salt: bytes
    priority: int
    deadline_ms: int
    traceparent: str
    def __init__(self, prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., committed: _Optional[_Iterable[_Union[Committed, _Mapping]]] = ..., salt: _Optional[bytes] = ..., priority: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., traceparent: _Optional[str] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Logprobs(_message.Message):
    __slots__ = ("logprob", "rank", "top", "asked")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    rank: int
    top: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    asked: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    def __init__(self, logprob: _Optional[float] = ..., rank: _Optional[int] = ..., top: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ..., asked: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ...) -> None: ...

class TokenChunk(_message.Message):
    __slots__ = ("leg", "choice", "start", "token_ids", "logprobs", "finish_reason", "stop_token_id")
    LEG_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    leg: LegId
    choice: int
    start: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[Logprobs]
    finish_reason: FinishReason
    stop_token_id: int
    def __init__(self, leg: _Optional[_Union[LegId, _Mapping]] = ..., choice: _Optional[int] = ..., start: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[Logprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., stop_token_id: _Optional[int] = ...) -> None: ...

class KVGroup(_message.Message):
    __slots__ = ("kind", "num_layers", "num_kv_heads", "head_dim", "dtype", "window")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    kind: KVKind
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    window: int
    def __init__(self, kind: _Optional[_Union[KVKind, str]] = ..., num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[str] = ..., window: _Optional[int] = ...) -> None: ...

class KVLayout(_message.Message):
    __slots__ = ("groups", "block_size", "tp_size")
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[KVGroup]
    block_size: int
    tp_size: int
    def __init__(self, groups: _Optional[_Iterable[_Union[KVGroup, _Mapping]]] = ..., block_size: _Optional[int] = ..., tp_size: _Optional[int] = ...) -> None: ...

class KVTicket(_message.Message):
    __slots__ = ("transfer_id", "address", "incarnation", "fingerprint", "layout", "num_tokens", "tokens_digest", "salt_digest", "expires_at_ms", "key_id", "mac")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SALT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_MS_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    address: str
    incarnation: bytes
    fingerprint: bytes
    layout: KVLayout
    num_tokens: int
    tokens_digest: bytes
    salt_digest: bytes
    expires_at_ms: int
    key_id: int
    mac: bytes
    def __init__(self, transfer_id: _Optional[bytes] = ..., address: _Optional[str] = ..., incarnation: _Optional[bytes] = ..., fingerprint: _Optional[bytes] = ..., layout: _Optional[_Union[KVLayout, _Mapping]] = ..., num_tokens: _Optional[int] = ..., tokens_digest: _Optional[bytes] = ..., salt_digest: _Optional[bytes] = ..., expires_at_ms: _Optional[int] = ..., key_id: _Optional[int] = ..., mac: _Optional[bytes] = ...) -> None: ...

class TransportAddress(_message.Message):
    __slots__ = ("name", "address")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: str
    def __init__(self, name: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class PoolingInfo(_message.Message):
    __slots__ = ("task", "num_values", "is_matryoshka", "dimensions", "tells_pairs")
    TASK_FIELD_NUMBER: _ClassVar[int]
    NUM_VALUES_FIELD_NUMBER: _ClassVar[int]
    IS_MATRYOSHKA_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    TELLS_PAIRS_FIELD_NUMBER: _ClassVar[int]
    task: PoolingTask
    num_values: int
    is_matryoshka: bool
    dimensions: _containers.RepeatedScalarFieldContainer[int]
    tells_pairs: bool
    def __init__(self, task: _Optional[_Union[PoolingTask, str]] = ..., num_values: _Optional[int] = ..., is_matryoshka: _Optional[bool] = ..., dimensions: _Optional[_Iterable[int]] = ..., tells_pairs: _Optional[bool] = ...) -> None: ...

class WorkerInfo(_message.Message):
    __slots__ = ("worker_id", "incarnation", "role", "model", "fingerprint", "layout", "address", "transports", "host_id", "pid", "device", "num_blocks", "max_model_len", "max_num_seqs", "vocab_size", "eos_token_ids", "capabilities", "protocol_major", "protocol_minor", "pooling")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MAJOR_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MINOR_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: bytes
    role: Role
    model: str
    fingerprint: bytes
    layout: KVLayout
    address: str
    transports: _containers.RepeatedCompositeFieldContainer[TransportAddress]
    host_id: str
    pid: int
    device: str
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    protocol_major: int
    protocol_minor: int
    pooling: PoolingInfo
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[bytes] = ..., role: _Optional[_Union[Role, str]] = ..., model: _Optional[str] = ..., fingerprint: _Optional[bytes] = ..., layout: _Optional[_Union[KVLayout, _Mapping]] = ..., address: _Optional[str] = ..., transports: _Optional[_Iterable[_Union[TransportAddress, _Mapping]]] = ..., host_id: _Optional[str] = ..., pid: _Optional[int] = ..., device: _Optional[str] = ..., num_blocks: _Optional[int] = ..., max_model_len: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., vocab_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., capabilities: _Optional[_Iterable[str]] = ..., protocol_major: _Optional[int] = ..., protocol_minor: _Optional[int] = ..., pooling: _Optional[_Union[PoolingInfo, _Mapping]] = ...) -> None: ...

class LinkRate(_message.Message):
    __slots__ = ("transport", "same_host", "bytes_per_s")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    SAME_HOST_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    transport: str
    same_host: bool
    bytes_per_s: float
    def __init__(self, transport: _Optional[str] = ..., same_host: _Optional[bool] = ..., bytes_per_s: _Optional[float] = ...) -> None: ...

class WorkerSnapshot(_message.Message):
    __slots__ = ("role", "num_running", "num_waiting", "num_waiting_for_kv", "free_blocks", "total_blocks", "num_leases", "num_quarantined_blocks", "queued_prefill_tokens", "context_tokens", "step_age_ms", "draining", "link_rates")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FOR_KV_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_LEASES_FIELD_NUMBER: _ClassVar[int]
    NUM_QUARANTINED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    LINK_RATES_FIELD_NUMBER: _ClassVar[int]
    role: Role
    num_running: int
    num_waiting: int
    num_waiting_for_kv: int
    free_blocks: int
    total_blocks: int
    num_leases: int
    num_quarantined_blocks: int
    queued_prefill_tokens: int
    context_tokens: int
    step_age_ms: float
    draining: bool
    link_rates: _containers.RepeatedCompositeFieldContainer[LinkRate]
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_waiting_for_kv: _Optional[int] = ..., free_blocks: _Optional[int] = ..., total_blocks: _Optional[int] = ..., num_leases: _Optional[int] = ..., num_quarantined_blocks: _Optional[int] = ..., queued_prefill_tokens: _Optional[int] = ..., context_tokens: _Optional[int] = ..., step_age_ms: _Optional[float] = ..., draining: _Optional[bool] = ..., link_rates: _Optional[_Iterable[_Union[LinkRate, _Mapping]]] = ...) -> None: ...

class StepTiming(_message.Message):
    __slots__ = ("num_prefill_tokens", "num_cached_tokens", "num_decodes", "context_tokens", "duration_ms")
    NUM_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODES_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    num_prefill_tokens: int
    num_cached_tokens: int
    num_decodes: int
    context_tokens: int
    duration_ms: float
    def __init__(self, num_prefill_tokens: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., num_decodes: _Optional[int] = ..., context_tokens: _Optional[int] = ..., duration_ms: _Optional[float] = ...) -> None: ...
