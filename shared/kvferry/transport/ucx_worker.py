"""The UCX thread: one UCP worker, driven in blocking progress mode, and the endpoints on it.

Everything in this file runs on that thread, except where a method says "owner". The owner's loop and the
thread talk through two queues of calls, each woken at most once per batch: `submit` (owner to thread, an
eventfd) and `_report` (thread to owner, `call_soon_threadsafe`).

The loop: run the owner's calls, progress until nothing moves, arm, and sleep on UCX's descriptor and the
eventfd. Nothing spins: idle costs no CPU. UCX may in rare cases lose a wake-up, hence a tick each second.

An endpoint's life:

    open ── close ──> draining ── all sends ended, BYE sent ──> leaving ──┐
      └──── abort, failure, the peer's BYE ──────────────────────────────┴──> closing ── all ended ──> gone

Frames are active messages: the tag travels in the header, so that a frame is matched to the receive that was
posted on its own endpoint before a byte of a large one moves (rendezvous); one that nobody posted or that
is too long never reaches memory. Closing by force ends every operation of the endpoint, and only when
UCX has said so of each are its buffers given back.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import struct
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

import numpy as np

from kvferry.errors import CorruptFrame, TransportUnavailable
from kvferry.runtime import blocking_clock
from kvferry.transport import libucp as ucp
from kvferry.transport.link import Transfer
from kvferry.transport.sockaddr import pack_sockaddr, unpack_port

TICK_SECONDS: Final = 1.0
STOP_SECONDS: Final = 2.0  # for operations of closing endpoints, before the worker itself is destroyed
AM_FLOW: Final = 1
AM_FRAME: Final = 2
AM_BYE: Final = 3
_SEQUENCE: Final = struct.Struct("<Q")  # header of a flow message: its number on this connection
_TAG: Final = struct.Struct("<Q")  # header of a frame
_REQUEST_FIELDS: Final = ucp.OP_CALLBACK | ucp.OP_USER_DATA | ucp.OP_FLAGS


class Owner(Protocol):
    """What the thread reports, on the owner's loop, about one endpoint."""

    def arrived(self, message: memoryview) -> None: ...
    def violated(self) -> None: ...
    def lost(self) -> None: ...
    def sent(self, transfer: Transfer[None] | None, num_bytes: int, status: int) -> None: ...
    def received(self, transfer: Transfer[int], num_bytes: int, status: int) -> None: ...
    def too_long(self, transfer: Transfer[int], error: CorruptFrame) -> None: ...
    def gone(self) -> None: ...
    def finish(self) -> None: ...


EndpointState = Literal["open", "draining", "leaving", "closing", "gone"]
_ALIVE: Final[frozenset[EndpointState]] = frozenset(("open", "draining", "leaving"))


@dataclass(eq=False, slots=True)
class Endpoint:
    """One connection, as the thread sees it."""

    owner: Owner = field(init=False)  # set, and used, on the owner's loop alone
    handle: int = 0
    state: EndpointState = "open"
    num_sends: int = 0
    num_operations: int = 0  # sends included
    next_sequence: int = 0  # of the flow messages that we send
    expected_sequence: int = 0  # of the next one that we receive
    posted: dict[int, tuple[memoryview, Transfer[int]]] = field(default_factory=dict)


@dataclass(slots=True)
class _Operation:
    """One UCX request. It keeps its buffers alive until UCX has ended it."""

    endpoint: Endpoint
    is_send: bool
    ended: Callable[[int, int], None]  # status, bytes received
    buffers: tuple[Any, ...]


