"""The endpoints of the UCX thread: connecting, sending, receiving, and an end that is proven.

Frames are active messages: the tag travels in the header, so that a frame is matched to the receive that was
posted on its own endpoint before a byte of a large one moves (rendezvous). A frame that nobody posted or
that is too long never reaches memory, and a receive that no frame has met is a dictionary entry, not a UCX
request. Closing by force ends every request of an endpoint, and only when UCX has said so of each are its
buffers given back.
"""

from __future__ import annotations

import ctypes
import struct
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from kvferry.errors import CorruptFrame
from kvferry.transport import libucp as ucp
from kvferry.transport.link import Transfer
from kvferry.transport.sockaddr import pack_sockaddr
from kvferry.transport.ucx_endpoint import ALIVE, Endpoint
from kvferry.transport.ucx_requests import Ended, Requests, address_of

AM_FLOW: Final = 1
AM_FRAME: Final = 2
AM_BYE: Final = 3
# Header of an active message: a flow message's number on its connection, or a frame's tag.
_NUMBER: Final = struct.Struct("<Q")


class Endpoints:
    """All endpoints of one UCP worker. Every method runs on the UCX thread, every report on the owner's loop."""

    def __init__(
        self,
        library: ucp.LibUcp,
        report: Callable[[Callable[[], None]], None],
        max_endpoints: int,
        accepted: Callable[[Endpoint], None],
        rejected: Callable[[], None],
    ) -> None:
        self._ucp = library
        # A report looks up `endpoint.owner` only when it runs: an accepted endpoint gets its owner there.
        self._report = report
        self._max_endpoints = max_endpoints
        self._accepted = accepted
        self._rejected = rejected
        self._worker = ctypes.c_void_p()
        self._listener = ctypes.c_void_p()
        self._open = True
        self._by_handle: dict[int, Endpoint] = {}
        self._doomed: deque[Endpoint] = deque()  # to be closed when no callback is running
        self._requests = Requests(library, self._request_settled)
        # ctypes keeps no reference to a callback that C holds: these must live as long as the worker.
        self._on_error = ucp.ErrorCallback(self._failed)
        self._on_message = ucp.AmCallback(self._message_arrived)
        self.on_connection_request = ucp.ConnCallback(self._connection_requested)

    # Life of the worker

    def attach(self, worker: ctypes.c_void_p) -> None:
        """Handle the active messages of `worker`."""
        self._worker = worker
        for kind in (AM_FLOW, AM_FRAME, AM_BYE):
            handler = ucp.AmHandlerParam(
                field_mask=ucp.AM_HANDLER_ID | ucp.AM_HANDLER_FLAGS | ucp.AM_HANDLER_CB | ucp.AM_HANDLER_ARG,
                id=kind,
                flags=ucp.AM_WHOLE_MSG,
                cb=self._on_message,
                arg=kind,
            )
            status = self._ucp.worker_set_am_recv_handler(worker, ctypes.byref(handler))
            assert status == ucp.OK, status

    def listen(self, listener: ctypes.c_void_p) -> None:
        """The listener that takes rejections."""
        self._listener = listener

    @property
    def idle(self) -> bool:
        """No endpoint and no request is left."""
        return not (self._by_handle or self._requests)

    def stop(self) -> None:
        """Close all, admit no more."""
        self._open = False
        for endpoint in list(self._by_handle.values()):
            self._doom(endpoint)

    def worker_destroyed(self) -> None:
        """The worker is gone and with it every access to memory: what it has not ended has ended now."""
        self._open = False
        remaining = [*self._by_handle.values(), *self._doomed]
        self._by_handle.clear()
        self._doomed.clear()
        self._requests.cancel_all()
        for endpoint in remaining:
            self._gone(endpoint)

    # Life of an endpoint

    def connect(self, endpoint: Endpoint, host: str, port: int) -> None:
        """Begin to connect to a listener. What is sent meanwhile waits in UCX; a failure ends the endpoint."""
        address = ctypes.create_string_buffer(pack_sockaddr(host, port))
        self._create(
            endpoint,
            field_mask=ucp.EP_PARAM_FLAGS | ucp.EP_PARAM_SOCK_ADDR,
            flags=ucp.EP_FLAG_CLIENT_SERVER,
            sockaddr=ucp.sockaddr_of(address),
        )

    def drain(self, endpoint: Endpoint) -> None:
        """End after everything that was sent before has reached the peer."""
        if endpoint.state == "open":
            endpoint.state = "draining"
            self._say_bye_if_drained(endpoint)

    def abort(self, endpoint: Endpoint) -> None:
        """End now."""
        self._doom(endpoint)

    def confirm(self, endpoint: Endpoint) -> None:
        """Report `finish`, after the answers to all that was submitted or posted before."""
        self._cancel_posted(endpoint)
        self._report(lambda: endpoint.owner.finish())

    def close_doomed(self) -> bool:
        """Close by force, which UCX does not allow within its callbacks. Whether there was something to close."""
        found = bool(self._doomed)
        while self._doomed:
            endpoint = self._doomed.popleft()
            endpoint.state = "closing"
            del self._by_handle[endpoint.handle]
            number = self._requests.begin(endpoint, False, _ignore)
            param = self._requests.send_param(number, ucp.EP_CLOSE_FORCE)
            self._requests.settle(number, self._ucp.ep_close_nbx(endpoint.handle, ctypes.byref(param)))
        return found

    def _connection_requested(self, request: int, _argument: object) -> None:
        if not self._open or len(self._by_handle) >= self._max_endpoints:
            self._ucp.listener_reject(self._listener, request)
            self._report(self._rejected)
            return
        endpoint = Endpoint()
        self._report(lambda: self._accepted(endpoint))
        self._create(endpoint, field_mask=ucp.EP_PARAM_CONN_REQUEST, conn_request=request)

    def _create(self, endpoint: Endpoint, field_mask: int, **fields: Any) -> None:
        params = ucp.EpParams(
            field_mask=field_mask | ucp.EP_PARAM_ERR_HANDLING_MODE | ucp.EP_PARAM_ERR_HANDLER,
            err_mode=ucp.ERR_HANDLING_PEER,  # at both ends: else a dead peer is never noticed
            err_handler=ucp.ErrHandler(self._on_error, None),
            **fields,
        )
        handle = ctypes.c_void_p()
        if not self._open or self._ucp.ep_create(self._worker, ctypes.byref(params), ctypes.byref(handle)) != ucp.OK:
            self._gone(endpoint)
            return
        assert handle.value is not None
        endpoint.handle = handle.value
        self._by_handle[endpoint.handle] = endpoint

    def _failed(self, _argument: object, handle: int, _status: int) -> None:
        """UCX's callback: the peer is gone or cannot be reached."""
        if (endpoint := self._by_handle.get(handle)) is not None:
            self._doom(endpoint)

    def _say_bye_if_drained(self, endpoint: Endpoint) -> None:
        # A send that has ended here is not delivered: closing now could lose it. The peer answers BYE, which
        # comes after everything else, by finishing its receives and closing, and that we hear as a failure.
        if endpoint.state == "draining" and endpoint.num_sends == 0:
            endpoint.state = "leaving"
            self._send(endpoint, AM_BYE, b"", memoryview(b""), _ignore)

    def _doom_if_received(self, endpoint: Endpoint) -> None:
        # The peer's sends have ended, but the last of their bytes may still be on their way through UCX.
        if endpoint.state == "left" and endpoint.num_requests == endpoint.num_sends:
            self._doom(endpoint)

    def _doom(self, endpoint: Endpoint) -> None:
        if endpoint.state in ALIVE:
            endpoint.state = "doomed"
            self._doomed.append(endpoint)
            self._report(lambda: endpoint.owner.lost())

    def _gone(self, endpoint: Endpoint) -> None:
        if endpoint.state == "gone":
            return
        endpoint.state = "gone"
        self._report(lambda: endpoint.owner.gone())

    def _cancel_posted(self, endpoint: Endpoint) -> None:
        while endpoint.posted:
            _, (_, transfer) = endpoint.posted.popitem()
            self._report_received(endpoint, transfer, ucp.ERR_CANCELED, 0)

    def _violated(self, endpoint: Endpoint) -> None:
        self._report(lambda: endpoint.owner.violated())
        self._doom(endpoint)

    # Sending

    def send_flow(self, endpoint: Endpoint, message: bytes) -> None:
        header = _NUMBER.pack(endpoint.next_sent)
        endpoint.next_sent += 1
        self._send(endpoint, AM_FLOW, header, memoryview(message), self._when_sent(endpoint, None, len(message)))

    def send_frame(self, endpoint: Endpoint, tag: int, frame: memoryview, transfer: Transfer[None]) -> None:
        self._send(endpoint, AM_FRAME, _NUMBER.pack(tag), frame, self._when_sent(endpoint, transfer, len(frame)))

    def _when_sent(self, endpoint: Endpoint, transfer: Transfer[None] | None, num_bytes: int) -> Ended:
        def ended(status: int, _length: int) -> None:
            self._report(lambda: endpoint.owner.sent(transfer, num_bytes, status))

        return ended

    def _send(self, endpoint: Endpoint, kind: int, header: bytes, payload: memoryview, ended: Ended) -> None:
        if endpoint.state not in ALIVE:
            ended(ucp.ERR_CANCELED, 0)
            return
        address, keep = address_of(payload)
        number = self._requests.begin(endpoint, True, ended, header, keep)
        # With a reply endpoint the receiver learns which of its connections a message came on.
        param = self._requests.send_param(number, ucp.AM_SEND_REPLY)
        result = self._ucp.am_send_nbx(
            endpoint.handle, kind, header, len(header), address, len(payload), ctypes.byref(param)
        )
        self._requests.settle(number, result)

    # Receiving

    def _message_arrived(self, kind: int, header: int, header_length: int, data: int, length: int, param: Any) -> int:
        """UCX's callback for active messages. Returns OK where UCX may drop the data."""
        endpoint = self._by_handle.get(param.contents.reply_ep)
        if endpoint is None or endpoint.state not in ALIVE:
            return ucp.OK
        large = bool(param.contents.recv_attr & ucp.AM_RECV_RNDV)
        if kind == AM_BYE:
            endpoint.state = "left"
            self._doom_if_received(endpoint)
        elif header_length != _NUMBER.size or (kind == AM_FLOW and large):
            self._violated(endpoint)
        else:
            (number,) = _NUMBER.unpack(ctypes.string_at(header, _NUMBER.size))
            if kind == AM_FRAME:
                return self._frame_arrived(endpoint, number, data, length, large)
            self._flow_arrived(endpoint, number, ctypes.string_at(data, length) if length else b"")
        return ucp.OK

    def _flow_arrived(self, endpoint: Endpoint, number: int, message: bytes) -> None:
        if number != endpoint.next_received:
            self._violated(endpoint)
            return
        endpoint.next_received += 1
        self._report(lambda: endpoint.owner.arrived(memoryview(message)))

    def _frame_arrived(self, endpoint: Endpoint, tag: int, data: int, length: int, large: bool) -> int:
        posted = endpoint.posted.pop(tag, None)
        if posted is None:
            self._violated(endpoint)
            return ucp.OK
        buffer, transfer = posted
        if length > len(buffer):
            error = CorruptFrame("long", f"{length} bytes into {len(buffer)}")
            self._report(lambda: endpoint.owner.too_long(transfer, error))
            return ucp.OK
        address, keep = address_of(buffer[:length])
        if not large:
            if address is not None:
                ctypes.memmove(address, data, length)
            self._report_received(endpoint, transfer, ucp.OK, length)
            return ucp.OK

        def ended(status: int, got: int) -> None:
            self._report_received(endpoint, transfer, status, got)

        number = self._requests.begin(endpoint, False, ended, keep)
        param = self._requests.receive_param(number)
        result = self._ucp.am_recv_data_nbx(self._worker, data, address, length, ctypes.byref(param))
        self._requests.settle(number, result, length)
        return ucp.INPROGRESS

    def _report_received(self, endpoint: Endpoint, transfer: Transfer[int], status: int, length: int) -> None:
        self._report(lambda: endpoint.owner.received(transfer, length, status))

    def _request_settled(self, endpoint: Endpoint) -> None:
        self._say_bye_if_drained(endpoint)
        self._doom_if_received(endpoint)
        # Its close is itself a request, so that nothing is gone before it was closed.
        if endpoint.state == "closing" and endpoint.num_requests == 0:
            self._gone(endpoint)


def _ignore(_status: int, _length: int) -> None:
    """The end of a request that concerns nobody: BYE, or the closing itself."""
