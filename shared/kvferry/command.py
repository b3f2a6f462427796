"""The command line of a service, made from its settings class.

A service's `__main__` is

    main = service_command(GatewaySettings, serve, summary="…")
    if __name__ == "__main__":
        main()

where `async def serve(settings)` runs until SIGTERM or SIGINT (`kvferry.runtime.stop_signals`). `main` is a click
command: `main(["--help"])` takes an argument list. Import what is heavy (torch) inside `serve`, so that
`--help` and a wrong setting answer at once.

Exit codes: 0 stopped as asked, 1 failed, 2 a setting is wrong. Errors that kvferry raises on purpose are one
line on stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import click
import uvloop

from kvferry.config.environment import env_name
from kvferry.config.field import JOIN_FLAG
from kvferry.config.flags import settings_options
from kvferry.config.layers import load_settings
from kvferry.config.settings import ProcessSettings
from kvferry.errors import KvferryError, SettingError
from kvferry.log import setup_logging
from kvferry.runfile import RunFile, default_run_file

EXIT_FAILED: Final = 1
EXIT_SETTING: Final = 2
EXIT_INTERRUPTED: Final = 130  # as a shell reports SIGINT

R = TypeVar("R")
S = TypeVar("S", bound=ProcessSettings)


def service_command(settings_class: type[S], serve: Callable[[S], Awaitable[None]], *, summary: str) -> click.Command:
    """The click command that loads the settings, sets up logs and uvloop, and runs `serve`."""

    @click.command(
        name=settings_class.role,
        help=summary,
        context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
    )
    @settings_options(settings_class)
    def command(config_file: Path | None, **flags: Any) -> None:
        with one_line_errors():
            settings = settings_from(settings_class, config_file, flags)
            setup_logging(settings.log_level, settings.log_format, service=settings.name)
            run(serve(settings))

    return command


def settings_from(cls: type[S], config_file: Path | None, flags: Mapping[str, Any]) -> S:
    """Settings of this process: flags as click gave them, the environment, and the run file that they name."""
    given = dict(flags)
    spelled, joined = JOIN_FLAG, given.pop("run_file", None)
    if joined is None:
        spelled, joined = env_name("run_file"), os.environ.get(env_name("run_file"))
    run_file = None
    if joined is not None:
        cluster = given.get("cluster") or os.environ.get(env_name("cluster")) or "dev"
        path = Path(joined) if joined else default_run_file(os.environ, cluster)
        run_file = RunFile.read(path, spelled)
        given["run_file"] = path
    return load_settings(cls, config_file=config_file, environ=os.environ, flags=given, run_file=run_file)


def run(main: Awaitable[R]) -> R:
    """Run to the end on uvloop."""

    async def body() -> R:
        return await main

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(body())


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns expected failures into one line on stderr and an exit code; anything else keeps its traceback."""
    try:
        yield
    except SettingError as error:
        fail(EXIT_SETTING, str(error))
    except KvferryError as error:
        fail(EXIT_FAILED, str(error))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def fail(code: int, problem: str) -> NoReturn:
    """One line on stderr, then exit with `code`."""
    sys.stderr.write(f"kvferry: {' '.join(problem.split())}\n")
    sys.exit(code)
