"""The `kvferry` command.

    kvferry up                          the whole stack on this machine
    kvferry gateway|prefill|decode      one service in the foreground, the same as python -m kvferry_<service>
    kvferry rank                        a part of a worker on another host
    kvferry chat|status|drain           talk to a running stack
    kvferry scale|autoscale             more workers, or fewer
    kvferry bench                       a load on any OpenAI-compatible endpoint
    kvferry doctor                      what is wrong on this machine, and what mends it
    kvferry credentials                 secrets of a cluster with a NATS server of your own
    kvferry model fetch|import|list     prepare weights

Exit codes and one-line errors: `kvferry.command`. Imports that take time stay inside the commands.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from kvferry.command import EXIT_FAILED, EXIT_SETTING, fail, one_line_errors, run
from kvferry.config.flags import settings_options
from kvferry.config.layers import load_settings
from kvferry.log import setup_logging
from kvferry.runfile import default_run_file
from kvferry_local.settings import (
    AutoscaleSettings,
    BenchSettings,
    ClientSettings,
    CredentialsSettings,
    DoctorSettings,
    UpSettings,
)

SERVICES: Final = {
    "gateway": ("kvferry_gateway", "Run one gateway in the foreground: HTTP in, tokens out."),
    "prefill": ("kvferry_prefill", "Run one prefill worker in the foreground: prompts in, KV caches out."),
    "decode": ("kvferry_decode", "Run one decode worker in the foreground: KV caches in, tokens out."),
    "rank": ("kvferry.worker.remote_rank", "Compute a part of a tensor-parallel worker's model, on another host."),
}
CONTEXT: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

F = TypeVar("F", bound=Callable[..., Any])


class InOrder(click.Group):
    """Lists commands in the order of their definition: the one to start with comes first."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=InOrder, context_settings=CONTEXT)
@click.version_option(importlib.metadata.version("kvferry"), prog_name="kvferry", message="%(prog)s %(version)s")
def main() -> None:
    """Serve a large language model with prefill and decode apart.

    Start with `kvferry up`, then talk to it with `kvferry chat`, curl or any OpenAI client.
    """


@main.command("up")
@settings_options(UpSettings)
def up_command(config_file: Path | None, **flags: Any) -> None:
    """Start, supervise and restart the whole stack on this machine.

    NATS (embedded unless one is named), gateways, prefill and decode workers. Ctrl-C drains and stops.
    """
    from kvferry_local.supervisor import StackFailed
    from kvferry_local.up import check_settings, up
    from kvferry_local.weights import resolve

    with one_line_errors():
        settings = load_settings(UpSettings, config_file=config_file, environ=os.environ, flags=flags)
        setup_logging(settings.log_level, settings.log_format, service="up")
        check_settings(settings)
        models = resolve(settings.model, settings.served_model_name)
        try:
            run(up(settings, models))
        except StackFailed as failure:
            code = failure.returncode if failure.returncode in (EXIT_FAILED, EXIT_SETTING) else EXIT_FAILED
            fail(code, failure.reason)


