"""The tables of the documents that are made from code. `python tests/docs_tables.py` writes them anew."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Final

from api_reference import api_tables
from prometheus_client.metrics import MetricWrapperBase
from sizing_tables import fleet_table, kv_table

from kvferry.config.environment import env_name
from kvferry.config.field import flag_name, is_secret, shown_default
from kvferry.config.settings import Settings
from kvferry.worker.metrics import WorkerMetrics
from kvferry.worker.settings import RankSettings
from kvferry_decode.settings import DecodeSettings
from kvferry_gateway.metrics import GatewayMetrics, HotHistogram
from kvferry_gateway.settings import GatewaySettings
from kvferry_local.settings import UpSettings
from kvferry_prefill.settings import PrefillSettings

ROOT = Path(__file__).parents[1]
DOCUMENTS: Final = (
    ROOT / "docs" / "api.md",
    ROOT / "docs" / "architecture.md",
    ROOT / "docs" / "configuration.md",
    ROOT / "docs" / "operations.md",
    ROOT / "docs" / "protocol.md",
)

# Limits that are part of the protocol and have no setting: (module, constant, unit and meaning).
CONSTANTS: Final = (
    ("kvferry.wire.fields", "MAX_TOKEN_BYTES", "bytes of one token column"),
    ("kvferry.wire.fields", "MAX_ROWS", "rows of one column, streams of one message"),
    ("kvferry.wire.record", "MAX_SHARDS", "shards of one worker"),
    ("kvferry.wire.fields", "MAX_NAME_CHARS", "characters of a name"),
    ("kvferry.wire.cache_news", "MAX_CACHE_KEYS", "blocks of one message about a cache"),
    ("kvferry_gateway.placement.prefix_index", "MAX_SNAPSHOT_PARTS", "parts of a snapshot of a cache"),
    ("kvferry_gateway.placement.prefix_index", "MAX_EARLY", "batches of cache events that wait for one before them"),
    ("kvferry.wire.flow", "MAX_FLOW_BYTES", "bytes of a flow message"),
    ("kvferry.wire.flow", "MAX_CREDITS", "credits in one message"),
    ("kvferry.bus.liveness", "BEAT_INTERVAL", "seconds between heartbeats"),
    ("kvferry.bus.liveness", "SILENCE", "seconds without one: gone"),
    ("kvferry.bus.liveness", "PING_TIMEOUT", "seconds that a suspect has to answer"),
    ("kvferry.bus.server", "MAX_PAYLOAD", "bytes of a message on the embedded server"),
    ("kvferry.bus.inlet", "MAX_PENDING_MESSAGES", "messages of a subscription that wait for their handler"),
    ("kvferry.transport.slots", "RETIRE_SECONDS", "seconds until a slot without completion is retired"),
    ("kvferry.worker.fences", "TOMBSTONE_S", "seconds that a cancelled attempt is refused"),
    ("kvferry.worker.outbox", "REPEAT_END_S", "seconds until an end is said again"),
    ("kvferry.worker.fences", "MAX_TOMBSTONES", "tombstones at once"),
    ("kvferry.worker.fences", "MAX_FENCES", "fenced gateways at once"),
    ("kvferry.worker.outbox", "MAX_BATCH_TOKENS", "tokens of one TokenBatch"),
    ("kvferry.worker.outbox", "MAX_BATCH_LOGPROBS", "rows of one TokenBatch with log-probabilities"),
    ("kvferry.worker.outbox", "MAX_BATCH_ENDS", "ends of one TokenBatch"),
    ("kvferry.worker.worker", "HAND_OVER_S", "seconds of the drain grace kept for ends to be confirmed"),
    ("kvferry.engine.ranks.shard", "MAX_RANKS", "ranks of one worker"),
    ("kvferry.engine.ranks.channel", "MAX_CHANNEL_BYTES", "bytes of a message between ranks"),
    ("kvferry.worker.handoff.channel", "MAX_MESSAGE_BYTES", "bytes of a message about hand-offs to a rank"),
    ("kvferry.worker.handoff.shards", "BEGIN_TIMEOUT_S", "seconds that a rank's data plane has to come up"),
    ("kvferry.engine.columns", "MAX_STEP_ROWS", "rows of a step of several ranks"),
    ("kvferry.worker.debug", "MAX_CONNECTIONS", "connections of a debug port"),
    ("kvferry.worker.debug", "RECEIVE_TIMEOUT", "seconds within which a request of a debug port must have arrived"),
    ("kvferry.worker.gateways", "MISSING_BEATS", "heartbeats without a stream: cancelled"),
    ("kvferry.schedule.chunk", "STEP_TARGET_S", "seconds that a step is sized for"),
    ("kvferry.schedule.chunk", "FIRST_TOKENS", "prefill tokens of a step before the speed is measured"),
    ("kvferry.worker.handoff.pump", "SEND_STALL", "seconds that a frame may take to leave before its connection ends"),
    ("kvferry.worker.handoff.serving", "MAX_PULLS", "pulls of one connection"),
    ("kvferry.worker.handoff.serving", "MAX_CREDITS_HELD", "unused credits of one pull"),
    ("kvferry.worker.handoff.outgoing", "MAX_AGAIN_QUEUED", "repeats that one pull is owed"),
    ("kvferry_prefill.sender", "PARK_S", "seconds that an Open waits for its request"),
    ("kvferry_prefill.sender", "MAX_PARKED", "Opens that wait at once"),
    ("kvferry.worker.handoff.incoming", "WINDOW", "receives posted at once by one pull"),
    ("kvferry.worker.handoff.fetching", "ABORT_TIMEOUT", "seconds that P has to answer an Abort"),
    ("kvferry_decode.puller", "MAX_TRIES", "tries of a pull before it is a failure"),
    ("kvferry.worker.handoff.incoming", "MAX_AGAIN", "bad frames of one pull that are asked for again"),
    ("kvferry.http_port", "MAX_HEAD_BYTES", "bytes of a request's line and headers"),
    ("kvferry.http_port", "MAX_DISCARDED_BYTES", "bytes of a body that goes on after its answer"),
    ("kvferry_gateway.fleet.registry", "MAX_WORKERS", "worker incarnations known at once"),
    ("kvferry_gateway.streams.attempt", "MAX_REMEMBERED", "attempts that are over and remembered"),
    ("kvferry_gateway.flights.patience", "NEW_REQUEST_WAIT", "seconds that a new request waits for absent workers"),
    ("kvferry_gateway.flights.patience", "RECENT_ABSENCE", "seconds of absence after which it does not"),
    ("kvferry_gateway.flights.setbacks", "CRASHES_TO_ISOLATE", "crashed workers before a request runs alone"),
    ("kvferry.wire.sampling", "MAX_LOGPROBS", "best tokens told beside a drawn one"),
    ("kvferry.wire.tokens", "MAX_SCORED_ROWS", "tokens of prompts with log-probabilities in one TokenBatch"),
    ("kvferry.engine.scoring", "MAX_LOGITS_BYTES", "bytes of logits at once, of rows that are scored"),
    ("kvferry_gateway.answers.prompt_logprobs", "MAX_TOLD", "log-probabilities of prompts in one answer"),
    (
        "kvferry_gateway.answers.prompt_logprobs",
        "TOKENS_PER_TURN",
        "tokens of a prompt that are told in one turn of the loop",
    ),
    ("kvferry.wire.sampling", "MAX_LOGIT_BIAS", "entries of `logit_bias`"),
    ("kvferry.wire.sampling", "MAX_TOKEN_LIST", "stop tokens, or banned ones, of a request"),
    ("kvferry.wire.sampling", "MAX_GRAMMAR_CHARS", "characters of a grammar's source"),
    ("kvferry.wire.work", "MAX_TRACE_STATE_CHARS", "characters of a `tracestate` that is passed on"),
    ("kvferry.trace.tracer", "MAX_WAITING_SPANS", "spans that wait for the collector before one is dropped"),
    ("kvferry.trace.journal", "MAX_CHUNK_SPANS", "spans of prefill chunks of one attempt; more are counted alone"),
    ("kvferry.grammar.compiler", "MAX_PATTERN_CHARS", "characters of a regular expression in one"),
    ("kvferry.grammar.compiler", "MAX_LARK_CHARS", "characters of a context-free grammar"),
    ("kvferry.grammar.compiler", "MAX_COMPILED", "compiled grammars that a process keeps"),
    ("kvferry_gateway.requests.structured", "MAX_CHOICE_TEXTS", "texts of `choice`"),
    ("kvferry_gateway.requests.structural_tag", "MAX_TAGS", "tags, and triggers, of a `structural_tag`"),
    ("kvferry_gateway.requests.structural_tag", "MAX_TAG_CHARS", "characters of what begins or ends a tag"),
    ("kvferry_gateway.requests.tools", "MAX_TOOLS", "tools of a request, calls of a message"),
    ("kvferry_gateway.requests.tools", "MAX_SCHEMA_DEPTH", "levels of a tool's schema"),
    ("kvferry_gateway.requests.response_items", "MAX_ITEMS", "items of a response's input"),
    ("kvferry_gateway.requests.openai", "MAX_CHOICES", "choices of a request: prompts times `n`"),
    ("kvferry.text.stop", "MAX_STOP_STRINGS", "stop strings of a request"),
    ("kvferry.text.stop", "MAX_STOP_CHARS", "characters of a stop string"),
    ("kvferry.engine.reference", "EPSILON", "logits: ε of `fast`"),
)


def settings_table(cls: type[Settings]) -> str:
    """A Markdown table of one settings class."""
    rows = ["| flag | variable | default | meaning |", "|---|---|---|---|"]
    for field, spec in cls.model_fields.items():
        flag = "" if is_secret(spec) else f"`{flag_name(cls, field)}`"
        default = f"`{shown}`" if (shown := shown_default(spec)) else ""
        rows.append(f"| {flag} | `{env_name(field)}` | {default} | {spec.description} |")
    return "\n".join(rows)


def limits_table() -> str:
    """Every bound of the protocol: constants first, then the settings that are numbers."""
    rows = ["| limit | default | setting | meaning |", "|---|---|---|---|"]
    for module, name, meaning in CONSTANTS:
        rows.append(f"| `{name}` | {getattr(importlib.import_module(module), name)} | | {meaning} |")
    seen: set[str] = set()
    for cls in (PrefillSettings, DecodeSettings, GatewaySettings):
        for field, spec in cls.model_fields.items():
            default = spec.get_default()
            numeric = isinstance(default, int | float) and not isinstance(default, bool)
            if numeric and field not in seen and not field.endswith("port"):
                seen.add(field)
                rows.append(f"| `{field}` | {default} | `{flag_name(cls, field)}` | {spec.description} |")
    return "\n".join(rows)


def metrics_table() -> str:
    """Every metric of our own, with who serves it."""
    rows = ["| metric | labels | served by | meaning |", "|---|---|---|---|"]
    for owner, metrics in (("worker", WorkerMetrics()), ("gateway", GatewayMetrics())):
        for collector in metrics.registry._collector_to_names:
            if isinstance(collector, MetricWrapperBase | HotHistogram):  # the others are of the process
                described = collector.describe() if isinstance(collector, MetricWrapperBase) else collector.collect()
                family = next(iter(described))
                name = family.name + ("_total" if family.type == "counter" else "")
                names = collector.labels if isinstance(collector, HotHistogram) else collector._labelnames
                labels = ", ".join(f"`{label}`" for label in names)
                rows.append(f"| `{name}` | {labels} | {owner} | {family.documentation} |")
    return "\n".join(rows)


def tables() -> dict[str, str]:
    """Name of a table, as its markers write it, to its text."""
    return {
        "up": settings_table(UpSettings),
        "gateway": settings_table(GatewaySettings),
        "prefill": settings_table(PrefillSettings),
        "decode": settings_table(DecodeSettings),
        "rank": settings_table(RankSettings),
        "limits": limits_table(),
        "metrics": metrics_table(),
        "sizing": kv_table(),
        "fleet": fleet_table(),
        **api_tables(),
    }


def with_tables(text: str) -> str:
    """`text` with every marked table as the code has it."""
    for name, table in tables().items():
        block = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = block.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    for path in DOCUMENTS:
        path.write_text(with_tables(path.read_text()))
