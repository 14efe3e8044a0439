from baton.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KVRange(_message.Message):
    __slots__ = ("layer_start", "layer_stop", "token_start", "token_stop", "head_start", "head_stop")
    LAYER_START_FIELD_NUMBER: _ClassVar[int]
    LAYER_STOP_FIELD_NUMBER: _ClassVar[int]
    TOKEN_START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_STOP_FIELD_NUMBER: _ClassVar[int]
    HEAD_START_FIELD_NUMBER: _ClassVar[int]
    HEAD_STOP_FIELD_NUMBER: _ClassVar[int]
    layer_start: int
    layer_stop: int
    token_start: int
    token_stop: int
    head_start: int
    head_stop: int
    def __init__(self, layer_start: _Optional[int] = ..., layer_stop: _Optional[int] = ..., token_start: _Optional[int] = ..., token_stop: _Optional[int] = ..., head_start: _Optional[int] = ..., head_stop: _Optional[int] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("salt_digest", "fingerprint", "num_tokens", "duration_ms", "key_id", "mac", "nonce", "last_hash", "source_incarnation", "consumer_incarnation")
    SALT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    LAST_HASH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CONSUMER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    salt_digest: bytes
    fingerprint: bytes
    num_tokens: int
    duration_ms: int
    key_id: int
    mac: bytes
    nonce: bytes
    last_hash: bytes
    source_incarnation: bytes
    consumer_incarnation: bytes
    def __init__(self, salt_digest: _Optional[bytes] = ..., fingerprint: _Optional[bytes] = ..., num_tokens: _Optional[int] = ..., duration_ms: _Optional[int] = ..., key_id: _Optional[int] = ..., mac: _Optional[bytes] = ..., nonce: _Optional[bytes] = ..., last_hash: _Optional[bytes] = ..., source_incarnation: _Optional[bytes] = ..., consumer_incarnation: _Optional[bytes] = ...) -> None: ...

class HashChain(_message.Message):
    __slots__ = ("hashes", "grant")
    HASHES_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    hashes: _containers.RepeatedScalarFieldContainer[bytes]
    grant: Grant
    def __init__(self, hashes: _Optional[_Iterable[bytes]] = ..., grant: _Optional[_Union[Grant, _Mapping]] = ...) -> None: ...

class FetchOpen(_message.Message):
    __slots__ = ("ticket", "chain", "probe_bytes", "range", "layout", "fingerprint", "tokens_digest", "salt_digest", "transport", "consumer", "initial_credit", "lane", "consumer_incarnation", "traceparent", "pace_ms")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    PROBE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RANGE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SALT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    CONSUMER_FIELD_NUMBER: _ClassVar[int]
    INITIAL_CREDIT_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    CONSUMER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    PACE_MS_FIELD_NUMBER: _ClassVar[int]
    ticket: _common_pb2.KVTicket
    chain: HashChain
    probe_bytes: int
    range: KVRange
    layout: _common_pb2.KVLayout
    fingerprint: bytes
    tokens_digest: bytes
    salt_digest: bytes
    transport: str
    consumer: str
    initial_credit: int
    lane: bytes
    consumer_incarnation: bytes
    traceparent: str
    pace_ms: int
    def __init__(self, ticket: _Optional[_Union[_common_pb2.KVTicket, _Mapping]] = ..., chain: _Optional[_Union[HashChain, _Mapping]] = ..., probe_bytes: _Optional[int] = ..., range: _Optional[_Union[KVRange, _Mapping]] = ..., layout: _Optional[_Union[_common_pb2.KVLayout, _Mapping]] = ..., fingerprint: _Optional[bytes] = ..., tokens_digest: _Optional[bytes] = ..., salt_digest: _Optional[bytes] = ..., transport: _Optional[str] = ..., consumer: _Optional[str] = ..., initial_credit: _Optional[int] = ..., lane: _Optional[bytes] = ..., consumer_incarnation: _Optional[bytes] = ..., traceparent: _Optional[str] = ..., pace_ms: _Optional[int] = ...) -> None: ...

class FetchCredit(_message.Message):
    __slots__ = ("num_frames",)
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    num_frames: int
    def __init__(self, num_frames: _Optional[int] = ...) -> None: ...

class FetchDone(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("open", "credit", "done")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    open: FetchOpen
    credit: FetchCredit
    done: FetchDone
    def __init__(self, open: _Optional[_Union[FetchOpen, _Mapping]] = ..., credit: _Optional[_Union[FetchCredit, _Mapping]] = ..., done: _Optional[_Union[FetchDone, _Mapping]] = ...) -> None: ...

class FetchOpened(_message.Message):
    __slots__ = ("epoch", "num_ready_tokens")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_READY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    num_ready_tokens: int
    def __init__(self, epoch: _Optional[int] = ..., num_ready_tokens: _Optional[int] = ...) -> None: ...

class FetchHave(_message.Message):
    __slots__ = ("num_tokens",)
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    def __init__(self, num_tokens: _Optional[int] = ...) -> None: ...

class FetchFailed(_message.Message):
    __slots__ = ("cause", "detail")
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    cause: _common_pb2.Cause
    detail: str
    def __init__(self, cause: _Optional[_Union[_common_pb2.Cause, str]] = ..., detail: _Optional[str] = ...) -> None: ...

class FetchReply(_message.Message):
    __slots__ = ("opened", "have", "frame", "failed")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    opened: FetchOpened
    have: FetchHave
    frame: bytes
    failed: FetchFailed
    def __init__(self, opened: _Optional[_Union[FetchOpened, _Mapping]] = ..., have: _Optional[_Union[FetchHave, _Mapping]] = ..., frame: _Optional[bytes] = ..., failed: _Optional[_Union[FetchFailed, _Mapping]] = ...) -> None: ...

class EndOfKV(_message.Message):
    __slots__ = ("first_tokens", "tokens_digest")
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    first_tokens: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenChunk]
    tokens_digest: bytes
    def __init__(self, first_tokens: _Optional[_Iterable[_Union[_common_pb2.TokenChunk, _Mapping]]] = ..., tokens_digest: _Optional[bytes] = ...) -> None: ...

class InventoryRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InventoryReply(_message.Message):
    __slots__ = ("seq", "hashes")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    seq: int
    hashes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, seq: _Optional[int] = ..., hashes: _Optional[_Iterable[bytes]] = ...) -> None: ...
