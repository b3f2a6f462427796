"""The console's routes: its files, its state, and the word to a worker to drain.

The files say nothing of the cluster and are open to all; the state is for whom `/v1/cluster` is for; draining takes a
key always, so that no page of another origin and no other user of this machine can do it.
"""

from __future__ import annotations

from importlib import resources
from typing import Annotated, Any, Final
from urllib.parse import parse_qsl

from pydantic import StringConstraints

from kvferry.log import get_logger
from kvferry.runtime import now
from kvferry_gateway.body import parse
from kvferry_gateway.console.view import state
from kvferry_gateway.errors import bad_request, no_such_worker
from kvferry_gateway.fleet.fleet import Fleet
from kvferry_gateway.http.asgi import Exchange, respond
from kvferry_gateway.http.cors import Header
from kvferry_gateway.requests.request_model import RequestModel

STATE: Final = "/console/state"
DRAIN: Final = "/console/drain"
_SCRIPT: Final = b"text/javascript; charset=utf-8"
PAGES: Final = {  # path -> file of `page/`, its type
    "/console": ("console.html", b"text/html; charset=utf-8"),
    "/console/console.css": ("console.css", b"text/css; charset=utf-8"),
    "/console/console.js": ("console.js", _SCRIPT),
    "/console/access.js": ("access.js", _SCRIPT),
    "/console/chart.js": ("chart.js", _SCRIPT),
    "/console/chat.js": ("chat.js", _SCRIPT),
    "/console/element.js": ("element.js", _SCRIPT),
    "/console/models.js": ("models.js", _SCRIPT),
    "/console/pool.js": ("pool.js", _SCRIPT),
    "/console/requests.js": ("requests.js", _SCRIPT),
    "/console/timeline.js": ("timeline.js", _SCRIPT),
    "/console/workers.js": ("workers.js", _SCRIPT),
}
MAX_NUMBER_DIGITS: Final = 19  # of a request's number in a query

_HEADERS: Final[tuple[Header, ...]] = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
        b"form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),  # a page of another version would read another state
)

log = get_logger(__name__)


class DrainRequest(RequestModel):
    incarnation: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]


class Console:
    """One gateway's."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        folder = resources.files(__package__) / "page"
        self._files = {path: ((folder / name).read_bytes(), kind) for path, (name, kind) in PAGES.items()}

    async def page(self, exchange: Exchange) -> None:
        body, kind = self._files[exchange.scope["path"]]
        await respond(exchange.send, 200, body, [*_HEADERS, *exchange.caller.headers], kind)

    async def state(self, exchange: Exchange) -> None:
        """Query: `request`, the number of the one whose timeline is wanted. Raises `ApiError` 400."""
        query = dict(parse_qsl(exchange.scope.get("query_string", b"").decode("latin-1"), max_num_fields=8))
        given = query.get("request")
        if given is not None and not (given.isascii() and given.isdigit() and len(given) <= MAX_NUMBER_DIGITS):
            raise bad_request("Invalid 'request': a request's number is wanted.", "request")
        shown = state(self._fleet, now(), None if given is None else int(given))
        await exchange.json(shown)

    def drain(self, body: bytes) -> dict[str, Any]:
        """Tell a worker to drain. Raises `ApiError` 400 or 404."""
        incarnation = parse(DrainRequest, body).incarnation
        worker = self._fleet.mail.drain(int(incarnation, 16))
        if worker is None:
            raise no_such_worker(incarnation)
        log.info("drain asked for", worker=worker.name)
        return {"status": "asked", "worker": worker.name}
