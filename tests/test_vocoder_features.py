"""Vocoder features: libopus' own values of a fixture, batches, time, and odd recordings."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soxr
import torch
from safetensors.numpy import load_file
from torch import Tensor

from valle.model.vocoder import features, lpc, pitch
from valle.model.vocoder.features import PITCH, VOICING, FeatureExtractor
from valle.model.vocoder.pitch import PitchNet

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "release/nano2/vocoder"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Frame by frame, threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return FeatureExtractor.load(WEIGHTS)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    """Samples in [-1, 1] and the features `fargan_demo` of libopus 1.6.1 computes of them.

    Made once by `./configure --enable-dred --enable-osce CFLAGS='-O3 -march=native -ffast-math'`,
    `make fargan_demo`, `./fargan_demo -features samples.pcm features.f32` on an AMD EPYC Zen 5;
    "exact" with CFLAGS='-O3 -march=native -DHIGH_ACCURACY'. The speaker is Piper's joe (CC0).
    """
    arrays = load_file(ROOT / "tests/golden/vocoder_features.safetensors")
    return {
        name: torch.from_numpy(array.astype(np.float32) / (32768 if "samples" in name else 1))
        for name, array in arrays.items()
    }


def _pitch_error(a: Tensor, b: Tensor) -> Tensor:
    """Relative difference of the frames' periods."""
    return (2 ** (a[..., PITCH] - b[..., PITCH]) - 1).abs()


def _assert_alike(a: Tensor, b: Tensor) -> None:
    """Equal but for the rounding of sums."""
    torch.testing.assert_close(a, b, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["speech", "loud", "tone"])
def test_features_are_libopus(
    extractor: FeatureExtractor, golden: dict[str, Tensor], name: str
) -> None:
    """Silence, speech, silence; clipped noise; a loud tone of 100 Hz, far above which is nothing.

    "exact" is libopus compiled with HIGH_ACCURACY, its switch for an exact tanh; else it
    approximates it to 3e-4, which decides where two pitches are about as likely.
    """
    answer = extractor(golden[f"{name}.samples"][None])[0]
    usual, exact = golden[f"{name}.features"], golden[f"{name}.exact"]
    assert answer.shape == usual.shape == exact.shape
    for expected in (usual, exact):
        torch.testing.assert_close(answer[:, :PITCH], expected[:, :PITCH], atol=1e-4, rtol=0)

    wrong = (_pitch_error(answer, exact) > 5e-4) | ((answer - exact)[:, VOICING].abs() > 5e-3)
    assert wrong.sum() <= 2  # frames

    voiced = usual[:, VOICING] > 0
    assert (_pitch_error(answer, usual)[voiced] > 0.01).sum() <= 2
    voicing_error = (answer - usual)[:, VOICING].abs()
    assert (voicing_error > 0.02).sum() <= 7
    same = pitch.periods(answer[None, :, PITCH])[0] == pitch.periods(usual[None, :, PITCH])[0]
    assert (~same).sum() <= 12 and (voicing_error[same] < 1e-3).all()


def test_a_batch_changes_nothing(extractor: FeatureExtractor, golden: dict[str, Tensor]) -> None:
    speech = golden["speech.samples"]
    parts = [speech, speech[9_000:20_123], speech[12_000:12_200]]
    batch = torch.full((3, len(speech)), 0.9)  # padding as loud as can be
    for row, part in enumerate(parts):
        batch[row, : len(part)] = part
    together = extractor(batch)
    for row, part in enumerate(parts):
        alone = extractor(part[None])[0]
        assert len(alone) == len(part) // 160
        _assert_alike(together[row, : len(alone)], alone)


@pytest.mark.parametrize("block_frames", [3, 11, 70])
def test_blocks_change_nothing(
    extractor: FeatureExtractor, golden: dict[str, Tensor], block_frames: int
) -> None:
    wave = golden["speech.samples"][None, 9_000:21_000]
    expected = extractor(wave, block_frames=10_000)
    _assert_alike(extractor(wave, block_frames=block_frames), expected)


