"""Each role's NATS user on a real server: what it may say and hear is what the table in `docs/protocol.md` says."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from nats_cluster import running_cluster

from kvferry.bus.base import BusSettings
from kvferry.bus.nats import NatsBus
from kvferry.bus.rights import BUS_ROLES, BusRole, BusUser, authorization, rights_of, user_name, users_of
from kvferry.bus.server import EmbeddedNats
from kvferry.bus.subject import matches
from kvferry.errors import BusUnavailable
from kvferry.runtime import SystemRuntime
from kvferry.wire.subjects import inbox_prefix, role_beats

pytestmark = pytest.mark.usefixtures("no_leaks")
CLUSTER: Final = "river"
PROTOCOL: Final = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text()
PASSWORDS: Final[dict[BusRole, str]] = {role: f"password of {role}" for role in BUS_ROLES}
ANYBODY: Final = BusUser("anybody", "may do everything")
ROW: Final = re.compile(r"^\| `(kvferry\.<cluster>\.[^`]+)` \| ([^|]*) \| ([^|]*) \|", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """One subject of the table, with values for its parts, and the roles that say and hear it."""

    subject: str
    said_by: frozenset[str]
    heard_by: frozenset[str]


def roles_in(cell: str) -> frozenset[str]:
    return frozenset(role for role in BUS_ROLES if re.search(rf"\b{role}\b", cell))


def rows(cluster: str = CLUSTER) -> list[Row]:
    """The document's table. `<role>` stands for every role that runs as a process."""
    found = []
    for pattern, said_by, heard_by in ROW.findall(PROTOCOL):
        subject = pattern.replace("<cluster>", cluster).replace("<name>", "x").replace("<incarnation>", f"{7:016x}")
        subject = subject.replace("…", "0123456789abcdef.1")
        for role in ("gateway", "prefill", "decode") if "<role>" in subject else ("",):
            found.append(Row(subject.replace("<role>", role), roles_in(said_by), roles_in(heard_by)))
    return found


TABLE: Final = rows()
# Of no role: another cluster, the server's own, what libraries would use.
FOREIGN: Final = ["kvferry.sea.decode.x.0000000000000007.gateway", "kvferry.sea.beat.decode.x.0000000000000007",
                  "news", "$SYS.REQ.SERVER.PING", "_INBOX.x.1"]  # fmt: skip


class Member:
    """A connection with the rights of a user, in NATS' own lines, so that what is refused is known before the next."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heard: list[str] = []
        self.replies: list[str] = []  # where the senders of what was heard wait
        self._reader = reader
        self._writer = writer
        self._refused = 0
        self._subscriptions = 0

    @classmethod
    async def connect(cls, url: str, user: BusUser) -> Member:
        host, port = url.removeprefix("nats://").split(":")
        member = cls(*await asyncio.open_connection(host, int(port)))
        options = {"verbose": False, "pedantic": False, "echo": False, "user": user.name, "pass": user.password}
        await member.read()
        await member.tell(f"CONNECT {json.dumps(options)}\r\n")
        return member

    async def may_say(self, subject: str, reply: str = "") -> bool:
        return await self.tell(f"PUB {subject} {reply} 0\r\n\r\n")

    async def may_hear(self, pattern: str) -> bool:
        self._subscriptions += 1
        return await self.tell(f"SUB {pattern} {self._subscriptions}\r\n")

    async def tell(self, lines: str = "") -> bool:
        """False: the server has refused it. What came meanwhile has been heard."""
        before = self._refused
        self._writer.write(f"{lines}PING\r\n".encode())
        while await self.read() != "PONG":
            pass
        return self._refused == before

    async def read(self) -> str:
        """One line's first word."""
        async with asyncio.timeout(60):
            words = (await self._reader.readline()).decode().split()
        match words[0]:
            case "-ERR":
                assert "Permissions" in words[1], words
                self._refused += 1
            case "MSG":
                self.heard.append(words[1])
                self.replies += words[3:-1]
                await self._reader.readline()
            case "PING":
                self._writer.write(b"PONG\r\n")
        return words[0]

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


