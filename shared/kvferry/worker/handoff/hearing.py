"""What a peer says on the data plane, and the end of one that says what nobody may."""

from __future__ import annotations

from kvferry.errors import WireError
from kvferry.transport.base import Connection
from kvferry.wire.flow import Flow, FlowCodec
from kvferry.worker.metrics import WorkerMetrics


class Hearing:
    """Of all connections of a process."""

    def __init__(self, metrics: WorkerMetrics) -> None:
        self._metrics = metrics
        self._codec = FlowCodec()

    def understand(self, connection: Connection, payload: memoryview) -> Flow | None:
        """None: it was garbage, and the connection has ended."""
        try:
            return self._codec.decode(payload)
        except WireError as error:
            self.distrust(connection, error.kind)
            return None

    def distrust(self, connection: Connection, kind: str) -> None:
        """End the connection. `kind` is what this is counted under."""
        self._metrics.wire_errors.labels("data", kind).inc()
        connection.abort()