def test_a_frame_sees_80_samples_after_those_it_describes(
    extractor: FeatureExtractor, golden: dict[str, Tensor]
) -> None:
    wave = golden["speech.samples"][None, 9_000:17_000]
    before = extractor(wave)
    for frame in (10, 30):
        last = (frame + 1) * 160 - 80  # the middle of what only the window's end sees
        later, sooner = wave.clone(), wave.clone()
        later[:, (frame + 1) * 160 :] = 0.5
        sooner[:, last:] = 0.5
        assert torch.equal(extractor(later)[:, : frame + 1], before[:, : frame + 1])
        after = extractor(sooner)
        assert torch.equal(after[:, :frame], before[:, :frame])
        assert not torch.allclose(after[:, frame], before[:, frame], atol=0.1)


@pytest.mark.parametrize("hertz", [90.0, 133.0, 200.0, 310.0])
def test_pitch_of_a_buzz(extractor: FeatureExtractor, hertz: float) -> None:
    time = np.arange(16_000) / 16_000
    harmonics = np.arange(1, int(4_000 / hertz))[:, None]
    buzz = (np.cos(2 * np.pi * hertz * harmonics * time) / harmonics).sum(0)
    wave = torch.from_numpy(0.1 * buzz).float()[None]
    answer = extractor(wave)[0, 20:]
    measured = 16_000 * 2 ** (answer[:, PITCH] + 1.5) / 256
    assert (measured.median() - hertz).abs() < 0.01 * hertz
    assert answer[:, VOICING].median() > 0.4


def test_noise_is_unvoiced(extractor: FeatureExtractor) -> None:
    noise = torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0)) * 0.1
    assert extractor(noise)[0, 20:, VOICING].median() < -0.1


def test_level_is_in_the_first_cepstrum(
    extractor: FeatureExtractor, golden: dict[str, Tensor]
) -> None:
    """Ten times the samples: every band's logarithm grows by 2, the first cepstrum by sqrt(18) so.

    Where the noise of 16 bits is far below.
    """
    wave = golden["speech.samples"][None, 9_000:17_000] / 10
    wave = wave + 0.01 * torch.randn(wave.shape, generator=torch.Generator().manual_seed(1))
    growth = (extractor(10 * wave) - extractor(wave))[0, 1:, :PITCH]
    torch.testing.assert_close(growth[:, 0], torch.full_like(growth[:, 0], 2 * 18**0.5), atol=0.02,
                               rtol=0)  # fmt: skip
    assert growth[:, 1:].abs().max() < 0.05


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-6, 1.0, 1e4])
@pytest.mark.parametrize("n_samples", [160, 319, 4_000])
def test_any_level_and_length_is_finite(
    extractor: FeatureExtractor, scale: float, n_samples: int
) -> None:
    noise = torch.randn(2, n_samples, generator=torch.Generator().manual_seed(0)) * scale
    answer = extractor(noise)
    assert answer.shape == (2, n_samples // 160, 20) and torch.isfinite(answer).all()
    assert (answer[..., PITCH].abs() <= 1.5).all()
    assert (answer[..., VOICING].abs() <= 0.5 + 1e-6).all()


def test_silence_has_the_floor_of_every_band(extractor: FeatureExtractor) -> None:
    cepstra = extractor(torch.zeros(1, 1_600))[0, :, :PITCH]
    floor = torch.zeros(PITCH)
    floor[0] = -2 * 18**0.5 - 4  # log10(0.01) in each band
    torch.testing.assert_close(cepstra, floor.expand_as(cepstra), atol=1e-5, rtol=0)


@pytest.mark.parametrize("wave", [torch.zeros(1, 0), torch.zeros(1, 159), torch.zeros(0, 1_600)])
def test_nothing_is_refused(extractor: FeatureExtractor, wave: Tensor) -> None:
    with pytest.raises(ValueError, match="need at least 160"):
        extractor(wave)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_that_are_no_numbers_are_refused(extractor: FeatureExtractor, value: float) -> None:
    wave = torch.zeros(2, 1_600)
    wave[1, 700] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        extractor(wave)


def test_recordings_of_any_rate_and_length(
    extractor: FeatureExtractor, golden: dict[str, Tensor]
) -> None:
    speech = golden["speech.samples"].numpy()
    at_24_khz = soxr.resample(speech, 16_000, 24_000).astype(np.float32)
    waves = [at_24_khz, at_24_khz[9_000:9_301], at_24_khz[12_000:30_000]]
    answers = extractor.extract(waves, 24_000)
    assert [a.shape for a in answers] == [(240, 20), (2, 20), (75, 20)]
    expected = golden["speech.features"]
    answer = torch.from_numpy(answers[0])[: len(expected)]
    loud = expected[:, 0] > -3
    # resampling twice takes the last 5 % below 8 kHz away: the uppermost band
    assert (answer - expected)[loud, :PITCH].abs().median() < 0.05
    voiced = expected[:, VOICING] > 0
    assert (_pitch_error(answer, expected)[voiced] < 0.01).float().mean() > 0.95
    (alone,) = extractor.extract(waves[2:], 24_000)
    _assert_alike(torch.from_numpy(answers[2]), torch.from_numpy(alone))


def test_an_empty_recording_is_refused_by_its_place(extractor: FeatureExtractor) -> None:
    waves = [np.ones(100, np.float32), np.ones(0, np.float32)]
    with pytest.raises(ValueError, match=r"waves\[1\]: no samples"):
        extractor.extract(waves, 24_000)
    assert extractor.extract([], 24_000) == []


def test_predictors_solve_the_normal_equations() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(5, 4_000))
    noise[:, 1:] += 0.5 * noise[:, :-1]
    lags = np.stack([[row[: 4_000 - k] @ row[k:] for k in range(17)] for row in noise])
    answer = lpc.lpc_coefficients(torch.from_numpy(lags)[None])[0].numpy()
    for row, weights in zip(lags, answer, strict=True):
        matrix = row[np.abs(np.subtract.outer(np.arange(16), np.arange(16)))]
        np.testing.assert_allclose(weights, np.linalg.solve(matrix, -row[1:]), rtol=1e-3, atol=1e-3)


