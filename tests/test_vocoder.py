"""The vocoder: equal to libopus' programs, streamed = whole, batched = single, fast = slow."""

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor, nn

from valle.model.vocoder import bandwidth, fargan
from valle.model.vocoder.bandwidth import BandwidthExtension
from valle.model.vocoder.bandwidth_layers import (
    AdaptiveFilter,
    Resampler,
    doubling_taps,
    halving_taps,
)
from valle.model.vocoder.fargan import Fargan, SubframeState
from valle.model.vocoder.gru import run_gru
from valle.model.vocoder.one_thread import one_thread
from valle.model.vocoder.vocoder import HOP, Vocoder, VocoderState
from valle.model.vocoder.weights import load_weights

GOLDEN = Path(__file__).parent / "golden" / "vocoder_expected.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    """Output of libopus' programs for a sentence of the voice joe; see the weights' README."""
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def vocoder() -> Vocoder:
    return Vocoder.load()


def speech_features(golden: dict[str, Tensor], n_frames: int) -> Tensor:
    """Features `[3, n_frames, 20]` of three different stretches of speech."""
    features = golden["features"]
    return torch.stack([features[start : start + n_frames] for start in (0, 20, 50)])


def test_fargan_equals_libopus(golden: dict[str, Tensor], vocoder: Vocoder) -> None:
    features, expected = golden["features"][None], golden["speech"]
    state = vocoder.fargan.start(features[:, 0])
    wave, _ = vocoder.fargan.decode(features[:, 1:], state)
    assert expected.abs().max() > 0.3
    torch.testing.assert_close(wave[0], expected, atol=2e-5, rtol=0)


def test_bandwidth_extension_equals_libopus(golden: dict[str, Tensor], vocoder: Vocoder) -> None:
    narrow = golden["narrow"][None].float() / 2**15
    model = vocoder.bandwidth
    features, _ = model.network.features(narrow, model.start(1).network)
    torch.testing.assert_close(
        features[0, : len(golden["narrow_features"])], golden["narrow_features"], atol=2e-3, rtol=0
    )
    wave, _ = model.decode(narrow, model.start(1))
    # libopus' output is at 48 kHz: decimate it by the same filter, written differently
    taps = halving_taps(63)[0, :-1].double().numpy()
    wide = golden["wide"].double().numpy() / 2**15
    expected = np.convolve(wide, taps[::-1])[: len(wide) : 2]
    assert np.abs(expected).max() > 0.3
    np.testing.assert_allclose(wave[0].numpy(), expected, atol=1e-4)


def test_forward_is_aligned_with_the_recording(golden: dict[str, Tensor], vocoder: Vocoder) -> None:
    """Envelopes of the recording and of the synthesized wave correlate best near lag zero."""
    features = golden["features"][None, :100]
    narrow = golden["narrow"].float() / 2**15
    for wave, recording in (
        (vocoder.fargan(features)[0], narrow),
        (vocoder.bandwidth(narrow[None])[0, ::3], narrow[::2]),
    ):
        lags = range(-60, 61)
        loudness = [envelope(signal)[100:-100] for signal in (wave, recording)]
        correlation = [float(loudness[0] @ loudness[1].roll(lag)) for lag in lags]
        assert abs(lags[int(np.argmax(correlation))]) <= 16


def envelope(signal: Tensor) -> Tensor:
    """Magnitude, smoothed over 64 samples."""
    return nn.functional.avg_pool1d(signal.abs()[None], 65, 1, 32)[0]


def test_bandwidth_extension_keeps_the_lower_band(
    golden: dict[str, Tensor], vocoder: Vocoder
) -> None:
    narrow = golden["narrow"].float()[None] / 2**15
    wide = vocoder.bandwidth(narrow)[0]
    # both below 4 kHz, at a rate of 8 kHz: inverse transforms of the lower parts of the spectra
    length = narrow.shape[1] // 2
    lower = [
        torch.fft.irfft(torch.fft.rfft(signal)[: length // 2 + 1], length)
        for signal in (narrow[0], wide)
    ]
    spectra = [torch.fft.rfft(signal) for signal in lower]
    correlation = torch.fft.irfft(spectra[0] * spectra[1].conj(), length)
    assert int(correlation.argmax()) == 0
    cosine = nn.functional.cosine_similarity(lower[0], lower[1], dim=0)
    assert float(cosine) > 0.98
    upper = torch.fft.rfft(wide).abs().square()
    assert float(upper[narrow.shape[1] // 2 :].sum() / upper.sum()) > 1e-6


@pytest.mark.parametrize("chunks", [[1, 1, 17, 1, 20], [2, 38], [40]])
def test_decode_in_chunks_equals_forward(
    chunks: list[int], golden: dict[str, Tensor], vocoder: Vocoder
) -> None:
    features = speech_features(golden, sum(chunks))
    expected = vocoder(features)
    assert expected.shape == (3, sum(chunks) * HOP) and expected.std() > 0.01
    state: VocoderState | None = None
    waves, end = [], 0
    for n_frames in chunks:
        start, end = end, end + n_frames
        last = end == features.shape[1]
        wave, state = vocoder.decode(features[:, start:end], state, last=last)
        # the state can be sent to another process
        pickled = pickle.dumps(state)
        assert len(pickled) < 3 * 40_000
        state = pickle.loads(pickled)
        waves.append(wave)
    assert waves[0].shape[1] == max(0, chunks[0] * HOP - 382) or len(chunks) == 1
    torch.testing.assert_close(torch.cat(waves, dim=1), expected, atol=1e-4, rtol=0)


def test_forward_batched_equals_single(golden: dict[str, Tensor], vocoder: Vocoder) -> None:
    features = speech_features(golden, 25)
    batched = vocoder(features)
    for row in range(3):
        torch.testing.assert_close(
            vocoder(features[row : row + 1])[0], batched[row], atol=1e-4, rtol=0
        )
    assert torch.equal(vocoder(features), batched)


def test_decode_runs_in_blocks_of_bounded_length(
    golden: dict[str, Tensor], vocoder: Vocoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The length of the blocks changes no sample."""
    features = speech_features(golden, 25)
    expected = vocoder(features)
    lengths: list[int] = []
    run = vocoder.fargan._recurrence
    assert run is not None
    monkeypatch.setattr(fargan, "_BLOCK", 7)
    monkeypatch.setattr(bandwidth, "_BLOCK", 9)
    original = Fargan._subframes

    def counted(model: Fargan, block: Tensor, state: fargan.FarganState) -> object:
        lengths.append(block.shape[1])
        return original(model, block, state)

    monkeypatch.setattr(Fargan, "_subframes", counted)
    torch.testing.assert_close(vocoder(features), expected, atol=1e-4, rtol=0)
    assert max(lengths) == 7


