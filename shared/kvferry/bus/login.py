"""As whom a process joins the bus: from its settings, or from the run file of a stack on this machine."""

from __future__ import annotations

from kvferry.bus.base import BusSettings
from kvferry.bus.rights import BusRole
from kvferry.config import ServiceSettings
from kvferry.runfile import RunFile
from kvferry.wire.subjects import inbox_prefix


def service_login(settings: ServiceSettings, min_payload: int) -> BusSettings:
    """Of a service, in its role."""
    return BusSettings(
        url=settings.nats_url,
        name=settings.name,
        inbox_prefix=inbox_prefix(settings.cluster, settings.role),
        user=settings.nats_user,
        password=settings.nats_password.get_secret_value(),
        token=settings.nats_token.get_secret_value(),
        tls_ca=settings.nats_tls_ca,
        tls_cert=settings.nats_tls_cert,
        tls_key=settings.nats_tls_key,
        min_payload=min_payload,
    )


def stack_login(run_file: RunFile, role: BusRole, name: str, min_payload: int = 0) -> BusSettings:
    """Of whoever can read the run file, in any role."""
    login = run_file.login(role)
    return BusSettings(
        url=run_file.nats_url,
        name=name,
        inbox_prefix=inbox_prefix(run_file.cluster, role),
        user=login.user,
        password=login.password.get_secret_value(),
        token=run_file.nats_token.get_secret_value(),
        tls_ca=run_file.nats_tls_ca,
        tls_cert=run_file.nats_tls_cert,
        tls_key=run_file.nats_tls_key,
        min_payload=min_payload,
    )
