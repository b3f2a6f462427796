"""A rank on another host than its leader: `kvferry rank`, the same as `python -m kvferry.worker.remote_rank`.

It waits for its leader, loads what that tells it, computes with it, and ends when it does. Whoever started it starts it
again, to wait for the leader's next process.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from kvferry.command import EXIT_FAILED, one_line_errors, run, settings_from
from kvferry.config.flags import settings_options
from kvferry.engine.config import ModelConfig
from kvferry.engine.limits import Limits
from kvferry.engine.ranks.caches import Caches
from kvferry.engine.ranks.copies import serve_copies
from kvferry.engine.ranks.followers import Setup
from kvferry.engine.ranks.following import Follower, follow
from kvferry.engine.ranks.part import part_id
from kvferry.engine.ranks.shard import shards_of
from kvferry.engine.settings import (
    EngineSettings,
    resolved_dtype,
    resolved_max_model_len,
    resolved_num_blocks,
)
from kvferry.errors import CheckpointError, SettingError
from kvferry.log import get_logger, setup_logging
from kvferry.runtime import SystemRuntime
from kvferry.schedule.step import KVFormat
from kvferry.transport.base import Transport, TransportSettings
from kvferry.transport.factory import open_transport
from kvferry.worker.handoff.channel import StreamChannel
from kvferry.worker.handoff.orders import Begin
from kvferry.worker.handoff.plane import open_plane
from kvferry.worker.rank_port import RankLink, join_leader
from kvferry.worker.settings import RankSettings

if TYPE_CHECKING:
    from kvferry.engine.torch.rank import TorchFollower

log = get_logger(__name__)
END_TIMEOUT_S: Final = 5.0  # for its data plane to close


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
    handing_over: list[threading.Thread] = []

    def loaded(setup: Setup) -> Follower:
        rank = load(setup, link, settings)
        for serving in (lambda: rank.serve_copies(link), lambda: rank.serve_handoffs(link, settings)):
            thread = threading.Thread(target=_or_exit, args=(serving, setup.rank), daemon=True)
            handing_over.append(thread)
            thread.start()
        return rank.follower

    try:
        follow(link.steps, loaded)
    except (SettingError, CheckpointError):
        raise
    except Exception:
        log.exception("rank failed")
        sys.exit(EXIT_FAILED)
    finally:
        for channel in link.channels:
            channel.end()
        for thread in handing_over:
            thread.join(END_TIMEOUT_S)
        link.close()


@dataclass(frozen=True, slots=True)
class Rank:
    """What has been loaded here: a part of the model, with its KV."""

    follower: TorchFollower
    limits: Limits

    def serve_copies(self, link: RankLink) -> None:
        serve_copies(link.copies, self.follower.cache, self.limits.kv_format)

    def serve_handoffs(self, link: RankLink, settings: RankSettings) -> None:
        run(self._hand_over(link, settings))

    async def _hand_over(self, link: RankLink, settings: RankSettings) -> None:
        runtime, host = SystemRuntime(), settings.host or link.host

        def data_plane(begin: Begin) -> Transport:
            wanted = TransportSettings(
                incarnation=begin.incarnation,
                data_key=settings.data_key_bytes,
                host=host,
                advertise_host=host,
                port=settings.data_port,
                net_devices=settings.ucx_net_devices,
            )
            return open_transport(begin.transport, wanted, runtime)

        channel = await StreamChannel.open(link.handoffs.detach())
        plane = await open_plane(channel, Caches([self.follower.cache], self.limits), data_plane, runtime)
        if plane is not None:
            await plane.run()


def load(setup: Setup, link: RankLink, own: RankSettings) -> Rank:
    """Its part of the model. Raises `CheckpointError` if that is not the leader's model, and what a runner raises."""
    from kvferry.engine.torch.collective import joined_exchange
    from kvferry.engine.torch.rank import TorchFollower, device_of

    settings = EngineSettings.of_fields(setup.settings)
    if own.model_dir:
        settings = replace(settings, model_dir=Path(own.model_dir).expanduser())
    if own.device:
        settings = replace(settings, device=own.device)
    config = ModelConfig.read(settings.model_dir)
    dtype, size = resolved_dtype(settings, config), settings.tensor_parallel_size
    if part_id(settings, config, dtype, shards_of(config, size)[setup.rank]) != setup.part_id:
        raise CheckpointError(str(settings.model_dir), "is not the leader's model: weights or shape differ")
    kv_format = KVFormat(
        config.num_layers, config.num_kv_heads, config.head_dim, dtype, settings.block_size, setup.format_id
    )
    assert setup.exchange is not None, "the leader knows that this rank is on another host"
    device = device_of(settings)
    exchange = joined_exchange(setup.exchange, link.host, setup.rank, size, device)
    follower = TorchFollower(settings, setup.rank, None, exchange)
    num_blocks = resolved_num_blocks(settings, kv_format)
    limits = Limits(kv_format, num_blocks, resolved_max_model_len(settings, config), config.vocab_size)
    return Rank(follower, limits)


def _or_exit(serving: Callable[[], None], rank: int) -> None:
    """On a thread beside the one that computes, which may wait in a step."""
    try:
        serving()
    except Exception:
        log.exception("rank failed", rank=rank)
        os._exit(EXIT_FAILED)


if __name__ == "__main__":
    main()
