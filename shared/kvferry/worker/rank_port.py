"""Where ranks on other hosts join their leader: one TCP port, and what is said there before anything else.

    rank                                       leader
    the data plane's handshake (`transport/hello.py`), both ways, with the cluster's data key
    Join(version, session, "steps")      ->      waits for all three of a session (`engine/ranks/followers.py`,
    Join(version, session, "copies")     ->      `engine/ranks/copies.py`,
    Join(version, session, "handoffs")   ->      `worker/handoff/orders.py`)
                                         <-      Refused(problem), on any, and the connection ends

The connections stay for the worker's life. They are not encrypted, nor is what the ranks exchange in a step: like the
data plane they belong on a private network.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Final, Literal, get_args

import msgspec
from msgspec import Meta

from kvferry import __version__
from kvferry.engine.ranks.channel import SocketChannel
from kvferry.errors import HandshakeRefused, MalformedMessage, RankLost, SettingError
from kvferry.log import get_logger
from kvferry.runtime import Runtime, blocking_sleep
from kvferry.transport.hello import NONCE_BYTES, Handshake, Side

log = get_logger(__name__)
GREETING_S: Final = 5.0  # for a stranger to show that it is none
MAX_GREETING_BYTES: Final = 4096
SESSION_BYTES: Final = 16
RETRY_S: Final = 0.5  # of a rank whose leader is not there yet
# A host that is gone says nothing: by then its peer's kernel has noticed.
KEEP_IDLE_S: Final = 2
KEEP_INTERVAL_S: Final = 1
KEEP_COUNT: Final = 3
ChannelName = Literal["steps", "copies", "handoffs"]
CHANNELS: Final[tuple[ChannelName, ...]] = get_args(ChannelName)
PURPOSE: Final = b"kvferry ranks"


class Join(msgspec.Struct, frozen=True, tag="join"):
    version: Annotated[str, Meta(max_length=64)]
    session: Annotated[bytes, Meta(min_length=SESSION_BYTES, max_length=SESSION_BYTES)]
    channel: ChannelName


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    problem: Annotated[str, Meta(max_length=256)]


class Joined(msgspec.Struct, frozen=True, tag="joined"):
    """The leader has all channels."""


_JOIN: Final = msgspec.msgpack.Decoder(Join)
_ANSWER: Final = msgspec.msgpack.Decoder(Joined | Refused)


@dataclass(frozen=True, slots=True)
class RankLink:
    """A leader and a rank on two hosts: one end."""

    steps: SocketChannel
    copies: SocketChannel
    handoffs: SocketChannel

    @property
    def host(self) -> str:
        """This end's address, as the other one sees it."""
        return self.steps.host

    def close(self) -> None:
        for channel in self.channels:
            channel.close()

    @property
    def channels(self) -> tuple[SocketChannel, ...]:
        return (self.steps, self.copies, self.handoffs)


