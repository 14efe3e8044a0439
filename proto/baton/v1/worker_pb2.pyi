from baton.v1 import common_pb2 as _common_pb2
from baton.v1 import kv_pb2 as _kv_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PoolInput(_message.Message):
    __slots__ = ("token_ids", "second_start")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SECOND_START_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    second_start: int
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., second_start: _Optional[int] = ...) -> None: ...

class PoolRequest(_message.Message):
    __slots__ = ("inputs", "use_activation", "dimensions", "priority")
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    USE_ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    inputs: _containers.RepeatedCompositeFieldContainer[PoolInput]
    use_activation: bool
    dimensions: int
    priority: int
    def __init__(self, inputs: _Optional[_Iterable[_Union[PoolInput, _Mapping]]] = ..., use_activation: _Optional[bool] = ..., dimensions: _Optional[int] = ..., priority: _Optional[int] = ...) -> None: ...

class PoolReply(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, values: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: _common_pb2.Request
    def __init__(self, request: _Optional[_Union[_common_pb2.Request, _Mapping]] = ...) -> None: ...

class ScoreReply(_message.Message):
    __slots__ = ("start", "logprobs")
    START_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    start: int
    logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.Logprobs]
    def __init__(self, start: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[_common_pb2.Logprobs, _Mapping]]] = ...) -> None: ...

