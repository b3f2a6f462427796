"""Settings of a prefill worker."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from kvferry.worker.settings import Duration, WorkerSettings
from kvferry_prefill.scheduler import PrefillPolicy


class PrefillSettings(WorkerSettings):
    """What every worker has, and how long KV waits for its pull."""

    role: ClassVar[str] = "prefill"

    lease_s: Duration = Field(30.0, description="Seconds that finished KV is held for a decode worker to fetch.")

    @property
    def policy(self) -> PrefillPolicy:
        return PrefillPolicy(
            max_waiting=self.max_waiting,
            max_num_batched_tokens=self.max_num_batched_tokens,
            overtake_s=self.overtake_ms / 1000,
            lease_s=self.lease_s,
        )
