"""The secrets of a cluster whose NATS server is not `kvferry up`'s own: one NATS user per role, and the data key.

`kvferry credentials DIRECTORY` writes them as files, each for those who need it alone:

    authorization.conf       for the NATS server, to be included in its `authorization` block: users and their rights
    nats-password-ROLE       for the processes of a role, whose user is CLUSTER-ROLE
    data-key                 for the workers
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from kvferry.bus.rights import BusRole, authorization, user_name, users_of
from kvferry.config.settings import DATA_KEY_BYTES
from kvferry.errors import SettingError
from kvferry.runfile import NatsLogin
from kvferry.runtime import Runtime
from kvferry.secret_file import check_private, read_secret

ROLES: Final[tuple[BusRole, ...]] = ("gateway", "prefill", "decode", "operator")
PASSWORD_BYTES: Final = 24
AUTHORIZATION: Final = "authorization.conf"
DATA_KEY: Final = "data-key"
PREFIX: Final = "nats-password-"  # of the file of a role
CREDENTIALS_SETTING: Final = "--nats-credentials"


def new_password(runtime: Runtime) -> str:
    return runtime.random_bytes(PASSWORD_BYTES).hex()


def new_data_key(runtime: Runtime) -> str:
    return runtime.random_bytes(DATA_KEY_BYTES).hex()


def authorization_file(cluster: str, passwords: Mapping[BusRole, str]) -> str:
    """What stands between the braces of the NATS server's `authorization`."""
    return f"users: {json.dumps(authorization(users_of(cluster, passwords))['users'], indent=2)}\n"


def write_credentials(directory: Path, cluster: str, runtime: Runtime) -> list[Path]:
    """New ones, in files that only we can read. Raises `SettingError` where there are some already."""
    passwords = {role: new_password(runtime) for role in ROLES}
    texts = {
        AUTHORIZATION: authorization_file(cluster, passwords),
        **{f"{PREFIX}{role}": password for role, password in passwords.items()},
        DATA_KEY: new_data_key(runtime),
    }
    paths = [directory / name for name in texts]
    for path in paths:
        if path.exists():
            raise SettingError("DIRECTORY", f"{path} is there already; processes may be using it")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, text in zip(paths, texts.values(), strict=True):
            write_secret(path, text)
    except OSError as error:
        raise SettingError("DIRECTORY", f"{error.filename}: {error.strerror}") from None
    return paths


@dataclass(frozen=True, slots=True)
class Credentials:
    logins: Mapping[str, NatsLogin]  # by role
    data_key: SecretStr


def read_credentials(directory: Path, cluster: str) -> Credentials:
    """What `write_credentials` wrote for this cluster, and its owner alone may read. Raises `SettingError`."""
    return Credentials(
        {
            role: NatsLogin(user=user_name(cluster, role), password=_read(directory / f"{PREFIX}{role}"))
            for role in ROLES
        },
        _read(directory / DATA_KEY),
    )


def _read(path: Path) -> SecretStr:
    secret = read_secret(path, CREDENTIALS_SETTING)
    check_private(path.stat(), path, CREDENTIALS_SETTING)
    if not secret:
        raise SettingError(CREDENTIALS_SETTING, f"{path} is empty")
    return SecretStr(secret)


def write_secret(path: Path, text: str) -> None:
    """Atomic, mode 0600. Raises OSError."""
    draft = path.with_name(f".{path.name}")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    draft.replace(path)
