"""Real processes: requests with a shared long prefix go to the prefill worker that has it cached."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
from stack import Stack, eventually

BLOCK_TOKENS = 16
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def two_prefills(flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    environ = {"KVFERRY_LOCAL_PREFILL_THRESHOLD": "0"}
    stack = Stack(tmp_path_factory.mktemp("prefixes"), *flags, "--prefill", "2", "--decode", "1", environ=environ)
    try:
        yield stack.start()
    finally:
        stack.close()


def test_requests_with_a_shared_long_prefix_go_where_it_is_cached(two_prefills: Stack) -> None:
    # Two texts, as token ids: none is in the other's way.
    families = [[1000 + family * 500 + i % 400 for i in range(24 * BLOCK_TOKENS)] for family in range(2)]
    with two_prefills.http() as http:

        def placement() -> dict[str, Any]:
            report: dict[str, Any] = http.get("/v1/cluster").json()["gateway"]["placement"]["smollm2"]
            return report

        def ask(family: int, turn: int) -> tuple[dict[str, Any], dict[str, Any]]:
            prompt = families[family] + [5000 + turn * 20 + i for i in range(20)]
            body = {"model": "smollm2", "prompt": prompt, "max_tokens": 4, "temperature": 0}
            answer = http.post("/v1/completions", json=body, timeout=PATIENCE_S)
            assert answer.status_code == 200, answer.text
            usage: dict[str, Any] = answer.json()["usage"]
            return usage, placement()["latest"][0]

        homes: list[set[str]] = []  # more than one, if a machine is so busy that the first looks worse for a moment
        for family in range(2):
            known = placement()["indexed_blocks"]
            usage, first = ask(family, 10 * family)
            assert first["cached_tokens"] == 0
            homes.append({first["prefill"]})
            # The worker tells what it has cached with its next heartbeats, one chunk perhaps before the other.
            eventually(lambda known=known: placement()["indexed_blocks"] >= known + 24, PATIENCE_S)
            turns = count(100 + 100 * family)

            def is_found(family: int = family, turns: Iterator[int] = turns) -> bool:
                placed = ask(family, next(turns))[1]
                homes[family].add(placed["prefill"])
                return bool(placed["cached_tokens"] >= 24 * BLOCK_TOKENS)

            eventually(is_found, PATIENCE_S)
        for turn in range(1, 4):
            for family in range(2):
                usage, placed = ask(family, 10 * family + turn)
                assert placed["prefill"] in homes[family], placed
                assert placed["cached_tokens"] >= 24 * BLOCK_TOKENS, placed
                assert usage["prompt_tokens_details"]["cached_tokens"] >= 24 * BLOCK_TOKENS, usage
        assert placement()["ttft_forecast"]["actual_to_forecast"] > 0
