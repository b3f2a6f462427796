"""This machine's clock against those of the cluster's processes, by the Date of their HTTP answers.

Gateways order requests by the time of their arrival, so that a gateway whose clock is behind goes before others.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from kvferry.runtime import wall_clock
from kvferry_local.client import TRUST_ENV
from kvferry_local.doctor.finding import Finding, ok, warning
from kvferry_local.ports import base_url
from kvferry_local.trust import trust

MAX_SKEW_S: Final = 2.0  # a Date has whole seconds
TIMEOUT: Final = httpx.Timeout(3.0)


def _system(url: str) -> ssl.SSLContext:
    return trust(url, None)


def peers_of(workers: list[dict[str, Any]]) -> dict[str, str]:
    """Name and URL of each worker's debug port, from the rows of `/v1/cluster`."""
    found = {}
    for worker in workers:
        host = urlsplit(worker["address"][0]).hostname if worker["address"] else None
        if host and worker["debug_port"]:
            found[worker["name"]] = base_url(host, worker["debug_port"])
    return found


def clock(peers: dict[str, str], tls: Callable[[str], ssl.SSLContext] = _system) -> Finding:
    """`peers`: name and base URL; `tls`: whom to trust at a URL. One that does not answer is no matter of clocks."""
    check = "clock"
    skews = {name: skew for name, url in peers.items() if (skew := _skew(url, tls(url))) is not None}
    if not skews:
        return ok(check, "no peer to compare with")
    name, worst = max(skews.items(), key=lambda item: abs(item[1]))
    if abs(worst) > MAX_SKEW_S:
        way = "ahead of" if worst > 0 else "behind"
        detail = f"{name}'s clock is {abs(worst):,.0f} s {way} this machine's"
        return warning(check, detail, "let both follow NTP: timedatectl set-ntp true")
    return ok(check, f"{len(skews)} peers within {MAX_SKEW_S:g} s")


def _skew(url: str, tls: ssl.SSLContext) -> float | None:
    """Seconds that the peer's clock is ahead, as far as whole seconds tell; None: no answer."""
    began = wall_clock()
    try:
        answer = httpx.get(f"{url}/health", timeout=TIMEOUT, trust_env=TRUST_ENV, verify=tls)
        told = parsedate_to_datetime(answer.headers["date"]).timestamp()
    except (httpx.HTTPError, KeyError, ValueError):
        return None
    # The answer was written in [began, ended], its Date rounded down by less than a second.
    ended = wall_clock()
    return max(0.0, told - ended) + min(0.0, told + 1.0 - began)
