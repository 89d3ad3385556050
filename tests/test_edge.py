"""The edge configuration that ships, in a real nginx, with raw sockets as its clients."""

import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import clusters

DEPLOY = Path(__file__).resolve().parent.parent / "platform" / "deploy"
NAME = "tts.example.com"

pytestmark = pytest.mark.skipif(
    shutil.which("nginx") is None or shutil.which("openssl") is None,
    reason="needs nginx and openssl: apt-get install nginx-light openssl",
)


class Upstream(ThreadingHTTPServer):
    """Stands for Serve: records requests; answers /stream in two parts, the second on demand."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.more = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append((self.path, headers, body))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"5\r\nfirst\r\n")
        if self.path == "/stream":
            self.server.more.wait(30)
        self.wfile.write(b"6\r\nsecond\r\n0\r\n\r\n")


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    server = Upstream()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def edge(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of nginx with the shipped files; what they mark EDIT, and the waits, are changed."""
    folder = tmp_path_factory.mktemp("edge")
    key = folder / "privkey.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
         "-subj", f"/CN={NAME}", "-keyout", key, "-out", folder / "fullchain.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    port = clusters.free_port()
    content = (DEPLOY / "nginx.conf").read_text()
    for pattern, value in {
        "pid /run/valle-nginx.pid": f"pid {folder}/pid",
        "/var/log/nginx": str(folder),
        "/etc/ssl/valle": str(folder),
        r"listen 443": f"listen 127.0.0.1:{port}",
        r"127\.0\.0\.1:8000": f"127.0.0.1:{upstream.server_address[1]}",
        "client_header_timeout 10s": "client_header_timeout 1s",
        "client_body_timeout 30s": "client_body_timeout 1s",
        r"worker_processes auto;": "worker_processes 1; daemon off;",
        r"worker_rlimit_nofile \d+;": "",
        r"worker_connections 4096": "worker_connections 64",
    }.items():
        content, n_found = re.subn(pattern, value, content)
        assert n_found, pattern
    (folder / "nginx.conf").write_text(content)
    shutil.copy(DEPLOY / "proxy_valle.conf", folder)
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            ["nginx", "-p", folder, "-c", folder / "nginx.conf"], stderr=stderr
        )
    try:
        clusters.wait_for(lambda: process.poll() is not None or _listens(port), 20, "nginx")
        assert process.poll() is None, (folder / "stderr").read_text()
        yield port
    finally:
        process.terminate()
        process.wait(timeout=20)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def connected(port: int, name: str = NAME) -> Iterator[ssl.SSLSocket]:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", port), timeout=20) as plain,
        context.wrap_socket(
            plain, server_hostname=name, do_handshake_on_connect=False
        ) as connection,
    ):
        connection.do_handshake()
        yield connection


def receive_all(connection: ssl.SSLSocket) -> bytes:
    """What arrives until nginx closes the connection, in whichever way it does."""
    data = b""
    with suppress(ConnectionError, ssl.SSLError):
        while part := connection.recv(65536):
            data += part
    return data


def ask(port: int, head: str, body: bytes = b"", name: str = NAME) -> bytes:
    with connected(port, name) as connection:
        connection.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode() + body)
        return receive_all(connection)


def post(*headers: str, path: str = "/v1/audio/speech", host: str = NAME) -> str:
    return "\r\n".join([f"POST {path} HTTP/1.1", f"Host: {host}", *headers])


def test_headers_that_direct_serve_are_taken_out(edge: int, upstream: Upstream) -> None:
    head = post(
        "Content-Length: 2", "x-request-disconnect-disabled: ?1", "X-Request-Timeout-Seconds: 0",
        "serve_multiplexed_model_id: x", "Serve-Multiplexed-Model-Id: x", "X-Session-Id: x",
        "X-Request-ID: chosen", "X-Forwarded-For: 1.2.3.4", "Authorization: Bearer KEY",
    )  # fmt: skip
    assert b" 200 " in ask(edge, head, b"{}")
    _, headers, body = upstream.requests[-1]
    assert body == b"{}" and headers["authorization"] == "Bearer KEY" and headers["host"] == NAME
    assert not [n for n in headers if re.search("disconnect|timeout|multiplex|session", n)]
    assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])
    assert headers["x-forwarded-for"] == "127.0.0.1"
    assert headers["x-forwarded-proto"] == "https"


