"""Subjects name one process of one cluster, and no name can reach outside its place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.bus.subject import check_subject, matches
from kvferry.errors import Impostor, SettingError
from kvferry.wire import subjects

names = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
roles = st.sampled_from(["gateway", "prefill", "decode"])
incarnations = st.integers(0, (1 << 64) - 1)


@given(names, roles, names, incarnations)
def test_what_is_built_from_checked_names_is_a_subject(cluster: str, role: str, name: str, incarnation: int) -> None:
    assert subjects.check_name("cluster", cluster) == cluster
    process = subjects.process_subject(cluster, role, name, incarnation)
    beat = subjects.beat_subject(cluster, role, name, incarnation)
    for subject in (process, beat, subjects.inbox_prefix(cluster, role)):
        check_subject(subject)
    assert process != beat
    assert matches(subjects.role_beats(cluster, role), beat)
    for sender in ("gateway", "operator"):
        mail = subjects.mail_subject(process, sender)
        check_subject(mail)
        assert subjects.sender_of(mail) == sender
        assert matches(subjects.all_mail(process), mail)
        assert matches(subjects.role_mail(cluster, role, sender), mail)


@given(roles, names, incarnations)
def test_beats_of_another_role_or_cluster_and_other_messages_do_not_match(
    role: str, name: str, incarnation: int
) -> None:
    other = "decode" if role != "decode" else "prefill"
    beat = subjects.beat_subject("c1", role, name, incarnation)
    assert not matches(subjects.role_beats("c1", other), beat)
    assert not matches(subjects.role_beats("c2", role), beat)
    assert not matches(subjects.role_beats("c1", role), subjects.inbox_prefix("c1", role))


@given(names, st.lists(incarnations, min_size=2, max_size=2, unique=True))
def test_a_restarted_process_has_another_subject(name: str, incarnation: list[int]) -> None:
    first, second = (subjects.process_subject("c", "decode", name, number) for number in incarnation)
    assert first != second


def test_a_message_must_come_on_a_subject_of_the_process_that_it_says_it_is_from() -> None:
    subjects.check_origin("a.b", "a", "a.b")
    with pytest.raises(Impostor):
        subjects.check_origin("a.c", "a", "a.b")


@pytest.mark.parametrize("name", ["", "a.b", "a b", "*", ">", "a\n", "a\r\nPUB", "é", "x" * 65])
def test_a_name_that_could_leave_its_place_is_refused_and_names_the_setting(name: str) -> None:
    with pytest.raises(SettingError) as caught:
        subjects.check_name("KVFERRY_CLUSTER", name)
    assert caught.value.setting == "KVFERRY_CLUSTER"
