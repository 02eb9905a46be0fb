"""The page of a user study in a real browser: from a disk and served, with mouse and keyboard, to the database.

Skipped only where there is no Chromium and CI_REQUIRE_BROWSER is not set.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from flowvqtalker_eval.study.analysis import analyse
from flowvqtalker_eval.study.answers import collect
from flowvqtalker_eval.study.commands import Build
from flowvqtalker_eval.study.key import Key

from ..browser import BrowserPage, needs_browser, open_browser
from .study_help import ITEMS, METHODS, quick_clips, write_methods, write_video

pytestmark = [needs_browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """Two methods and the real videos, two items, one attention check; everybody sees four clips and the check."""
    folder = tmp_path_factory.mktemp("browser")
    given = write_methods(folder / "in")
    practice = write_video(folder / "practice.mp4")
    with pytest.MonkeyPatch.context() as patch:
        quick_clips(patch)
        options = {"real": folder / "in" / "real", "practice": practice, "contact": "someone@example.org"}
        Build(methods=tuple(given), output=folder / "study", per_rater=4, seed=1, **options).run()
    return folder / "study"


class Page(BrowserPage):
    """A browser on the page, with what a participant does."""

    def open(self, address: str) -> None:
        self.driver.get(address)
        self.wait(lambda: any(self[f"screen-{name}"].is_displayed() for name in ("intro", "clip", "end")), "a screen")

    def start(self, code: str | None = None) -> None:
        if code is not None:
            self["code"].clear()
            self["code"].send_keys(code)
        self["agree"].click()
        self.driver.find_element(By.CSS_SELECTOR, "#consent button").click()
        assert self["clip-title"].text == "Practice"

    def answerable(self) -> bool:
        return self["quality-1"].is_enabled()

    def watch(self) -> None:
        assert not self.answerable()
        self["play"].click()
        self.wait(self.answerable, "the end of the clip")

    def choose(self, lip_sync: int, quality: int, emotion: str) -> None:
        for name in (f"lip_sync-{lip_sync}", f"quality-{quality}", f"emotion-{emotion}"):
            self[name].click()

    def rate(self, lip_sync: int, quality: int, emotion: str) -> None:
        self.watch()
        self.choose(lip_sync, quality, emotion)
        self["next"].click()

    def clip(self) -> str:
        """Identifier of the clip on the screen."""
        return str(self["video"].get_attribute("src")).rsplit("/", 1)[1].removesuffix(".mp4")

    def chosen(self) -> list[str]:
        chosen = self.driver.find_elements(By.CSS_SELECTOR, "#questions input:checked")
        return [str(one.get_attribute("value")) for one in chosen]

    def kept(self) -> dict:
        """What the browser keeps of the participant."""
        script = "return Object.entries(localStorage).filter(([name]) => name.includes(':rater:')).map(([, v]) => v)"
        return json.loads(self.driver.execute_script(script)[-1])

    def dialog(self, name: str) -> None:
        self.driver.find_element(By.CSS_SELECTOR, f'#dialog button[value="{name}"]').click()
        self.settle()

    def settle(self) -> None:
        """Until the events of a click have been dealt with: a dialog's close comes in a task of its own."""
        self.wait(lambda: not self.driver.execute_script("return document.getElementById('dialog').open"), "the dialog")
        self.driver.execute_async_script("const done = arguments[0]; setTimeout(() => setTimeout(done, 100), 100)")


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    """A browser with a fresh profile."""
    driver = open_browser(tmp_path_factory.mktemp("chromium") / "profile")
    yield driver
    driver.quit()


@pytest.fixture
def page(driver, study, tmp_path) -> Page:
    """The browser without memory of the tests before; downloads go to ``downloads`` in the test's folder."""
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    where = {"behavior": "allow", "downloadPath": str(tmp_path / "downloads")}
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", where)
    driver.get((study / "page" / "index.html").as_uri())
    driver.execute_script("localStorage.clear()")
    driver.get("about:blank")
    page = Page(driver)
    page.requests()
    page.complaints()
    return page


