"""Speech requests through the web layer, with stand-ins for the models."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from helpers.asgi import StreamingRequest
from helpers.deployments import GROUP, FakeDeployments, all_codebooks, recording_codes, samples
from helpers.recordings import speech
from starlette.types import ASGIApp

from valle.model.chunks import nar_decode_chunks
from valle.model.codec.interface import Wave
from valle.model.nar_decoding import NARRequest
from valle.model.sentences import PAUSE, sentence_phoneme_ids
from valle.model.tokens import FRAME_RATE, HOP
from valle.platform import audio
from valle.serve.app_args import AppArgs
from valle.serve.engine.request import Request
from valle.serve.web.api import create_api
from valle.serve.web.service import PREFETCH_CHUNKS

MODEL = "/some/bundle#" + "1a2b3c4d" * 8
"""A folder: no registry is asked about it."""

SPEECH = "/v1/audio/speech"
TEXT = "The early train was late again. So we walked along the river. And then we talked."
BODY = {"input": TEXT, "voice": "ann", "response_format": "pcm", "seed": 7}

pytestmark = pytest.mark.anyio


@pytest.fixture
def recording() -> Wave:
    return speech(2)


@pytest.fixture
def args(tmp_path: Path, recording: Wave) -> AppArgs:
    (tmp_path / "ann.wav").write_bytes(audio.wav_bytes(recording))
    return AppArgs(model=MODEL, voices=str(tmp_path))


@pytest.fixture
def deployments() -> FakeDeployments:
    return FakeDeployments()


@pytest.fixture
def api(args: AppArgs, deployments: FakeDeployments) -> ASGIApp:
    return create_api(args, deployments)


@pytest.fixture
async def http(api: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def pcm(wave: Wave) -> bytes:
    return (np.clip(wave, -1, 1) * 32767).round().astype("<i2").tobytes()


def expected_wave(
    deployments: FakeDeployments, args: AppArgs, wave: Wave, text: str = TEXT, *, chunked: bool
) -> Wave:
    """What the stand-ins say, sentence by sentence, without the web layer."""
    prompt = recording_codes(audio.read(audio.wav_bytes(wave), max_seconds=30))
    parts: list[Wave] = []
    for index, ids in enumerate(sentence_phoneme_ids(text, "en-us")):
        max_frames = int(args.max_sentence_seconds * FRAME_RATE)
        request = Request(
            id="x", phonemes=ids, prompt=prompt, max_frames=max_frames, seed=BODY["seed"] + index
        )
        codes, hit_limit = deployments.first_codebook(request)
        nar_request = NARRequest(ids, prompt, codes, complete=not hit_limit)
        if chunked:
            decoded = nar_decode_chunks(all_codebooks, nar_request, args.chunking(), GROUP)
        else:
            decoded = all_codebooks(nar_request)
        parts += [PAUSE, samples(decoded)]
    return np.concatenate(parts[1:])


async def until(condition: Any) -> None:
    """Lets other tasks run until a condition holds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def test_create_speech_of_one_sentence_is_a_complete_file(
    http: httpx.AsyncClient, deployments: FakeDeployments, args: AppArgs, recording: Wave
) -> None:
    text = "The early train was late again."
    response = await http.post(SPEECH, json=BODY | {"input": text})
    assert response.status_code == 200, response.text
    assert response.content == pcm(expected_wave(deployments, args, recording, text, chunked=False))
    assert response.headers["x-model"] == "bundle#1a2b3c4d" and response.headers["x-seed"] == "7"
    assert response.headers["x-hit-limit"] == "false"
    assert int(response.headers["content-length"]) == len(response.content)


@pytest.mark.parametrize("chunked", [False, True])
async def test_create_speech_of_a_text_is_its_sentences_with_pauses(
    http: httpx.AsyncClient,
    deployments: FakeDeployments,
    args: AppArgs,
    recording: Wave,
    chunked: bool,
) -> None:
    response = await http.post(SPEECH, json=BODY | {"chunked": chunked})
    assert response.status_code == 200 and response.headers["x-hit-limit"] == "unknown"
    expected = expected_wave(deployments, args, recording, chunked=chunked)
    assert response.content == pcm(expected)
    assert (deployments.count("decode_next") > 3) == chunked
    assert {call.version for call in deployments.calls} == {MODEL}