class UcxWorker:
    """Owns the UCP context, worker and listener."""

    def __init__(
        self,
        library: ucp.LibUcp,
        options: Mapping[str, str],
        max_endpoints: int,
        wake_owner: Callable[[Callable[[], None]], object],
        accepted: Callable[[Endpoint], None],
        rejected: Callable[[], None],
    ) -> None:
        """`wake_owner` is the owner's `call_soon_threadsafe`. `accepted` gives a new endpoint its owner, `rejected`
        hears of a peer for which there was no room; both are called on the owner's loop."""
        self._ucp = library
        self._options = options
        self._max_endpoints = max_endpoints
        self._wake_owner = wake_owner
        self._accepted = accepted
        self._rejected = rejected
        self._calls: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._reports: deque[Callable[[], None]] = deque()
        self._owner_woken = False
        self._sleeping = False
        self._stopping = False
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._context = ctypes.c_void_p()
        self._worker = ctypes.c_void_p()
        self._listener = ctypes.c_void_p()
        self._endpoints: dict[int, Endpoint] = {}  # by handle
        self._operations: dict[int, _Operation] = {}
        self._doomed: deque[Endpoint] = deque()  # to be closed when no callback is running
        self._last_operation = 0
        # ctypes keeps no reference to a callback that C holds: these must live as long as the worker.
        self._on_sent = ucp.SendCallback(self._sent)
        self._on_received = ucp.RecvCallback(self._received)
        self._on_error = ucp.ErrorCallback(self._failed)
        self._on_connection = ucp.ConnCallback(self._connection_requested)
        self._on_message = ucp.AmCallback(self._message_arrived)

    # Called by the owner

    def submit(self, call: Callable[..., None], *args: Any) -> None:
        """Owner: run `call(*args)` on the thread, after all that was submitted before."""
        self._calls.append((call, args))
        if self._sleeping:
            os.eventfd_write(self._eventfd, 1)

    def collect(self) -> None:
        """Owner: run what the thread has reported."""
        # Cleared first: a report that comes from here on wakes the owner again.
        self._owner_woken = False
        for _ in range(len(self._reports)):
            self._reports.popleft()()

    def settle(self) -> None:
        """Owner, once the thread has ended: answer what was submitted too late."""
        while self._calls or self._reports:
            self._run_calls()
            self.collect()

    def confirm(self, endpoint: Endpoint) -> None:
        """Report `finish`, after the answers to all that the owner submitted before it knew of the end."""
        self._report(lambda: endpoint.owner.finish())

    def _report(self, report: Callable[[], None]) -> None:
        # A report looks up `endpoint.owner` only when it runs: an accepted endpoint gets its owner there.
        self._reports.append(report)

    # The thread

    def run(self, host: str, port: int, listening: Callable[[int | TransportUnavailable], None]) -> None:
        """The thread's life. Reports `listening(port)` or `listening(error)` first; returns after `stop`."""
        try:
            try:
                descriptor = self._open(host, port)
            except TransportUnavailable as error:
                failure = error
                self._report(lambda: listening(failure))
                return
            port = self._listening_port()
            self._report(lambda: listening(port))
            self._serve(descriptor)
        finally:
            self._destroy()
            self._hand_over()

    def stop(self) -> None:
        self._stopping = True
        for endpoint in list(self._endpoints.values()):
            self._doom(endpoint)

    def _serve(self, descriptor: int) -> None:
        poller = select.epoll()
        poller.register(descriptor, select.EPOLLIN)
        poller.register(self._eventfd, select.EPOLLIN)
        deadline: float | None = None
        try:
            while True:
                self._run_calls()
                moved = self._ucp.worker_progress(self._worker)
                self._close_doomed()
                self._hand_over()
                if self._stopping:
                    deadline = deadline or blocking_clock() + STOP_SECONDS
                    if not (self._endpoints or self._operations) or blocking_clock() > deadline:
                        return
                # Armed only when nothing moved, as UCX asks; a failure to arm means that something has.
                if moved or self._ucp.worker_arm(self._worker) != ucp.OK:
                    continue
                self._sleep(poller)
                # The interpreter joins this thread at exit, also if nobody has closed the transport.
                if not threading.main_thread().is_alive():
                    self.stop()
        finally:
            poller.close()

    def _sleep(self, poller: select.epoll) -> None:
        self._sleeping = True
        # Looked at after the flag is set: the owner looks at the flag after it has queued its call.
        if not self._calls:
            poller.poll(TICK_SECONDS)
        self._sleeping = False
        with contextlib.suppress(BlockingIOError):  # it was UCX, or the tick
            os.eventfd_read(self._eventfd)

    def _run_calls(self) -> None:
        while self._calls:
            call, args = self._calls.popleft()
            call(*args)

    def _hand_over(self) -> None:
        if self._reports and not self._owner_woken:
            self._owner_woken = True
            try:
                self._wake_owner(self.collect)
            except RuntimeError:
                self._reports.clear()  # the owner's loop is closed: nobody is left to hear

    # Opening and destroying

    def _open(self, host: str, port: int) -> int:
        """Returns the descriptor to sleep on."""
        config = ctypes.c_void_p()
        self._must(self._ucp.config_read(None, None, ctypes.byref(config)), "read its configuration")
        for name, value in self._options.items():
            self._must(self._ucp.config_modify(config, name.encode(), value.encode()), f"set {name}")
        params = ucp.Params(field_mask=ucp.PARAM_FEATURES, features=ucp.FEATURE_AM | ucp.FEATURE_WAKEUP)
        status = self._ucp.init_version(
            ucp.API_MAJOR, ucp.API_MINOR, ctypes.byref(params), config, ctypes.byref(self._context)
        )
        self._ucp.config_release(config)
        self._must(status, "start")
        worker = ucp.WorkerParams(field_mask=ucp.WORKER_PARAM_THREAD_MODE, thread_mode=ucp.THREAD_MODE_SINGLE)
        self._must(
            self._ucp.worker_create(self._context, ctypes.byref(worker), ctypes.byref(self._worker)),
            "make a worker; is UCX_NET_DEVICES right?",
        )
        for number in (AM_FLOW, AM_FRAME, AM_BYE):
            handler = ucp.AmHandlerParam(
                field_mask=ucp.AM_HANDLER_ID | ucp.AM_HANDLER_FLAGS | ucp.AM_HANDLER_CB | ucp.AM_HANDLER_ARG,
                id=number, flags=ucp.AM_WHOLE_MSG, cb=self._on_message, arg=number,
            )  # fmt: skip
            self._must(self._ucp.worker_set_am_recv_handler(self._worker, ctypes.byref(handler)), "set a handler")
        address = ctypes.create_string_buffer(pack_sockaddr(host, port))
        listener = ucp.ListenerParams(
            field_mask=ucp.LISTENER_PARAM_SOCK_ADDR | ucp.LISTENER_PARAM_CONN_HANDLER,
            sockaddr=_sockaddr_of(address), conn_handler=ucp.ConnHandler(self._on_connection, None),
        )  # fmt: skip
        self._must(
            self._ucp.listener_create(self._worker, ctypes.byref(listener), ctypes.byref(self._listener)),
            f"listen on {host}:{port}",
        )
        descriptor = ctypes.c_int()
        self._must(self._ucp.worker_get_efd(self._worker, ctypes.byref(descriptor)), "give its descriptor")
        return descriptor.value

    def _must(self, status: int, deed: str) -> None:
        if status != ucp.OK:
            raise TransportUnavailable("ucx", f"UCX cannot {deed} (status {status})")

    def _listening_port(self) -> int:
        attributes = ucp.ListenerAttr(field_mask=ucp.LISTENER_ATTR_SOCKADDR)
        self._must(self._ucp.listener_query(self._listener, ctypes.byref(attributes)), "tell its port")
        return unpack_port(bytes(attributes.sockaddr))

    def _destroy(self) -> None:
        if self._listener:
            self._ucp.listener_destroy(self._listener)
        if self._worker:
            self._ucp.worker_destroy(self._worker)
        if self._context:
            self._ucp.cleanup(self._context)
        # The worker is gone and with it every access to memory: what it has not ended has ended now.
        self._stopping = True
        remaining = [*self._endpoints.values(), *self._doomed]
        for number in list(self._operations):
            self._end(number, ucp.ERR_CANCELED, 0)
        for endpoint in remaining:
            if endpoint.state != "gone":
                self._gone(endpoint)
        os.close(self._eventfd)

    # Endpoints

    def connect(self, endpoint: Endpoint, host: str, port: int) -> None:
        if self._stopping:
            self._gone(endpoint)
            return
        address = ctypes.create_string_buffer(pack_sockaddr(host, port))
        self._create(
            endpoint,
            field_mask=ucp.EP_PARAM_FLAGS | ucp.EP_PARAM_SOCK_ADDR,
            flags=ucp.EP_FLAG_CLIENT_SERVER,
            sockaddr=_sockaddr_of(address),
        )

    def _connection_requested(self, request: int, _argument: object) -> None:
        if self._stopping or len(self._endpoints) >= self._max_endpoints:
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
        if self._ucp.ep_create(self._worker, ctypes.byref(params), ctypes.byref(handle)) != ucp.OK:
            self._gone(endpoint)
            return
        assert handle.value is not None
        endpoint.handle = handle.value
        self._endpoints[endpoint.handle] = endpoint

    def _failed(self, _argument: object, handle: int, _status: int) -> None:
        """UCX reports that the peer is gone or unreachable."""
        endpoint = self._endpoints.get(handle)
        if endpoint is not None:
            self._doom(endpoint)

    def abort(self, endpoint: Endpoint) -> None:
        self._doom(endpoint)

    def drain(self, endpoint: Endpoint) -> None:
        """End after everything that was sent before has reached the peer's UCX."""
        if endpoint.state == "open":
            endpoint.state = "draining"
            self._say_bye_if_drained(endpoint)

    def _say_bye_if_drained(self, endpoint: Endpoint) -> None:
        # A send that has completed locally is not delivered: closing now could lose it. The peer answers
        # BYE, which comes after everything else, by closing, and that we hear as a failure.
        if endpoint.state == "draining" and endpoint.num_sends == 0:
            endpoint.state = "leaving"
            self._send(endpoint, AM_BYE, b"", None, _ignore)

    def _doom(self, endpoint: Endpoint) -> None:
        """Close by force, but not from within a callback of UCX."""
        if endpoint.state in _ALIVE:
            endpoint.state = "closing"
            self._doomed.append(endpoint)
            self._report(lambda: endpoint.owner.lost())

    def _close_doomed(self) -> None:
        while self._doomed:
            endpoint = self._doomed.popleft()
            del self._endpoints[endpoint.handle]
            number = self._begin(endpoint, False, _ignore, ())
            param = self._param(number, self._on_sent, ucp.EP_CLOSE_FORCE)
            status = ucp.status_of(self._ucp.ep_close_nbx(endpoint.handle, ctypes.byref(param)))
            if status != ucp.INPROGRESS:
                self._end(number, status, 0)

    def _gone(self, endpoint: Endpoint) -> None:
        endpoint.state = "gone"
        for _, transfer in endpoint.posted.values():
            self._report_received(endpoint, transfer, ucp.ERR_CANCELED, 0)
        endpoint.posted.clear()
        self._report(lambda: endpoint.owner.gone())

    # Sending

    def send_flow(self, endpoint: Endpoint, message: bytes) -> None:
        header = _SEQUENCE.pack(endpoint.next_sequence)
        endpoint.next_sequence += 1
        self._send(endpoint, AM_FLOW, header, memoryview(message), self._when_sent(endpoint, None, len(message)))

    def send_frame(self, endpoint: Endpoint, tag: int, frame: memoryview, transfer: Transfer[None]) -> None:
        self._send(endpoint, AM_FRAME, _TAG.pack(tag), frame, self._when_sent(endpoint, transfer, len(frame)))

    def _when_sent(
        self, endpoint: Endpoint, transfer: Transfer[None] | None, num_bytes: int
    ) -> Callable[[int, int], None]:
        def ended(status: int, _length: int) -> None:
            self._report(lambda: endpoint.owner.sent(transfer, num_bytes, status))

        return ended

    def _send(
        self,
        endpoint: Endpoint,
        kind: int,
        header: bytes,
        payload: memoryview | None,
        ended: Callable[[int, int], None],
    ) -> None:
        if endpoint.state not in _ALIVE:
            ended(ucp.ERR_CANCELED, 0)
            return
        address, keep = _address_of(payload)
        number = self._begin(endpoint, True, ended, (header, keep))
        param = self._param(number, self._on_sent, ucp.AM_SEND_REPLY)
        status = ucp.status_of(
            self._ucp.am_send_nbx(
                endpoint.handle, kind, header, len(header), address,
                len(payload) if payload is not None else 0, ctypes.byref(param),
            )
        )  # fmt: skip
        if status != ucp.INPROGRESS:
            self._end(number, status, 0)

    # Receiving

    def post(self, endpoint: Endpoint, tag: int, buffer: memoryview, transfer: Transfer[int]) -> None:
        if endpoint.state == "open":
            endpoint.posted[tag] = (buffer, transfer)
        else:
            self._report_received(endpoint, transfer, ucp.ERR_CANCELED, 0)

    def _report_received(self, endpoint: Endpoint, transfer: Transfer[int], status: int, length: int) -> None:
        self._report(lambda: endpoint.owner.received(transfer, length, status))

    def _message_arrived(self, kind: int, header: int, header_length: int, data: int, length: int, param: Any) -> int:
        """UCX's callback for active messages. Returns OK where UCX may drop the data."""
        endpoint = self._endpoints.get(param.contents.reply_ep)
        if endpoint is None or endpoint.state not in _ALIVE:
            return ucp.OK
        attributes = param.contents.recv_attr
        large = bool(attributes & ucp.AM_RECV_RNDV)
        if kind == AM_BYE:
            self._doom(endpoint)
        elif header_length != _TAG.size:
            self._violated(endpoint)
        elif kind == AM_FRAME:
            (tag,) = _TAG.unpack(ctypes.string_at(header, _TAG.size))
            return self._frame_arrived(endpoint, tag, data, length, large)
        elif large:  # no flow message is: it would have to be received into memory first
            self._violated(endpoint)
        else:
            (sequence,) = _SEQUENCE.unpack(ctypes.string_at(header, _SEQUENCE.size))
            if sequence != endpoint.expected_sequence:
                self._violated(endpoint)
                return ucp.OK
            endpoint.expected_sequence += 1
            message = memoryview(ctypes.string_at(data, length) if length else b"")
            self._report(lambda: endpoint.owner.arrived(message))
        return ucp.OK

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
        address, keep = _address_of(buffer)
        if not large:
            if length:
                assert address is not None
                ctypes.memmove(address, data, length)
            self._report_received(endpoint, transfer, ucp.OK, length)
            return ucp.OK

        def ended(status: int, got: int) -> None:
            self._report_received(endpoint, transfer, status, got)

        number = self._begin(endpoint, False, ended, (keep,))
        param = self._param(number, self._on_received, 0)
        status = ucp.status_of(self._ucp.am_recv_data_nbx(self._worker, data, address, length, ctypes.byref(param)))
        if status != ucp.INPROGRESS:
            self._end(number, status, length)
        return ucp.INPROGRESS

    def _violated(self, endpoint: Endpoint) -> None:
        self._report(lambda: endpoint.owner.violated())
        self._doom(endpoint)

    # Operations

    def _begin(
        self, endpoint: Endpoint, is_send: bool, ended: Callable[[int, int], None], buffers: tuple[Any, ...]
    ) -> int:
        self._last_operation += 1
        self._operations[self._last_operation] = _Operation(endpoint, is_send, ended, buffers)
        endpoint.num_operations += 1
        endpoint.num_sends += is_send
        return self._last_operation

    def _end(self, number: int, status: int, length: int) -> None:
        operation = self._operations.pop(number)
        endpoint = operation.endpoint
        endpoint.num_operations -= 1
        endpoint.num_sends -= operation.is_send
        operation.ended(status, length)
        if endpoint.state == "draining" and operation.ended is not _ignore:
            self._say_bye_if_drained(endpoint)
        elif endpoint.state == "closing" and endpoint.num_operations == 0 and endpoint not in self._doomed:
            self._gone(endpoint)

    def _param(self, number: int, callback: Any, flags: int) -> ucp.RequestParam:
        return ucp.RequestParam(
            op_attr_mask=_REQUEST_FIELDS, flags=flags, cb=ctypes.cast(callback, ctypes.c_void_p), user_data=number
        )

    def _sent(self, request: int, status: int, number: int) -> None:
        self._ucp.request_free(request)
        self._end(number, status, 0)

    def _received(self, request: int, status: int, length: int, number: int) -> None:
        self._ucp.request_free(request)
        self._end(number, status, length)


def _ignore(_status: int, _length: int) -> None:
    """The end of an operation that concerns nobody: BYE, or the closing itself."""


def _address_of(view: memoryview | None) -> tuple[int | None, object]:
    """Where a buffer lies, read-only ones too, and what keeps it there."""
    if view is None or len(view) == 0:
        return None, view
    array = np.frombuffer(view, dtype=np.uint8)
    return array.ctypes.data, array


def _sockaddr_of(packed: ctypes.Array[ctypes.c_char]) -> ucp.SockAddr:
    """Points at `packed`, which must outlive it. The zero that `create_string_buffer` adds is no part of it."""
    return ucp.SockAddr(ctypes.cast(packed, ctypes.c_void_p), len(packed) - 1)
