"""`python -m kvferry_prefill`: one prefill worker in the foreground."""

from __future__ import annotations

from kvferry.command import service_command
from kvferry.worker.service import serve_worker
from kvferry_prefill.settings import PrefillSettings
from kvferry_prefill.worker import PrefillWorker


async def serve(settings: PrefillSettings) -> None:
    await serve_worker(settings, PrefillWorker)


main = service_command(
    PrefillSettings,
    serve,
    summary="Run one prefill worker in the foreground.",
)

if __name__ == "__main__":
    main()