@pytest.fixture
def served(study) -> Iterator[str]:
    """Address of the study, served by the real command."""
    code = "import sys, pathlib; from flowvqtalker_eval.study.commands import Serve; "
    code += "Serve(study=pathlib.Path(sys.argv[1]), port=0).run()"
    process = subprocess.Popen([sys.executable, "-c", code, str(study)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(20)


def test_from_a_disk_to_the_table(page, study, tmp_path):
    key = Key.load(study)
    expected = {clip.id: clip.expected for clip in key.clips if clip.expected}
    page.open((study / "page" / "index.html").as_uri())
    page["agree"].click()
    page["code"].clear()
    page["code"].send_keys("no spaces please")
    page.driver.find_element(By.CSS_SELECTOR, "#consent button").click()
    assert "1 to 40 letters" in page["code-problem"].text
    page["agree"].click()
    page.start("P3")
    page["next"].click()
    assert "watch the clip to its end first" in page["missing"].text
    page.watch()
    page["quality-4"].click()
    page["next"].click()
    assert page["missing"].text == "Please answer: lips and speech, emotion."
    assert page.driver.switch_to.active_element.get_attribute("name") == "lip_sync"
    page.choose(3, 4, "sad")
    page["next"].click()

    # No name of a method or item anywhere in what the browser shows, at any time.
    sources = []
    given = {}
    for place, clip in enumerate(key.plan[2]):
        assert page["clip-title"].text == f"Clip {place + 1} of 5"
        assert page["progress-text"].text == f"{place} of 5 clips rated"
        assert page.clip() == clip
        assert page.chosen() == []  # nothing is chosen beforehand
        sources.append(page.driver.page_source)
        wanted = expected.get(clip)
        given[clip] = (
            (wanted.lip_sync, wanted.quality, wanted.emotion) if wanted else (1 + place % 5, 5 - place % 5, "sad")
        )
        if place == 2:  # a reload in the middle, after watching and half an answer
            page.watch()
            page["quality-2"].click()
            page.driver.refresh()
            page.wait(lambda: page["clip-title"].text == "Clip 3 of 5", "the clip where it was")
            assert page["quality-2"].is_selected()
            assert page.answerable()  # it was watched
            page.choose(*given[clip])
            page["next"].click()
        else:
            page.rate(*given[clip])
    assert "That was the last clip" in page["end-title"].text
    assert "someone@example.org" in page["save-text"].text
    assert not page["send"].is_displayed()
    page["remark"].send_keys("all fine")
    sources.append(page.driver.page_source)
    text = "".join(sources).lower()
    assert not any(name.lower() in text for name in (*METHODS, *ITEMS))

    for name in ("save-json", "save-csv"):
        page[name].click()
    files = [tmp_path / "downloads" / f"answers-{key.study}-P3.{suffix}" for suffix in ("json", "csv")]
    page.wait(lambda: all(file.exists() for file in files), "the downloads")
    assert json.loads(files[0].read_text(encoding="utf-8"))["comment"] == "all fine"
    found = [collect([file], key) for file in files]
    assert found[0] == found[1]
    answers, problems = found[0]
    assert problems == []
    assert {one.clip: (one.lip_sync, one.quality, one.emotion) for one in answers} == given
    assert [one.clip for one in sorted(answers, key=lambda one: one.position)] == list(key.plan[2])
    assert {one.revision for one in answers} == {0}
    assert all(0 < one.seconds < 60 and one.plays == 1 for one in answers)
    result = analyse(answers, key, draws=100)
    assert result.excluded == {}
    assert result.estimates.xs("quality", level="measure")["answers"].sum() == 4
    asked = page.requests()
    assert asked
    assert all(address.startswith((study / "page").as_uri()) for address in asked)
    assert page.complaints() == []


def test_served_to_the_database(page, study, served):
    key = Key.load(study)
    page.open(served)
    assert page["code"].get_attribute("value") == "P1"
    page.start()
    page.rate(3, 3, "happy")
    order = key.plan[0]
    page.rate(1, 2, "happy")
    page.watch()
    page["back"].click()  # from an unanswered clip: nothing to lose
    assert page.clip() == order[0]
    assert page.chosen() == ["1", "2", "happy"]
    assert page["seen-note"].is_displayed()
    assert page["next"].text == "Next"
    page["quality-5"].click()
    assert page["next"].text == "Save the change"
    page["pause"].click()  # leaving with an unsaved change asks first
    page.dialog("stay")
    assert page.clip() == order[0]
    page["pause"].click()
    page.dialog("drop")
    page.wait(lambda: "1 of 5 clips" in page["return-text"].text, "the pause")
    page["resume"].click()
    assert page.clip() == order[1]
    assert page.answerable()
    page["back"].click()
    assert page.chosen() == ["1", "2", "happy"]  # as it was
    page["quality-4"].click()
    page["next"].click()
    assert page.kept()["answers"][order[0]]["quality"] == 4
    page.choose(2, 2, "fear")
    page["next"].click()
    page["broken"].click()
    page.dialog("skip")
    for _ in order[3:]:
        page.rate(4, 4, "angry")
    page.driver.execute_script("window.fetch = () => Promise.reject(new Error('no network'))")
    page["send"].click()
    page.wait(lambda: "no network" in page["send-state"].text, "the failure")
    assert "safe on this device" in page["send-state"].text
    page.driver.refresh()  # the network is back
    page.wait(lambda: page["send"].is_displayed(), "the last page")
    page["send"].click()
    page.wait(lambda: "have arrived" in page["end-title"].text, "the server's answer")
    assert not page["review"].is_displayed()
    answers = {one.clip: one for one in collect([study], key)[0]}
    assert set(answers) == set(order)
    assert (answers[order[0]].quality, answers[order[0]].revision, answers[order[0]].plays) == (4, 1, 1)
    assert answers[order[2]].problem
    assert {answers[clip].emotion for clip in order[3:]} == {"angry"}
    page.driver.refresh()
    page.wait(lambda: "have arrived" in page["end-title"].text, "the end again")
    page["leave"].click()
    page["other"].click()  # somebody else at the same computer
    page.wait(lambda: page["consent"].is_displayed(), "the start")
    root = served.split("?")[0]
    assert all(address.startswith(root) for address in page.requests())
    assert page.complaints() == []


def test_keyboard_alone(page, study):
    page.open((study / "page" / "index.html").as_uri() + "?rater=K1")
    page.press(Keys.TAB, Keys.TAB, Keys.SPACE, Keys.TAB, Keys.ENTER)  # code, consent, start
    for title in ("Practice", "Clip 1 of 5"):
        assert page["clip-title"].text == title
        page.press(Keys.SPACE)  # the play button has the focus
        page.wait(page.answerable, "the end of the clip")
        page.press(*([Keys.TAB] if title == "Practice" else [Keys.TAB, Keys.TAB]))
        page.press(Keys.SPACE, Keys.DOWN)  # the second of five
        page.press(Keys.TAB, Keys.SPACE)
        page.press(Keys.TAB, Keys.SPACE, Keys.DOWN, Keys.DOWN)
        assert page.chosen() == ["4", "5", "disgusted"]
        page.press(Keys.ENTER)  # sends the form
    assert page["clip-title"].text == "Clip 2 of 5"


def test_withdrawal_deletes(page, study):
    page.open((study / "page" / "index.html").as_uri() + "?rater=W1")
    page.start()
    page.rate(3, 3, "happy")
    page.rate(3, 3, "happy")
    page["pause"].click()
    page["withdraw"].click()
    page.dialog("delete")
    assert page["consent"].is_displayed()
    assert page.driver.execute_script("return localStorage.length") == 0


def test_phone(page, study):
    """On a narrow screen nothing is cut off and everything can be touched."""
    page.screen(360, 740)
    page.open((study / "page" / "index.html").as_uri() + "?rater=M1")
    page.start()
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 360
    labels = page.driver.find_elements(By.CSS_SELECTOR, "#questions label")
    assert len(labels) == 18
    assert min(label.rect["height"] for label in labels) >= 44
    page.rate(3, 3, "happy")
    time.sleep(0.1)
    assert page.driver.execute_script("return scrollY") == 0
