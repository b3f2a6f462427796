"""`python -m kvferry_decode`: one decode worker in the foreground."""

from __future__ import annotations

from kvferry.command import service_command
from kvferry.worker.service import serve_worker
from kvferry_decode.settings import DecodeSettings
from kvferry_decode.worker import DecodeWorker


async def serve(settings: DecodeSettings) -> None:
    await serve_worker(settings, DecodeWorker)


main = service_command(
    DecodeSettings,
    serve,
    summary="Run one decode worker in the foreground.",
)

if __name__ == "__main__":
    main()