def test_a_slow_client_is_closed(edge: int, upstream: Upstream) -> None:
    n_requests = len(upstream.requests)
    for start in (
        "POST /v1/audio/speech HTTP/1.1\r\nHost: tts.exa",
        f"{post('Content-Length: 1000')}\r\n\r\n" + '{"input',
        f"{post('Transfer-Encoding: chunked')}\r\n\r\n" + "5\r\nab",
    ):
        with connected(edge) as connection:
            connection.sendall(start.encode())
            begin = time.monotonic()
            answer = receive_all(connection)
        assert time.monotonic() - begin < 10
        assert answer == b"" or b" 408 " in answer
    assert len(upstream.requests) == n_requests, "Serve has not heard of them"


def test_a_long_body_is_refused(edge: int, upstream: Upstream) -> None:
    n_requests = len(upstream.requests)
    with connected(edge) as connection:
        connection.sendall(f"{post(f'Content-Length: {2**30}')}\r\n\r\n".encode())
        assert b" 413 " in connection.recv(65536)
    chunk = b"100000\r\n" + b"x" * 2**20 + b"\r\n"
    with connected(edge) as connection:
        connection.sendall(f"{post('Transfer-Encoding: chunked')}\r\n\r\n".encode())
        with suppress(OSError):  # closed meanwhile
            for _ in range(15):
                connection.sendall(chunk)
        assert b" 413 " in connection.recv(65536)
    assert len(upstream.requests) == n_requests


@pytest.mark.parametrize(
    "headers",
    [
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: -5",),
        ("Content-Length: 5, 6",),
        ("Transfer-Encoding: gzip",),
        ("Transfer-Encoding: xchunked",),
    ],
)
def test_an_ambiguous_length_is_refused(
    edge: int, upstream: Upstream, headers: tuple[str, ...]
) -> None:
    n_requests = len(upstream.requests)
    answer = ask(edge, post(*headers), b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n")
    assert re.match(rb"HTTP/1.1 (400|501) ", answer), answer
    assert len(upstream.requests) == n_requests


def test_long_headers_are_refused(edge: int) -> None:
    assert b" 400 " in ask(edge, post("Content-Length: 2", "X-A: " + "x" * 20_000), b"{}")
    assert b" 414 " in ask(edge, post("Content-Length: 2", path="/" + "x" * 20_000), b"{}")


def test_a_body_without_a_length_reaches_serve_with_one(edge: int, upstream: Upstream) -> None:
    assert b" 200 " in ask(edge, post("Transfer-Encoding: chunked"), b"2\r\n{}\r\n0\r\n\r\n")
    _, headers, body = upstream.requests[-1]
    assert headers["content-length"] == "2" and body == b"{}"
    assert "transfer-encoding" not in headers


def test_speech_is_passed_on_as_it_is_made(edge: int, upstream: Upstream) -> None:
    upstream.more.clear()
    with connected(edge) as connection:
        head = post("Content-Length: 2", "Connection: close", path="/stream")
        connection.sendall(f"{head}\r\n\r\n{{}}".encode())
        data = b""
        while b"first" not in data:  # the second part is not made yet
            data += connection.recv(65536)
        assert b"second" not in data
        upstream.more.set()
        data += receive_all(connection)
    assert b"second" in data and b"Strict-Transport-Security" in data


def test_only_its_own_name_is_answered(edge: int, upstream: Upstream) -> None:
    n_requests = len(upstream.requests)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        ask(edge, post("Content-Length: 0", host="evil.example"), name="evil.example")
    assert not ask(edge, post("Content-Length: 0", host="evil.example"))
    assert len(upstream.requests) == n_requests