def add_service(name: str, module: str, summary: str) -> None:
    @main.command(
        name,
        help=summary + f"\n\nThe same as python -m {module}; `kvferry {name} --help` lists its settings.",
        short_help=summary,
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def command(arguments: tuple[str, ...]) -> None:
        # The service becomes this process: signals, exit code and terminal are its own.
        program = (sys.executable, "-P", "-m", module, *arguments)
        os.execv(program[0], program)  # noqa: S606 - no shell is the point


for _name, (_module, _summary) in SERVICES.items():
    add_service(_name, _module, _summary)


@main.command("chat")
@settings_options(ClientSettings)
@click.argument("prompt", required=False)
@click.option("--model", "model_name", help="Model to talk to; the stack's first unless given.")
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer, in tokens.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 always takes the likeliest token.")
@click.option("--seed", type=int, help="The same seed draws the same answer.")
def chat_command(config_file: Path | None, prompt: str | None, model_name: str | None, **flags: Any) -> None:
    """Talk to a running stack. With PROMPT, print one answer and end.

    In a conversation, Ctrl-C stops the answer and Ctrl-D ends.
    """
    from kvferry_local.chat import run_chat
    from kvferry_local.client import client_settings, find_target

    options = {name: flags.pop(name) for name in ("max_tokens", "temperature", "seed")}
    with one_line_errors():
        settings = client_settings(config_file, flags)
        given = {name: value for name, value in options.items() if value is not None}
        run_chat(find_target(settings), settings, model_name, prompt, given)


@main.command("status")
@settings_options(ClientSettings)
def status_command(config_file: Path | None, **flags: Any) -> None:
    """List the workers of a running stack and their load."""
    from kvferry_local.client import client_settings, find_target
    from kvferry_local.cluster import show_status

    with one_line_errors():
        settings = client_settings(config_file, flags)
        show_status(find_target(settings), settings)


@main.command("drain")
@settings_options(ClientSettings)
@click.argument("worker")
def drain_command(config_file: Path | None, worker: str, **flags: Any) -> None:
    """Let WORKER take no more, finish or hand over, and end.

    Under `kvferry up` a fresh process then takes its place.
    """
    from kvferry_local.client import client_settings, find_target
    from kvferry_local.cluster import drain, worker_named, workers_of

    with one_line_errors():
        settings = client_settings(config_file, flags)
        target = find_target(settings, need_run_file=True)
        assert target.run_file is not None
        run(drain(target.run_file, worker_named(workers_of(target, settings), worker)))
        click.echo(f"{worker} drains")


@main.command("scale")
@settings_options(ClientSettings)
@click.option("--model", "model_name", help="Model whose workers are meant; each model's unless given.")
@click.argument("replicas", nargs=-1, metavar="[ROLE=N]...")
def scale_command(config_file: Path | None, model_name: str | None, replicas: tuple[str, ...], **flags: Any) -> None:
    """Run N workers of a role under `kvferry up`, as in: kvferry scale decode=3

    Workers that are no longer wanted drain before they end. Without ROLE=N, say how many there are.
    """
    from kvferry_local.client import client_settings
    from kvferry_local.control import ask_stack, parse_scale

    with one_line_errors():
        settings = client_settings(config_file, flags)
        path = settings.run_file or default_run_file(os.environ, settings.cluster)
        found = run(ask_stack(path, parse_scale(replicas), model_name))
        for model, counts in found.items():
            for role, count in counts.items():
                click.echo(f"{model} {role}={count}" if len(found) > 1 else f"{role}={count}")


@main.command("autoscale")
@settings_options(AutoscaleSettings)
def autoscale_command(config_file: Path | None, **flags: Any) -> None:
    """Add and drain workers as the load asks for, prefill and decode apart.

    By what a gateway sees: time busy and queues of prefill, streams and KV blocks of decode. The rules stand in each
    worker's scaling.yaml.
    """
    from kvferry_local.autoscale.service import AutoscaleService, scale_target
    from kvferry_local.client import find_target

    with one_line_errors():
        settings = load_settings(AutoscaleSettings, config_file=config_file, environ=os.environ, flags=flags)
        setup_logging(settings.log_level, settings.log_format, service="autoscale")
        run(AutoscaleService(settings, find_target(settings), scale_target(settings)).serve())


@main.command("bench")
@settings_options(BenchSettings)
def bench_command(config_file: Path | None, **flags: Any) -> None:
    """Put a load on an OpenAI-compatible endpoint, and print what its clients see.

    A pattern or a recorded trace; TTFT, ITL and goodput; --json and --svg write files. Without --url, the stack of this
    machine. Ends with 1 if no request was answered whole.
    """
    from kvferry_local.bench.service import bench

    with one_line_errors():
        settings = load_settings(BenchSettings, config_file=config_file, environ=os.environ, flags=flags)
        if not run(bench(settings)):
            sys.exit(EXIT_FAILED)


@main.command("doctor")
@settings_options(DoctorSettings)
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of lines.")
def doctor_command(config_file: Path | None, as_json: bool, **flags: Any) -> None:
    """Try each part of a stack on this machine, and say what mends what is wrong.

    Model, engine, UCX and a real transfer, NATS, ports, shared memory, clocks. With a stack of this machine running,
    its NATS server and its model are looked at. Ends with 1 if something failed.
    """
    from kvferry_local.doctor.service import beside, examine, running_stack

    with one_line_errors():
        settings = load_settings(DoctorSettings, config_file=config_file, environ=os.environ, flags=flags)
        setup_logging("error", settings.log_format, service="doctor")
        run_file = running_stack(settings)
        if run_file is not None:
            settings = beside(settings, run_file)
        if not run(examine(settings, run_file, as_json)):
            sys.exit(EXIT_FAILED)


@main.command("credentials")
@settings_options(CredentialsSettings)
@click.argument("directory", type=click.Path(path_type=Path))
def credentials_command(config_file: Path | None, directory: Path, **flags: Any) -> None:
    """Make the secrets of a cluster with a NATS server of your own, as files in DIRECTORY.

    A user and password for each role, the server's authorization block with the rights of each, and the data key.
    """
    from kvferry.runtime import SystemRuntime
    from kvferry_local.credentials import write_credentials

    with one_line_errors():
        settings = load_settings(CredentialsSettings, config_file=config_file, environ=os.environ, flags=flags)
        for path in write_credentials(directory, settings.cluster, SystemRuntime()):
            click.echo(path)


@main.group("model", cls=InOrder)
def model_group() -> None:
    """Prepare weights."""


@model_group.command("fetch")
@click.argument("name")
def fetch_command(name: str) -> None:
    """Fetch a known model into the cache, once, and print its directory."""
    from kvferry_local.weights import fetch

    with one_line_errors():
        click.echo(fetch(name))


@model_group.command("import")
@click.argument("gguf", type=click.Path(path_type=Path))
@click.argument("directory", type=click.Path(path_type=Path))
def import_command(gguf: Path, directory: Path) -> None:
    """Turn a GGUF file into a model directory in Hugging Face form."""
    from kvferry_local.weights import import_file

    with one_line_errors():
        import_file(gguf, directory)
        click.echo(directory)


@model_group.command("list")
def list_command() -> None:
    """List the models that `fetch` knows and where they lie."""
    from kvferry_local.weights import known

    with one_line_errors():
        for name, directory in known():
            click.echo(f"{name}  {directory or 'not fetched'}")