async def test_create_speech_decodes_a_short_sentence_at_once(
    http: httpx.AsyncClient, deployments: FakeDeployments
) -> None:
    """The stream decoder needs more frames for its first chunk than this sentence has."""
    deployments.frames_per_phoneme = 1
    response = await http.post(SPEECH, json=BODY | {"input": "Oh.", "chunked": True})
    assert response.status_code == 200 and len(response.content) % (2 * HOP) == 0
    assert 0 < len(response.content) // (2 * HOP) < 8
    assert [deployments.count(name) for name in ("decode", "decode_next")] == [1, 0]


async def test_create_speech_sends_events(
    http: httpx.AsyncClient, deployments: FakeDeployments, args: AppArgs, recording: Wave
) -> None:
    response = await http.post(SPEECH, json=BODY | {"stream_format": "sse"})
    events = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-1]]
    *deltas, done = events
    assert {event["type"] for event in deltas} == {"speech.audio.delta"} and len(deltas) >= 3
    expected = expected_wave(deployments, args, recording, chunked=False)
    assert b"".join(base64.b64decode(event["audio"]) for event in deltas) == pcm(expected)
    n_phonemes = sum(map(len, sentence_phoneme_ids(TEXT, "en-us")))
    n_frames = deployments.frames_per_phoneme * n_phonemes
    assert done == {
        "type": "speech.audio.done",
        "usage": {
            "input_tokens": n_phonemes,
            "output_tokens": n_frames,
            "total_tokens": n_phonemes + n_frames,
        },
        "hit_limit": False,
    }


async def test_create_speech_says_when_the_limit_falls_between_sentences(
    http: httpx.AsyncClient, deployments: FakeDeployments
) -> None:
    """The first sentence ends by itself at the limit, and the others are dropped."""
    n_frames = deployments.frames_per_phoneme * len(sentence_phoneme_ids(TEXT, "en-us")[0])
    for chunked in (False, True):
        body = BODY | {"max_seconds": (n_frames + 0.5) / FRAME_RATE, "stream_format": "sse"}
        deployments.ends_at_limit = True
        response = await http.post(SPEECH, json=body | {"chunked": chunked})
        done = json.loads(response.text.split("\n\n")[-2].removeprefix("data: "))
        assert (done["hit_limit"], done["usage"]["output_tokens"]) == (True, n_frames)
        whole = TEXT.split(".")[0] + "."
        response = await http.post(SPEECH, json=body | {"input": whole, "chunked": chunked})
        done = json.loads(response.text.split("\n\n")[-2].removeprefix("data: "))
        assert done["hit_limit"] is False


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"language": "fr"}, "language: fr is not spoken here, only en-us"),
        ({"language": "auto"}, "language: espeak has no voice named 'auto'"),
        ({"input": "你好"}, "input: the voice en-us cannot read Chinese characters (你好)"),
        ({"language": "zh", "input": "你好"}, "language: cmn has tones"),
        ({"input": "---"}, "text: nothing to say in it"),
    ],
)
async def test_create_speech_names_what_cannot_be_spoken(
    http: httpx.AsyncClient, fields: dict[str, str], message: str
) -> None:
    response = await http.post(SPEECH, json=BODY | fields)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(message)


async def test_create_speech_of_the_languages_that_are_set(
    args: AppArgs, deployments: FakeDeployments
) -> None:
    api = create_api(args.model_copy(update={"languages": ("de-DE", "en")}), deployments)
    transport = httpx.ASGITransport(api)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        for language, status in (("de", 200), ("EN_us", 200), ("en-GB", 200), ("fr", 400)):
            response = await http.post(SPEECH, json=BODY | {"language": language})
            assert response.status_code == status
    assert len({tuple(c.request.phonemes) for c in deployments.calls if c.request}) == 6
    with pytest.raises(ValueError, match="language: espeak has no voice"):
        AppArgs(languages=("xx",))


