"""What placement aims at, and when the gateway refuses."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Targets:
    """Service levels of one gateway, in seconds. Raises ValueError that names a field out of range."""

    ttft_s: float = 1.0  # arrival to first token
    itl_s: float = 0.05  # between two tokens of one stream
    # Longest expected wait in prefill queues before a request of normal priority is refused with 429.
    max_queue_s: float = math.inf
    # Prompts may be prefilled on a decode worker where that is faster and its streams keep their ITL.
    prefill_on_decode: bool = True

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.name != "prefill_on_decode"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not above 0")

    def max_queue_of(self, priority: int) -> float:
        """Priorities below 0 are urgent and wait four times as long before they are refused, above 0 half as long."""
        return self.max_queue_s * (4.0 if priority < 0 else 1.0 if priority == 0 else 0.5)
