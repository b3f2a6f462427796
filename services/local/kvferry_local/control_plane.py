"""The NATS server of a one-machine stack: the one that was named, or one of our own."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

from pydantic import SecretStr

from kvferry.bus.login import bus_login
from kvferry.bus.nats import NatsBus
from kvferry.bus.rights import BUS_ROLES, user_name, users_of
from kvferry.bus.server import EmbeddedNats
from kvferry.errors import BusUnavailable, SettingError
from kvferry.runfile import NatsLogin, RunFile
from kvferry.runtime import Runtime
from kvferry_local.credentials import CREDENTIALS_SETTING, new_data_key, new_password, read_credentials
from kvferry_local.keeper import keep_running
from kvferry_local.settings import UpSettings


@contextlib.asynccontextmanager
async def control_plane(settings: UpSettings, runtime: Runtime) -> AsyncIterator[RunFile]:
    """A run file without gateways and model. Raises `SettingError`, `BusUnavailable`."""
    if settings.nats_url:
        access = named_server(settings)
        key = access.data_key.get_secret_value() or new_data_key(runtime)
        yield access.model_copy(update={"data_key": SecretStr(key)})
        return
    passwords = {role: new_password(runtime) for role in BUS_ROLES}
    server = EmbeddedNats(users_of(settings.cluster, passwords))
    await server.start()
    keeper = asyncio.get_running_loop().create_task(keep_running(server), name="keep nats-server")
    try:
        yield RunFile(
            cluster=settings.cluster,
            pid=os.getpid(),
            nats_url=server.url,
            nats_logins={
                role: NatsLogin(user=user_name(settings.cluster, role), password=SecretStr(password))
                for role, password in passwords.items()
            },
            data_key=SecretStr(settings.data_key.get_secret_value() or new_data_key(runtime)),
        )
    finally:
        keeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeper
        await server.stop()


def named_server(settings: UpSettings) -> RunFile:
    """How it is reached, in every role. The data key is empty where there is none yet. Raises `SettingError`."""
    secrets: dict[str, Any] = {"data_key": settings.data_key}
    if settings.nats_credentials is not None:
        made = read_credentials(settings.nats_credentials, settings.cluster)
        secrets["nats_logins"] = made.logins
        if not settings.data_key.get_secret_value():
            secrets["data_key"] = made.data_key
    return RunFile(
        cluster=settings.cluster,
        pid=os.getpid(),
        nats_url=settings.nats_url,
        nats_user=settings.nats_user,
        nats_password=settings.nats_password,
        nats_token=settings.nats_token,
        nats_tls_ca=settings.nats_tls_ca,
        nats_tls_cert=settings.nats_tls_cert,
        nats_tls_key=settings.nats_tls_key,
        **secrets,
    )


async def check_logins(access: RunFile, runtime: Runtime) -> None:
    """Whether the server lets every role in, before its processes load a model. Raises `SettingError`."""
    for role, login in access.nats_logins.items():
        bus = NatsBus(bus_login(access.in_role(role), role, f"kvferry-up-{role}"), runtime)
        try:
            await bus.start()
        except BusUnavailable as error:
            raise SettingError(CREDENTIALS_SETTING, f"as {login.user}: {error}") from None
        await bus.close()