class PrefixSource(_message.Message):
    __slots__ = ("worker_id", "transports", "host_id", "grant", "predicted_ms", "deadline_ms")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_MS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    transports: _containers.RepeatedCompositeFieldContainer[_common_pb2.TransportAddress]
    host_id: str
    grant: _kv_pb2.Grant
    predicted_ms: float
    deadline_ms: int
    def __init__(self, worker_id: _Optional[str] = ..., transports: _Optional[_Iterable[_Union[_common_pb2.TransportAddress, _Mapping]]] = ..., host_id: _Optional[str] = ..., grant: _Optional[_Union[_kv_pb2.Grant, _Mapping]] = ..., predicted_ms: _Optional[float] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("leg", "request", "prefix")
    LEG_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    leg: _common_pb2.LegId
    request: _common_pb2.Request
    prefix: PrefixSource
    def __init__(self, leg: _Optional[_Union[_common_pb2.LegId, _Mapping]] = ..., request: _Optional[_Union[_common_pb2.Request, _Mapping]] = ..., prefix: _Optional[_Union[PrefixSource, _Mapping]] = ...) -> None: ...

class Bind(_message.Message):
    __slots__ = ("leg", "request", "ticket", "transports", "host_id")
    LEG_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    leg: _common_pb2.LegId
    request: _common_pb2.Request
    ticket: _common_pb2.KVTicket
    transports: _containers.RepeatedCompositeFieldContainer[_common_pb2.TransportAddress]
    host_id: str
    def __init__(self, leg: _Optional[_Union[_common_pb2.LegId, _Mapping]] = ..., request: _Optional[_Union[_common_pb2.Request, _Mapping]] = ..., ticket: _Optional[_Union[_common_pb2.KVTicket, _Mapping]] = ..., transports: _Optional[_Iterable[_Union[_common_pb2.TransportAddress, _Mapping]]] = ..., host_id: _Optional[str] = ...) -> None: ...

class Rebind(_message.Message):
    __slots__ = ("leg", "ticket", "transports", "host_id")
    LEG_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    leg: _common_pb2.LegId
    ticket: _common_pb2.KVTicket
    transports: _containers.RepeatedCompositeFieldContainer[_common_pb2.TransportAddress]
    host_id: str
    def __init__(self, leg: _Optional[_Union[_common_pb2.LegId, _Mapping]] = ..., ticket: _Optional[_Union[_common_pb2.KVTicket, _Mapping]] = ..., transports: _Optional[_Iterable[_Union[_common_pb2.TransportAddress, _Mapping]]] = ..., host_id: _Optional[str] = ...) -> None: ...

class ComputeLocally(_message.Message):
    __slots__ = ("leg", "request", "prefix")
    LEG_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    leg: _common_pb2.LegId
    request: _common_pb2.Request
    prefix: PrefixSource
    def __init__(self, leg: _Optional[_Union[_common_pb2.LegId, _Mapping]] = ..., request: _Optional[_Union[_common_pb2.Request, _Mapping]] = ..., prefix: _Optional[_Union[PrefixSource, _Mapping]] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("leg", "choice")
    LEG_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    leg: _common_pb2.LegId
    choice: int
    def __init__(self, leg: _Optional[_Union[_common_pb2.LegId, _Mapping]] = ..., choice: _Optional[int] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("leg",)
    LEG_FIELD_NUMBER: _ClassVar[int]
    leg: _common_pb2.LegId
    def __init__(self, leg: _Optional[_Union[_common_pb2.LegId, _Mapping]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("seq",)
    SEQ_FIELD_NUMBER: _ClassVar[int]
    seq: int
    def __init__(self, seq: _Optional[int] = ...) -> None: ...

class GatewayMessage(_message.Message):
    __slots__ = ("submit", "bind", "rebind", "compute_locally", "abort", "release", "heartbeat", "checksum")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    BIND_FIELD_NUMBER: _ClassVar[int]
    REBIND_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_LOCALLY_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    bind: Bind
    rebind: Rebind
    compute_locally: ComputeLocally
    abort: Abort
    release: Release
    heartbeat: Heartbeat
    checksum: int
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., bind: _Optional[_Union[Bind, _Mapping]] = ..., rebind: _Optional[_Union[Rebind, _Mapping]] = ..., compute_locally: _Optional[_Union[ComputeLocally, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., checksum: _Optional[int] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("info",)
    INFO_FIELD_NUMBER: _ClassVar[int]
    info: _common_pb2.WorkerInfo
    def __init__(self, info: _Optional[_Union[_common_pb2.WorkerInfo, _Mapping]] = ...) -> None: ...

class Queued(_message.Message):
    __slots__ = ("leg",)
    LEG_FIELD_NUMBER: _ClassVar[int]
    leg: _common_pb2.LegId
    def __init__(self, leg: _Optional[_Union[_common_pb2.LegId, _Mapping]] = ...) -> None: ...

class PrefixFetched(_message.Message):
    __slots__ = ("num_tokens", "cause", "stats")
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    cause: _common_pb2.Cause
    stats: TransferStats
    def __init__(self, num_tokens: _Optional[int] = ..., cause: _Optional[_Union[_common_pb2.Cause, str]] = ..., stats: _Optional[_Union[TransferStats, _Mapping]] = ...) -> None: ...

class Admitted(_message.Message):
    __slots__ = ("leg", "num_cached_tokens", "ticket", "prefix")
    LEG_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    leg: _common_pb2.LegId
    num_cached_tokens: int
    ticket: _common_pb2.KVTicket
    prefix: PrefixFetched
    def __init__(self, leg: _Optional[_Union[_common_pb2.LegId, _Mapping]] = ..., num_cached_tokens: _Optional[int] = ..., ticket: _Optional[_Union[_common_pb2.KVTicket, _Mapping]] = ..., prefix: _Optional[_Union[PrefixFetched, _Mapping]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("leg", "tokens_done", "predicted_ms_left")
    LEG_FIELD_NUMBER: _ClassVar[int]
    TOKENS_DONE_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_MS_LEFT_FIELD_NUMBER: _ClassVar[int]
    leg: _common_pb2.LegId
    tokens_done: int
    predicted_ms_left: float
    def __init__(self, leg: _Optional[_Union[_common_pb2.LegId, _Mapping]] = ..., tokens_done: _Optional[int] = ..., predicted_ms_left: _Optional[float] = ...) -> None: ...

class NoRoom(_message.Message):
    __slots__ = ("leg", "free_blocks", "retry_after_ms")
    LEG_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    leg: _common_pb2.LegId
    free_blocks: int
    retry_after_ms: int
    def __init__(self, leg: _Optional[_Union[_common_pb2.LegId, _Mapping]] = ..., free_blocks: _Optional[int] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class Bound(_message.Message):
    __slots__ = ("leg", "num_cached_tokens")
    LEG_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    leg: _common_pb2.LegId
    num_cached_tokens: int
    def __init__(self, leg: _Optional[_Union[_common_pb2.LegId, _Mapping]] = ..., num_cached_tokens: _Optional[int] = ...) -> None: ...

class TransferStats(_message.Message):
    __slots__ = ("transport", "num_bytes", "num_frames", "num_tokens", "duration_ms", "ready_bytes", "ready_ms")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    READY_BYTES_FIELD_NUMBER: _ClassVar[int]
    READY_MS_FIELD_NUMBER: _ClassVar[int]
    transport: str
    num_bytes: int
    num_frames: int
    num_tokens: int
    duration_ms: float
    ready_bytes: int
    ready_ms: float
    def __init__(self, transport: _Optional[str] = ..., num_bytes: _Optional[int] = ..., num_frames: _Optional[int] = ..., num_tokens: _Optional[int] = ..., duration_ms: _Optional[float] = ..., ready_bytes: _Optional[int] = ..., ready_ms: _Optional[float] = ...) -> None: ...

class Imported(_message.Message):
    __slots__ = ("leg", "stats")
    LEG_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    leg: _common_pb2.LegId
    stats: TransferStats
    def __init__(self, leg: _Optional[_Union[_common_pb2.LegId, _Mapping]] = ..., stats: _Optional[_Union[TransferStats, _Mapping]] = ...) -> None: ...

class KvFailed(_message.Message):
    __slots__ = ("leg", "valid_tokens", "cause", "detail")
    LEG_FIELD_NUMBER: _ClassVar[int]
    VALID_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    leg: _common_pb2.LegId
    valid_tokens: int
    cause: _common_pb2.Cause
    detail: str
    def __init__(self, leg: _Optional[_Union[_common_pb2.LegId, _Mapping]] = ..., valid_tokens: _Optional[int] = ..., cause: _Optional[_Union[_common_pb2.Cause, str]] = ..., detail: _Optional[str] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("leg", "cause", "detail")
    LEG_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    leg: _common_pb2.LegId
    cause: _common_pb2.Cause
    detail: str
    def __init__(self, leg: _Optional[_Union[_common_pb2.LegId, _Mapping]] = ..., cause: _Optional[_Union[_common_pb2.Cause, str]] = ..., detail: _Optional[str] = ...) -> None: ...

class LeaseLost(_message.Message):
    __slots__ = ("leg", "cause")
    LEG_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    leg: _common_pb2.LegId
    cause: _common_pb2.Cause
    def __init__(self, leg: _Optional[_Union[_common_pb2.LegId, _Mapping]] = ..., cause: _Optional[_Union[_common_pb2.Cause, str]] = ...) -> None: ...

class LegMessage(_message.Message):
    __slots__ = ("queued", "admitted", "progress", "no_room", "bound", "imported", "kv_failed", "failed", "lease_lost", "tokens")
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    NO_ROOM_FIELD_NUMBER: _ClassVar[int]
    BOUND_FIELD_NUMBER: _ClassVar[int]
    IMPORTED_FIELD_NUMBER: _ClassVar[int]
    KV_FAILED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    LEASE_LOST_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    queued: Queued
    admitted: Admitted
    progress: Progress
    no_room: NoRoom
    bound: Bound
    imported: Imported
    kv_failed: KvFailed
    failed: Failed
    lease_lost: LeaseLost
    tokens: _common_pb2.TokenChunk
    def __init__(self, queued: _Optional[_Union[Queued, _Mapping]] = ..., admitted: _Optional[_Union[Admitted, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., no_room: _Optional[_Union[NoRoom, _Mapping]] = ..., bound: _Optional[_Union[Bound, _Mapping]] = ..., imported: _Optional[_Union[Imported, _Mapping]] = ..., kv_failed: _Optional[_Union[KvFailed, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., lease_lost: _Optional[_Union[LeaseLost, _Mapping]] = ..., tokens: _Optional[_Union[_common_pb2.TokenChunk, _Mapping]] = ...) -> None: ...

class WorkerTotals(_message.Message):
    __slots__ = ("num_preemptions", "num_failed_fetches", "num_expired_leases", "num_step_tokens", "steps_by_tokens")
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_FAILED_FETCHES_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPIRED_LEASES_FIELD_NUMBER: _ClassVar[int]
    NUM_STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEPS_BY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_preemptions: int
    num_failed_fetches: int
    num_expired_leases: int
    num_step_tokens: int
    steps_by_tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, num_preemptions: _Optional[int] = ..., num_failed_fetches: _Optional[int] = ..., num_expired_leases: _Optional[int] = ..., num_step_tokens: _Optional[int] = ..., steps_by_tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class StepBatch(_message.Message):
    __slots__ = ("messages", "snapshot", "timing", "heartbeat_seq", "totals")
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_SEQ_FIELD_NUMBER: _ClassVar[int]
    TOTALS_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[LegMessage]
    snapshot: _common_pb2.WorkerSnapshot
    timing: _common_pb2.StepTiming
    heartbeat_seq: int
    totals: WorkerTotals
    def __init__(self, messages: _Optional[_Iterable[_Union[LegMessage, _Mapping]]] = ..., snapshot: _Optional[_Union[_common_pb2.WorkerSnapshot, _Mapping]] = ..., timing: _Optional[_Union[_common_pb2.StepTiming, _Mapping]] = ..., heartbeat_seq: _Optional[int] = ..., totals: _Optional[_Union[WorkerTotals, _Mapping]] = ...) -> None: ...

class WorkerMessage(_message.Message):
    __slots__ = ("hello", "step", "checksum")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    step: StepBatch
    checksum: int
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., step: _Optional[_Union[StepBatch, _Mapping]] = ..., checksum: _Optional[int] = ...) -> None: ...