@pytest.fixture
async def server() -> AsyncIterator[EmbeddedNats]:
    server = EmbeddedNats([*users_of(CLUSTER, PASSWORDS), ANYBODY])
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def joined(server: EmbeddedNats, name: str) -> AsyncIterator[Member]:
    member = await Member.connect(server.url, next(user for user in server.users if user.name == name))
    try:
        yield member
    finally:
        await member.close()


def test_the_table_has_every_subject_that_a_right_speaks_of_and_no_other() -> None:
    assert len(TABLE) >= 15
    granted = {pattern for role in BUS_ROLES for pattern in rights_of(role, CLUSTER).publish}
    granted |= {pattern for role in BUS_ROLES if role != "observer" for pattern in rights_of(role, CLUSTER).subscribe}
    assert [pattern for pattern in granted if not any(matches(pattern, row.subject) for row in TABLE)] == []
    assert [row.subject for row in TABLE if not any(matches(pattern, row.subject) for pattern in granted)] == []


@pytest.mark.parametrize("role", BUS_ROLES)
async def test_a_role_says_and_hears_what_the_table_says_and_nothing_else(server: EmbeddedNats, role: BusRole) -> None:
    async with joined(server, user_name(CLUSTER, role)) as member, joined(server, ANYBODY.name) as everybody:
        said = [row.subject for row in TABLE if await member.may_say(row.subject)]
        assert said == [row.subject for row in TABLE if role in row.said_by]
        heard = [row.subject for row in TABLE if await member.may_hear(row.subject)]
        assert heard == [row.subject for row in TABLE if role in row.heard_by or role == "observer"]
        foreign = [s for s in FOREIGN if await member.may_say(s) or await member.may_hear(s)]
        assert foreign == []
        for pattern in (">", "kvferry.>", "*.*.*.*.*.*"):
            assert not await member.may_hear(pattern)
        # What was refused was not only complained of: it does not arrive.
        for subject in (*(row.subject for row in TABLE), *FOREIGN[:3]):
            assert await everybody.may_say(subject)
        await member.tell()
        assert sorted(member.heard) == sorted(heard)


async def test_nobody_hears_what_was_refused(server: EmbeddedNats) -> None:
    async with joined(server, ANYBODY.name) as everybody, joined(server, user_name(CLUSTER, "prefill")) as prefill:
        assert await everybody.may_hear("kvferry.>")
        for row in TABLE:
            await prefill.may_say(row.subject)
        await everybody.tell()
        assert everybody.heard == [row.subject for row in TABLE if "prefill" in row.said_by]


async def test_a_worker_answers_each_request_once_and_writes_to_no_inbox_unasked(server: EmbeddedNats) -> None:
    mail = next(row.subject for row in TABLE if ".decode.x." in row.subject and row.subject.endswith(".gateway"))
    inbox = f"{inbox_prefix(CLUSTER, 'gateway')}.0123456789abcdef"
    async with (
        joined(server, user_name(CLUSTER, "gateway")) as gateway,
        joined(server, user_name(CLUSTER, "decode")) as decode,
        joined(server, user_name(CLUSTER, "prefill")) as prefill,
    ):
        assert await gateway.may_hear(f"{inbox}.*")
        assert await decode.may_hear(mail)
        assert not await decode.may_say(f"{inbox}.1")
        assert await gateway.may_say(mail, reply=f"{inbox}.1")
        await decode.tell()
        assert decode.heard == [mail]
        assert not await prefill.may_say(f"{inbox}.1"), "it knows the address and was not asked"
        assert not await decode.may_say(f"{inbox}.2"), "another's"
        assert await decode.may_say(f"{inbox}.1")
        assert not await decode.may_say(f"{inbox}.1"), "once"
        await gateway.tell()
        assert gateway.heard == [f"{inbox}.1"]


