"""The exception tree of kvferry.

    KvferryError
    ├── SettingError            a setting has a wrong value; names the setting
    ├── WireError               bytes from another process that cannot be used
    │   ├── UnknownVersion      spoken in a wire version that this process lacks
    │   ├── MalformedMessage    not a message of this wire version
    │   ├── Impostor            a message that claims another sender than its subject shows
    │   └── CorruptFrame        a KV frame that fails its own header or checksum
    ├── BusError                control plane
    │   ├── BusUnavailable      not connected: nothing is queued for later
    │   ├── NoResponders        nobody listens on the subject
    │   └── BusTimeout          no answer in time
    ├── TransportError          data plane
    │   ├── ConnectionClosed    the peer or this side ended the connection
    │   ├── HandshakeRefused    the hello does not prove the cluster's data key
    │   └── TransportUnavailable  the backend cannot run here (names the setting)
    ├── PoolExhausted           the KV block pool has too few free blocks
    ├── CheckpointError         a model directory that cannot be loaded; names file and tensor
    └── RankLost                a rank of a tensor-parallel worker has ended, and with it the worker

Errors carry fields, so that callers decide by type and field, never by text.
"""

from __future__ import annotations


class KvferryError(Exception):
    """Base of every error that kvferry raises on purpose."""


class SettingError(KvferryError):
    """A setting has a wrong value. `setting` is its name as the user writes it."""

    def __init__(self, setting: str, problem: str) -> None:
        super().__init__(f"{setting}: {problem}")
        self.setting = setting
        self.problem = problem


class WireError(KvferryError):
    """Bytes from another process that cannot be used. `kind` labels the drop counter."""

    kind = "wire"


class UnknownVersion(WireError):
    """A message in a wire version that this process does not speak."""

    kind = "unknown_version"

    def __init__(self, version: int) -> None:
        super().__init__(f"unknown wire version {version}")
        self.version = version


class MalformedMessage(WireError):
    """Not a message of this wire version: empty, cut, of a wrong type or over a limit."""

    kind = "malformed"


class Impostor(WireError):
    """A message that claims another sender than its subject shows, or that its sender's role has no right to send."""

    kind = "impostor"


class CorruptFrame(WireError):
    """A KV frame whose header, length or checksum is wrong. `reason` labels the failure counter."""

    kind = "corrupt_frame"

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"corrupt frame ({reason}) {detail}".rstrip())
        self.reason = reason


class BusError(KvferryError):
    """The control plane failed."""


class BusUnavailable(BusError):
    """The bus is not connected. Nothing was sent and nothing will be replayed later."""


class NoResponders(BusError):
    """Nobody listens on the subject of a request."""

    def __init__(self, subject: str) -> None:
        super().__init__(f"no responders on {subject}")
        self.subject = subject


class BusTimeout(BusError):
    """No answer arrived in time."""

    def __init__(self, subject: str, timeout: float) -> None:
        super().__init__(f"no answer on {subject} within {timeout:.3f} s")
        self.subject = subject
        self.timeout = timeout


class TransportError(KvferryError):
    """The data plane failed."""


class ConnectionClosed(TransportError):
    """The connection has ended; every pending send and receive on it ends with this."""


class HandshakeRefused(TransportError):
    """The peer's hello does not prove the cluster's data key, or speaks another version."""


class TransportUnavailable(TransportError):
    """A transport backend cannot run on this machine."""

    def __init__(self, backend: str, problem: str) -> None:
        super().__init__(f"transport {backend}: {problem}")
        self.backend = backend
        self.problem = problem


class PoolExhausted(KvferryError):
    """Fewer blocks are free than were asked for. The pool is unchanged."""

    def __init__(self, wanted: int, free: int) -> None:
        super().__init__(f"{wanted} KV blocks wanted, {free} free")
        self.wanted = wanted
        self.free = free


class CheckpointError(KvferryError):
    """A model directory cannot be loaded."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


class RankLost(KvferryError):
    """A rank of a tensor-parallel worker has ended or failed. The worker can compute nothing any more."""

    def __init__(self, rank: int, problem: str) -> None:
        super().__init__(f"rank {rank}: {problem}")
        self.rank = rank
        self.problem = problem
