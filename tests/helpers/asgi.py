"""Requests to an ASGI application in the process of a test, message by message: streams can be
read in part, and clients can leave."""

import asyncio
import json
from typing import Any

import httpx
from starlette.types import ASGIApp, Message


def asgi_client(application: ASGIApp) -> httpx.AsyncClient:
    """A client of an application in this process; its errors are answers with 500."""
    transport = httpx.ASGITransport(application, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


SPEECH, VOICES = "/v1/audio/speech", "/v1/audio/voices"
BODY = {"input": "Hi there.", "voice": "ann", "response_format": "pcm"}
JSON = {"Content-Type": "application/json"}
"""Routes, a request and its content type, for tests of the HTTP border."""


class StreamingRequest:
    """One POST request that runs as a task."""

    def __init__(self, app: ASGIApp, path: str, body: dict[str, Any], buffer_size: int = 0) -> None:
        """`buffer_size` messages of the response may wait to be read; 0: any number."""
        data = json.dumps(body).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(data)).encode()),
        ]
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "root_path": "",
            "query_string": b"",
            "headers": headers,
            "asgi": {"version": "3.0"},
        }
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": data, "more_body": False})
        self._outgoing: asyncio.Queue[Message] = asyncio.Queue(buffer_size)
        self.task = asyncio.create_task(app(scope, self._incoming.get, self._outgoing.put))

    async def message(self) -> Message:
        """The next message of the response."""
        getter = asyncio.create_task(self._outgoing.get())
        await asyncio.wait([getter, self.task], return_when=asyncio.FIRST_COMPLETED)
        if not getter.done():
            getter.cancel()
            await self.task
            raise AssertionError("the response has ended")
        return getter.result()

    async def body(self) -> bytes:
        """The next part of the body, after the start of the response if that comes first."""
        message = await self.message()
        if message["type"] == "http.response.start":
            message = await self.message()
        return message["body"]

    def disconnect(self) -> None:
        """The client closes its connection: Serve says so to a response that runs, and cancels the
        task of a request that waits for one."""
        self._incoming.put_nowait({"type": "http.disconnect"})
