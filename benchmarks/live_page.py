"""The page's live tab in a real browser: how long after a voice begins does the face begin to talk?

    python benchmarks/live_page.py PORTRAIT SPEECH [--repeats 5] [--weights FOLDER]

A headless Chromium on this machine talks to a server on this machine; its microphone plays 4 s of silence and 3 s of
the speech, over and over. Clock: the page's. Heard: the first loud block of samples goes to the server. Shown: the
first picture after the server says "talking" is on the canvas. Prints milliseconds, pictures per second, and the
browser's share of the processor time of browser and server.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
import wave
from pathlib import Path

import numpy as np
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from flowvqtalker.io import audio
from serve import RATE, family, serving

#: Put into the page before its own code: notes when loud samples leave and when the state becomes "talking".
WATCH = """
window.heard = []; window.talking = []; window.pictures = [];
const Real = window.WebSocket;
window.WebSocket = class extends Real {
  constructor(...given) {
    super(...given);
    let quiet = true;
    const send = this.send.bind(this);
    this.send = (data) => {
      if (data instanceof ArrayBuffer || ArrayBuffer.isView(data)) {
        const loud = new Int16Array(data.buffer ?? data).some((value) => Math.abs(value) > 1500);
        if (loud && quiet) heard.push(performance.now());
        quiet = loud ? false : quiet;
        if (loud) window.lastLoud = performance.now();
        if (performance.now() - (window.lastLoud ?? 0) > 1500) quiet = true;
      }
      send(data);
    };
    this.addEventListener("message", ({data}) => {
      if (typeof data === "string" && JSON.parse(data).state === "talking") talking.push(performance.now());
    });
  }
};
const draw = CanvasRenderingContext2D.prototype.drawImage;
CanvasRenderingContext2D.prototype.drawImage = function (...given) {
  if (this.canvas.id === "live-view") pictures.push(performance.now());
  return draw.apply(this, given);
};
"""


def processor_seconds(pids: list[int]) -> float:
    """User and system time of processes so far (Linux)."""
    total = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        except OSError:
            continue
    return total / 100


def microphone(path: Path, speech: Path) -> None:
    """4 s of silence and 3 s of speech, as Chromium's false microphone wants it."""
    voice = audio.load(speech)[: 3 * RATE]
    whole = np.concatenate([np.zeros(4 * RATE, np.float32), 0.7 * voice / np.abs(voice).max()])
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes((whole * 32767).astype("<i2").tobytes())


def measure(driver: webdriver.Chrome, url: str, portrait: Path, repeats: int, server: int) -> dict[str, object]:
    """Open the page, start the session, wait for so many beginnings of speech."""
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
    driver.get(url)
    find = driver.find_element
    time.sleep(2)
    find(By.ID, "portrait").send_keys(str(portrait.resolve()))
    driver.execute_script("const box = document.getElementById('consent'); if (!box.checked) box.click()")
    while not find(By.ID, "crop-box").is_displayed():
        time.sleep(0.2)
    driver.execute_script("document.getElementById('mode-live').click(); document.getElementById('live-start').click()")
    clicked = time.monotonic()
    while not driver.execute_script("return pictures.length"):
        time.sleep(0.02)
    first = time.monotonic() - clicked
    browser = driver.service.process.pid
    before = [processor_seconds(family(pid)) for pid in (browser, server)]
    begun = time.monotonic()
    time.sleep(7.0 * repeats + 1)
    spent = [processor_seconds(family(pid)) - old for pid, old in zip((browser, server), before, strict=True)]
    seconds = time.monotonic() - begun
    heard, talking, pictures = (
        np.array(driver.execute_script(f"return {name}")) for name in ("heard", "talking", "pictures")
    )
    waits = []
    for moment in heard:
        said = talking[talking > moment]
        if len(said) and len(shown := pictures[pictures > said[0]]):
            waits.append(float(shown[0] - moment))
    return {
        "click_to_picture_s": round(first, 2),
        "voice_to_talking_ms": [round(wait) for wait in waits],
        "pictures_per_second": round(len(pictures) / seconds, 1),
        "browser_share": round(spent[0] / sum(spent), 2),
        "busy_cores": round(sum(spent) / seconds, 2),
        "note": driver.find_element(By.ID, "live-note").text,
    }


def main() -> None:
    """Start the server and the browser, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("portrait", type=Path)
    parser.add_argument("speech", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--weights", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving(given.weights) as (url, pid):
        sound = Path(folder) / "microphone.wav"
        microphone(sound, given.speech)
        options = webdriver.ChromeOptions()
        for argument in (
            "headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
            "disable-component-update", "disable-sync", "disable-dev-shm-usage", "use-fake-ui-for-media-stream",
            "use-fake-device-for-media-stream", f"use-file-for-fake-audio-capture={sound}",
            "autoplay-policy=no-user-gesture-required", f"user-data-dir={folder}/profile",
        ):  # fmt: skip
            options.add_argument(f"--{argument}")
        options.binary_location = shutil.which("chromium") or ""
        driver = webdriver.Chrome(options=options, service=Service(executable_path=shutil.which("chromedriver")))
        try:
            print(json.dumps(measure(driver, url, given.portrait, given.repeats, pid)))
        finally:
            driver.quit()


if __name__ == "__main__":
    main()
