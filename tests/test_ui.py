"""The web page in Chromium, against an endpoint: speech, stop, voices, errors."""

import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
from playwright.sync_api import ConsoleMessage, Page, expect, sync_playwright

from valle.jobs.speakers import Joe
from valle.platform.audio import wav_bytes

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium (apt-get install chromium)"),
]


@pytest.fixture
def page(endpoint: str, tmp_path: Path) -> Iterator[Page]:
    """The loaded page, with a recording of joe as its microphone. Errors on the page's console fail
    the test."""
    text = "The early train was late again, so we walked along the river and talked until dark."
    (tmp_path / "microphone.wav").write_bytes(wav_bytes(Joe().synthesize(text, "joe", "en-us")))
    with sync_playwright() as playwright:
        arguments = [
            "--no-sandbox",
            "--autoplay-policy=no-user-gesture-required",
            "--use-fake-ui-for-media-stream",
            "--use-fake-device-for-media-stream",
            f"--use-file-for-fake-audio-capture={tmp_path / 'microphone.wav'}",
        ]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(_console_error(message)))
        page.on("requestfailed", lambda request: errors.append(f"{request.url} failed"))
        page.goto(endpoint)
        page.wait_for_selector("body[data-ready]")
        yield page
        browser.close()
        assert [line for line in errors if line and "v1/audio/speech failed" not in line] == []


def _console_error(message: ConsoleMessage) -> str:
    """An error or a warning on the console; empty for the browser's own line about an answer of
    400, which the page shows as an alert."""
    refused = "the server responded with a status of 400" in message.text
    if message.type not in ("error", "warning") or refused:
        return ""
    return f"{message.type}: {message.text} ({message.location})"


@pytest.mark.parametrize("eos_bias", [-1e9], ids=["never stops"])
def test_page_speaks_stops_and_shows_errors(page: Page, endpoint: str, tmp_path: Path) -> None:
    expect(page.get_by_label("Voice", exact=True)).to_have_value("ann")
    page.get_by_label("Text").fill("Hello there. Good bye.")
    with page.expect_response("**/v1/audio/speech") as answer:
        page.get_by_role("button", name="Speak").click()
    link = page.get_by_role("link", name="Download wav")
    link.wait_for()
    with page.expect_download() as loaded:
        link.click()
    samples, rate = soundfile.read(loaded.value.path(), dtype="int16")
    body = {
        "input": "Hello there. Good bye.",
        "voice": "ann",
        "response_format": "wav",
        "chunked": True,
        "seed": int(answer.value.headers["x-seed"]),
    }
    same = httpx.post(f"{endpoint}/v1/audio/speech", json=body, timeout=60)
    wave, _ = soundfile.read(io.BytesIO(same.content), dtype="int16")
    assert rate == 24_000 and np.abs(samples.astype(int) - wave).max() <= 1
    expect(page.locator("#duration")).to_have_text(f"{len(wave) / 24_000:.2f} s")
    expect(page.locator("#model")).to_have_text(re.compile(r"valle/1#[0-9a-f]{8}"))
    pixel_values = page.evaluate(
        "() => new Set(document.querySelector('canvas').getContext('2d')"
        ".getImageData(0, 0, 1200, 320).data).size"
    )
    assert pixel_values > 20  # a plot, not a single colour

    page.get_by_label("Text").fill("And on and on it goes. " * 150)
    page.get_by_role("button", name="Speak").click()
    expect(page.locator("#duration")).to_contain_text(" s")
    page.get_by_role("button", name="Stop", exact=True).click()
    # the button reads "Speaking ..." until then; without the stop, this text takes many seconds
    speak = page.get_by_role("button", name="Speak", exact=True)
    expect(speak).to_be_visible(timeout=2000)
    seconds = float(page.locator("#duration").inner_text().removesuffix(" s"))
    assert 0 < seconds < 60  # of 150 and more
    expect(page.get_by_role("alert")).to_be_hidden()  # a stop is not an error

    page.get_by_label("Text").fill("...")
    page.get_by_role("button", name="Speak").click()
    expect(page.get_by_role("alert")).to_contain_text("text: nothing to say in it")

    form = page.get_by_role("form", name="Add a voice")
    noise = np.random.default_rng(0).normal(0, 0.1, 72_000).astype(np.float32)
    joe = Joe().synthesize("The early train was late again, so we walked along.", "joe", "en-us")
    for name, wave in (("noise", noise), ("joe", joe)):
        (tmp_path / f"{name}.wav").write_bytes(wav_bytes(wave))
        form.get_by_label("Name").fill(name)
        form.get_by_label("Recording, 1 to 60").set_input_files(tmp_path / f"{name}.wav")
        form.get_by_label("Who agreed").fill("The one who speaks")
        form.get_by_role("button", name="Add voice").click()
        if name == "noise":
            expect(page.get_by_role("alert")).to_contain_text("of it is speech")
    expect(page.get_by_label("Voice", exact=True)).to_have_value("joe")
    expect(page.get_by_role("alert")).to_be_hidden()
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete voice joe").click()
    expect(page.get_by_role("button", name="Delete voice joe")).to_have_count(0)
    voices = httpx.get(f"{endpoint}/v1/audio/voices").json()["voices"]
    assert [voice["id"] for voice in voices] == ["ann"]


def test_page_adds_a_voice_from_the_microphone(page: Page, endpoint: str) -> None:
    """Chromium's fake device plays a recording in a loop."""
    form = page.get_by_role("form", name="Add a voice")
    form.get_by_role("button", name="Record", exact=True).click()
    stop = form.get_by_role("button", name="Stop recording")
    expect(stop).to_have_attribute("aria-pressed", "true")
    page.wait_for_timeout(4000)
    stop.click()
    expect(page.locator("#recording-status")).to_contain_text("Recorded ")
    form.get_by_label("Name").fill("me")
    form.get_by_label("Who agreed").fill("The one who speaks")
    form.get_by_role("button", name="Add voice").click()
    expect(page.get_by_label("Voice", exact=True)).to_have_value("me")
    expect(page.get_by_role("alert")).to_be_hidden()
    names = [voice["id"] for voice in httpx.get(f"{endpoint}/v1/audio/voices").json()["voices"]]
    assert names == ["ann", "me"]
    body = {"input": "Hello.", "voice": "me", "max_seconds": 1, "response_format": "wav"}
    assert httpx.post(f"{endpoint}/v1/audio/speech", json=body, timeout=60).status_code == 200
