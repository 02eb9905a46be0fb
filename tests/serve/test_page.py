"""The web page in a real browser, on a real server with tiny networks.

Skipped only where there is no Chromium and CI_REQUIRE_BROWSER is not set.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from flowvqtalker.io.audio import stream

from ..browser import BrowserPage, needs_browser, open_browser
from ..conftest import babble, write_wav

pytestmark = [needs_browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def files(tmp_path_factory, astronaut, sample_speech) -> dict[str, str]:
    """What users choose: good and bad."""
    folder = tmp_path_factory.mktemp("chosen")
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    for name, picture in {"portrait": astronaut, "noise": noise, "two": np.hstack([astronaut, astronaut])}.items():
        Image.fromarray(picture).save(folder / f"{name}.png")
    write_wav(folder / "speech.wav", babble(1.0))
    write_wav(folder / "voice.wav", np.concatenate(list(stream(sample_speech)))[:48_000])
    (folder / "<img src=x onerror=alert(1)>.txt").write_text("neither a picture nor a sound")
    return {path.stem: str(path) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def driver(tmp_path_factory, files) -> Iterator[webdriver.Chrome]:
    """A browser whose microphone plays a voice over and over and whose camera shows a test picture."""
    fake = ("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream")
    sound = f"--use-file-for-fake-audio-capture={files['voice']}"
    driver = open_browser(tmp_path_factory.mktemp("chromium") / "profile", *fake, sound)
    yield driver
    driver.quit()


class Page(BrowserPage):
    """A browser on the page, with what a user does."""

    def open(self, address: str) -> Page:
        self.address = address
        self.driver.get(address)
        self.wait(lambda: self.script("return document.documentElement.dataset.ready"), "the page")
        return self

    def script(self, text: str, *given: object):
        return self.driver.execute_script(text, *given)

    def click(self, name: str) -> None:
        target = self[name]
        if target.get_attribute("class") == "unseen":  # the label around it is what users see
            target = target.find_element(By.XPATH, "..")
        self.script("arguments[0].scrollIntoView({block: 'center'})", target)
        target.click()

    def choose(self, portrait: str, speech: str | None = None) -> None:
        self["portrait"].send_keys(portrait)
        if not self["consent"].is_selected():
            self.click("consent")
        self.wait(self["crop-box"].is_displayed, "the face")
        if speech is not None:
            self["speech"].send_keys(speech)
            self.wait(self["timeline"].is_displayed, "the waveform")

    def problem(self, field: str) -> str:
        self.wait(lambda: self[f"problem-{field}"].text, f"a sentence at {field}")
        return self[f"problem-{field}"].text

    def result(self) -> list:
        """The takes of the finished video."""
        self.wait(lambda: self["result"].get_attribute("data-status"), "the end of the video", 300)
        assert self["result"].get_attribute("data-status") == "completed", self["problem-result"].text
        return self.driver.find_elements(By.CSS_SELECTOR, "#gallery .take")

    def kept(self) -> list[dict]:
        """What the browser remembers."""
        return json.loads(self.script("return localStorage.getItem('flowvqtalker-videos')") or "[]")

    def status(self, address: str) -> int:
        return self.script("return fetch(arguments[0], {cache: 'no-store'}).then((one) => one.status)", address)

    def watch_requests(self) -> None:
        """Keep the fields of the forms that the page sends in ``sent``."""
        self.script(
            """const real = window.fetch; window.sent = [];
            window.fetch = (path, options) => {
              if (options?.body instanceof FormData) sent.push([path, Object.fromEntries(options.body)]);
              return real(path, options);
            }"""
        )


@pytest.fixture
def page(driver, real_server) -> Page:
    """The page in a browser that remembers nothing."""
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.get(real_server.url)
    driver.execute_script("localStorage.clear()")
    page = Page(driver)
    page.requests()
    page.complaints()
    return page.open(real_server.url)


def test_photo_and_speech_become_a_video(page, files):
    page["portrait"].send_keys(files["portrait"])
    assert "confirm" in page.problem("consent")  # nothing is uploaded before
    page.choose(files["portrait"], files["speech"])
    assert page["speech-note"].text == "1.0 seconds"
    page.script(
        "window.seen = []; new MutationObserver(() => seen.push(document.getElementById('stage').textContent))"
        ".observe(document.getElementById('stage'), {childList: true})"
    )
    page.click("emotion-happy")
    page.click("make")
    (take,) = page.result()
    assert page["said"].get_attribute("textContent") == "The video is ready."
    assert any(text.startswith("Frame ") and text.endswith(" of 25") for text in page.script("return seen"))
    video = take.find_element(By.TAG_NAME, "video")
    page.wait(lambda: page.script("return arguments[0].readyState >= 2", video), "the video")
    assert page.script("return arguments[0].duration", video) == pytest.approx(1.0, abs=0.1)
    page.script("arguments[0].play()", video)
    page.wait(lambda: page.script("return arguments[0].currentTime", video) > 0.2, "the video to advance")
    links = [link.get_attribute("href") for link in take.find_elements(By.TAG_NAME, "a")]
    assert [page.status(link) for link in links] == [200] * 3

    # A reload brings it back from the history, and only what the browser itself knows.
    page.driver.refresh()
    page.open(page.address)
    (entry,) = page.driver.find_elements(By.CSS_SELECTOR, "#history .earlier")
    assert entry.text.lower().startswith("happy")
    entry.click()
    assert len(page.result()) == 1
    page.driver.find_element(By.CSS_SELECTOR, "#history .remove").click()
    page.click("dialog-yes")
    page.wait(lambda: not page["history-box"].is_displayed(), "the history to be empty")
    assert page.kept() == []
    assert page.status(links[0]) == 404
    complaints = [text for text in page.complaints() if "404" not in text]
    assert complaints == []
    assert all(address.startswith(page.address) for address in page.requests())


def test_errors_stand_next_to_their_fields(page, files):
    page.click("make")
    assert "photo first" in page.problem("portrait")
    assert "confirm" in page.problem("consent")
    assert "speech first" in page.problem("speech")
    assert page.driver.switch_to.active_element == page["portrait"]
    page.click("consent")
    bad = next(path for name, path in files.items() if name.startswith("<img"))
    for field, path in {"portrait": files["noise"], "speech": bad}.items():
        page[field].send_keys(path)
        assert len(page.problem(field)) > 20
        assert page[field].get_attribute("aria-invalid") == "true"
    page["portrait"].send_keys(bad)
    page.wait(lambda: page["problem-portrait"].text, "the sentence")
    assert page["portrait-empty"].is_displayed()  # ready for another one
    page.choose(files["portrait"], files["speech"])
    assert page["problem-portrait"].text == page["problem-speech"].text == ""
    page.script("document.getElementById('option-temperature').value = 9")
    page.click("make")
    assert "emperature" in page.problem("options")
    assert page["option-temperature"].is_displayed()
    assert page.driver.switch_to.active_element == page["option-temperature"]
    assert not page.driver.find_elements(By.CSS_SELECTOR, "img[src=x]")


def test_emotion_over_time_and_a_gallery(page, files):
    page.watch_requests()
    page.choose(files["portrait"], files["speech"])
    page.script("document.getElementById('audio').currentTime = 0.5")
    page.wait(lambda: page["wave"].get_attribute("aria-valuenow") == "0.5", "the playhead")
    page.click("add")
    page.click("emotion-angry")
    page["border-1"].send_keys(Keys.ARROW_RIGHT)
    page.click("part-1")
    assert page["emotion-angry"].is_selected()
    page.click("part-0")
    assert page["emotion-neutral"].is_selected()
    page["intensity"].send_keys(Keys.ARROW_RIGHT)
    page["num_samples"].send_keys("2")
    page.click("make")
    takes = page.result()
    sent = next(fields for path, fields in page.script("return sent") if path == "/v1/videos")
    assert json.loads(sent["emotion_track"]) == [
        {"time": 0, "emotion": "neutral", "intensity": 1.05},
        {"time": 0.6, "emotion": "angry", "intensity": 1},
    ]
    assert "emotion" not in sent
    assert [take.find_element(By.TAG_NAME, "small").text for take in takes] == ["seed 0", "seed 1"]
    page.script("for (const video of document.querySelectorAll('#gallery video')) video.play()")
    playing = "return [...document.querySelectorAll('#gallery video')].filter((video) => !video.paused).length"
    page.wait(lambda: page.script(playing) <= 1, "one video at a time")
    addresses = [take.find_element(By.TAG_NAME, "video").get_attribute("src") for take in takes]
    keep = takes[1].find_element(By.XPATH, ".//button[text()='Keep only this']")
    page.script("arguments[0].click()", keep)
    page.click("dialog-yes")
    page.wait(lambda: len(page.driver.find_elements(By.CSS_SELECTOR, "#gallery .take")) == 1, "the other to go")
    assert page.status(addresses[0]) >= 400
    assert page.status(addresses[1]) == 200


def test_microphone_text_camera_and_faces(page, files):
    page.click("record")
    page.wait(lambda: page["record-time"].text == "0:01", "a second of recording")
    page.click("record-stop")
    page.wait(page["timeline"].is_displayed, "the recording")
    assert 0.8 < float(page["speech-note"].text.split()[0]) < 10
    page.click("speech-again")
    page["text"].send_keys("One, two, three.")
    page.click("speak")
    page.wait(page["timeline"].is_displayed, "the spoken text")
    assert page["speech-name"].text == "One, two, three."
    page.click("speech-again")
    page.click("example")
    page.wait(page["timeline"].is_displayed, "the example")
    page.click("portrait-again")
    page.click("consent")
    page.click("camera")
    page.wait(lambda: page.script("return document.getElementById('camera-view').videoWidth"), "the camera")
    page.click("camera-take")
    assert page.problem("portrait")  # the test picture of the fake camera shows no face
    page.script(
        """const files = new DataTransfer(); files.items.add(new File(['no sound'], 'dropped.wav'));
        const drop = new DragEvent('drop', {dataTransfer: files, bubbles: true, cancelable: true});
        document.getElementById('speech-drop').dispatchEvent(drop);"""
    )
    assert page.problem("speech")
    page.choose(files["two"])
    faces = page.driver.find_elements(By.CSS_SELECTOR, "#faces .face input")
    assert len(faces) == 2
    assert faces[0].is_selected()
    page.script("arguments[0].focus()", faces[0])
    page.press(Keys.ARROW_RIGHT)
    assert page["crop"].get_attribute("src").endswith("face=1")


def test_live(page, files):
    page.choose(files["portrait"])
    page.click("mode-live")
    page.click("live-start")
    frames = "return Number(document.getElementById('live-view').dataset.frames ?? 0)"
    page.wait(lambda: page.script(frames) > 3, "frames", 300)
    assert page["live-state"].text in ("Idle", "Listening", "Talking")
    drawn = "return document.getElementById('live-view').getContext('2d').getImageData(256, 256, 1, 1).data[3]"
    assert page.script(drawn) == 255
    page.click("emotion-happy")
    page.wait(lambda: page["live-state"].text == "Talking", "speech to be heard")
    shown = page.script(frames)
    page.wait(lambda: page.script(frames) > shown, "more frames")
    page.click("live-stop")
    assert page["live-state"].text == "Stopped"
    assert page["problem-live"].text == ""


def test_two_browsers_see_only_their_own(page, real_server, files, tmp_path):
    other = open_browser(tmp_path / "profile")
    try:
        pages = [page, Page(other).open(real_server.url)]
        for one, emotion in zip(pages, ("sad", "happy"), strict=True):
            one.choose(files["portrait"], files["speech"])
            one.click(f"emotion-{emotion}")
            one.click("make")
        for one in pages:
            assert len(one.result()) == 1
        ids = [[entry["id"] for entry in one.kept()] for one in pages]
        assert [entry["title"] for one in pages for entry in one.kept()] == ["sad", "happy"]
        for one, foreign in zip(pages, reversed(ids), strict=True):
            assert one.status(f"/v1/videos/{foreign[0]}") == 404
    finally:
        other.quit()


def test_phone_and_keyboard(page, files):
    page.screen(390, 844)
    page.choose(files["portrait"], files["speech"])
    page.click("add")
    page.script("document.getElementById('more').open = true")
    assert page.script("return document.documentElement.scrollWidth") <= 390
    # Everything that can be used has a name and can be reached with the tabulator.
    page.script("document.activeElement.blur(); scrollTo(0, 0)")
    reached = set()
    for _ in range(60):
        page.press(Keys.TAB)
        reached.add(page.script("return document.activeElement.id || document.activeElement.tagName"))
    wanted = {"consent", "portrait-again", "speech-again", "wave", "border-1", "part-0", "intensity", "add", "make"}
    assert wanted <= reached, wanted - reached
    names = page.script(
        """const named = (one) => one.labels?.length || one.ariaLabel || one.textContent.trim();
        const all = [...document.querySelectorAll('button, input, select, textarea, [role=slider], video, audio')];
        return all.filter((one) => one.checkVisibility() && !named(one)).map((one) => one.id)"""
    )
    assert names == []
