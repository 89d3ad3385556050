"""An S3 server for tests, and a proxy before it that fails on demand."""

import http.client
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from botocore.config import Config

from helpers import clusters

SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch, bucket: str) -> Iterator[str]:
    """The URI of a bucket on a server of its own; the AWS_* variables lead to it."""
    import boto3

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    port = clusters.free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        client = boto3.client("s3", config=Config(retries={"max_attempts": 20}))
        client.create_bucket(Bucket=bucket)
        client.close()
        yield f"s3://{bucket}"
    finally:
        server.terminate()
        server.wait()


class FailingProxy:
    """Forwards requests to an S3 server, or answers as it does in an outage."""

    def __init__(self, server_url: str) -> None:
        self.requests = self.failures = 0
        self.status = 503
        self.fails: Callable[[str, str], bool] = lambda method, path: False
        """Says of a request whether it fails with `status`; status 0 resets the connection."""
        address = server_url.removeprefix("http://")
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def _handle(self) -> None:
                body = self._body()
                proxy.requests += 1
                if proxy.fails(self.command, self.path):
                    proxy.failures += 1
                    if not proxy.status:
                        self.close_connection = True
                        self.connection.shutdown(socket.SHUT_RDWR)
                        return
                    self._answer(proxy.status, {"Content-Type": "application/xml"}, SLOW_DOWN)
                    return
                upstream = http.client.HTTPConnection(address, timeout=60)
                hop = ("expect", "connection", "transfer-encoding", "content-length")
                sent = {name: v for name, v in self.headers.items() if name.lower() not in hop}
                upstream.request(self.command, self.path, body, sent)
                answer = upstream.getresponse()
                data = answer.read()
                kept = {
                    name: value
                    for name, value in answer.getheaders()
                    if name.lower() not in ("transfer-encoding", "connection", "server", "date")
                }
                upstream.close()
                self._answer(answer.status, kept, data)

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                while self.rfile.readline().strip():
                    pass
                return b"".join(parts)

            def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
                self.send_response(status)
                if self.command != "HEAD":
                    headers = {**headers, "Content-Length": str(len(data))}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def fail_for(self, seconds: float) -> None:
        """All requests fail from now on, for so long."""
        end = time.monotonic() + seconds
        self.fails = lambda method, path: time.monotonic() < end

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def failing_proxy(monkeypatch: pytest.MonkeyPatch, server_url: str) -> Iterator[FailingProxy]:
    """A proxy before the server; the AWS_* variables lead to the proxy."""
    proxy = FailingProxy(server_url)
    try:
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", proxy.url)
            yield proxy
    finally:
        proxy.close()
