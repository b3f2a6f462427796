"""Settings in the environment: their variables' names, and what no child inherits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

ENV_PREFIX: Final = "KVFERRY_"
FILE_SUFFIX: Final = "_FILE"
_SECRET_NAME: Final = re.compile(rf"{ENV_PREFIX}\w+_(PASSWORD|TOKEN|KEY)({FILE_SUFFIX})?")


def env_name(field: str) -> str:
    return ENV_PREFIX + field.upper()


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without settings that are secret or name a secret's file: for children that need none of them, or
    get them otherwise."""
    return {name: value for name, value in environ.items() if not _SECRET_NAME.fullmatch(name)}
