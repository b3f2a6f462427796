"""What D's blocks hold is what P's held, by digests that have nothing in common with the frames' checksum."""

from __future__ import annotations

import asyncio

import pytest
from cluster import GREEDY, Cluster, check_clean, expected, prompt_of, virtual

from kvferry.schedule.step import BlockTable
from kvferry.wire.frame import Piece
from kvferry.wire.sampling import Sampling
from kvferry.worker.digests import MAX_SEQUENCES, Digests


def test_every_fetched_slot_holds_the_bytes_that_it_had_at_p() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(max_num_batched_tokens=48), await cluster.decode()
        gateway = await cluster.gateway()
        works = [await gateway.run(prompt_of(100 + n), decode, prefill) for n in range(3)]
        theirs, ours = prefill.digests.rows(), decode.digests.rows()
        assert set(ours) == {work.ticket.hex() for work in works}
        for work in works:
            slots = ours[work.ticket.hex()]
            assert slots
            assert slots == theirs[work.ticket.hex()]
        assert len(ours[works[0].ticket.hex()]) == 100

    virtual(scenario)


def test_one_bit_flipped_after_the_check_is_caught_by_the_digests_and_changes_the_tokens() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        scatter = decode.runner.scatter

        def flipping(piece: Piece, block_table: BlockTable, payload: memoryview) -> None:
            scatter(piece, block_table, payload)
            if piece.layer_start == 0 and piece.token_start <= 37 < piece.token_end:
                one = Piece(0, 1, 37, 38, 0, decode.runner.kv_format.num_kv_heads)
                kv = decode.runner.kv_format
                slot = memoryview(bytearray(one.num_bytes(kv.head_dim, kv.dtype)))
                decode.runner.gather(one, block_table, slot)
                slot[3] ^= 1
                scatter(one, block_table, slot)

        decode.runner.scatter = flipping  # type: ignore[method-assign]
        work = await gateway.run(prompt_of(100), decode, prefill)
        ticket = work.ticket.hex()
        theirs, ours = prefill.digests.rows()[ticket], decode.digests.rows()[ticket]
        assert [place for place in theirs if theirs[place] != ours[place]] == [37]
        right = expected(prompt_of(100), GREEDY, 8)
        assert gateway.text(work)[0] == right[0], "token 0 is P's"
        assert gateway.text(work) != right

    virtual(scenario)


def test_a_planted_leak_of_a_block_a_slot_or_a_pin_fails_the_check() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        await gateway.run(prompt_of(100), decode, prefill)
        await gateway.run(prompt_of(20), decode, prefill)
        decode.tasks.spawn(asyncio.sleep(0), "planted")
        with pytest.raises(AssertionError):
            check_clean(decode)
        blocks = decode.scheduler.memory.pool.allocate(1)
        with pytest.raises(AssertionError):
            check_clean(decode)
        decode.scheduler.memory.pool.release(blocks)
        slot = decode.slots.try_acquire("planted")
        assert slot is not None
        with pytest.raises(AssertionError):
            check_clean(decode)
        decode.slots.release(slot)
        work = gateway.work(prompt_of(60), sampling=Sampling(temperature=0.0, max_tokens=2))
        await gateway.accepted(work, decode, None)
        [sequence] = decode.scheduler.sequences.values()
        decode.scheduler.memory.pin(sequence)
        await gateway.ended(work)
        with pytest.raises(AssertionError):
            check_clean(decode)
        decode.unpin(sequence)

    virtual(scenario)


def test_digests_are_kept_for_the_newest_transfers_only() -> None:
    digests = Digests(enabled=True)
    for number in range(MAX_SEQUENCES + 2):
        digests.keep(number.to_bytes(16, "big"), {0: "x"})
    assert len(digests.rows()) == MAX_SEQUENCES
    assert bytes(16).hex() not in digests.rows()
