"""A Chromium for tests of the page, and what a person does in it."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
from playwright.sync_api import expect, sync_playwright

from flashformer.serve.load import LoadOptions
from flashformer.serve.server.routes import ENDPOINTS
from serving import TINY, Serving

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed on this machine"
)
CPU = replace(TINY, load=LoadOptions(None, "cpu", None, 1024, None, max_batch=8))
PROMPT = "def fibonacci(n):\n"
SECONDS = 20.0
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage"]  # as root in a container, as CI may be


class Browsing:
    """Pages of one server; whatever goes wrong in them is kept in `problems`."""

    def __init__(self, chromium, serving):
        self._chromium = chromium
        self.serving = serving
        self.problems = []

    def open(self, server=None, *, ready=True, before=None, **options):
        """A page in a context of its own, once it has reached the server."""
        context = self._chromium.new_context(
            **{"viewport": {"width": 1280, "height": 800}, **options}
        )
        page = context.new_page()
        page.set_default_timeout(1e3 * SECONDS)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", lambda message: self._note(message.text))
        if before is not None:
            before(page)
        page.goto(f"http://127.0.0.1:{(server or self.serving).port}/")
        if ready:
            expect(page.locator("#state")).to_have_attribute("data-state", "ready")
        return page

    def close(self):
        """Close every page; nothing may be left of them."""
        for context in self._chromium.contexts:
            context.close()
        problems, self.problems = self.problems, []
        assert not problems
        assert self.serving.wait_idle()

    def _note(self, text):
        if "Content Security" in text:
            self.problems.append(text)


@contextmanager
def browsing():
    """A browser and a server with the default model on the CPU."""
    with Serving(CPU, ENDPOINTS) as serving, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield Browsing(chromium, serving)
        chromium.close()


def choose(page, mode):
    page.get_by_text({"chat": "Chat", "text": "Continue text"}[mode], exact=True).click()


def sample(page, **fields):
    page.get_by_role("button", name="Sampling").click()
    for name, value in fields.items():
        page.locator(f"[name={name}]").fill(str(value))
    page.get_by_role("button", name="Sampling").click()


def send(page, prompt=PROMPT):
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.keyboard.press("Control+Enter")


def wait_for_end(page):
    expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=1e3 * SECONDS)


def answers(page):
    """What the model wrote, one a turn."""
    return page.locator(".answer").evaluate_all(
        """all => all.map((one) =>
            [...one.childNodes].slice(1).map((part) => part.textContent).join(""))"""
    )


def stream(page, *chunks, path="**/v1/chat/completions"):
    """Let the server say these chunks instead of its own."""
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    tell(page, path, body)


def tell(page, path, body):
    """Let the server answer with these events."""
    page.route(path, lambda route: route.fulfill(body=body, content_type="text/event-stream"))


def delta(finish=None, **fields):
    return {"choices": [{"delta": fields, "finish_reason": finish}]}
