"""A request's priority from the body to the workers' schedulers, on real workers and a virtual clock."""

from __future__ import annotations

import asyncio

from api_cluster import ApiCluster, api

NUM_BACKGROUND = 8


def order_of_ends(priority: int, *, disaggregated: bool) -> list[str]:
    """Long background prompts, and after a while a short one of this priority: who ended before whom."""
    ended: list[str] = []

    async def scenario(cluster: ApiCluster) -> None:
        async def ask(name: str, prompt: str, priority: int) -> None:
            body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True, "priority": priority}
            await cluster.ask("/v1/completions", body)
            ended.append(name)

        crowd = [asyncio.create_task(ask(f"crowd {i}", f"{i}" * 280, 3)) for i in range(NUM_BACKGROUND)]
        await asyncio.sleep(0.2)
        await ask("ours", "x" * 40, priority)
        await asyncio.gather(*crowd)

    api(scenario, disaggregated=disaggregated)
    return ended


def test_an_urgent_request_passes_a_crowd_in_the_background_on_both_sides_of_the_hand_off() -> None:
    for disaggregated in (True, False):
        assert order_of_ends(-1, disaggregated=disaggregated).index("ours") <= 1
        # As one of the crowd a short one passes at most those that wait for memory, and only for a while.
        assert order_of_ends(3, disaggregated=disaggregated).index("ours") >= 3
