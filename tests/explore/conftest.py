"""A real browser over the page of runs that a test names."""

import io
import shutil
import warnings
from contextlib import ExitStack

import numpy as np
import pytest
from PIL import Image

from unet_diffusion.explore.page import served
from unet_diffusion.explore.runs import Run
from unet_diffusion.inference.loading import load

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run")  # fmt: skip
PATIENCE = 60_000  # milliseconds, for a machine that does other things meanwhile


class Visitor:
    """Somebody who looks at the page in a window of their own."""

    def __init__(self, window):
        self.window = window

    def open_tab(self, name):
        self.window.get_by_role("tab", name=name, exact=True).click()

    def press(self, name):
        self.window.get_by_role("button", name=name, exact=True).locator("visible=true").first.click()

    def set_number(self, element, value):
        field = self.window.locator(f"#{element} input[type=number]").first
        field.fill(str(value))
        field.press("Tab")

    def choose(self, element, name):
        field = self.window.locator(f"#{element} input").first
        field.click()
        field.fill(name)
        self.window.get_by_role("option", name=name, exact=True).click()
        self.window.keyboard.press("Escape")

    def upload(self, path):
        self.window.locator("#upload input[type=file]").set_input_files(str(path))
        # Before it is shown, it has not arrived, and whoever presses a button is asked for an image.
        self.window.locator("#upload .file-preview", has_text=path.suffix).wait_for(timeout=PATIENCE)

    def status(self, words):
        """The status line, as soon as it holds these words."""
        line = self.window.locator(".status:visible", has_text=words).first
        line.wait_for(timeout=PATIENCE)
        return line.inner_text()

    def picture(self, element) -> np.ndarray:
        """The pixels of an image on the page, as soon as it is there."""
        image = self.window.locator(f"#{element} img").first
        image.wait_for(timeout=PATIENCE)
        return pixels_of(self.window.request.get(image.get_attribute("src")).body())

    def pictures(self, element) -> list[np.ndarray]:
        self.window.locator(f"#{element} img").first.wait_for(timeout=PATIENCE)
        images = self.window.locator(f"#{element} .grid-container img").all()
        return [pixels_of(self.window.request.get(image.get_attribute("src")).body()) for image in images]

    def code(self) -> str:
        """The command line, as soon as it is there."""
        line = self.window.locator(".cm-content:visible").first
        line.wait_for(timeout=PATIENCE)
        return line.inner_text().strip()

    def until(self, holds):
        """Wait until something holds of the page, which changes when its events have been answered."""
        for _ in range(PATIENCE // 100):
            if holds():
                return
            self.window.wait_for_timeout(100)
        raise AssertionError("what the test waits for has not come")

    def downloads(self) -> dict[str, bytes]:
        """The files that may be downloaded, by their names."""
        links = self.window.locator(".file-preview a:visible").all()
        paths = [link.get_attribute("href") for link in links]
        return {path.rpartition("/")[2]: self.window.request.get(path).body() for path in paths}


def pixels_of(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        own = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        try:
            opened = started.chromium.launch(executable_path=own, args=list(FLAGS))
        except playwright.Error as error:
            pytest.skip(f"there is no Chromium (apt install chromium, or playwright install chromium): {error}")
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """Serves the page of runs, and opens windows of visitors; nothing may be fetched from elsewhere."""
    with ExitStack() as stack:
        foreign = []

        def open_page(*runs, visitors=1):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Gradio and its server
                address = stack.enter_context(served(runs, host="127.0.0.1", port=None, open_browser=False))
            opened = [new_visitor(address) for _ in range(visitors)]
            return opened if visitors > 1 else opened[0]

        def new_visitor(address):
            context = browser.new_context(viewport={"width": 1500, "height": 1000})
            stack.callback(context.close)
            window = context.new_page()
            window.on("requestfinished", lambda request: foreign.append(request.url))
            window.on("requestfailed", lambda request: request.failure == "csp" or foreign.append(request.url))
            window.goto(address)
            window.get_by_role("tab").first.wait_for(timeout=PATIENCE)
            return Visitor(window)

        yield open_page
        own = ("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:")
        assert [url for url in foreign if not url.startswith(own)] == []


@pytest.fixture
def run_of():
    """The run at a path, with data of its own configuration."""

    def make(path, data=None) -> Run:
        return Run(path, load(path), load, lambda: data)

    return make
