"""The binding against the header of the very library that it loads: offsets, sizes, constants."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from kvferry.transport import libucp as ucp
from kvferry.transport.sockaddr import pack_sockaddr, unpack_port
from kvferry.transport.ucx import OPTIONS, context_options

STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "ucp_params_t": ucp.Params,
    "ucp_worker_params_t": ucp.WorkerParams,
    "ucp_listener_params_t": ucp.ListenerParams,
    "ucp_listener_attr_t": ucp.ListenerAttr,
    "ucp_ep_params_t": ucp.EpParams,
    "ucp_request_param_t": ucp.RequestParam,
    "ucp_am_handler_param_t": ucp.AmHandlerParam,
    "ucp_am_recv_param_t": ucp.RecvParam,
    "ucs_sock_addr_t": ucp.SockAddr,
    "ucp_err_handler_t": ucp.ErrHandler,
    "ucp_listener_conn_handler_t": ucp.ConnHandler,
    "ucp_listener_accept_handler_t": ucp.AcceptHandler,
}
CONSTANTS = {
    "UCS_OK": ucp.OK,
    "UCS_INPROGRESS": ucp.INPROGRESS,
    "UCS_ERR_CANCELED": ucp.ERR_CANCELED,
    "UCP_FEATURE_WAKEUP": ucp.FEATURE_WAKEUP,
    "UCP_FEATURE_AM": ucp.FEATURE_AM,
    "UCP_PARAM_FIELD_FEATURES": ucp.PARAM_FEATURES,
    "UCP_WORKER_PARAM_FIELD_THREAD_MODE": ucp.WORKER_PARAM_THREAD_MODE,
    "UCS_THREAD_MODE_SINGLE": ucp.THREAD_MODE_SINGLE,
    "UCP_LISTENER_PARAM_FIELD_SOCK_ADDR": ucp.LISTENER_PARAM_SOCK_ADDR,
    "UCP_LISTENER_PARAM_FIELD_CONN_HANDLER": ucp.LISTENER_PARAM_CONN_HANDLER,
    "UCP_LISTENER_ATTR_FIELD_SOCKADDR": ucp.LISTENER_ATTR_SOCKADDR,
    "UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE": ucp.EP_PARAM_ERR_HANDLING_MODE,
    "UCP_EP_PARAM_FIELD_ERR_HANDLER": ucp.EP_PARAM_ERR_HANDLER,
    "UCP_EP_PARAM_FIELD_SOCK_ADDR": ucp.EP_PARAM_SOCK_ADDR,
    "UCP_EP_PARAM_FIELD_FLAGS": ucp.EP_PARAM_FLAGS,
    "UCP_EP_PARAM_FIELD_CONN_REQUEST": ucp.EP_PARAM_CONN_REQUEST,
    "UCP_EP_PARAMS_FLAGS_CLIENT_SERVER": ucp.EP_FLAG_CLIENT_SERVER,
    "UCP_EP_CLOSE_FLAG_FORCE": ucp.EP_CLOSE_FORCE,
    "UCP_ERR_HANDLING_MODE_PEER": ucp.ERR_HANDLING_PEER,
    "UCP_OP_ATTR_FIELD_CALLBACK": ucp.OP_CALLBACK,
    "UCP_OP_ATTR_FIELD_USER_DATA": ucp.OP_USER_DATA,
    "UCP_OP_ATTR_FIELD_FLAGS": ucp.OP_FLAGS,
    "UCP_AM_SEND_FLAG_REPLY": ucp.AM_SEND_REPLY,
    "UCP_AM_RECV_ATTR_FLAG_RNDV": ucp.AM_RECV_RNDV,
    "UCP_AM_HANDLER_PARAM_FIELD_ID": ucp.AM_HANDLER_ID,
    "UCP_AM_HANDLER_PARAM_FIELD_FLAGS": ucp.AM_HANDLER_FLAGS,
    "UCP_AM_HANDLER_PARAM_FIELD_CB": ucp.AM_HANDLER_CB,
    "UCP_AM_HANDLER_PARAM_FIELD_ARG": ucp.AM_HANDLER_ARG,
    "UCP_AM_FLAG_WHOLE_MSG": ucp.AM_WHOLE_MSG,
}


def test_structures_and_constants_are_those_of_the_header(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    spec = importlib.util.find_spec("libucx")
    if compiler is None or spec is None or spec.origin is None:
        pytest.skip("needs a C compiler and the wheel of UCX")
    lines = ["#include <stdio.h>", "#include <stddef.h>", "#include <ucp/api/ucp.h>", "int main(void) {"]
    expected = {}
    for name, structure in STRUCTURES.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        expected[name] = ctypes.sizeof(structure)
        for field, *_ in structure._fields_:
            lines.append(f'printf("{name}.{field} %zu\\n", offsetof({name}, {field}));')
            expected[f"{name}.{field}"] = getattr(structure, field).offset
    for name, value in CONSTANTS.items():
        lines.append(f'printf("{name} %d\\n", (int){name});')
        expected[name] = value
    source, program = tmp_path / "layout.c", tmp_path / "layout"
    source.write_text("\n".join([*lines, "return 0; }"]))
    include = Path(spec.origin).parent / "include"
    subprocess.run([compiler, f"-I{include}", source, "-o", program], check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in map(str.split, output.splitlines())}
    assert found == expected


def test_a_status_pointer_is_read_as_ucx_reads_it() -> None:
    assert ucp.status_of(None) == ucp.OK
    assert ucp.status_of((1 << 64) - 16) == ucp.ERR_CANCELED
    assert ucp.status_of((1 << 64) - 100) == -100
    assert ucp.status_of((1 << 64) - 101) == ucp.INPROGRESS
    assert ucp.status_of(0x7F00_0000_0000) == ucp.INPROGRESS


def test_loading_gives_a_version_that_is_new_enough() -> None:
    assert ucp.LibUcp().version >= ucp.MIN_VERSION


def test_the_users_variables_win_over_our_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UCX_TLS", raising=False)
    ours = context_options("eth0")
    assert ours["NET_DEVICES"] == "eth0"
    assert ours.items() >= OPTIONS.items()
    assert ours["RNDV_SCHEME"] == "put_zcopy"
    monkeypatch.setenv("UCX_TLS", "rc,tcp")
    monkeypatch.setenv("UCX_NET_DEVICES", "mlx5_0:1")
    theirs = context_options("eth0")
    assert {"TLS", "NET_DEVICES", "RNDV_SCHEME"}.isdisjoint(theirs)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_addresses_have_the_length_and_port_of_their_family(host: str) -> None:
    packed = pack_sockaddr(host, 54_321)
    assert len(packed) == (28 if ":" in host else 16)
    assert unpack_port(packed) == 54_321