class RankPort:
    """The leader's."""

    def __init__(self, host: str, port: int, data_key: bytes, runtime: Runtime) -> None:
        """Raises `SettingError` for an address that can't be had."""
        try:
            self._server = socket.create_server((host, port))
        except OSError as error:
            raise SettingError("--rank-port", f"{host}:{port}: {error.strerror}") from None
        self._data_key = data_key
        self._runtime = runtime
        self._parts: dict[bytes, dict[str, SocketChannel]] = {}  # by session: channels that wait for the others

    @property
    def address(self) -> str:
        host, port = self._server.getsockname()[:2]
        return f"{host}:{port}"

    def accept(self, count: int) -> list[RankLink]:
        """Wait for so many ranks. Who is none of this cluster is turned away. Raises `RankLost` if closed meanwhile."""
        accepted: list[SocketChannel] = []
        links: list[RankLink] = []
        try:
            while len(links) < count:
                connection, peer = self._next(len(links) + 1)
                accepted.append(SocketChannel(kept_alive(connection)))
                try:
                    link = self._joined(accepted[-1])
                except (HandshakeRefused, MalformedMessage, msgspec.MsgspecError, OSError) as error:
                    log.warning("a connection to the rank port was refused", peer=peer[0], problem=str(error))
                    accepted.pop().close()
                    continue
                if link is not None:
                    links.append(link)
                    log.info("a rank has joined", peer=peer[0], missing=count - len(links))
        except BaseException:
            links.clear()
            raise
        finally:
            joined = {channel for link in links for channel in link.channels}
            for channel in accepted:
                if channel not in joined:
                    channel.close()
        return links

    def close(self) -> None:
        """Also wakes who waits in `accept`."""
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _next(self, rank: int) -> tuple[socket.socket, tuple[str, int]]:
        try:
            return self._server.accept()
        except OSError:
            raise RankLost(rank, "no longer waited for") from None

    def _joined(self, channel: SocketChannel) -> RankLink | None:
        """The rank that this channel makes complete, if it is one's last."""
        with deadline(channel):
            greet(channel, "acceptor", self._data_key, self._runtime)
            payload = channel.receive(MAX_GREETING_BYTES)
            if payload is None:
                raise ConnectionResetError("the other end is gone")
            join = _JOIN.decode(payload)
            if join.version != __version__:
                problem = f"it runs kvferry {join.version}, its leader {__version__}"
                channel.send(msgspec.msgpack.encode(Refused(problem)))
                raise HandshakeRefused(problem)
        parts = self._parts.setdefault(join.session, {})
        parts[join.channel] = channel
        if len(parts) < len(CHANNELS):
            return None
        del self._parts[join.session]
        parts["steps"].send(msgspec.msgpack.encode(Joined()))
        return RankLink(*(parts[name] for name in CHANNELS))


def join_leader(host: str, port: int, data_key: bytes, runtime: Runtime) -> RankLink:
    """A rank's: wait for its leader, as long as that takes. Raises `HandshakeRefused`."""
    while True:
        session = runtime.random_bytes(SESSION_BYTES)  # of this attempt: no channel of an earlier one is taken for its
        with contextlib.ExitStack() as stack:
            try:
                channels: list[SocketChannel] = []
                for name in CHANNELS:
                    channel = SocketChannel(kept_alive(socket.create_connection((host, port), GREETING_S)))
                    stack.callback(channel.close)
                    channels.append(channel)
                    with deadline(channel):
                        greet(channel, "initiator", data_key, runtime)
                        channel.send(msgspec.msgpack.encode(Join(__version__, session, name)))
                # The leader may be waiting for other ranks, or turn to this one later.
                answer = channels[0].receive(MAX_GREETING_BYTES)
            except OSError as error:
                log.debug("the leader is not there", problem=str(error))
                answer = None
            if answer is not None:
                said = _ANSWER.decode(answer)
                if isinstance(said, Refused):
                    raise HandshakeRefused(said.problem)
                stack.pop_all()
                return RankLink(*channels)
        blocking_sleep(RETRY_S)


def greet(channel: SocketChannel, side: Side, data_key: bytes, runtime: Runtime) -> None:
    """Both ends prove that they hold the data key. Raises `HandshakeRefused`, or OSError if the other one is gone."""
    handshake = Handshake(side, data_key, runtime.random_u64(), runtime.random_bytes(NONCE_BYTES), PURPOSE)
    channel.send(handshake.opening())
    while not handshake.done:
        message = channel.receive(MAX_GREETING_BYTES)
        if message is None:
            raise ConnectionResetError("the other end is gone")
        if (answer := handshake.feed(memoryview(message))) is not None:
            channel.send(answer)


@contextlib.contextmanager
def deadline(channel: SocketChannel) -> Iterator[None]:
    """What is said inside ends within `GREETING_S`, however slowly the other end speaks."""
    timer = threading.Timer(GREETING_S, channel.end)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def kept_alive(connection: socket.socket) -> socket.socket:
    """Blocking, without delay, and ended by the kernel when the other host is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, KEEP_IDLE_S),
        (socket.TCP_KEEPINTVL, KEEP_INTERVAL_S),
        (socket.TCP_KEEPCNT, KEEP_COUNT),
        (socket.TCP_USER_TIMEOUT, 1000 * (KEEP_IDLE_S + KEEP_INTERVAL_S * KEEP_COUNT)),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection
