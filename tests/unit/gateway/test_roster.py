"""The workers' columns: what is asked of them is what was last heard."""

from __future__ import annotations

from kvferry.wire.beats import Load
from kvferry.wire.fields import Role
from kvferry.wire.record import WorkerAddress, WorkerRecord
from kvferry_gateway.placement.roster import Roster


def record(incarnation: int, role: Role = "prefill") -> WorkerRecord:
    return WorkerRecord(
        role,
        f"w{incarnation}",
        incarnation,
        1,
        "s",
        "m",
        "tcp",
        WorkerAddress(incarnation, ()),
        "f",
        "n",
        1000,
        10,
        50,
        1,
    )


def test_columns_grow_and_keep_what_they_hold() -> None:
    roster = Roster()
    for incarnation in range(500):
        roster.add(record(incarnation), slot=incarnation + 1)
        roster.observe(incarnation, Load(waiting_tokens=incarnation, prefill_tokens_per_s=1.0), "ready", 0.0)
    rows = roster.of_role("prefill")
    assert len(rows) == len(roster) == 500
    assert [roster.incarnations[row] for row in rows] == list(range(500))
    assert roster.slot[rows].tolist() == list(range(1, 501))
    assert roster.queued_tokens[rows, 1].tolist() == list(range(500))
    assert set(roster.capacity[rows].tolist()) == {500}, "the pool is smaller than the context"


def test_a_row_is_used_again_without_what_it_held() -> None:
    roster = Roster()
    roster.add(record(1), 0)
    roster.observe(1, Load(waiting_tokens=77, num_running=5, decode_step_s=0.5), "ready", 0.0)
    roster.placed(1, 0.0, 10, 10)
    roster.remove(1)
    assert len(roster.of_role("prefill")) == 0
    roster.add(record(2, "decode"), 0)
    (row,) = roster.of_role("decode")
    assert row == 0
    assert not roster.ready[row], "it has said nothing yet"
    assert roster.queued_tokens[row].tolist() == [0.0, 0.0, 0.0]
    assert (roster.running[row], roster.placed_requests[row], roster.placed_blocks[row]) == (0.0, 0.0, 0.0)
    assert roster.step_base[row] < 0.1


def test_what_is_said_of_unknown_workers_is_ignored() -> None:
    roster = Roster()
    roster.observe(9, Load(), "ready", 0.0)
    roster.placed(9, 0.0, 10)
    roster.remove(9)
    assert len(roster) == 0
    assert roster.rows_of([9]) == []
    assert roster.id_of("numerics", "n") == -1


def test_a_queue_drains_at_the_worker_s_rate_but_never_for_longer_than_heartbeats_may_be_late() -> None:
    roster = Roster()
    roster.add(record(1), 0)
    roster.observe(1, Load(waiting_tokens=1000, prefill_tokens_per_s=1000.0), "ready", 10.0)
    rows = roster.of_role("prefill")
    assert [round(float(roster.queue_seconds(rows, 0, now)[0]), 6) for now in (9.0, 10.0, 10.2, 99.0)] == [
        1,
        1,
        0.8,
        0.5,
    ]
    roster.placed(1, 10.2, 300)
    assert round(float(roster.queue_seconds(rows, 0, 10.2)[0]), 6) == 1.1
