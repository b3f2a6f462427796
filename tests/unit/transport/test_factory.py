"""Which backend a kind gives."""

from __future__ import annotations

import pytest
import structlog

from kvferry.errors import SettingError, TransportUnavailable
from kvferry.runtime import SystemRuntime
from kvferry.transport import libucp
from kvferry.transport.base import TransportSettings
from kvferry.transport.factory import open_transport

SETTINGS = TransportSettings(1, b"key")


@pytest.mark.parametrize(("kind", "scheme"), [("auto", "ucx"), ("ucx", "ucx"), ("tcp", "tcp")])
def test_a_kind_gives_its_backend(kind: str, scheme: str) -> None:
    assert open_transport(kind, SETTINGS, SystemRuntime()).scheme == scheme


def test_without_the_library_auto_is_tcp_with_one_log_line_and_ucx_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent() -> str:
        raise TransportUnavailable("ucx", "no UCX library")

    monkeypatch.setattr(libucp, "_load", absent)
    with structlog.testing.capture_logs() as lines:
        assert open_transport("auto", SETTINGS, SystemRuntime()).scheme == "tcp"
    assert len(lines) == 1
    assert lines[0]["reason"] == "no UCX library"
    with pytest.raises(TransportUnavailable) as caught:
        open_transport("ucx", SETTINGS, SystemRuntime())
    assert caught.value.backend == "ucx"


def test_another_kind_names_the_setting() -> None:
    with pytest.raises(SettingError, match="transport"):
        open_transport("rdma", SETTINGS, SystemRuntime())