def test_recurrence_equals_run_plain(golden: dict[str, Tensor], vocoder: Vocoder) -> None:
    features = speech_features(golden, 12)
    model = vocoder.fargan
    state = model.start(features[:, 0])
    with torch.inference_mode():
        subframes, state = model._subframes(features[:, 1:], state)
        initial = SubframeState(state.excitation, state.samples, state.hidden)
        fast, fast_state = model._run(subframes, state)
        slow, slow_state = model.run_plain(subframes, initial)
    assert slow.abs().max() > 0.05
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0)
    for fast_hidden, slow_hidden in zip(fast_state.hidden, slow_state.hidden, strict=True):
        torch.testing.assert_close(fast_hidden, slow_hidden, atol=1e-4, rtol=0)
    torch.testing.assert_close(fast_state.samples, slow_state.samples, atol=1e-5, rtol=0)


def test_fargan_with_new_weights_uses_them(golden: dict[str, Tensor]) -> None:
    features = golden["features"][None, :4]
    model = Fargan.load()
    before = model(features)
    weights = model.state_dict()
    weights["exit.weight"] = torch.zeros_like(weights["exit.weight"])
    model.load_state_dict(weights)
    assert not torch.equal(model(features), before)
    model.load_state_dict(load_weights("fargan"))
    assert torch.equal(model(features), before)


def test_run_gru_equals_torch(vocoder: Vocoder) -> None:
    torch.manual_seed(0)
    module = vocoder.bandwidth.network.gru
    x, hidden = torch.randn(3, 50, 128), torch.randn(1, 3, 128)
    with torch.inference_mode():
        for fast, slow in zip(run_gru(module, x, hidden), module(x, hidden), strict=True):
            torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0)


