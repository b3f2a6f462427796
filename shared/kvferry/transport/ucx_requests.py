"""The requests of the UCX thread that are under way: what each one's end means, and the memory that it uses.

A request keeps its buffers alive until UCX has said that it has ended: at once, in the answer of the call that
began it, or later by a callback.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvferry.transport import libucp as ucp
from kvferry.transport.ucx_endpoint import Endpoint

_REQUEST_FIELDS: Final = ucp.OP_CALLBACK | ucp.OP_USER_DATA | ucp.OP_FLAGS

Ended = Callable[[int, int], None]  # of a request: status, bytes received


@dataclass(slots=True)
class _Request:
    endpoint: Endpoint
    is_send: bool
    ended: Ended
    buffers: tuple[object, ...]


class Requests:
    """All requests of one UCP worker. Every method runs on the UCX thread."""

    def __init__(self, library: ucp.LibUcp, settled: Callable[[Endpoint], None]) -> None:
        """`settled` hears of an endpoint of which a request has ended, after the request's own `ended`."""
        self._ucp = library
        self._settled = settled
        self._under_way: dict[int, _Request] = {}
        self._last = 0
        # ctypes keeps no reference to a callback that C holds: these must live as long as the worker.
        self._on_sent = ucp.SendCallback(self._sent)
        self._on_received = ucp.RecvCallback(self._received)
        self._sent_address = ctypes.cast(self._on_sent, ctypes.c_void_p)
        self._received_address = ctypes.cast(self._on_received, ctypes.c_void_p)

    def __len__(self) -> int:
        return len(self._under_way)

    def begin(self, endpoint: Endpoint, is_send: bool, ended: Ended, *buffers: object) -> int:
        """A request that is about to be given to UCX; its number, for the parameters."""
        self._last += 1
        self._under_way[self._last] = _Request(endpoint, is_send, ended, buffers)
        endpoint.num_requests += 1
        endpoint.num_sends += is_send
        return self._last

    def send_param(self, number: int, flags: int) -> ucp.RequestParam:
        """Parameters of a send, and of a close, which ends the same way."""
        return ucp.RequestParam(op_attr_mask=_REQUEST_FIELDS, flags=flags, cb=self._sent_address, user_data=number)

    def receive_param(self, number: int) -> ucp.RequestParam:
        return ucp.RequestParam(op_attr_mask=_REQUEST_FIELDS, flags=0, cb=self._received_address, user_data=number)

    def settle(self, number: int, result: int | None, length: int = 0) -> None:
        """End a request that UCX has completed at once; else its callback will."""
        if (status := ucp.status_of(result)) != ucp.INPROGRESS:
            self._end(number, status, length)

    def cancel_all(self) -> None:
        """The worker is destroyed, and with it every access to memory: what has not ended has ended now."""
        for number in list(self._under_way):
            self._end(number, ucp.ERR_CANCELED, 0)

    def _sent(self, request: int, status: int, number: int) -> None:
        self._ucp.request_free(request)
        self._end(number, status, 0)

    def _received(self, request: int, status: int, length: int, number: int) -> None:
        self._ucp.request_free(request)
        self._end(number, status, length)

    def _end(self, number: int, status: int, length: int) -> None:
        request = self._under_way.pop(number)
        endpoint = request.endpoint
        endpoint.num_requests -= 1
        endpoint.num_sends -= request.is_send
        request.ended(status, length)
        self._settled(endpoint)


def address_of(view: memoryview) -> tuple[int | None, object]:
    """Where a buffer lies, a read-only one too, and what keeps it there."""
    if len(view) == 0:
        return None, view
    array = np.frombuffer(view, dtype=np.uint8)
    return array.ctypes.data, array
