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
from pathlib import Path
from typing import Final

from kvferry.bus.rights import BusRole, authorization, users_of
from kvferry.config import DATA_KEY_BYTES
from kvferry.errors import SettingError
from kvferry.runtime import Runtime

ROLES: Final[tuple[BusRole, ...]] = ("gateway", "prefill", "decode", "operator")
PASSWORD_BYTES: Final = 24
AUTHORIZATION: Final = "authorization.conf"
DATA_KEY: Final = "data-key"


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
        **{f"nats-password-{role}": password for role, password in passwords.items()},
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


def write_secret(path: Path, text: str) -> None:
    """Atomic, mode 0600. Raises OSError."""
    draft = path.with_name(f".{path.name}")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    draft.replace(path)