async def test_create_speech_splits_what_numbers_make_long(
    http: httpx.AsyncClient, deployments: FakeDeployments, args: AppArgs
) -> None:
    """Each part has time for a slow voice within the limit of a sentence."""
    text = "They are " + ", ".join(str(1_234_567 + 1_111_111 * n) for n in range(13)) + "."
    response = await http.post(SPEECH, json=BODY | {"input": text})
    assert response.status_code == 200 and response.headers["x-hit-limit"] == "unknown"
    requests = [call.request for call in deployments.calls if call.request is not None]
    assert len(requests) > 3
    assert all(len(r.phonemes) < args.max_sentence_seconds * 14 for r in requests)


async def test_create_speech_stops_at_the_length_limit(
    http: httpx.AsyncClient, deployments: FakeDeployments
) -> None:
    """The sentence that reaches it is cut there, and later ones are not synthesized."""
    body = BODY | {"max_seconds": 100 / FRAME_RATE, "stream_format": "sse"}
    response = await http.post(SPEECH, json=body)
    done = json.loads(response.text.split("\n\n")[-2].removeprefix("data: "))
    assert done["hit_limit"] and done["usage"]["output_tokens"] == 100
    first, second = (call.request for call in deployments.calls if call.request is not None)
    n_first = deployments.frames_per_phoneme * len(first.phonemes)
    assert (first.max_frames, second.max_frames) == (100, 100 - n_first)
    assert (first.seed, second.seed) == (7, 8)


@pytest.mark.parametrize("chunked", [False, True])
async def test_create_speech_is_refused_when_the_first_call_finds_a_full_queue(
    http: httpx.AsyncClient, deployments: FakeDeployments, chunked: bool
) -> None:
    deployments.ar_slots = 0
    response = await http.post(SPEECH, json=BODY | {"chunked": chunked})
    assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded")
    assert deployments.count("nar_decode") == 0
    metrics = (await http.get("/metrics")).text
    assert f'valle_requests_total{{route="{SPEECH}",status="429"}} 1.0' in metrics
    assert "valle_audio_seconds_total 0.0" in metrics


@pytest.mark.parametrize("chunked", [False, True])
async def test_create_speech_waits_for_a_full_queue_after_the_first_chunk(
    api: ASGIApp,
    deployments: FakeDeployments,
    args: AppArgs,
    recording: Wave,
    chunked: bool,
) -> None:
    release = deployments.hold("nar_decode")
    request = StreamingRequest(api, SPEECH, BODY | {"chunked": chunked})
    await until(lambda: deployments.running["nar_decode"])
    deployments.ar_slots = 0  # other requests have taken all places
    release.set()
    data = await request.body()
    await until(lambda: deployments.n_queued)  # the second sentence
    deployments.ar_slots = 1
    expected = pcm(expected_wave(deployments, args, recording, chunked=chunked))
    while len(data) < len(expected):
        data += await request.body()
    assert data == expected
    await request.task


@pytest.mark.parametrize("method", ["encode", "generate_codes", "nar_decode", "decode"])
async def test_create_speech_cancels_its_calls_when_the_client_leaves_before_audio(
    api: ASGIApp, deployments: FakeDeployments, method: str
) -> None:
    deployments.hold(method)
    request = StreamingRequest(api, SPEECH, BODY)
    await until(lambda: deployments.running[method])
    request.task.cancel()  # as Serve does
    with pytest.raises(asyncio.CancelledError):
        await request.task
    await until(lambda: not +deployments.running)


@pytest.mark.parametrize("stream_format", ["audio", "sse"])
@pytest.mark.parametrize("chunked", [False, True])
async def test_create_speech_cancels_its_calls_when_the_client_leaves_a_stream(
    api: ASGIApp, deployments: FakeDeployments, chunked: bool, stream_format: str
) -> None:
    body = BODY | {"chunked": chunked, "stream_format": stream_format}
    request = StreamingRequest(api, SPEECH, body, buffer_size=2)
    assert await request.body()
    deployments.hold("nar_decode")
    request.disconnect()
    await request.task
    await until(lambda: not +deployments.running)
    n_calls = len(deployments.calls)
    await asyncio.sleep(0.01)
    assert len(deployments.calls) == n_calls, "it still works for a client that has left"


