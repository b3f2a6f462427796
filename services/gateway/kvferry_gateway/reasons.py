"""Why a worker does not take a placement, and why one that was taken ends before its request is complete."""

from __future__ import annotations

from typing import Final, Literal, get_args

from kvferry.wire.tokens import EndReason, FinalReason
from kvferry.wire.work import RejectReason

RefusalReason = RejectReason | Literal["unreachable"]
REFUSAL_REASONS: Final = (*get_args(RejectReason), "unreachable")

GatewayReason = Literal["decode_gone", "prefill_gone", "wedged", "forgotten", "token_mismatch"]
LostReason = EndReason | GatewayReason
LOST_REASONS: Final = tuple(
    reason for reason in (*get_args(EndReason), *get_args(GatewayReason)) if reason not in get_args(FinalReason)
)
