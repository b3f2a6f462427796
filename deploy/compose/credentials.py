"""Makes the secrets of a compose stack, once: the NATS password and the key of the data plane.

They lie in two volumes as files that only the services' user may read: what NATS needs in one, what the others
need in the other (a run file, the same as `kvferry up` writes). So no secret is in an image, in the environment
of a container or in its command line. A stack that has them keeps them; `docker compose down --volumes` ends them.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from kvferry.config import DATA_KEY_BYTES
from kvferry.runfile import RunFile

USER: Final = "kvferry"
PASSWORD_BYTES: Final = 24


def make_credentials(run_file: Path, authorization: Path, cluster: str, nats_url: str, gateway: str) -> RunFile:
    """Write both files, or make the second one match the first where there is one already. Raises OSError."""
    if run_file.exists():
        credentials = RunFile.read(run_file)
    else:
        credentials = RunFile(
            cluster=cluster,
            pid=1,
            nats_url=nats_url,
            nats_user=USER,
            nats_password=SecretStr(os.urandom(PASSWORD_BYTES).hex()),
            data_key=SecretStr(os.urandom(DATA_KEY_BYTES).hex()),
            gateways=(gateway,),
        )
        credentials.write(run_file)
    draft = authorization.with_name(f".{authorization.name}")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f'user: "{credentials.nats_user}"\npassword: "{credentials.nats_password.get_secret_value()}"\n')
    draft.replace(authorization)
    return credentials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-file", type=Path, required=True)
    parser.add_argument("--authorization", type=Path, required=True)
    parser.add_argument("--cluster", required=True)
    parser.add_argument("--nats-url", required=True)
    parser.add_argument("--gateway", required=True)
    make_credentials(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
