"""The page in a browser: talking with the model, and what nobody can do to the page."""

import re
from dataclasses import replace

import pytest
from playwright.sync_api import expect

from browsing import (
    PROMPT,
    SECONDS,
    answers,
    choose,
    delta,
    needs_browser,
    sample,
    send,
    stream,
    wait_for_end,
)
from flashformer.serve.server.routes import ENDPOINTS
from serving import TINY, Serving, wait_until

KEY = "correct-horse-battery"
LOUD = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
pytestmark = needs_browser


def test_an_answer_is_the_server_s_own_text(pages):
    page = pages.open()
    sample(page, max_tokens=40)
    for mode in ("text", "chat"):
        choose(page, mode)
        send(page)
        wait_for_end(page)
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 40}
    expected = [
        pages.serving.ask("/v1/completions", {"prompt": PROMPT, "max_tokens": 40})[1]["choices"][0][
            "text"
        ],
        pages.serving.ask("/v1/chat/completions", chat)[1]["choices"][0]["message"]["content"],
    ]
    assert answers(page) == expected
    footer = page.locator(".turn footer").first
    expect(footer).to_contain_text(
        re.compile(r"^40 tokens · \d.* a second · first after .*seed \d+")
    )


def go_on_for_ever(route):
    """No stream ends by itself while the others begin."""
    route.continue_(post_data={**route.request.post_data_json, "ignore_eos": True})


def test_eight_streams_go_side_by_side_while_the_machine_is_watched(pages):
    page = pages.open()
    choose(page, "text")
    sample(page, temperature=1, max_tokens=900)
    for _ in range(7):
        page.get_by_role("button", name="One stream more").click()
    expect(page.get_by_role("button", name="One stream more")).to_be_disabled()
    page.route("**/v1/completions", go_on_for_ever)
    page.get_by_label("Seed of stream B", exact=True).fill("7")
    page.get_by_label("Seed of stream C", exact=True).fill("7")
    send(page)
    assert wait_until(lambda: pages.serving.client.stats().num_running == 8, SECONDS)
    expect(page.locator("#slots .mine")).to_have_count(8)
    assert sorted(page.locator("#slots b").all_text_contents()) == list("ABCDEFGH")
    expect(page.locator("#queue")).to_contain_text("8 of 8 slots taken")
    expect(page.locator("#pages")).to_contain_text(re.compile(r"^[1-9]\d* of \d+ pages in use"))
    assert float(page.locator("#rate").inner_text().replace(",", "")) > 0
    page.get_by_role("button", name="Stop stream H").click()
    expect(page.locator(".column:last-child footer")).to_contain_text("stopped")
    assert wait_until(lambda: pages.serving.client.stats().num_running == 7, SECONDS)
    page.keyboard.press("Escape")
    wait_for_end(page)
    assert pages.serving.wait_idle()
    texts = answers(page)
    same = min(len(texts[1]), len(texts[2]))
    assert texts[1][:same] == texts[2][:same] != ""  # one seed, one text
    assert len({*texts[:2], *texts[3:]}) == 7  # the others have their own


def test_a_turn_can_be_had_again_and_gone_on_with(pages):
    page = pages.open()
    choose(page, "text")
    sample(page, max_tokens=24)
    send(page)
    wait_for_end(page)
    (first,) = answers(page)
    page.get_by_role("button", name="Go on").click()
    expect(page.get_by_role("button", name="Go on")).to_be_visible()
    (longer,) = answers(page)
    assert longer.startswith(first)
    assert len(longer) > len(first)
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("button", name="Retry")).to_be_visible()
    assert answers(page) == [first]  # greedy: the same text again
    page.get_by_role("button", name="New conversation").click()
    assert answers(page) == []


def test_a_conversation_goes_along_with_every_request(pages):
    page = pages.open()
    choose(page, "chat")
    sample(page, system="Be brief.")
    stream(page, delta(content="One."), delta("stop"))
    with page.expect_request("**/v1/chat/completions") as asked:
        send(page, "First?")
    wait_for_end(page)
    system, first = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "First?"},
    )
    assert asked.value.post_data_json["messages"] == [system, first]
    with page.expect_request("**/v1/chat/completions") as asked:
        send(page, "Second?")
    wait_for_end(page)
    said = {"role": "assistant", "content": "One."}
    second = {"role": "user", "content": "Second?"}
    assert asked.value.post_data_json["messages"] == [system, first, said, second]


