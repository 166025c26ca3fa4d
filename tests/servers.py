"""Servers on loopback: one that speaks S3, one before it, and some that behave badly."""

from __future__ import annotations

import http.client
import http.server
import os
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def serving(**environment: str) -> Iterator[tuple[str, int]]:
    """moto's server: its address and its process."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    line = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    nothing = subprocess.DEVNULL
    with subprocess.Popen(
        line, env={**os.environ, **environment}, stdout=nothing, stderr=nothing
    ) as process:
        try:
            _wait_until_it_answers(process, f"{address}/moto-api/")
            yield address, process.pid
        finally:
            process.kill()


def _wait_until_it_answers(process: subprocess.Popen[bytes], url: str) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)


class Mute(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while self.request.recv(65536):
            pass


class BreaksOff(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.recv(65536)
        self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf of it")


@contextmanager
def odd_server(handler: type[socketserver.BaseRequestHandler]) -> Iterator[str]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


class LosesReplies(http.server.BaseHTTPRequestHandler):
    """Hands requests on to `behind`. Of each put, the first reply is lost on its way back."""

    protocol_version = "HTTP/1.1"
    behind = ""
    lost: list[str]

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        behind = http.client.HTTPConnection(self.behind, timeout=10)
        behind.request(self.command, self.path, body, dict(self.headers))
        reply = behind.getresponse()
        data = reply.read()
        behind.close()
        if self.command == "PUT" and self.path not in self.lost:
            self.lost.append(self.path)
            self.close_connection = True
            return
        self.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        length = reply.headers.get("Content-Length") if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any

    def log_message(self, *_: object) -> None: ...


@contextmanager
def losing_replies(behind: str) -> Iterator[tuple[str, list[str]]]:
    """Its address, and the paths of the puts whose reply was lost."""
    lost: list[str] = []
    members = {"behind": behind.removeprefix("http://"), "lost": lost}
    handler = type("Handler", (LosesReplies,), members)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", lost
        server.shutdown()
        thread.join()
