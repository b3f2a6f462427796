"""Metrics of a worker."""

from __future__ import annotations

from typing import Final

from kvferry.metrics import STEP_BUCKETS, Metrics

TRANSFER_FAILURES: Final = (
    "connect", "connection_lost", "stall", "send_stall", "unknown_ticket",  # the way, or who is at its other end
    "short", "long", "header", "checksum", "identity", "range", "size", "content", "twice", "manifest",  # a frame
    "part", "kv_format", "frame_count", "chain_hash", "first_token",  # all of them together
    "gather", "scatter",  # this side's own copies
)  # fmt: skip


class WorkerMetrics(Metrics):
    """Names and meanings as in `docs/architecture.md`, "Metrics"."""

    def __init__(self) -> None:
        super().__init__()
        self.identity = self.gauge(
            "kvferry_worker_info",
            "Always 1: joins a worker's other metrics with its model",
            ("model", "role", "engine"),
        )
        self.steps = self.histogram("kvferry_step_seconds", "Engine steps", buckets=STEP_BUCKETS)
        self.tokens = self.counter("kvferry_token", "Tokens by kind: prefill rows, drawn tokens", ("kind",))
        self.batch = self.gauge("kvferry_batch_size", "Sequences in the last engine step")
        self.queue = self.gauge("kvferry_queue_depth", "Requests that wait")
        self.queued_prefill = self.gauge(
            "kvferry_queued_prefill_seconds", "Until the prompts that wait or are under way are computed, as expected"
        )
        self.running = self.gauge("kvferry_running_sequences", "Sequences that decode")
        self.blocks = self.gauge("kvferry_kv_blocks", "KV blocks by state", ("state",))
        self.slots = self.gauge("kvferry_staging_slots", "Staging slots by state", ("state",))
        self.kv_bytes = self.counter("kvferry_kv_bytes", "KV bytes moved between workers", ("direction",))
        self.kv_tokens = self.counter("kvferry_kv_token", "Token slots moved between workers", ("direction",))
        self.pulls = self.counter("kvferry_pull", "Pulls by outcome", ("outcome",))
        self.pull_seconds = self.histogram("kvferry_pull_seconds", "From Fetch to the verified manifest")
        self.tail_seconds = self.histogram(
            "kvferry_handoff_tail_seconds",
            "On P: from the last computed layer to D's word that the sequence may run",
            buckets=STEP_BUCKETS,
        )
        self.transfer_failures = self.counter("kvferry_transfer_failure", "Transfer failures by kind", ("kind",))
        for kind in TRANSFER_FAILURES:
            self.transfer_failures.labels(kind)  # from 0 on, so that a first failure is seen as one
        self.prefix_hits = self.counter("kvferry_prefix_cache_hit_token", "Prompt tokens found in the prefix cache")
        self.prefix_queries = self.counter("kvferry_prefix_cache_query_token", "Prompt tokens looked up")
        self.preemptions = self.counter("kvferry_preemption", "Sequences that lost their memory to an older one")
        self.cancels = self.counter("kvferry_cancel", "Sequences cancelled by their gateway")
        self.cancel_seconds = self.histogram("kvferry_cancel_to_free_seconds", "From cancel to free blocks")
        self.lease_expiries = self.counter("kvferry_lease_expiry", "Held KV whose lease ran out")
        self.wire_errors = self.counter("kvferry_wire_error", "Messages dropped by kind", ("plane", "kind"))
        self.spans = self.counter("kvferry_span", "Spans of traces by outcome: sent, failed, dropped", ("outcome",))
