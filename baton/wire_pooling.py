"""baton.pooling to and from protobuf; trusts what comes in as little as `baton.wire` does."""

from collections.abc import Sequence

from baton.pooling import PoolingInfo, PoolingInput, PoolingRequest, PoolingTask
from baton.v1 import common_pb2, worker_pb2
from baton.wire_checks import MAX_ITEMS, MAX_TOKENS, check_len, refuse

MAX_INPUTS = 4096  # of one call
_VALUE_BYTES = 4
_MAX_VALUES = 1 << 16  # of one result
_TASKS = {
    common_pb2.POOLING_TASK_EMBED: PoolingTask.EMBED,
    common_pb2.POOLING_TASK_SCORE: PoolingTask.SCORE,
}
_TASKS_PB = {task: number for number, task in _TASKS.items()}


def pooling_info_to_pb(info: PoolingInfo) -> common_pb2.PoolingInfo:
    return common_pb2.PoolingInfo(
        task=_TASKS_PB[info.task],
        num_values=info.num_values,
        is_matryoshka=info.is_matryoshka,
        dimensions=info.dimensions,
        tells_pairs=info.tells_pairs,
    )


def pooling_info_from_pb(message: common_pb2.PoolingInfo) -> PoolingInfo:
    if message.task not in _TASKS:
        raise refuse(f"pooling task {message.task}")
    if not 0 < message.num_values <= _MAX_VALUES:
        raise refuse(f"results of {message.num_values} values")
    check_len(message.dimensions, MAX_ITEMS, "dimensions")
    return PoolingInfo(
        _TASKS[message.task],
        message.num_values,
        message.is_matryoshka,
        tuple(message.dimensions),
        message.tells_pairs,
    )


def pool_request_to_pb(request: PoolingRequest) -> worker_pb2.PoolRequest:
    """`deadline_ms` is the call's own."""
    return worker_pb2.PoolRequest(
        inputs=[
            worker_pb2.PoolInput(token_ids=one.token_ids, second_start=one.second_start)
            for one in request.inputs
        ],
        use_activation=request.use_activation,
        dimensions=request.dimensions,
        priority=request.priority,
    )


def pool_request_from_pb(message: worker_pb2.PoolRequest) -> PoolingRequest:
    check_len(message.inputs, MAX_INPUTS, "inputs")
    if not message.inputs:
        raise refuse("a pool request without inputs")
    return PoolingRequest(
        tuple(map(_input_from_pb, message.inputs)),
        message.use_activation if message.HasField("use_activation") else None,
        message.dimensions if message.HasField("dimensions") else None,
        message.priority,
    )


def _input_from_pb(message: worker_pb2.PoolInput) -> PoolingInput:
    check_len(message.token_ids, MAX_TOKENS, "token_ids")
    second_start = message.second_start if message.HasField("second_start") else None
    if second_start is not None and second_start > len(message.token_ids):
        raise refuse("the second text begins behind the input")
    return PoolingInput(tuple(message.token_ids), second_start)


def pool_reply_to_pb(results: Sequence[bytes]) -> worker_pb2.PoolReply:
    return worker_pb2.PoolReply(values=results)


def pool_reply_from_pb(message: worker_pb2.PoolReply, num_inputs: int) -> tuple[bytes, ...]:
    if len(message.values) != num_inputs:
        raise refuse(f"{len(message.values)} results for {num_inputs} inputs")
    for result in message.values:
        check_len(result, _MAX_VALUES * _VALUE_BYTES, "a result")
        if not result or len(result) % _VALUE_BYTES:
            raise refuse(f"a result of {len(result)} bytes")
    return tuple(message.values)