def test_what_a_model_writes_is_text_and_what_it_thinks_is_apart(pages):
    page = pages.open()
    choose(page, "chat")
    stream(page, delta(reasoning_content=LOUD), delta(content=LOUD), delta("stop"))
    send(page, LOUD)
    wait_for_end(page)
    assert answers(page) == [LOUD]
    assert page.locator(".asked").inner_text().endswith(LOUD)
    page.get_by_text("Reasoning").click()
    assert page.locator(".thoughts div").inner_text() == LOUD
    assert page.locator("#columns img, #columns script").count() == 0
    assert page.title() == "FlashFormer"


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_code_between_fences_is_set_apart_however_it_comes(pages, size):
    text = "So:\n```python\nx = `1`\n\n```\nand ``two`` ticks, ```three``` here.\n  ```\ny = 2\n```"
    page = pages.open()
    choose(page, "chat")
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    stream(page, *(delta(content=part) for part in parts), delta("stop"))
    send(page)
    wait_for_end(page)
    assert page.locator(".answer pre").all_text_contents() == ["x = `1`\n", "y = 2"]
    said = page.locator(".answer").inner_text()
    assert "and ``two`` ticks, ```three``` here." in said
    assert "python" not in said


def test_nothing_foreign_runs_and_no_other_host_is_asked(pages):
    page = pages.open()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    expect(page.locator("#state")).to_have_attribute("data-state", "ready")
    assert asked
    assert all(
        url.startswith((f"http://127.0.0.1:{pages.serving.port}/", "data:")) for url in asked
    )
    refused = page.evaluate(
        """async () => {
            const tries = [
                () => { document.body.innerHTML = "<b>x</b>"; },
                () => { document.createElement("script").text = "document.title = 1"; },
                () => fetch("http://127.0.0.1:1/"),
            ];
            const refused = [];
            for (const attempt of tries) {
                try { await attempt(); refused.push(false); } catch { refused.push(true); }
            }
            return refused;
        }"""
    )
    assert refused == [True, True, True]
    assert pages.problems
    pages.problems.clear()


def test_a_refusal_is_shown_in_the_server_s_words(pages):
    page = pages.open()
    choose(page, "text")
    send(page, "word " * 3000)
    wait_for_end(page)
    expect(page.locator(".turn .error")).to_contain_text("1024")
    page.route(
        "**/v1/completions",
        lambda route: route.fulfill(
            status=429, json={"error": {"message": "256 texts wait already."}}
        ),
    )
    send(page)
    expect(page.locator(".turn .error").last).to_have_text("256 texts wait already.")
    stream(page, {"error": {"message": "the engine was lost."}}, path="**/v1/completions")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".turn .error").last).to_have_text("The engine was lost.")
    page.route("**/v1/completions", lambda route: route.abort())
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".turn .error").last).to_contain_text("cannot be reached")
    sample(page, top_p=7)
    send(page)
    expect(page.locator("#notice")).to_contain_text("Top-p")
    expect(page.locator("[name=top_p]")).to_be_focused()


def test_a_key_is_asked_for_and_stays_in_the_tab(pages):
    with Serving(replace(TINY, api_keys=(KEY,)), ENDPOINTS) as locked:
        page = pages.open(locked, ready=False)
        field = page.get_by_label("API key")
        expect(field).to_be_focused()
        page.keyboard.press("Escape")
        field.fill("wrong-key")
        page.keyboard.press("Enter")
        expect(page.locator("#key-error")).to_have_text("The server does not take that key.")
        field.fill(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#state")).to_have_attribute("data-state", "ready")
        sample(page, max_tokens=3)
        send(page)
        wait_for_end(page)
        expect(page.locator(".turn footer")).to_contain_text("3 tokens")
        assert KEY in page.evaluate("Object.values(sessionStorage)")
        assert KEY not in page.evaluate("JSON.stringify(localStorage) + document.cookie")
        page.close()
