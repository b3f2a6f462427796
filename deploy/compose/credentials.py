"""Makes the secrets of a compose stack, once: a NATS password for each role, and the key of the data plane.

They lie in volumes as files that only the services' user may read: what NATS needs in one, and in one for each role a
run file (as `kvferry up` writes it) that holds what its processes need and no more. So no secret is in an image, in the
environment of a container or in its command line, and no container can speak on the bus as another role's. A stack that
has them keeps them; `docker compose down --volumes` ends them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from kvferry.bus.rights import BusRole, user_name
from kvferry.runfile import NatsLogin, RunFile
from kvferry.runtime import SystemRuntime
from kvferry_local.credentials import ROLES, authorization_file, new_data_key, new_password, write_secret

# Who reads a volume, and as whom its processes may join: an operator's commands are run in a gateway's container.
READERS: Final[dict[str, tuple[BusRole, ...]]] = {
    "gateway": ("gateway", "operator"), "prefill": ("prefill",), "decode": ("decode",),
}  # fmt: skip
WORKERS: Final = ("prefill", "decode")


def make_credentials(folder: Path, authorization: Path, cluster: str, nats_url: str, gateway: str) -> None:
    """Write `folder`/ROLE/run.json for each reader, where one is missing, and NATS' file to match. Raises OSError."""
    paths = {reader: folder / reader / "run.json" for reader in READERS}
    if not all(path.exists() for path in paths.values()):
        runtime = SystemRuntime()
        logins = {
            role: NatsLogin(user=user_name(cluster, role), password=SecretStr(new_password(runtime))) for role in ROLES
        }
        data_key = new_data_key(runtime)
        for reader, roles in READERS.items():
            RunFile(
                cluster=cluster,
                pid=1,
                nats_url=nats_url,
                nats_logins={role: logins[role] for role in roles},
                data_key=SecretStr(data_key if reader in WORKERS else ""),
                gateways=(gateway,),
            ).write(paths[reader])
    written = [RunFile.read(path).nats_logins for path in paths.values()]
    known = {role: login.password.get_secret_value() for found in written for role, login in found.items()}
    write_secret(authorization, authorization_file(cluster, {role: known[role] for role in ROLES}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--authorization", type=Path, required=True)
    parser.add_argument("--cluster", required=True)
    parser.add_argument("--nats-url", required=True)
    parser.add_argument("--gateway", required=True)
    make_credentials(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
