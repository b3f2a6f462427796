"""The UCX thread: one UCP worker, driven in blocking progress mode.

Everything runs on that thread, except where a method says "owner". The owner's loop and the thread talk
through two queues of calls, each woken at most once per batch: `submit` (owner to thread, an eventfd) and
`report` (thread to owner, `call_soon_threadsafe`).

The loop: run the owner's calls, progress until nothing moves, arm, and sleep on UCX's descriptor and the
eventfd. Nothing spins: idle costs no CPU. UCX may in rare cases lose a wake-up, hence a tick each second.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

from kvferry.errors import TransportUnavailable
from kvferry.runtime import blocking_clock
from kvferry.transport import libucp as ucp
from kvferry.transport.sockaddr import pack_sockaddr, unpack_port
from kvferry.transport.ucx_endpoint import Endpoint
from kvferry.transport.ucx_endpoints import Endpoints

TICK_SECONDS: Final = 1.0
STOP_SECONDS: Final = 2.0  # for operations of closing endpoints, before the worker itself is destroyed


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
        self._wake_owner = wake_owner
        self._calls: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._reports: deque[Callable[[], None]] = deque()
        self._owner_woken = False
        self._sleeping = False
        self._stopping = False
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._context = ctypes.c_void_p()
        self._worker = ctypes.c_void_p()
        self._listener = ctypes.c_void_p()
        self.endpoints = Endpoints(library, self.report, max_endpoints, accepted, rejected)

    # The two queues

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

    def report(self, report: Callable[[], None]) -> None:
        """Run `report()` on the owner's loop, after all that was reported before."""
        self._reports.append(report)

    def _run_calls(self) -> None:
        while self._calls:
            call, args = self._calls.popleft()
            call(*args)

    def _hand_over(self) -> None:
        if self._reports and not self._owner_woken:
            self._owner_woken = True
            # A loop that is closed leaves nobody to hear.
            with contextlib.suppress(RuntimeError):
                self._wake_owner(self.collect)

    # The thread

    def run(self, host: str, port: int, listening: Callable[[int | TransportUnavailable], None]) -> None:
        """The thread's life. Reports `listening(port)` or `listening(error)` first; returns after `stop`."""
        try:
            try:
                descriptor = self._open(host, port)
                outcome: int | TransportUnavailable = self._listening_port()
            except TransportUnavailable as error:
                outcome = error
                return
            finally:
                self.report(lambda: listening(outcome))
            self._serve(descriptor)
        finally:
            self._destroy()
            self._hand_over()

    def stop(self) -> None:
        self._stopping = True
        self.endpoints.stop()

    def _serve(self, descriptor: int) -> None:
        deadline: float | None = None
        with select.epoll() as poller:
            poller.register(descriptor, select.EPOLLIN)
            poller.register(self._eventfd, select.EPOLLIN)
            while True:
                self._run_calls()
                moved = self._ucp.worker_progress(self._worker)
                closed = self.endpoints.close_doomed()
                self._hand_over()
                if self._stopping:
                    deadline = deadline or blocking_clock() + STOP_SECONDS
                    if self.endpoints.idle or blocking_clock() > deadline:
                        return
                # Armed only when nothing moved, as UCX asks: a close that was begun here has work to do in the
                # next round, of which arming would not tell. A failure to arm means that something has come.
                if moved or closed or self._ucp.worker_arm(self._worker) != ucp.OK:
                    continue
                self._sleep(poller)
                # The interpreter joins this thread at exit, also if nobody has closed the transport.
                if not threading.main_thread().is_alive():
                    self.stop()

    def _sleep(self, poller: select.epoll) -> None:
        self._sleeping = True
        # Looked at after the flag is set: the owner looks at the flag after it has queued its call.
        events = poller.poll(0 if self._calls else TICK_SECONDS)
        self._sleeping = False
        if any(descriptor == self._eventfd for descriptor, _ in events):
            os.eventfd_read(self._eventfd)

    # Opening and destroying

    def _open(self, host: str, port: int) -> int:
        """Returns the descriptor to sleep on. Raises `TransportUnavailable`."""
        self._open_context()
        params = ucp.WorkerParams(field_mask=ucp.WORKER_PARAM_THREAD_MODE, thread_mode=ucp.THREAD_MODE_SINGLE)
        status = self._ucp.worker_create(self._context, ctypes.byref(params), ctypes.byref(self._worker))
        _must(status, "make a worker: is there such a device as net_devices names?")
        self.endpoints.attach(self._worker)
        address = ctypes.create_string_buffer(pack_sockaddr(host, port))
        listener = ucp.ListenerParams(
            field_mask=ucp.LISTENER_PARAM_SOCK_ADDR | ucp.LISTENER_PARAM_CONN_HANDLER,
            sockaddr=ucp.sockaddr_of(address),
            conn_handler=ucp.ConnHandler(self.endpoints.on_connection_request, None),
        )
        status = self._ucp.listener_create(self._worker, ctypes.byref(listener), ctypes.byref(self._listener))
        _must(status, f"listen on {host}:{port}")
        self.endpoints.listen(self._listener)
        descriptor = ctypes.c_int()
        _must(self._ucp.worker_get_efd(self._worker, ctypes.byref(descriptor)), "give a descriptor to sleep on")
        return descriptor.value

    def _open_context(self) -> None:
        config = ctypes.c_void_p()
        _must(
            self._ucp.config_read(None, None, ctypes.byref(config)), "read its environment: is a UCX_ variable wrong?"
        )
        try:
            for name, value in self._options.items():
                _must(self._ucp.config_modify(config, name.encode(), value.encode()), f"set {name} to {value}")
            params = ucp.Params(field_mask=ucp.PARAM_FEATURES, features=ucp.FEATURE_AM | ucp.FEATURE_WAKEUP)
            status = self._ucp.init_version(
                ucp.API_MAJOR, ucp.API_MINOR, ctypes.byref(params), config, ctypes.byref(self._context)
            )
            _must(status, "start: is there such a device as net_devices names?")
        finally:
            self._ucp.config_release(config)

    def _listening_port(self) -> int:
        attributes = ucp.ListenerAttr(field_mask=ucp.LISTENER_ATTR_SOCKADDR)
        _must(self._ucp.listener_query(self._listener, ctypes.byref(attributes)), "tell its port")
        return unpack_port(bytes(attributes.sockaddr))

    def _destroy(self) -> None:
        if self._listener:
            self._ucp.listener_destroy(self._listener)
        if self._worker:
            self._ucp.worker_destroy(self._worker)
        if self._context:
            self._ucp.cleanup(self._context)
        self.endpoints.worker_destroyed()
        os.close(self._eventfd)


def _must(status: int, deed: str) -> None:
    if status != ucp.OK:
        raise TransportUnavailable("ucx", f"UCX cannot {deed} (status {status})")
