"""As whom a process joins the bus."""

from __future__ import annotations

from typing import Protocol

from pydantic import SecretStr

from kvferry.bus.base import BusSettings
from kvferry.wire.subjects import inbox_prefix


class NatsAccess(Protocol):
    """What settings and run files say of it."""

    cluster: str
    nats_url: str
    nats_user: str
    nats_password: SecretStr
    nats_token: SecretStr
    nats_tls_ca: str
    nats_tls_cert: str
    nats_tls_key: str


def bus_login(access: NatsAccess, role: str, name: str, min_payload: int = 0) -> BusSettings:
    """`access`: of that role; a run file's, by its `in_role`."""
    return BusSettings(
        url=access.nats_url,
        name=name,
        inbox_prefix=inbox_prefix(access.cluster, role),
        user=access.nats_user,
        password=access.nats_password.get_secret_value(),
        token=access.nats_token.get_secret_value(),
        tls_ca=access.nats_tls_ca,
        tls_cert=access.nats_tls_cert,
        tls_key=access.nats_tls_key,
        min_payload=min_payload,
    )