async def test_create_speech_prefetches_a_bounded_number_of_sentences(
    api: ASGIApp, deployments: FakeDeployments
) -> None:
    """Where the server does not buffer what it sends."""
    request = StreamingRequest(api, SPEECH, BODY | {"input": "And on it goes. " * 30}, 1)
    await until(lambda: deployments.count("decode") >= PREFETCH_CHUNKS)
    await asyncio.sleep(0.05)
    # waiting: one message, two chunks; in progress: what is being encoded, sent and synthesized
    assert deployments.count("decode") <= PREFETCH_CHUNKS + 4
    request.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request.task


async def test_create_speech_answers_500_when_the_first_sentence_fails(
    http: httpx.AsyncClient, deployments: FakeDeployments
) -> None:
    deployments.fail("decode", RuntimeError("a replica died"))
    response = await http.post(SPEECH, json=BODY)
    assert response.status_code == 500 and "a replica died" not in response.text
    assert response.json()["error"]["type"] == "server_error"


async def test_create_speech_breaks_a_stream_that_fails(
    api: ASGIApp, deployments: FakeDeployments
) -> None:
    """Without a last chunk, so that the server breaks the connection: a client must not take a part
    for the whole."""
    deployments.fail("decode", RuntimeError("a replica died"), after=1)
    request = StreamingRequest(api, SPEECH, BODY)
    messages = [await request.message()]
    with pytest.raises((RuntimeError, ExceptionGroup), match=r"died|unhandled errors"):
        while True:
            messages.append(await request.message())
    start, *parts = messages
    assert start["status"] == 200 and parts and all(part["more_body"] for part in parts)


async def test_create_speech_sends_an_error_event_when_a_stream_fails(
    http: httpx.AsyncClient, deployments: FakeDeployments
) -> None:
    deployments.fail("decode", RuntimeError("a replica died"), after=1)
    response = await http.post(SPEECH, json=BODY | {"stream_format": "sse"})
    last = json.loads(response.text.split("\n\n")[-2].removeprefix("data: "))
    assert last["type"] == "error" and last["error"]["message"] == "the server failed"


async def test_create_speech_encodes_a_recording_once(
    http: httpx.AsyncClient, deployments: FakeDeployments, recording: Wave
) -> None:
    by_voice = await http.post(SPEECH, json=BODY)
    inline = base64.b64encode(audio.wav_bytes(recording)).decode()
    by_content = await http.post(SPEECH, json=BODY | {"voice": "", "ref_audio": inline})
    assert by_content.status_code == 200 and by_content.content == by_voice.content
    assert deployments.count("encode") == 1


@pytest.mark.parametrize(
    ("status", "param", "fields"),
    [
        (400, "input", {"input": ""}),
        (400, "input", {"input": "..."}),
        (400, "input", {"input": "x" * 5000}),
        (400, "voice", {"voice": ""}),
        (400, "voice", {"voice": "../ann"}),
        (400, "volume", {"volume": 3}),
        (400, "response_format", {"response_format": "midi"}),
        (400, "speed", {"speed": 5}),
        (400, "ref_audio", {"ref_audio": "%%%"}),
        (400, "ref_audio", {"ref_audio": "bm90IGF1ZGlv"}),
        (400, "language", {"language": "xx"}),
        (400, "max_seconds", {"max_seconds": 0}),
        (404, "voice", {"voice": "bob"}),
    ],
)
async def test_create_speech_refuses_bad_fields_by_name(
    http: httpx.AsyncClient,
    deployments: FakeDeployments,
    status: int,
    param: str,
    fields: dict[str, Any],
) -> None:
    response = await http.post(SPEECH, json=BODY | fields)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert {call.method for call in deployments.calls} <= {"languages"}


async def test_health_ready_names_the_deployments_that_do_not_run(
    http: httpx.AsyncClient, deployments: FakeDeployments
) -> None:
    deployments.missing = ["NAR"]
    response = await http.get("/health/ready")
    assert response.status_code == 503
    assert response.json() == {"status": "waiting", "waiting_for": ["NAR"]}
    deployments.missing = []
    async with asyncio.timeout(10):
        while (await http.get("/health/ready")).status_code != 200:
            await asyncio.sleep(0.1)