def test_a_predictor_stops_at_30_db() -> None:
    """A sine is explained by two samples; its power is far above the floor, so nothing follows."""
    lags = 1e9 * torch.cos(0.3 * torch.arange(17, dtype=torch.float64))
    (weights,) = lpc.lpc_coefficients(lags[None, None])[0]
    assert (weights[:2].abs() > 0.5).all() and not weights[2:].any()


def test_the_low_pass_is_the_recursive_filter() -> None:
    x = torch.randn(2, 1_600, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros_like(x)
    for n in range(x.shape[1]):
        past = [(x[:, n - k], expected[:, n - k]) if n >= k else (0, 0) for k in (1, 2)]
        (x1, y1), (x2, y2) = past
        expected[:, n] = x[:, n] - 0.84946 * x1 + x2 + 1.54220 * y1 - 0.70781 * y2
    torch.testing.assert_close(lpc.low_pass(x), expected, atol=1e-8, rtol=0)


def test_correlations_are_inner_products() -> None:
    frames = 100 * torch.randn(1, 3, 416, generator=torch.Generator().manual_seed(0))
    answer = pitch.correlations(frames)[0].double()
    for frame, row in zip(frames[0].double(), answer, strict=True):
        now = frame[256:]
        for place in (0, 1, 100, 223):  # periods 256, 255, 156, 33
            past = frame[place : place + 160]
            expected = 2 * (now @ past) / (1 + now @ now + past @ past)
            assert abs(row[place] - expected) < 1e-5


def test_weights_that_are_not_the_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights of the pitch network"):
        FeatureExtractor.load(tmp_path)
    (tmp_path / features.WEIGHTS).write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="does not hold the pitch network"):
        PitchNet.load(tmp_path / features.WEIGHTS)
    (tmp_path / features.WEIGHTS).write_bytes(
        (ROOT / "tests/golden/vocoder_features.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match="does not hold the pitch network"):
        FeatureExtractor.load(tmp_path)
