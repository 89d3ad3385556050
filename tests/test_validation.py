"""Requests with wrong values: a ValueError for that request alone; the engine continues."""

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from helpers.engines import build_engine, collect, generate_alone, request, short_ar
from helpers.tiny_models import tiny_nar
from hypothesis import given
from hypothesis import strategies as st

from valle.model.ar import AR
from valle.model.nar_decoding import NARDecoder, NARDecoding, NARRequest
from valle.model.sampling import Sampling
from valle.model.validation import validate_codes, validate_wave
from valle.serve.engine.engine import Engine
from valle.serve.engine.request import FinishReason, Request

pytestmark = pytest.mark.fuzz

ODD_NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from([10**5000, -(10**5000), 1e300, 1e-300, math.nan, math.inf, True, None]),
    st.sampled_from([np.int8(3), np.uint64(2**64 - 1), np.float16("nan"), np.float32(0.5)]),
)
ODD_VALUES = ODD_NUMBERS | st.sampled_from(["", "no number", b"x", [], {}, 1j, object])
IDS = st.integers(0, 40)
PHONEMES = st.lists(IDS, max_size=30) | st.lists(IDS | ODD_NUMBERS, max_size=9) | ODD_VALUES
DTYPES = st.sampled_from(
    ["<i2", ">i2", "u1", "i8", "u8", "f4", "f8", "?", "O", "c8", "U1", "M8[s]"]
)


@st.composite
def prompts(draw: st.DrawFn) -> Any:
    """Codes of a shape, a type and a layout that may be wrong, with entries that may be too."""
    shape = draw(
        st.sampled_from([(8, 0), (8, 1), (8, 9), (7, 9), (8,), (0, 0), (8, 3, 2), (8, 900)])
    )
    low, high = draw(st.sampled_from([(0, 120), (0, 1023), (-5, 9), (900, 1300)]))
    values = np.random.default_rng(draw(IDS)).integers(low, high + 1, shape)
    codes = values.astype(draw(DTYPES) if draw(st.booleans()) else np.int16)
    return draw(
        st.sampled_from(
            [codes, codes[..., ::-1], codes.T, codes.tolist(), np.ma.masked_array(codes)]
        )
    )


def odd_fields(schema: type) -> st.SearchStrategy[dict[str, Any]]:
    """Values for some of a dataclass's fields."""
    return st.dictionaries(
        st.sampled_from([x.name for x in fields(schema)]), ODD_VALUES, max_size=2
    )


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """A request whose fields have been set past its own checks."""
    item = request(draw(st.integers(0, 5)), max_frames=12)
    sampling = Sampling(guidance_scale=draw(st.sampled_from([1.0, 1.5])))
    for name, value in draw(odd_fields(Sampling)).items():
        object.__setattr__(sampling, name, value)
    changes: dict[str, Any] = {"id": "odd", "sampling": sampling}
    if draw(st.booleans()):
        changes["phonemes"] = draw(PHONEMES)
    if draw(st.booleans()):
        changes["prompt"] = draw(prompts())
    if draw(st.booleans()):
        changes |= draw(odd_fields(Request))
    for name, value in changes.items():
        object.__setattr__(item, name, value)
    return item


@pytest.fixture(scope="module")
def model() -> AR:
    return short_ar(2)


@pytest.fixture(scope="module")
def engine(model: AR) -> Engine:
    """One for all examples: none may leave anything behind."""
    return build_engine(model, slots=2)


@pytest.fixture(scope="module")
def expected(model: AR) -> list[int]:
    return generate_alone(model, request(1))[0]


@given(odd=requests())
def test_engine_survives_whatever_a_request_holds(
    engine: Engine, expected: list[int], odd: Request
) -> None:
    codes: dict[str, list[int]] = {}
    ends: dict[str, FinishReason] = {}
    engine.add(request(1))
    try:
        engine.add(odd)
    except ValueError as error:
        assert str(error).partition(":")[0] in {x.name for x in fields(Request) + fields(Sampling)}
    while not engine.idle:
        collect(engine.step(), codes, ends)
        engine.check_integrity()
    assert engine.n_running == 0
    assert codes.pop("r1") == expected, "the request beside it"
    assert all(0 <= code < 1024 for odd_codes in codes.values() for code in odd_codes)


@st.composite
def nar_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Values for some fields of a `NARRequest`, which may be anything."""
    names = draw(st.sets(st.sampled_from([x.name for x in fields(NARRequest)[:4]])))
    values: dict[str, Any] = {}
    for name in sorted(names):
        value = draw(PHONEMES if name == "phonemes" else prompts())
        if name == "first_codebook" and isinstance(value, np.ndarray) and draw(st.booleans()):
            value = value.reshape(-1)[:40]
        values[name] = value
    return values


@given(n_frames=st.integers(0, 9), odd=nar_fields())
def test_nar_model_survives_whatever_a_request_holds(n_frames: int, odd: dict[str, Any]) -> None:
    decoder = NARDecoder(tiny_nar())
    decoding = NARDecoding(sampling=Sampling(temperature=0.0), guided_levels=0)
    codes = np.zeros((8, n_frames), np.int16)
    item = NARRequest([5, 9], codes, codes[0], prefix=codes[:, :2])
    for name, value in odd.items():
        object.__setattr__(item, name, value)
    try:
        item.validate(decoder.config)
    except ValueError as error:
        assert str(error).partition(":")[0] in {x.name for x in fields(NARRequest)}
        return
    [decoded] = decoder.decode([item], decoding)
    assert decoded.shape == (8, len(item.first_codebook)) and decoded.min(initial=0) >= 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", "no number"), ("seed", -1), ("seed", 2**63), ("seed", 1.0), ("seed", True),
        ("max_frames", 0), ("max_frames", None), ("max_frames", math.nan), ("id", ""), ("id", 5),
        ("phonemes", []), ("phonemes", [5.0]), ("phonemes", [-1]), ("phonemes", [True]),
        ("phonemes", np.array([5])), ("prompt", None), ("prompt", np.zeros((8, 3), np.float32)),
        ("prompt", np.full((8, 3), 1024, np.int16)), ("prompt", np.zeros(8, np.int16)),
        ("sampling", None),
    ],
)  # fmt: skip
def test_request_refuses_a_bad_value_by_the_name_of_its_field(field: str, value: Any) -> None:
    values = {x.name: getattr(request(1), x.name) for x in fields(Request)}
    with pytest.raises(ValueError, match=f"^{field}: "):
        Request(**(values | {field: value}))


@pytest.mark.parametrize("name", [x.name for x in fields(Sampling)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 2**70, "1", None, True, 1j])
def test_sampling_refuses_a_bad_value_by_the_name_of_its_field(name: str, value: Any) -> None:
    sampling = Sampling()
    object.__setattr__(sampling, name, value)  # past the checks of types that tests switch on
    with pytest.raises(ValueError, match=f"^{name}: "):
        sampling.validate()


@pytest.mark.parametrize(
    "codes", [np.zeros((8, 2), np.float32), np.full((8, 2), -1), [[1]], np.zeros((7, 2), np.int16)]
)
def test_codes_that_no_codec_makes_are_refused(codes: Any) -> None:
    with pytest.raises(ValueError, match="^codes: "):
        validate_codes("codes", codes, 8)


@pytest.mark.parametrize("wave", [[0.1], np.zeros((2, 2)), np.zeros(3, int), np.array([math.nan])])
def test_waves_that_are_no_sound_are_refused(wave: Any) -> None:
    with pytest.raises(ValueError, match="^recording: "):
        validate_wave("recording", wave)