async def test_a_user_without_the_rights_of_its_role_is_told_so_at_the_start(server: EmbeddedNats) -> None:
    """As one is whose KVFERRY_NATS_USER or KVFERRY_CLUSTER is another's."""

    def settings(user: BusUser, role: str) -> BusSettings:
        return BusSettings(server.url, "x", inbox_prefix(CLUSTER, role), user.name, user.password)

    (prefill,) = users_of(CLUSTER, {"prefill": PASSWORDS["prefill"]})
    with pytest.raises(BusUnavailable, match="KVFERRY_NATS_USER"):
        await NatsBus(settings(prefill, "gateway"), SystemRuntime()).start()
    bus = NatsBus(settings(prefill, "prefill"), SystemRuntime())
    await bus.start()
    with pytest.raises(BusUnavailable, match=r"KVFERRY_NATS_USER.*KVFERRY_CLUSTER"):
        await bus.subscribe(role_beats(CLUSTER, "decode"), lambda message: None)
    await bus.subscribe(role_beats(CLUSTER, "gateway"), lambda message: None)
    await bus.close()


async def test_clusters_that_share_a_server_do_not_hear_each_other() -> None:
    users = [user for cluster in ("one", "two") for user in users_of(cluster, {"observer": f"of {cluster}"})]
    server = EmbeddedNats([*users, ANYBODY])
    await server.start()
    async with joined(server, user_name("one", "observer")) as one, joined(server, ANYBODY.name) as everybody:
        assert await one.may_hear("kvferry.one.>")
        assert not await one.may_hear("kvferry.two.>")
        for row in (*rows("one"), *rows("two")):
            await everybody.may_say(row.subject)
        await one.tell()
        assert one.heard == [row.subject for row in rows("one")]
    await server.stop()


async def test_the_rights_hold_from_node_to_node_of_a_cluster() -> None:
    mail = next(row.subject for row in TABLE if ".decode.x." in row.subject and row.subject.endswith(".gateway"))
    inbox = f"{inbox_prefix(CLUSTER, 'gateway')}.0123456789abcdef"
    async with (
        running_cluster([*users_of(CLUSTER, PASSWORDS), ANYBODY], size=2) as cluster,
        joined(cluster.nodes[0], user_name(CLUSTER, "gateway")) as gateway,
        joined(cluster.nodes[1], user_name(CLUSTER, "decode")) as decode,
    ):
        assert await gateway.may_hear(f"{inbox}.*")
        assert await decode.may_hear(mail)
        asked = 0
        async with asyncio.timeout(60):
            while not decode.replies:  # until the nodes have told each other who listens
                asked += 1
                assert await gateway.may_say(mail, reply=f"{inbox}.{asked}")
                await decode.tell()
            answered = decode.replies[0]
            assert not await decode.may_say(f"{inbox}.{asked + 1}")
            assert await decode.may_say(answered)
            assert not await decode.may_say(answered), "once"
            while not gateway.heard:
                await gateway.tell()
        assert gateway.heard == [answered]


def test_the_configuration_says_no_more_than_the_rights() -> None:
    for entry, role in zip(authorization(users_of(CLUSTER, PASSWORDS))["users"], BUS_ROLES, strict=True):
        permissions, rights = entry["permissions"], rights_of(role, CLUSTER)
        assert entry["user"] == f"river-{role}"
        assert permissions["publish"] == {"allow": list(rights.publish)}
        assert permissions["subscribe"] == {"allow": list(rights.subscribe)}
        assert ("allow_responses" in permissions) == (role in ("prefill", "decode"))
    assert "of prefill" not in repr(users_of(CLUSTER, PASSWORDS))


async def test_negative_control_without_rights_everything_is_allowed() -> None:
    server = EmbeddedNats([ANYBODY])
    await server.start()
    async with joined(server, ANYBODY.name) as member:
        assert all([await member.may_say(row.subject) and await member.may_hear(row.subject) for row in TABLE])
    await server.stop()
