"""`python -m kvferry.transport.probe ucx|tcp DEVICES`: what a backend can do here, as one line of JSON.

    {"scheme": "ucx", "version": "1.21.0", "transports": ["tcp/lo", …], "bytes_per_s": 3.1e9}
    {"setting": "--transport", "problem": "…"}

`transports` are what the loaded UCX itself finds on this machine, whatever the options are. The speed is of a real
transfer over loopback, every byte compared. A program of its own: UCX keeps what it reads at its first start, and one
that crashes takes nobody along.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import re
import sys
import tempfile
from ctypes import c_void_p
from typing import Any, Final

from kvferry.command import run
from kvferry.errors import CorruptFrame, KvferryError, TransportUnavailable
from kvferry.runtime import Runtime, SystemRuntime, blocking_clock
from kvferry.transport import libucp as ucp
from kvferry.transport.base import Connection, TransportSettings
from kvferry.transport.factory import open_transport

FRAME_BYTES: Final = 4 << 20
NUM_FRAMES: Final = 32
WARM_UP: Final = 4  # frames before the clock starts
TIMEOUT_S: Final = 20.0
_RESOURCE: Final = re.compile(r"resource \d+ .*?(\S+/\S+)$", re.MULTILINE)


def ucx_transports() -> tuple[str, list[str]]:
    """UCX's version, and transport/device of everything that it could use here. Raises `TransportUnavailable`."""
    library = ucp.LibUcp()
    config, context = c_void_p(), c_void_p()
    if library.config_read(None, None, ctypes.byref(config)) != ucp.OK:
        raise TransportUnavailable("ucx", "UCX does not read its configuration")
    for name in ("TLS", "NET_DEVICES"):
        library.config_modify(config, name.encode(), b"all")
    params = ucp.Params(field_mask=ucp.PARAM_FEATURES, features=ucp.FEATURE_AM)
    status = library.init_version(ucp.API_MAJOR, ucp.API_MINOR, ctypes.byref(params), config, ctypes.byref(context))
    library.config_release(config)
    if status != ucp.OK:
        raise TransportUnavailable("ucx", f"UCX does not start here (status {status})")
    libc = ctypes.CDLL(None)
    libc.fdopen.restype, libc.fclose.argtypes = c_void_p, [c_void_p]
    with tempfile.TemporaryFile() as file:
        stream = libc.fdopen(os.dup(file.fileno()), b"w")
        library.context_print_info(context, stream)
        libc.fclose(stream)
        library.cleanup(context)
        file.seek(0)
        found = _RESOURCE.findall(file.read().decode(errors="replace"))
    return ".".join(map(str, library.version)), found


async def transfer(kind: str, devices: str, runtime: Runtime) -> float:
    """Bytes per second from one worker's transport to another's. Raises `KvferryError`, TimeoutError."""
    key = runtime.random_bytes(32)
    ends = [
        open_transport(kind, TransportSettings(incarnation, key, net_devices=devices), runtime)
        for incarnation in (1, 2)
    ]
    arrived: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
    async with asyncio.timeout(TIMEOUT_S):
        await ends[0].start(arrived.set_result)
        await ends[1].start(lambda connection: connection.abort())
        try:
            sender = await ends[1].connect(ends[0].address, TIMEOUT_S)
            seconds = await _send_all(sender, await arrived, runtime)
        finally:
            for end in ends:
                await end.close()
    return NUM_FRAMES * FRAME_BYTES / seconds


async def _send_all(sender: Connection, receiver: Connection, runtime: Runtime) -> float:
    sent = memoryview(bytearray(runtime.random_bytes(FRAME_BYTES)))
    seconds = 0.0
    for tag in range(WARM_UP + NUM_FRAMES):
        buffer = memoryview(bytearray(FRAME_BYTES))
        began = blocking_clock()
        receiving = receiver.receive(tag, buffer)
        await asyncio.gather(sender.send(tag, sent), receiving)
        seconds += blocking_clock() - began if tag >= WARM_UP else 0.0
        if buffer != sent:
            raise CorruptFrame("content")
    return seconds


def main() -> None:
    kind, devices = sys.argv[1:]
    answer: dict[str, Any] = {"scheme": kind}
    setting = "--transport"
    try:
        if kind == "ucx":
            answer["version"], answer["transports"] = ucx_transports()
            setting = "--ucx-net-devices"  # UCX itself is there
        answer["bytes_per_s"] = run(transfer(kind, devices, SystemRuntime()))
    except TransportUnavailable as error:
        answer |= {"setting": setting, "problem": error.problem}
    except (KvferryError, TimeoutError) as error:
        answer |= {"setting": setting, "problem": f"no transfer: {str(error) or 'no end in time'}"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
