"""What each role may say and hear on the bus: the permissions of its NATS user. Pure.

A role reads what is said to it and speaks in its own name, and nothing else: a prefill worker hears no answer that is
meant for a gateway, and what it publishes shows that a prefill worker has (`kvferry.wire.subjects`). Whoever has a
role's password is any process of that role.

    role        who                                   says                 hears
    gateway     gateways                              mail to workers      workers' beats and caches, exits
    prefill     prefill workers                       mail to gateways     gateways' beats
    decode      decode workers                        mail to gateways     gateways' beats
    operator    `kvferry up`, `drain` and `doctor`    drain, ping, exits
    observer    who looks for a fault                                      everything, prompts too

Besides, gateways and workers hear their own mail and send their own heartbeats.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from kvferry.wire.subjects import (
    ROOT,
    all_cache_news,
    all_exits,
    inbox_prefix,
    role_beats,
    role_cache_news,
    role_mail,
    role_mailboxes,
)

BusRole = Literal["gateway", "prefill", "decode", "operator", "observer"]
BUS_ROLES: Final[tuple[BusRole, ...]] = get_args(BusRole)
WORKERS: Final = ("prefill", "decode")
ANSWER_WITHIN: Final = "30s"  # a worker answers within a loop's turn; a gateway waits for 0.3 s


@dataclass(frozen=True, slots=True)
class Rights:
    """Patterns of subjects. `answers`: it may answer each request that it gets, once, wherever its sender waits."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    answers: bool = False


def user_name(cluster: str, role: BusRole) -> str:
    """The NATS user of a role; clusters that share a server have users of their own."""
    return f"{cluster}-{role}"


def rights_of(role: BusRole, cluster: str) -> Rights:
    inbox = f"{inbox_prefix(cluster, role)}.>"  # to read answers, and to hear oneself: the proof of a connection
    match role:
        case "gateway":
            return Rights(
                publish=(*(role_mail(cluster, worker, role) for worker in WORKERS), role_beats(cluster, role), inbox),
                subscribe=(
                    role_mailboxes(cluster, role),
                    *(role_beats(cluster, worker) for worker in WORKERS),
                    all_cache_news(cluster),
                    all_exits(cluster),
                    inbox,
                ),
            )
        case "prefill" | "decode":
            return Rights(
                publish=(
                    role_mail(cluster, "gateway", role),
                    role_beats(cluster, role),
                    role_cache_news(cluster, role),
                    inbox,
                ),
                subscribe=(role_mailboxes(cluster, role), role_beats(cluster, "gateway"), inbox),
                answers=True,
            )
        case "operator":
            return Rights(
                publish=(*(role_mail(cluster, worker, role) for worker in WORKERS), all_exits(cluster), inbox),
                subscribe=(inbox,),
            )
        case "observer":
            return Rights(publish=(inbox,), subscribe=(f"{ROOT}.{cluster}.>",))


@dataclass(frozen=True, slots=True)
class BusUser:
    """One user of a NATS server. Without `rights` it may do everything."""

    name: str
    password: str = field(repr=False)
    rights: Rights | None = None


def users_of(cluster: str, passwords: Mapping[BusRole, str]) -> tuple[BusUser, ...]:
    """A user for each role that has a password."""
    return tuple(
        BusUser(user_name(cluster, role), password, rights_of(role, cluster)) for role, password in passwords.items()
    )


def authorization(users: Iterable[BusUser]) -> dict[str, Any]:
    """The `authorization` block of a NATS server's configuration; it reads JSON."""
    return {"users": [{"user": user.name, "password": user.password, **_permissions(user.rights)} for user in users]}


def _permissions(rights: Rights | None) -> dict[str, Any]:
    if rights is None:
        return {}
    allowed: dict[str, Any] = {
        "publish": {"allow": list(rights.publish)},
        "subscribe": {"allow": list(rights.subscribe)},
    }
    if rights.answers:
        allowed["allow_responses"] = {"max": 1, "expires": ANSWER_WITHIN}
    return {"permissions": allowed}
