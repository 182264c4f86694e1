"""The page in a browser: what it shows of the machine, and that everybody can use it."""

import json

import pytest
from playwright.sync_api import expect

from browsing import choose, needs_browser, sample, send, tell, wait_for_end

pytestmark = needs_browser


def test_the_machine_s_stages_are_drawn_in_a_token_s_order(pages):
    page = pages.open()
    sample(page, max_tokens=60)
    send(page)
    wait_for_end(page)
    expect(page.locator("#waterfall-note")).to_contain_text("measured inside the kernel")
    rows = page.locator("#waterfall li")
    expect(rows).to_have_count(8)
    bars = page.locator("#waterfall i").evaluate_all(
        """all => all.map(({style}) =>
            ["--from", "--part"].map((name) => Number(style.getPropertyValue(name))))"""
    )
    end = 0.0
    for start, part in bars:
        assert start == pytest.approx(end)
        end = start + part
    assert end == pytest.approx(1.0)
    assert rows.nth(4).inner_text().split("\n")[0].startswith("gate_up")
    expect(page.locator("#bandwidth-note")).to_contain_text("may come from the processor's caches")


def test_everything_can_be_done_with_the_keyboard(pages):
    page = pages.open()
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    page.locator(".skip").focus()
    reached = []
    for _ in range(24):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "(({id, name, className}) => id || name || className)(document.activeElement)"
            )
        )
    wanted = ["machine-toggle", "theme", "prompt", "send", "mode", "more"]
    wanted += ["settings-toggle", "clear"]
    assert [name for name in reached if name in wanted][: len(wanted)] == wanted
    page.get_by_label("Prompt", exact=True).focus()
    choose(page, "text")
    page.get_by_label("Prompt", exact=True).focus()
    sample(page, max_tokens=900, temperature=1)
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.type("import os\n")
    assert page.locator(".turn").count() == 0  # Enter alone is a new line
    page.keyboard.press("Control+Enter")
    expect(page.locator(".turn.running")).to_have_count(1)
    expect(page.get_by_role("log")).to_have_attribute("aria-busy", "true")
    page.keyboard.press("Escape")
    expect(page.locator(".turn footer")).to_contain_text("stopped")
    page.get_by_role("button", name="Retry").press("Enter")
    expect(page.get_by_role("log")).to_be_focused()  # the button has gone
    page.get_by_role("button", name="Stop", exact=True).press("Enter")
    expect(page.get_by_role("button", name="Send")).to_be_focused()
    expect(page.locator(".turn footer")).to_contain_text("stopped")
    expect(page.get_by_role("log")).to_have_attribute("aria-busy", "false")
    expect(page.locator("#announcer")).to_contain_text("stopped")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read_in_either_scheme(pages, scheme):
    page = pages.open(
        viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True, color_scheme=scheme
    )
    page.get_by_role("button", name="One stream more").tap()
    page.get_by_role("button", name="Machine").tap()
    page.get_by_role("button", name="Sampling").tap()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for name in ("Machine", "Sampling", "Send", "New conversation"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        assert box["y"] + box["height"] <= 740
        assert box["height"] >= 36  # for a finger
    expect(page.locator("#machine")).to_be_hidden()  # there is room for one of them
    form = page.locator("#composer").bounding_box()
    assert form["y"] + form["height"] == pytest.approx(740, abs=1)  # the settings scroll inside
    # WCAG's contrast of every pair of colours that text has.
    ratios = page.evaluate(
        """() => {
            const luminance = (name) => {
                const probe = document.createElement("i");
                probe.style.color = `var(${name})`;
                document.body.append(probe);
                const parts = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3);
                probe.remove();
                const [r, g, b] = parts.map((part) => part / 255)
                    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const found = {};
            for (const front of ["--text", "--quiet", "--accent", "--bad"]) {
                for (const back of ["--paper", "--card", "--sunk"]) {
                    const [low, high] = [luminance(front), luminance(back)].sort((a, b) => a - b);
                    found[front + back] = (high + 0.05) / (low + 0.05);
                }
            }
            return found;
        }"""
    )
    assert min(ratios.values()) >= 4.5, ratios


def test_a_browser_that_may_keep_nothing_shows_the_page_all_the_same(pages):
    forbid = """for (const name of ["localStorage", "sessionStorage"]) {
        Object.defineProperty(window, name, { get() { throw new DOMException("no"); } });
    }"""
    page = pages.open(before=lambda p: p.add_init_script(forbid))
    page.get_by_role("button", name="Colours: as the system").click()
    sample(page, max_tokens=3)
    send(page)
    wait_for_end(page)
    expect(page.locator(".turn footer")).to_contain_text("3 tokens")


def test_colours_follow_the_system_until_a_person_chooses(pages):
    page = pages.open(color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.get_by_role("button", name="Colours: as the system").click()
    light = page.evaluate(background)
    assert light != dark
    page.reload()
    assert page.evaluate(background) == light
    page.get_by_role("button", name="Colours: light").click()
    assert page.evaluate(background) == dark


def test_the_page_says_when_the_server_has_gone_and_when_it_is_back(pages):
    page = pages.open()
    page.route("**/live", lambda route: route.abort())
    page.reload()
    expect(page.locator("#state")).to_have_attribute("data-state", "lost")
    page.unroute("**/live")
    expect(page.locator("#state")).to_have_attribute("data-state", "ready")


CARD = {
    "model_id": "org/model",
    "context": 8192,
    "max_batch": 8,
    "device": "cuda",
    "machine": "a GPU",
    "format": "bf16",
    "image_bytes": 16_060_000_000,
    "kv_bytes": 8_600_000_000,
    "page_tokens": 64,
    "is_embedded": False,
    "has_chat_template": False,
    "defaults": {"temperature": 0.6, "top_p": 0.9, "top_k": 0, "min_p": 0, "max_tokens": None},
}
PICTURE = {
    "state": "ready",
    "uptime": 100.0,
    "num_running": 2,
    "num_waiting": 3,
    "max_batch": 8,
    "slots": [{"request_id": "r", "tokens": 4096, "prompt_tokens": 30}],
    "pages_used": 300,
    "pages_cached": 200,
    "num_pages": 1000,
    "tokens_per_second": 600.0,
    "prompt_tokens_per_second": 0.0,
    "step_seconds": 0.0041,
    "gb_per_second": 3910.0,
    "read_gb_s": 4600.0,
    "share": 0.85,
    "stages": [
        {"name": "qkv", "nbytes": 3_000_000_000, "seconds": None},
        {"name": "attention", "nbytes": 1_000_000_000, "seconds": None},
    ],
    "total_tokens": 1000,
    "total_requests": 12,
    "engine_restarts": 1,
}


def test_a_large_model_on_a_gpu_has_a_share_and_bytes_and_one_without_template_cannot_chat(pages):
    later = {**PICTURE, "uptime": 101.0, "total_tokens": 1600}
    told = (
        f"event: model\ndata: {json.dumps(CARD)}",
        *(f"data: {json.dumps(p)}" for p in (PICTURE, later)),
    )
    page = pages.open(ready=False, before=lambda p: tell(p, "**/live", "\n\n".join((*told, ""))))
    expect(page.locator("#share")).to_have_text("85 %")
    expect(page.locator("#bandwidth")).to_have_text("3,910 GB/s of 4,600 GB/s")
    expect(page.locator("#rate")).to_have_text("600")
    expect(page.locator("#waterfall-note")).to_contain_text("no times are measured")
    assert page.locator("#waterfall li").all_inner_texts() == ["qkv\n3 GB", "attention\n1 GB"]
    expect(page.locator("#queue")).to_contain_text("2 of 8 slots taken, 3 waiting")
    expect(page.locator("#slots .taken")).to_have_text("other4,096")
    expect(page.locator("#pages")).to_contain_text("300 of 1,000 pages in use, 200 kept")
    expect(page.locator("#totals")).to_contain_text("1 engine restart")
    expect(page.get_by_label("Chat", exact=True)).to_be_disabled()
    expect(page.get_by_label("Continue text", exact=True)).to_be_checked()
    expect(page.locator(".welcome")).to_contain_text("no chat template")
