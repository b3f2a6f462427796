"""The part of UCX's public C API (`ucp.h`, 1.19 and newer) that `ucx.py` needs, bound with ctypes.

Why not ucxx: its private worker API tells neither the length of a received message (a short frame would
pass with old bytes behind it) nor can it place an active message into a buffer that is already there.
The public C API does both, its ABI is stable, and its options are given to a context instead of being
written into this process's environment, where children would inherit them.

Structures follow the header field by field; a test compiles the header and compares every offset.
Calls into `progress`, `close` and `destroy` release the GIL; the short ones keep it (`PyDLL`), because
releasing it would cost more than they take.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_int, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from typing import Any, Final

from kvferry.errors import TransportUnavailable

API_MAJOR: Final = 1
API_MINOR: Final = 19
MIN_VERSION: Final = (1, 19)

OK: Final = 0
INPROGRESS: Final = 1
ERR_CANCELED: Final = -16
_LAST_ERROR: Final = -100

FEATURE_WAKEUP: Final = 1 << 4
FEATURE_AM: Final = 1 << 6
PARAM_FEATURES: Final = 1 << 0
WORKER_PARAM_THREAD_MODE: Final = 1 << 0
THREAD_MODE_SINGLE: Final = 0
LISTENER_PARAM_SOCK_ADDR: Final = 1 << 0
LISTENER_PARAM_CONN_HANDLER: Final = 1 << 2
LISTENER_ATTR_SOCKADDR: Final = 1 << 0
EP_PARAM_ERR_HANDLING_MODE: Final = 1 << 1
EP_PARAM_ERR_HANDLER: Final = 1 << 2
EP_PARAM_SOCK_ADDR: Final = 1 << 4
EP_PARAM_FLAGS: Final = 1 << 5
EP_PARAM_CONN_REQUEST: Final = 1 << 6
EP_FLAG_CLIENT_SERVER: Final = 1 << 0
EP_CLOSE_FORCE: Final = 1 << 0
ERR_HANDLING_PEER: Final = 1
OP_CALLBACK: Final = 1 << 1
OP_USER_DATA: Final = 1 << 2
OP_FLAGS: Final = 1 << 4
AM_SEND_REPLY: Final = 1 << 0
AM_RECV_RNDV: Final = 1 << 17
AM_HANDLER_ID: Final = 1 << 0
AM_HANDLER_FLAGS: Final = 1 << 1
AM_HANDLER_CB: Final = 1 << 2
AM_HANDLER_ARG: Final = 1 << 3
AM_WHOLE_MSG: Final = 1 << 0


class RecvParam(Structure):
    _fields_ = [("recv_attr", c_uint64), ("reply_ep", c_void_p)]


# void (*)(request, status, user_data)
SendCallback = CFUNCTYPE(None, c_void_p, c_int, c_void_p)
# void (*)(request, status, length, user_data)
RecvCallback = CFUNCTYPE(None, c_void_p, c_int, c_size_t, c_void_p)
# ucs_status_t (*)(arg, header, header_length, data, length, param)
AmCallback = CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, POINTER(RecvParam))
# void (*)(arg, ep, status)
ErrorCallback = CFUNCTYPE(None, c_void_p, c_void_p, c_int)
# void (*)(conn_request, arg)
ConnCallback = CFUNCTYPE(None, c_void_p, c_void_p)


class SockAddr(Structure):
    _fields_ = [("addr", c_void_p), ("addrlen", c_uint32)]


class ErrHandler(Structure):
    _fields_ = [("cb", ErrorCallback), ("arg", c_void_p)]


class ConnHandler(Structure):
    _fields_ = [("cb", ConnCallback), ("arg", c_void_p)]


class AcceptHandler(Structure):
    _fields_ = [("cb", c_void_p), ("arg", c_void_p)]


class Params(Structure):
    _fields_ = [
        ("field_mask", c_uint64), ("features", c_uint64), ("request_size", c_size_t),
        ("request_init", c_void_p), ("request_cleanup", c_void_p), ("tag_sender_mask", c_uint64),
        ("mt_workers_shared", c_int), ("estimated_num_eps", c_size_t), ("estimated_num_ppn", c_size_t),
        ("name", c_char_p), ("node_local_id", c_size_t),
    ]  # fmt: skip


class WorkerParams(Structure):
    _fields_ = [
        ("field_mask", c_uint64), ("thread_mode", c_int), ("cpu_mask", c_uint64 * 16), ("events", c_uint),
        ("user_data", c_void_p), ("event_fd", c_int), ("flags", c_uint64), ("name", c_char_p),
        ("am_alignment", c_size_t), ("client_id", c_uint64),
    ]  # fmt: skip


class ListenerParams(Structure):
    _fields_ = [
        ("field_mask", c_uint64), ("sockaddr", SockAddr), ("accept_handler", AcceptHandler),
        ("conn_handler", ConnHandler),
    ]  # fmt: skip


class ListenerAttr(Structure):
    _fields_ = [("field_mask", c_uint64), ("sockaddr", c_uint64 * 16)]


class EpParams(Structure):
    _fields_ = [
        ("field_mask", c_uint64), ("address", c_void_p), ("err_mode", c_int), ("err_handler", ErrHandler),
        ("user_data", c_void_p), ("flags", c_uint), ("sockaddr", SockAddr), ("conn_request", c_void_p),
        ("name", c_char_p), ("local_sockaddr", SockAddr),
    ]  # fmt: skip


class RequestParam(Structure):
    _fields_ = [
        ("op_attr_mask", c_uint32), ("flags", c_uint32), ("request", c_void_p), ("cb", c_void_p),
        ("datatype", c_uint64), ("user_data", c_void_p), ("reply_buffer", c_void_p),
        ("memory_type", c_int), ("recv_info", c_void_p), ("memh", c_void_p),
    ]  # fmt: skip


class AmHandlerParam(Structure):
    _fields_ = [
        ("field_mask", c_uint64), ("id", c_uint), ("flags", c_uint32), ("cb", AmCallback), ("arg", c_void_p),
    ]  # fmt: skip


# name: (result, arguments, whether the call releases the GIL)
_FUNCTIONS: Final[dict[str, tuple[Any, list[Any], bool]]] = {
    "ucp_get_version": (None, [POINTER(c_uint)] * 3, False),
    "ucp_config_read": (c_int, [c_char_p, c_char_p, POINTER(c_void_p)], False),
    "ucp_config_modify": (c_int, [c_void_p, c_char_p, c_char_p], False),
    "ucp_config_release": (None, [c_void_p], False),
    "ucp_init_version": (c_int, [c_uint, c_uint, POINTER(Params), c_void_p, POINTER(c_void_p)], True),
    "ucp_cleanup": (None, [c_void_p], True),
    "ucp_context_print_info": (None, [c_void_p, c_void_p], True),
    "ucp_worker_create": (c_int, [c_void_p, POINTER(WorkerParams), POINTER(c_void_p)], True),
    "ucp_worker_destroy": (None, [c_void_p], True),
    "ucp_worker_progress": (c_uint, [c_void_p], True),
    "ucp_worker_arm": (c_int, [c_void_p], False),
    "ucp_worker_get_efd": (c_int, [c_void_p, POINTER(c_int)], False),
    "ucp_worker_set_am_recv_handler": (c_int, [c_void_p, POINTER(AmHandlerParam)], False),
    "ucp_listener_create": (c_int, [c_void_p, POINTER(ListenerParams), POINTER(c_void_p)], True),
    "ucp_listener_query": (c_int, [c_void_p, POINTER(ListenerAttr)], False),
    "ucp_listener_reject": (c_int, [c_void_p, c_void_p], True),
    "ucp_listener_destroy": (None, [c_void_p], True),
    "ucp_ep_create": (c_int, [c_void_p, POINTER(EpParams), POINTER(c_void_p)], True),
    "ucp_ep_close_nbx": (c_void_p, [c_void_p, POINTER(RequestParam)], True),
    "ucp_ep_flush_nbx": (c_void_p, [c_void_p, POINTER(RequestParam)], True),
    "ucp_am_send_nbx": (
        c_void_p, [c_void_p, c_uint, c_void_p, c_size_t, c_void_p, c_size_t, POINTER(RequestParam)], True,
    ),
    "ucp_am_recv_data_nbx": (
        c_void_p, [c_void_p, c_void_p, c_void_p, c_size_t, POINTER(RequestParam)], True,
    ),
    "ucp_request_free": (None, [c_void_p], False),
}  # fmt: skip


class LibUcp:
    """The loaded library: one attribute per function of `_FUNCTIONS`, without its `ucp_` prefix."""

    def __init__(self) -> None:
        path = _load()
        blocking, quick = ctypes.CDLL(path), ctypes.PyDLL(path)
        for name, (result, arguments, releases_gil) in _FUNCTIONS.items():
            try:
                function = getattr(blocking if releases_gil else quick, name)
            except AttributeError:
                raise TransportUnavailable("ucx", f"libucp has no {name}: UCX 1.19 or newer is needed") from None
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ucp_"), function)
        if self.version[:2] < MIN_VERSION:
            raise TransportUnavailable("ucx", f"UCX {self.version} is too old: 1.19 or newer is needed")

    def __getattr__(self, name: str) -> Any:
        """For type checkers: the functions are set in `__init__`."""
        raise AttributeError(name)

    @property
    def version(self) -> tuple[int, int, int]:
        numbers = (c_uint(), c_uint(), c_uint())
        self.get_version(*(ctypes.byref(number) for number in numbers))
        return numbers[0].value, numbers[1].value, numbers[2].value


def _load() -> str:
    """Load UCX's libraries and return what `ctypes` opens.

    The wheel (`libucx`) loads its own, or the system's where RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY=true;
    without the wheel the system's libucp.so.0 is taken.
    """
    # UCX reads these two while it is being loaded, and only then; its log would go to stdout, which is the
    # service's. They are taken back, so that no child inherits them.
    quiet = {"UCX_WARN_UNUSED_ENV_VARS": "n", "UCX_LOG_LEVEL": "fatal"}
    added = {name: value for name, value in quiet.items() if name not in os.environ}
    os.environ.update(added)
    try:
        try:
            wheel: Any = importlib.import_module("libucx")
        except ImportError:
            path = "libucp.so.0"
        else:
            path = next(lib._name for lib in wheel.load_library() if lib is not None and "libucp" in lib._name)
        ctypes.CDLL(path)
    except OSError as error:
        raise TransportUnavailable("ucx", f"no UCX library ({error}): install kvferry[ucx] or use tcp") from None
    except StopIteration:
        raise TransportUnavailable("ucx", "the libucx wheel brings no libucp: use tcp") from None
    finally:
        for name in added:
            del os.environ[name]
    return path


def is_error(result: int | None) -> bool:
    """Whether a `ucs_status_ptr_t` is an error: errors are the top of the address space."""
    return result is not None and result >= (1 << 64) + _LAST_ERROR


def status_of(result: int | None) -> int:
    """The status in a `ucs_status_ptr_t`: `OK`, a negative error, or `INPROGRESS` for a request."""
    if result is None:
        return OK
    return result - (1 << 64) if is_error(result) else INPROGRESS


def sockaddr_of(packed: ctypes.Array[ctypes.c_char]) -> SockAddr:
    """Points at `packed`, which must outlive it. The zero that `create_string_buffer` adds is no part of it."""
    return SockAddr(ctypes.cast(packed, c_void_p), len(packed) - 1)
