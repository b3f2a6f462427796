"""Cross-origin access, for pages in a browser. Pure: request headers in, response headers out."""

from __future__ import annotations

from typing import Final

Header = tuple[bytes, bytes]

_MAX_AGE_S: Final = b"600"
_TOLD: Final = (b"limit", b"remaining", b"reset")  # of a key's rate limits
_EXPOSED: Final = b", ".join(
    (
        b"x-request-id",
        b"retry-after",
        *(b"x-ratelimit-%b-%b" % (what, kind) for kind in (b"requests", b"tokens") for what in _TOLD),
    )
)


class Cors:
    """`origins` as they are written in an `Origin` header; `*` admits any."""

    def __init__(self, origins: tuple[str, ...]) -> None:
        self._any = "*" in origins
        self._origins = frozenset(origin.encode() for origin in origins)

    def headers(self, origin: bytes | None) -> list[Header]:
        """What to add to the answer of a request from `origin`."""
        if origin is None or not (self._any or self._origins):
            return []
        if self._any:
            # Keys travel in a header and never in a cookie, so the wildcard gives nothing away.
            return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", _EXPOSED)]
        # Also for a stranger, so that a shared cache keeps the answers apart.
        vary = (b"vary", b"origin")
        if origin not in self._origins:
            return [vary]
        return [(b"access-control-allow-origin", origin), (b"access-control-expose-headers", _EXPOSED), vary]

    def preflight(self, origin: bytes | None, methods: str, asked: bytes | None) -> list[Header]:
        """What to answer to OPTIONS. `asked` are the headers that the page wants to send."""
        headers = self.headers(origin)
        if headers and headers[0][0] == b"access-control-allow-origin":
            headers += [
                (b"access-control-allow-methods", methods.encode()),
                (b"access-control-allow-headers", asked or b"authorization, content-type, x-request-id"),
                (b"access-control-max-age", _MAX_AGE_S),
            ]
        return headers
