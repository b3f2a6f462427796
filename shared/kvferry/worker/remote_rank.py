"""A rank on another host than its leader: `kvferry rank`, the same as `python -m kvferry.worker.remote_rank`.

It waits for its leader, loads what that tells it, computes with it, and ends when it does. Whoever started it starts it
again, to wait for the leader's next process.
"""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from kvferry.command import EXIT_FAILED, one_line_errors, settings_from
from kvferry.config.flags import settings_options
from kvferry.engine.config import ModelConfig
from kvferry.engine.ranks.copies import serve_copies
from kvferry.engine.ranks.followers import Setup
from kvferry.engine.ranks.following import Follower, follow
from kvferry.engine.settings import EngineSettings, kv_format_of, resolved_dtype
from kvferry.errors import CheckpointError, SettingError
from kvferry.log import get_logger, setup_logging
from kvferry.runtime import SystemRuntime
from kvferry.worker.rank_port import RankLink, join_leader
from kvferry.worker.settings import RankSettings

log = get_logger(__name__)


@click.command(
    name="rank",
    help="Compute a part of a tensor-parallel worker's model, on another host than the worker.",
    context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
)
@settings_options(RankSettings)
def main(config_file: Path | None, **flags: Any) -> None:
    with one_line_errors():
        settings = settings_from(RankSettings, config_file, flags)
        setup_logging(settings.log_level, settings.log_format, service=settings.name)
        host, _, port = settings.leader.rpartition(":")
        if not host or not port.isdigit():
            raise SettingError("--leader", f"{settings.leader!r} is not HOST:PORT")
        log.info("waiting for the leader", leader=settings.leader)
        link = join_leader(host, int(port), settings.data_key_bytes, SystemRuntime())
        log.info("joined", leader=settings.leader)
        serve(link, settings)


def serve(link: RankLink, settings: RankSettings) -> None:
    """Until the leader ends. Raises what keeps it from loading."""
    try:
        follow(link.steps, lambda setup: load(setup, link, settings.model_dir))
    except (SettingError, CheckpointError):
        raise
    except Exception:
        log.exception("rank failed")
        sys.exit(EXIT_FAILED)
    finally:
        link.close()


def load(setup: Setup, link: RankLink, model_dir: str) -> Follower:
    """Its part of the model. Raises `CheckpointError` if that is not the leader's model, and what a runner raises."""
    from kvferry.engine.torch.collective import joined_exchange
    from kvferry.engine.torch.rank import TorchFollower

    settings = EngineSettings.of_fields(setup.settings)
    if model_dir:
        settings = replace(settings, model_dir=Path(model_dir).expanduser())
    config = ModelConfig.read(settings.model_dir)
    kv_format = kv_format_of(settings, config, resolved_dtype(settings, config))
    if kv_format.format_id != setup.format_id:
        raise CheckpointError(str(settings.model_dir), "is not the leader's model: weights or shape differ")
    assert setup.exchange is not None, "the leader knows that this rank is on another host"
    exchange = joined_exchange(setup.exchange, link.host, setup.rank, settings.tensor_parallel_size)
    follower = TorchFollower(settings, setup.rank, None, exchange)

    def copies() -> None:
        try:
            serve_copies(link.copies, follower.cache, kv_format)
        except Exception:
            log.exception("rank failed", rank=setup.rank)
            os._exit(EXIT_FAILED)  # the other thread may wait in a step

    threading.Thread(target=copies, daemon=True).start()
    return follower


if __name__ == "__main__":
    main()
