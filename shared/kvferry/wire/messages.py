"""All messages of the control plane (NATS). Who sends what to whom stands in `docs/protocol.md`."""

from __future__ import annotations

from kvferry.wire.beats import ExitNotice, GatewayHeartbeat, Heartbeat
from kvferry.wire.cache_news import CacheEvents, CacheSnapshot
from kvferry.wire.codec import Codec
from kvferry.wire.orders import CacheResync, Cancel, Drain, EndAck, Fence, Ping, Pong, Resend
from kvferry.wire.tokens import TokenBatch
from kvferry.wire.work import Accepted, DecodeRequest, PrefillRequest, Rejected

ToWorker = PrefillRequest | DecodeRequest | Cancel | Fence | Resend | EndAck | Ping | Drain | CacheResync
ToGateway = TokenBatch
Answer = Accepted | Rejected | Pong
Beat = Heartbeat | GatewayHeartbeat | ExitNotice
CacheNews = CacheEvents | CacheSnapshot


class Codecs:
    """The codecs of the control plane. One instance per event loop."""

    def __init__(self) -> None:
        self.to_worker: Codec[ToWorker] = Codec(ToWorker)
        self.to_gateway: Codec[ToGateway] = Codec(ToGateway)
        self.answer: Codec[Answer] = Codec(Answer)
        self.beat: Codec[Beat] = Codec(Beat)
        self.cache: Codec[CacheNews] = Codec(CacheNews)
