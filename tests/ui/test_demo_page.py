"""The demo's page in a real browser."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import tiny
from PIL import Image

from rae_jax.build import data as build_data

ROOT = Path(__file__).parents[2]

_WAIT = 240.0  # seconds, on a machine that others use as well


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of the demo of the shipped weights, which runs in its own process."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    pytest.importorskip("selenium", reason="selenium is not installed")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium and chromedriver are not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workdir = tmp_path_factory.mktemp("demo") / "run"
    command = ["-m", "rae_jax.main", "--config=configs/small.py", f"--workdir={workdir}", "--mode=demo"]
    environment = {**os.environ, "XLA_FLAGS": "", "GRADIO_TEMP_DIR": str(workdir.parent / "files")}
    process = subprocess.Popen(
        [sys.executable, *command, f"--port={port}"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    line = process.stdout.readline()
    assert line.startswith(f"demo: http://127.0.0.1:{port}/"), line
    yield f"http://127.0.0.1:{port}/"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert not workdir.exists()


@pytest.fixture
def browsers():
    """Makes browsers of their own users, and ends them."""
    from selenium import webdriver

    opened = []

    def make():
        options = webdriver.ChromeOptions()
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1300"):
            options.add_argument(argument)
        options.binary_location = shutil.which("chromium")
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        opened.append(webdriver.Chrome(options=options, service=service))
        return opened[-1]

    yield make
    for browser in opened:
        browser.quit()


def _until(condition):
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + _WAIT
    while time.monotonic() < end:
        try:
            if found := condition():
                return found
        except WebDriverException:  # not there yet, or drawn again in between
            pass
        time.sleep(0.2)
    raise AssertionError("it did not come")


def _open(browser, address, tab):
    browser.get(address)
    _until(lambda: [b for b in _tabs(browser) if b.text == tab])[0].click()


def _tabs(browser):
    return browser.find_elements("css selector", "button[role=tab]")


def _message(browser, tab):
    return browser.find_element("id", f"{tab}-message").text


def _pixels(browser, name):
    """Width of the picture with this name as it was received."""
    image = browser.find_element("css selector", f"#{name} img")
    return browser.execute_script("return arguments[0].complete && arguments[0].naturalWidth", image)


def _give(browser, name, path):
    browser.find_element("css selector", f"#{name} input[type=file]").send_keys(str(path))


def _shot(browser, name):
    """A picture of the page, for people, where RAE_JAX_SHOTS names a folder."""
    if folder := os.environ.get("RAE_JAX_SHOTS"):
        time.sleep(1.0)
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def _sample(browser, steps):
    _until(lambda: browser.find_element("css selector", f"#steps input[value='{steps}']")).click()
    _until(lambda: browser.find_element("id", "sample")).click()


@pytest.mark.slow
def test_sampling_in_a_browser_by_two_users_at_once(address, browsers):
    one, other = browsers(), browsers()
    for browser in (one, other):
        _open(browser, address, "Sample")
    _sample(one, 100)
    _sample(other, 5)
    for browser in (one, other):
        _until(lambda browser=browser: "Done" in _message(browser, "sample"))
        _until(lambda browser=browser: _pixels(browser, "sample-now") and _pixels(browser, "sample-strip"))
    _shot(one, "sample")
    _shot(other, "sample_of_another")


@pytest.mark.slow
def test_pictures_in_a_browser(address, browsers, tmp_path):
    browser = browsers()
    _open(browser, address, "Reconstruct")
    photo = tmp_path / "photo.jpg"
    image = Image.fromarray(build_data.source(tiny(), "heldout")[5]["image"]).resize((320, 256))
    image.save(photo)
    _until(lambda: browser.find_element("css selector", "#reconstruct-file input"))
    _give(browser, "reconstruct-file", photo)
    _until(lambda: "PSNR" in _message(browser, "reconstruct"))
    for name in ("given", "decoded", "latents", "errors"):
        assert _until(lambda name=name: _pixels(browser, f"reconstruct-{name}")) == 256
    _shot(browser, "reconstruct")

    browser.find_element(
        "css selector", "#reconstruct-file button[aria-label=Clear], #reconstruct-file .icon-button"
    ).click()
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    _until(lambda: browser.find_element("css selector", "#reconstruct-file input"))
    _give(browser, "reconstruct-file", bad)
    _until(lambda: "bad.png is no image" in _message(browser, "reconstruct"))
    _shot(browser, "bad_file")

    _until(lambda: [b for b in _tabs(browser) if b.text == "Interpolate"])[0].click()
    _until(lambda: browser.find_element("id", "two-held-out-pictures").is_displayed())
    browser.find_element("id", "two-held-out-pictures").click()
    _until(lambda: _pixels(browser, "interpolate-strip"))
    _shot(browser, "interpolate")

    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert asked and all(url.startswith((address, "data:", "blob:")) for url in asked), asked
