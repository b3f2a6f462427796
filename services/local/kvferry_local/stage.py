"""Where the stack is seen from: shows it on the terminal and tells the bus who is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import httpx

from kvferry.bus.base import Bus
from kvferry.certificate import pinned_context
from kvferry.errors import BusUnavailable
from kvferry.log import get_logger
from kvferry.runtime import now
from kvferry.wire.beats import ExitNotice
from kvferry.wire.messages import Codecs
from kvferry.wire.subjects import exit_subject
from kvferry_gateway.http.auth import first_key
from kvferry_local.plan import curl_options, ready_message
from kvferry_local.process import Report
from kvferry_local.settings import UpSettings
from kvferry_local.supervision import Announce, Restarting
from kvferry_local.supervisor import Audience
from kvferry_local.terminal import Terminal

# All children are up: what is missing is a heartbeat, which comes every 250 ms.
PROBE_INTERVAL_S: Final = 0.05
PROBE_TIMEOUT_S: Final = 15.0

log = get_logger(__name__)


class Stage(Audience):
    def __init__(
        self, settings: UpSettings, models: Sequence[str], url: str, terminal: Terminal, bus: Bus, began: float
    ) -> None:
        self._settings = settings
        self._models = models
        self._url = url
        self._terminal = terminal
        self._bus = bus
        self._began = began  # on the loop's clock
        self._codecs = Codecs()

    def report(self, name: str, report: Report) -> None:
        self._terminal.report(name, report)

    def line(self, name: str, line: str) -> None:
        self._terminal.child_line(name, line)

    def restarting(self, event: Restarting) -> None:
        log.warning(
            "child ended; starting it again",
            child=event.name, cause=event.cause, returncode=event.returncode, delay=event.delay,
        )  # fmt: skip

    async def announce(self, event: Announce) -> None:
        subject = exit_subject(self._settings.cluster, event.role, event.name, event.incarnation)
        try:
            await self._bus.publish(subject, self._codecs.beat.encode(ExitNotice(event.incarnation, event.cause)))
        except BusUnavailable:
            # Its silence will tell, only later.
            log.warning("exit not announced: the bus is down", child=event.name)

    async def all_ready(self) -> None:
        """Show the address once the first gateway sees every worker ready."""
        if not await self._all_seen():
            log.error("the gateway does not see all workers ready", waited_s=PROBE_TIMEOUT_S)
            return
        settings = self._settings
        self._terminal.end()
        self._terminal.result(
            ready_message(
                self._url, self._models, settings.prefill, settings.decode, now() - self._began, curl_options(settings)
            )
        )

    async def _all_seen(self) -> bool:
        wanted = (self._settings.prefill + self._settings.decode) * len(self._models)
        certificate = self._settings.tls_cert
        verify = True if certificate is None else pinned_context(certificate, "--tls-cert")
        keys = self._settings.api_key_file
        headers = {} if keys is None else {b"authorization": b"Bearer " + first_key(keys)}
        async with httpx.AsyncClient(base_url=self._url, headers=headers, trust_env=False, verify=verify) as http:
            deadline = now() + PROBE_TIMEOUT_S
            while now() < deadline:
                try:
                    answer = await http.get("/v1/cluster")
                    if answer.is_success:
                        workers = answer.json()["workers"]
                        if sum(worker["state"] == "ready" for worker in workers) >= wanted:
                            return True
                except httpx.TransportError as error:
                    log.debug("gateway not reached", error=repr(error))
                await asyncio.sleep(PROBE_INTERVAL_S)
        return False
