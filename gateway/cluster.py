"""GET /v1/cluster: the fleet as the gateway sees it, read-only."""

import os
from typing import Any

from fastapi import APIRouter

import baton
from baton.gateway.backend import ClusterView, Disaggregation, LinkView, WorkerView
from baton.gateway.context import Context
from baton.gateway.errors import ERROR_RESPONSES
from baton.telemetry import GatewayMetrics


def cluster_router(context: Context) -> APIRouter:
    router = APIRouter(tags=["Operations"], responses=ERROR_RESPONSES)

    @router.get("/v1/cluster")
    async def get_cluster() -> dict[str, Any]:
        view = context.backend.topology()
        return {
            "gateway": {"version": baton.__version__, "pid": os.getpid()},
            "ready": context.backend.ready(),
            "disaggregation": {
                "state": view.hand_overs.state.value,
                "remote_prefills": view.hand_overs.num_remote_prefills,
                "local_prefills": view.hand_overs.num_local_prefills,
            },
            "models": [model.name for model in context.backend.models()],
            "workers": [worker_body(worker) for worker in view.workers],
            "links": [link_body(link) for link in view.links],
            "conflicts": [
                {
                    "source": conflict.source,
                    "target": conflict.target,
                    "cause": conflict.cause.name.lower(),
                    "reason": conflict.reason,
                }
                for conflict in view.conflicts
            ],
            "redis_reachable": view.is_redis_reachable,
        }

    return router


def worker_body(worker: WorkerView) -> dict[str, Any]:
    load = worker.snapshot
    return {
        "worker_id": worker.worker_id,
        "role": worker.role.value,
        "state": worker.state.value,
        "model": worker.model,
        "pid": worker.pid,
        "address": worker.address,
        "host_id": worker.host_id,
        "device": worker.device,
        "block_size": worker.block_size,
        "kv_blocks": {
            "free": load.free_blocks,
            "total": load.total_blocks,
            "quarantined": load.num_quarantined_blocks,
        },
        "load": {
            "running": load.num_running,
            "waiting": load.num_waiting,
            "waiting_for_kv": load.num_waiting_for_kv,
            "leases": load.num_leases,
            "queued_prefill_tokens": load.queued_prefill_tokens,
            "context_tokens": load.context_tokens,
            "step_age_ms": load.step_age_ms,
        },
        "link_rates": [
            {
                "transport": rate.transport,
                "same_host": rate.is_same_host,
                "bytes_per_s": rate.bytes_per_s,
            }
            for rate in load.link_rates
        ],
    }


def link_body(link: LinkView) -> dict[str, Any]:
    return {
        "source": link.source,
        "target": link.target,
        "transport": link.transport,
        "num_transfers": link.num_transfers,
        "num_bytes": link.num_bytes,
        "bytes_per_s": link.bytes_per_s,
        "measured": link.is_measured,
        "in_flight_bytes": link.in_flight_bytes,
        "num_failures": link.num_failures,
        "failures": {cause.name.lower(): count for cause, count in link.failures.items()},
    }


def refresh_fleet_gauges(metrics: GatewayMetrics, view: ClusterView) -> None:
    """Fleet totals are read when they are scraped, from the snapshots that workers send anyway."""
    loads = [worker.snapshot for worker in view.workers]
    for state, count in {
        "free": sum(load.free_blocks for load in loads),
        "total": sum(load.total_blocks for load in loads),
        "quarantined": sum(load.num_quarantined_blocks for load in loads),
    }.items():
        metrics.fleet_blocks.labels(state).set(count)
    for state, count in {
        "running": sum(load.num_running for load in loads),
        "waiting": sum(load.num_waiting for load in loads),
        "waiting_for_kv": sum(load.num_waiting_for_kv for load in loads),
    }.items():
        metrics.fleet_sequences.labels(state).set(count)
    metrics.fleet_leases.set(sum(load.num_leases for load in loads))
    if metrics.vllm is not None and view.workers:
        first = view.workers[0]
        metrics.vllm.show(first.model, first.block_size, loads, view.totals, view.num_parked)
    for disaggregation in Disaggregation:
        is_now = disaggregation is view.hand_overs.state
        metrics.disaggregation.labels(disaggregation.value).set(is_now)
    metrics.redis_reachable.set(view.is_redis_reachable)
    metrics.conflicts.clear()
    for conflict in view.conflicts:
        metrics.conflicts.labels(conflict.cause.name.lower()).inc()
    metrics.workers.clear()
    for worker in view.workers:
        metrics.workers.labels(worker.role.value).inc()
