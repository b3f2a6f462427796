"""The run file: what a running one-machine stack tells the other commands (`--join`, `chat`, `status`).

It holds the NATS credentials and the cluster's data key, so it is written with mode 0600 and refused when
anyone but its owner may read or write it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError, field_serializer

from kvferry.errors import SettingError
from kvferry.secret_file import check_private

MAX_RUN_FILE_BYTES: Final = 64 * 1024


class NatsLogin(BaseModel):
    """A user of the NATS server."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user: str
    password: SecretStr

    @field_serializer("password", when_used="json")
    def _reveal(self, secret: SecretStr) -> str:
        return secret.get_secret_value()


class RunFile(BaseModel):
    """Written once when the stack starts, removed when it has stopped."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cluster: str
    pid: int  # of the supervisor
    nats_url: str
    nats_logins: dict[str, NatsLogin] = {}  # by role; empty where one user serves for all
    nats_user: str = ""
    nats_password: SecretStr = SecretStr("")
    nats_token: SecretStr = SecretStr("")
    nats_tls_ca: str = ""
    nats_tls_cert: str = ""
    nats_tls_key: str = ""
    data_key: SecretStr = SecretStr("")  # the workers'
    gateways: tuple[str, ...] = ()  # base URLs
    gateway_certificate: str = ""  # PEM file, where they speak HTTPS
    model: tuple[str, ...] = ()  # NAME=DIRECTORY of each

    @field_serializer("nats_password", "nats_token", "data_key", when_used="json")
    def _reveal(self, secret: SecretStr) -> str:
        return secret.get_secret_value()

    @property
    def first_model(self) -> str:
        """Its name in requests; empty where the file tells no model."""
        return self.model[0].partition("=")[0] if self.model else ""

    def in_role(self, role: str) -> RunFile:
        """The same for one role: its NATS user is `nats_user`, as where one user serves for all."""
        login = self.nats_logins.get(role)
        if login is None:
            return self
        return self.model_copy(update={"nats_user": login.user, "nats_password": login.password, "nats_logins": {}})

    def write(self, path: Path) -> None:
        """Atomic: a reader sees the old file or the new one, never a part. Raises OSError."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(self.model_dump_json(indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise

    @classmethod
    def read(cls, path: Path, setting: str = "--join") -> RunFile:
        """Raises `SettingError` under the name `setting`: missing, readable by others, not a run file."""
        try:
            with path.open("rb") as file:
                check_private(os.fstat(file.fileno()), path, setting)
                text = file.read(MAX_RUN_FILE_BYTES + 1)
        except FileNotFoundError:
            raise SettingError(setting, f"{path} does not exist; is `kvferry up` running?") from None
        except OSError as error:
            raise SettingError(setting, f"{path}: {error.strerror}") from None
        if len(text) > MAX_RUN_FILE_BYTES:
            raise SettingError(setting, f"{path} is larger than {MAX_RUN_FILE_BYTES} bytes")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            # Only the field's name: the content may be a secret.
            field = ".".join(str(part) for part in error.errors(include_input=False)[0]["loc"])
            raise SettingError(setting, f"{path} is no run file{f' ({field})' if field else ''}") from None


def default_run_file(environ: Mapping[str, str], cluster: str = "dev") -> Path:
    """Where `kvferry up` writes and the other commands look, unless `run_file` says otherwise."""
    if runtime_dir := environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime_dir) / "kvferry" / f"{cluster}.json"
    state = environ.get("XDG_STATE_HOME")
    home = Path(state) if state else Path(environ.get("HOME", "~")).expanduser() / ".local" / "state"
    return home / "kvferry" / f"{cluster}.json"
