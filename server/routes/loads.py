"""GET /v1/loads, as SGLang has it: what routers choose a replica by."""

from __future__ import annotations

from datetime import UTC, datetime

from fastapi import APIRouter
from starlette.responses import Response

from pilotfish import __version__
from pilotfish.engine.request import EngineInfo
from pilotfish.server.encoding import json_response, returns
from pilotfish.server.protocol.loads import AggregateLoad, Load, Loads, Speculative
from pilotfish.server.service import Service, ServiceDependency

router = APIRouter()


@router.get("/v1/loads", **returns(Loads))
async def loads(service: ServiceDependency) -> Response:
    """Return the load now. It is known to the server's process: no step waits for it."""
    own = load_of(service, service.ready())
    aggregate = AggregateLoad(
        total_running_reqs=own.num_running_reqs,
        total_waiting_reqs=own.num_waiting_reqs,
        total_reqs=own.num_total_reqs,
        avg_token_usage=own.token_usage,
        avg_throughput=own.gen_throughput,
        avg_utilization=own.utilization,
    )
    timestamp = datetime.now(UTC).isoformat()
    return json_response(Loads(timestamp=timestamp, version=__version__, loads=[own], aggregate=aggregate))


def load_of(service: Service, info: EngineInfo) -> Load:
    """Return the load of the engine, whose info this is."""
    now, in_flight, recent = service.metrics.now, service.gate.in_flight, service.recent.sums()
    running, used = (0, 0) if now is None else (min(now.running, in_flight), now.blocks_used)
    return Load(
        num_running_reqs=running,
        num_waiting_reqs=in_flight - running,
        num_total_reqs=in_flight,
        num_used_tokens=used * info.block_size,
        max_total_num_tokens=info.num_blocks * info.block_size,
        token_usage=used / info.num_blocks,
        gen_throughput=service.recent.tokens_per_second(),
        cache_hit_rate=recent.cache_hit_rate,
        utilization=running / info.max_num_seqs,
        max_running_requests=info.max_num_seqs,
        speculative=Speculative(recent.accept_length, recent.accept_rate),
    )
