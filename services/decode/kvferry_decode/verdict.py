"""Whether a sequence may run on the KV that has come for it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvferry.schedule.sequence import Sequence
from kvferry.wire.logprobs import TokenLogprobs
from kvferry.worker.handoff.incoming import Incoming


@dataclass(frozen=True, slots=True)
class Right:
    """It may. Its first token, as P has drawn it."""

    token: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class Wrong:
    """It may not. `fault` labels the failure counter."""

    fault: str


def judge(sequence: Sequence, kv_format_id: str, leaders: Incoming, others: Iterable[Incoming]) -> Right | Wrong:
    """On all parts of a pull, that between the leaders and the others, when each of them is whole: their manifests must
    fit what D knows of the sequence."""
    known = kv_format_id, sequence.chain_hash(leaders.from_token), sequence.chain_hash(sequence.num_context)
    for part in (leaders, *others):
        if (fault := part.fault(*known)) is not None:
            return Wrong(fault)
    work = sequence.work
    first = leaders.first(work.choice, with_logprobs=work.sampling.num_logprobs is not None)
    return Wrong("first_token") if first is None else Right(*first)
