"""JSON bodies of requests: hostile ones, wrong ones, and those that hypothesis generates."""

import asyncio
import json

import httpx
import pytest
from helpers.asgi import JSON, SPEECH, asgi_client
from helpers.deployments import FakeDeployments
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from valle.serve.app_args import AppArgs
from valle.serve.web.api import create_api
from valle.serve.web.json_body import MAX_JSON_VALUES, JsonError, parse_json_object
from valle.serve.web.schema import SpeechRequest

HOSTILE = {
    "keys": "{" + ",".join(f'"k{i}":1' for i in range(300_000)) + "}",
    "same key": "{" + ",".join(['"k":1'] * 300_000) + "}",
    "numbers": '{"input":[' + ",".join("1" * 1_500_000) + "]}",
    "strings": '{"input":[' + ",".join(['""'] * 900_000) + "]}",
    "objects": '{"input":[' + ",".join(["{}"] * 900_000) + "]}",
    "nested lists": '{"input":' + "[" * 1_900_000 + "]" * 1_900_000 + "}",
    "nested objects": '{"a":' * 600_000 + "1" + "}" * 600_000,
    "long key": '{"' + "k" * 3_900_000 + '":1}',
    "long wrong value": '{"response_format":"' + "k" * 3_900_000 + '"}',
    "large integer": '{"seed":' + "9" * 3_900_000 + "}",
    "large exponent": '{"speed":1e' + "9" * 3_900_000 + "}",
    "spaces": "{" + " " * 3_900_000 + '"voise":1}',
    "escapes": '{"input":"' + "\\n" * 1_900_000 + '"}',
    "unfinished string": '{"input":"' + "x" * 3_900_000,
    "quotes": '"' * 3_900_000,
    "colons": "{" + ":" * 3_900_000,
}


@pytest.mark.anyio
@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_body_is_refused_without_being_built(
    http: httpx.AsyncClient, name: str
) -> None:
    """Few objects are made of it, and little of it is echoed."""
    data = HOSTILE[name].encode()
    response = await http.post(SPEECH, content=data, headers=JSON)
    assert response.status_code == 400 and len(response.content) < 2000
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", ["keys", "strings", "nested lists", "objects"])
def test_parse_json_object_makes_no_values_of_a_hostile_body(name: str) -> None:
    import tracemalloc

    data = HOSTILE[name].encode()
    tracemalloc.start()
    try:
        with pytest.raises(JsonError, match="more than"):
            parse_json_object(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(data)  # the decoded text, and pieces of it


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[]", "must be a JSON object, not a list"),
        (b'"x"', "not a string"),
        (b"null", "not null"),
        (b"7", "not a number"),
        (b"", "the body is empty"),
        (b"{", "the body is not JSON"),
        (b'{"input":"a","input":"b"}', "input: given twice"),
        (b'{"speed":NaN}', "NaN is no number"),
        (b'{"max_seconds":-Infinity}', "-Infinity is no number"),
        (b'{"max_seconds":1e999,"input":"a"}', "max_seconds: Input should be a finite number"),
        (b'{"input":"\xff"}', "not text in UTF-8"),
        (b'{"voise":"ann"}', "voise: no such field; did you mean voice?"),
        (b'{"volume_multiplier":2}', "volume_multiplier: no such field; known: model, input"),
        (b'{"input":"a","voice":{"name":"x"}}', 'voice: an object must be {"id": NAME}'),
        (b'{"input":"a","voice":{"id":7}}', "voice: Input should be a valid string"),
        (b'{"input":{"a":1},"voice":"ann"}', "input: Input should be a valid string"),
        (b'{"input":"\\ud800","voice":"ann"}', "input"),
        (b'{"\\ud800":1}', "no such field"),
    ],
)
async def test_a_wrong_body_is_named(http: httpx.AsyncClient, body: bytes, message: str) -> None:
    response = await http.post(SPEECH, content=body, headers=JSON)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5)
    ),
    max_leaves=30,
)
field_names = st.sampled_from([*SpeechRequest.model_fields, "Input", "voise", ""])
plausible = st.fixed_dictionaries(
    {"input": st.text(max_size=40), "voice": st.just("ann")},
    optional={
        "response_format": st.sampled_from(["pcm", "wav", "mp3", "midi"]),
        "speed": st.floats() | st.integers(),
        "seed": st.integers(),
        "temperature": st.floats(),
        "top_p": st.floats(),
        "max_seconds": st.floats() | st.integers(),
        "chunked": st.booleans(),
        "stream_format": st.sampled_from(["audio", "sse"]),
        "language": st.sampled_from(["en-us", "de", "xx", ""]),
        "ref_audio": st.text(max_size=20),
    },
)
bodies = (
    plausible.map(json.dumps).map(str.encode)
    | st.dictionaries(field_names, json_values, max_size=12).map(json.dumps).map(str.encode)
    | json_values.map(json.dumps).map(str.encode)
    | st.binary(max_size=200)
    | st.text(alphabet='{}[]":,\\ueE+-.0123456789 \tNaInfity', max_size=200).map(str.encode)
)


@pytest.mark.fuzz
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=bodies)
def test_no_body_makes_the_server_fail(args: AppArgs, body: bytes) -> None:
    """Whatever JSON, or no JSON, is sent: an answer in bounded time, and never a 500."""

    async def post() -> httpx.Response:
        async with asgi_client(create_api(args, FakeDeployments())) as http, asyncio.timeout(20):
            return await http.post(SPEECH, content=body, headers=JSON)

    response = asyncio.run(post())
    assert response.status_code in (200, 400, 404, 413, 429), (body, response.text)
    assert len(response.content) < 3000 or response.status_code == 200


@pytest.mark.fuzz
@given(value=json_values)
def test_parse_json_object_equals_json_loads(value: object) -> None:
    """The bounded parser accepts what is small, and reads it as Python's own does."""
    data = json.dumps(value).encode()
    try:
        parsed = parse_json_object(data)
    except JsonError:
        text = data.decode()
        many = sum(map(text.count, ',[{"')) > MAX_JSON_VALUES / 2
        assert many or not isinstance(value, dict) or "NaN" in text or "Infinity" in text
    else:
        assert parsed == json.loads(data)
