"""`python -m kvferry_gateway`, the same as `kvferry gateway`."""

from __future__ import annotations

from kvferry.command import service_command
from kvferry_gateway.service import serve
from kvferry_gateway.settings import GatewaySettings

main = service_command(GatewaySettings, serve, summary="Run one gateway in the foreground: HTTP in, tokens out.")

if __name__ == "__main__":
    main()
