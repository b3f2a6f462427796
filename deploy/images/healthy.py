"""Whether a port of this container answers a path with 200: the health check of every image.

    python -ISs healthy.py 8001 /ready

Exit code 0 or 1, as Docker asks. It runs every few seconds for the container's whole life, so it speaks the dozen
bytes of HTTP by itself: importing an HTTP client would take ten times as long.
"""

import socket
import sys

TIMEOUT_S = 2.0
STATUS = slice(9, 12)  # of "HTTP/1.1 200 OK"


def main() -> None:
    port, path = int(sys.argv[1]), sys.argv[2]
    try:
        with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            status = connection.makefile("rb").read(12)[STATUS].decode("ascii", "replace")
    except OSError as error:
        sys.exit(f"{path}: {error}")
    if status != "200":
        sys.exit(f"{path}: HTTP {status or 'nothing'}")


if __name__ == "__main__":
    main()