def test_adaptive_filter_equals_the_plain_sum() -> None:
    torch.manual_seed(0)
    layer = AdaptiveFilter(2, 3, n_taps=5, length=16)
    signal, latents = torch.randn(2, 2, 48), torch.randn(2, 3, 128)
    with torch.inference_mode():
        filtered, _ = layer(signal, latents, layer.start(2))
        kernels = layer._kernels(latents)
    padded = nn.functional.pad(signal, (4, 0))
    for sample in range(48):
        subframe, position = divmod(sample, 16)
        kernel = kernels[:, subframe]
        if position < 8:
            fade = 0.5 + 0.5 * math.cos(math.pi * (position + 0.5) / 8)
            past = kernels[:, subframe - 1] if subframe else torch.zeros_like(kernel)
            kernel = fade * past + (1 - fade) * kernel
        expected = (kernel * padded[:, None, :, sample : sample + 5]).sum((2, 3))
        torch.testing.assert_close(filtered[:, :, sample], expected, atol=1e-5, rtol=1e-5)


def test_doubling_taps_equal_the_recursive_filter() -> None:
    signal = np.random.default_rng(0).standard_normal(400)
    sections = (
        (0.026641845703125, 0.228668212890625, 1 - 0.4036407470703125),
        (0.104583740234375, 0.3932037353515625, 1 - 0.152496337890625),
    )
    expected = np.empty(800)
    for phase, coefficients in enumerate(sections):
        values = signal.copy()
        for a in coefficients:
            past_in = past_out = 0.0
            for index, value in enumerate(values):
                past_out = a * (value - past_out) + past_in
                past_in = value
                values[index] = past_out
        expected[phase::2] = values
    resampler = Resampler(doubling_taps(), down=1, blocks=40)
    doubled, _ = resampler(torch.from_numpy(signal).float()[None], resampler.start(1))
    np.testing.assert_allclose(doubled[0].numpy(), expected, atol=1e-5)


def test_de_emphasis_equals_the_recursive_filter(vocoder: Vocoder) -> None:
    torch.manual_seed(0)
    samples, last = torch.randn(2, 480), torch.randn(2)
    wave, after = vocoder.fargan._de_emphasis(samples, last)
    expected = last.clone()
    for index in range(480):
        expected = samples[:, index] + 0.85 * expected
        torch.testing.assert_close(wave[:, index], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)


def test_one_thread_lasts_until_the_last_user_leaves() -> None:
    def threads() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    with threadpool_limits(2, user_api="blas"):
        first, second = one_thread(), one_thread()
        with first:
            assert threads() == {1}
            second.__enter__()
        assert threads() == {1}
        second.__exit__(None, None, None)
        assert threads() == {2}


def test_vocoder_with_extreme_features_stays_finite(vocoder: Vocoder) -> None:
    """A quantiser's decoder may output a pitch that no recording has."""
    torch.manual_seed(0)
    features = 3 * torch.randn(2, 40, 20)
    features[:, :, 18] = torch.linspace(-9, 9, 40)
    assert vocoder(features).isfinite().all()


@pytest.mark.parametrize("shape", [(3, 20), (1, 3, 19), (1, 0, 20)])
def test_vocoder_refuses_features_of_another_shape(
    shape: tuple[int, ...], vocoder: Vocoder
) -> None:
    with pytest.raises(ValueError, match="features: "):
        vocoder(torch.zeros(shape))
    with pytest.raises(ValueError, match="features: "):
        vocoder.fargan(torch.zeros(shape))


def test_decode_refuses_waves_and_states_that_do_not_fit(vocoder: Vocoder) -> None:
    model: BandwidthExtension = vocoder.bandwidth
    with pytest.raises(ValueError, match="even N"):
        model(torch.zeros(1, 161))
    with pytest.raises(ValueError, match="N in 160s"):
        model.decode(torch.zeros(1, 200), model.start(1))
    with pytest.raises(ValueError, match="2 rows, but the state has 1"):
        model.decode(torch.zeros(2, 160), model.start(1))
    state = vocoder.fargan.start(torch.zeros(1, 20))
    with pytest.raises(ValueError, match="2 rows, but the state has 1"):
        vocoder.fargan.decode(torch.zeros(2, 1, 20), state)


def test_load_weights_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_weights("fargan", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no network named larynx"):
        load_weights("larynx")
