"""Settings of a decode worker."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from kvferry.worker.settings import Duration, Positive, WorkerSettings
from kvferry_decode.puller import PullPolicy
from kvferry_decode.scheduler import DecodePolicy


class DecodeSettings(WorkerSettings):
    """What every worker has, and the bounds of batch and pulls."""

    role: ClassVar[str] = "decode"

    max_num_seqs: Positive = Field(64, description="Most sequences that hold memory at once.")
    max_num_batched_tokens: Positive = Field(
        256, description="Most rows of one engine step, local prefill chunks among them."
    )
    pull_stall: Duration = Field(2.0, description="Seconds of silence after which a pull's connection ends.")
    pull_deadline: Duration = Field(60.0, description="Seconds within which a pull must end once it has memory.")
    reserve_lead: Annotated[float, Field(ge=0, le=60)] = Field(
        0.7, description="Seconds before the expected end of a prefill at which memory is reserved, plus the transfer."
    )
    pull_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.25, description="Share of a decode step that arriving KV may take while streams decode; 1: all of it."
    )
    watermark_blocks: Annotated[int, Field(ge=0)] = Field(
        4, description="Blocks that stay free for running sequences to grow when new ones are admitted."
    )

    @property
    def policy(self) -> DecodePolicy:
        return DecodePolicy(
            max_waiting=self.max_waiting,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            overtake_s=self.overtake_ms / 1000,
            pull_deadline_s=self.pull_deadline,
            watermark_blocks=self.watermark_blocks,
        )

    @property
    def pull_policy(self) -> PullPolicy:
        return PullPolicy(pull_stall_s=self.pull_stall, reserve_lead_s=self.reserve_lead, share=self.pull_share)
