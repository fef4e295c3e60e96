"""An HTTP and a DNS server on free ports of 127.0.0.1, for debian/tests/proxy.

origin.py FILE     serves, and writes both port numbers into FILE
origin.py --free N prints N port numbers that are free for TCP and UDP alike
"""

import os
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PAGE = b"hello from the origin"
ADDRESS = bytes([192, 0, 2, 7])


class Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, *_: object) -> None:
        pass


def answer(query: bytes) -> bytes:
    """Any question is answered by one A record (RFC 1035)."""
    end = query.index(b"\0", 12) + 5
    return (
        query[:2]
        + b"\x81\x80\0\1\0\1\0\0\0\0"
        + query[12:end]
        + b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4"
        + ADDRESS
    )


def serve_dns(sock: socket.socket) -> None:
    while True:
        query, client = sock.recvfrom(4096)
        sock.sendto(answer(query), client)


def free_ports(count: int) -> list[int]:
    held, ports = [], []
    while len(ports) < count:
        stream, datagram = socket.socket(), socket.socket(type=socket.SOCK_DGRAM)
        held += [stream, datagram]
        stream.bind(("127.0.0.1", 0))
        try:
            datagram.bind(stream.getsockname())
        except OSError:
            continue
        ports.append(stream.getsockname()[1])
    return ports


def main() -> None:
    if sys.argv[1] == "--free":
        print(*free_ports(int(sys.argv[2])))
        return
    dns = socket.socket(type=socket.SOCK_DGRAM)
    dns.bind(("127.0.0.1", 0))
    http = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=serve_dns, args=(dns,), daemon=True).start()
    with open(sys.argv[1] + ".new", "w") as file:
        print(http.server_port, dns.getsockname()[1], file=file)
    os.rename(sys.argv[1] + ".new", sys.argv[1])
    http.serve_forever()


main()
