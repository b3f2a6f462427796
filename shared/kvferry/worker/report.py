"""What others see of a worker: its record, its load, its sequences, its ledger, its gauges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, get_args

from kvferry.runtime import now
from kvferry.schedule.sequence import Sequence
from kvferry.transport.slots import SlotState
from kvferry.wire.beats import Held, Load
from kvferry.wire.record import Feature, WorkerAddress, WorkerRecord
from kvferry.wire.tokens import Spent

if TYPE_CHECKING:
    from kvferry.worker.worker import Worker


FEATURES: Final[tuple[Feature, ...]] = get_args(Feature)  # all that this version knows


def record(worker: Worker[Any]) -> WorkerRecord:
    """What it is, fixed for its incarnation."""
    kv_format = worker.runner.kv_format
    return WorkerRecord(
        role=worker.role,
        name=worker.settings.name,
        incarnation=worker.incarnation,
        pid=worker.pid,
        subject=worker.subject,
        model=worker.model_name,
        transport=worker.transport.scheme,
        address=address(worker),
        kv_format_id=kv_format.format_id,
        numerics_id=worker.runner.numerics_id,
        max_model_len=worker.runner.max_model_len,
        block_size=kv_format.block_size,
        num_blocks=worker.runner.num_blocks,
        kv_token_bytes=kv_format.token_bytes,
        debug_port=worker.debug_port,
        exact=worker.runner.exact and worker.settings.exactness != "fast",
        engine=worker.engine,
        engine_reason=worker.engine_reason,
        grammars=worker.grammars.followed,
        kv_dtype=kv_format.dtype,
        vocabulary_id=worker.vocabulary_id,
        features=FEATURES,
        ranks=worker.settings.tensor_parallel_size,
    )


def address(worker: Worker[Any]) -> WorkerAddress:
    """Where its shards are. The leader's own comes up first."""
    addresses = (worker.transport.address, *(shard.address for shard in worker.shards))
    if len(addresses) == 1:
        return WorkerAddress(worker.incarnation, addresses)
    heads = (worker.runner.here.heads, *(shard.heads for shard in worker.shards))
    return WorkerAddress(worker.incarnation, addresses, tuple((part.start, part.stop) for part in heads))


def load(worker: Worker[Any]) -> Load:
    """What it is doing, for placement. Takes the pulls that have ended since the last call."""
    scheduler = worker.scheduler
    queued = scheduler.queued_tokens
    return Load(
        num_waiting=scheduler.num_waiting,
        num_running=scheduler.num_running,
        waiting_tokens=sum(queued),
        free_blocks=scheduler.memory.pool.num_free,
        prefill_tokens_per_s=scheduler.chunk.tokens_per_s,
        decode_step_s=worker.engine_loop.step_s,
        steps=worker.engine_loop.num_steps,
        cache_seq=worker.cache_news.seq,
        queued_tokens=queued,
        pulls=worker.take_pulls(),
        blocks=_block_counts(worker),
    )


def held(worker: Worker[Any]) -> dict[str, tuple[Held, ...]]:
    """Its sequences and its unconfirmed ends, by gateway subject."""
    rows = worker.outbox.held()
    for sequence in worker.scheduler.sequences.values():
        scored = 0 if sequence.work.scoring is None else worker.outbox.next_scored(sequence.work)
        row = Held(sequence.work.stream_id, sequence.state, sequence.next_index, scored, *worker.progress(sequence))
        rows.setdefault(sequence.work.gateway, []).append(row)
    return {subject: tuple(held) for subject, held in rows.items()}


def spent(sequence: Sequence, moment: float) -> Spent:
    """Where its time went on this worker until now, when it has drawn its first token."""
    seconds = sequence.spent
    return Spent(
        sequence.work.stream_id,
        waiting_s=seconds.get("waiting", 0.0) + seconds.get("opening", 0.0),
        computing_s=seconds.get("computing", 0.0),
        fetching_s=seconds.get("fetching", 0.0),
        step_s=seconds.get("running", 0.0) + (moment - sequence.since if sequence.state == "running" else 0.0),
    )


def blocks(worker: Worker[Any]) -> dict[str, Any]:
    """The ledger, for `GET /debug/blocks`."""
    memory = worker.scheduler.memory
    return {
        "role": worker.role,
        "incarnation": f"{worker.incarnation:016x}",
        "num_blocks": memory.pool.num_blocks,
        "counts": _block_counts(worker),
        "holdings": memory.ledger.rows(now()),
        "slots": worker.slots.counts(),
        "sequences": len(worker.scheduler.sequences),
        "streams": len(worker.outbox),
    }


def refresh_metrics(worker: Worker[Any]) -> None:
    """Bring gauges, and counters that the hot path keeps as plain numbers, up to date before they are read."""
    memory, metrics = worker.scheduler.memory, worker.metrics
    metrics.queue.set(worker.scheduler.num_waiting)
    metrics.running.set(worker.scheduler.num_running)
    rate = worker.scheduler.chunk.tokens_per_s
    metrics.queued_prefill.set(sum(worker.scheduler.queued_tokens) / rate if rate else 0.0)
    for state, count in _block_counts(worker).items():
        metrics.blocks.labels(state).set(count)
    slots = worker.slots.counts()
    for name in get_args(SlotState):
        metrics.slots.labels(name).set(slots.get(name, 0))
    counters = worker.transport.counters
    for kind, count in (("handshake", counters.refused_handshakes), ("transport", counters.protocol_errors)):
        known = metrics.value("kvferry_wire_error_total", plane="data", kind=kind)
        metrics.wire_errors.labels("data", kind).inc(count - known)
    metrics.prefix_hits.inc(memory.hit_tokens - metrics.value("kvferry_prefix_cache_hit_token_total"))
    metrics.prefix_queries.inc(memory.queried_tokens - metrics.value("kvferry_prefix_cache_query_token_total"))


def _block_counts(worker: Worker[Any]) -> dict[str, int]:
    return {state.value: count for state, count in worker.scheduler.memory.ledger.counts().items()}
