"""Memory of the web layer over thousands of requests in every language."""

from pathlib import Path

import httpx
import psutil
import pytest
from helpers.deployments import FakeDeployments
from helpers.recordings import speech

from valle.model import espeak
from valle.platform import audio
from valle.serve.app_args import AppArgs
from valle.serve.web.api import create_api

N_REQUESTS = 2_000

MAX_GROWTH = 30e6
"""Bytes; one espeak for each change of language took 5.4 MB, 10 GB for these requests."""


@pytest.mark.faults
@pytest.mark.anyio
async def test_memory_stays_flat_in_all_languages(tmp_path: Path) -> None:
    """Requests name another language each time; voices that cannot speak refuse by name."""
    (tmp_path / "ann.wav").write_bytes(audio.wav_bytes(speech(2)))
    languages = tuple(sorted(espeak.voices()))
    args = AppArgs(model="/a/bundle#" + "0" * 64, voices=str(tmp_path), languages=languages)
    transport = httpx.ASGITransport(create_api(args, FakeDeployments()))
    process = psutil.Process()
    statuses = []
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        for number in range(N_REQUESTS):
            if number == 2 * len(languages):  # every voice has been loaded, and grammars too
                before = process.memory_info().rss
            language = languages[number % len(languages)]
            body = {"input": f"{number}, $5.", "voice": "ann", "language": language, "seed": 1}
            answer = await http.post("/v1/audio/speech", json=body | {"response_format": "pcm"})
            statuses.append(answer.status_code)
    assert set(statuses) <= {200, 400} and statuses.count(200) > 0.8 * N_REQUESTS
    growth = process.memory_info().rss - before
    assert growth < MAX_GROWTH, f"{growth / 1e6:.1f} MB"
