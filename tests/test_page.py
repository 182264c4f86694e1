"""The page at `/`, without a browser: one document, a strict policy, and what feeds it."""

import base64
import hashlib
import json
import re
from dataclasses import replace

import pytest

from flashformer.serve.load import LoadOptions
from flashformer.serve.server import wire
from flashformer.serve.server.live import Recorder
from flashformer.serve.server.page import FOLDER, SCRIPTS, document
from serving import TINY, Serving
from test_protocol_fields import INFO

KEY = "correct-horse-battery"
MAX_BYTES = 96 << 10  # the page comes before the first token
MAX_LINES = 400
TEXT = document().content.decode()
CPU = replace(TINY, load=LoadOptions(None, "cpu", None, 256, None, max_batch=8))


@pytest.fixture(scope="module")
def locked():
    with Serving(replace(TINY, api_keys=(KEY,))) as running:
        yield running


@pytest.fixture(scope="module")
def policy():
    header = dict(document().headers)[b"content-security-policy"].decode()
    parts = (part.split() for part in header.split(";"))
    return {name: sources for name, *sources in parts}


def inline(name):
    return re.findall(rf"<{name}[^>]*>(.*?)</{name}>", TEXT, re.DOTALL)


@pytest.mark.parametrize("name", ["script", "style"])
def test_the_policy_allows_the_one_inline_element_by_its_hash(policy, name):
    (text,) = inline(name)
    assert len(text) > 1000
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert policy[f"{name}-src"] == [f"'sha256-{digest}'"]


def test_the_policy_allows_nothing_else(policy):
    for name in ("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"):
        assert policy[name] == ["'none'"]
    assert policy["connect-src"] == ["'self'"]
    assert policy["img-src"] == ["data:"]
    assert policy["require-trusted-types-for"] == ["'script'"]
    assert not [s for sources in policy.values() for s in sources if "unsafe" in s or "*" in s]


def test_the_page_names_no_other_host_and_no_other_file():
    addresses = set(re.findall(r"\w+://[^\s'\"`)]+", TEXT))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a namespace, which nobody fetches
    risky = r"\bsrc=|@import|url\(|^import\b|\bimport\(|importScripts"
    assert not re.search(risky, TEXT, re.MULTILINE)
    assert set(re.findall(r'href="([^"]{1,10})', TEXT)) == {"data:image", "#prompt"}


def test_text_from_outside_never_becomes_markup():
    risky = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|Function\("
    assert not re.search(risky, TEXT)
    assert not re.search(r"<[^>]+\s(on\w+|style)=", re.sub(r"<script.*?</script>", "", TEXT))


def test_the_page_is_small_and_its_files_are_short_and_all_used():
    assert len(document().content) <= MAX_BYTES
    files = {path.name: path for path in FOLDER.iterdir()}
    assert set(files) == {"index.html", "style.css", *SCRIPTS}
    for path in files.values():
        assert len(path.read_text().splitlines()) <= MAX_LINES


def test_every_control_has_a_name_and_the_order_of_focus_is_that_of_the_page():
    (body,) = re.findall(r"<body>(.*)<script", TEXT, re.DOTALL)
    assert "tabindex" not in body
    labels = set(re.findall(r'<label[^>]* for="(\w+)"', body))
    wrapped = "".join(re.findall(r"<label.*?</label>", body, re.DOTALL))
    for tag, attributes in re.findall(r"<(input|textarea|select)\b([^>]*)>", body):
        found = re.search(r'id="(\w+)"', attributes)
        named = (found and found[1] in labels) or f"<{tag}{attributes}>" in wrapped
        assert named or "aria-label" in attributes, attributes
    # Buttons without a text of their own are named here, the theme's by the script.
    for attributes, text in re.findall(r"<button\b([^>]*)>(.*?)</button>", body, re.DOTALL):
        assert re.search(r"[A-Za-z]", text) or "aria-label" in attributes or "theme" in attributes
    assert 'lang="en"' in TEXT
    assert 'aria-live="polite"' in body
    assert 'role="alert"' in body


def test_the_page_is_open_says_nothing_of_the_server_and_what_feeds_it_needs_the_key(locked):
    status, content, headers = locked.ask("/")
    assert (status, content) == (200, document().content)
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    for path in ("/live", "/v1/models", "/metrics"):
        assert locked.ask(path)[0] == 401


def test_a_browser_asks_for_a_password_only_where_a_person_opened_an_address(locked):
    opened = locked.ask("/metrics", headers={"Sec-Fetch-Mode": "navigate"})[2]
    assert "Basic" in opened["WWW-Authenticate"]
    called = locked.ask("/live", headers={"Sec-Fetch-Mode": "cors"})[2]
    assert called["WWW-Authenticate"] == "Bearer"


def first_events(serving, count):
    """(name, data) of the first events of `/live`."""
    connection = serving.connect()
    connection.request("GET", "/live")
    answer = connection.getresponse()
    events = []
    while len(events) < count:
        lines = []
        while line := answer.readline().decode().strip():
            lines.append(line)
        name, data = ("message", lines[0]) if len(lines) == 1 else lines
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    connection.close()
    return events


def test_the_live_stream_begins_with_the_model_and_then_shows_the_machine():
    with Serving(CPU) as serving:
        serving.tokens({"max_tokens": 60, "ignore_eos": True})
        (first, card), (second, picture) = first_events(serving, 2)
        assert (first, second) == ("model", "message")
        assert card["context"] == 256
        assert card["is_embedded"]
        assert card["defaults"]["temperature"] == 0.0
        names = [stage["name"] for stage in picture["stages"]]
        assert names == [
            *("embed", "qkv", "attention", "o_proj", "gate_up", "down", "lm_head", "sample")
        ]
        nbytes = {stage["name"]: stage["nbytes"] for stage in picture["stages"]}
        weights = sum(nbytes.values()) - nbytes["attention"]
        assert 0.99 * card["image_bytes"] < weights <= card["image_bytes"]
        assert nbytes["attention"] > 0
        assert all(stage["seconds"] > 0 for stage in picture["stages"] if stage["nbytes"])


def test_a_machine_that_keeps_no_times_for_stages_shows_bytes_alone():
    recorder = Recorder()
    info = replace(INFO, stages=(("qkv", 30), ("attention", 0)))
    recorder.note_usage(wire.Usage(((1, 5, 3),), 0, 1, 0, kv_step_bytes=12))
    picture = recorder.sum_up(state="ready", slots=(), info=info, restarts=0)
    assert [(s.name, s.nbytes, s.seconds) for s in picture.stages] == [
        ("qkv", 30, None),
        ("attention", 12, None),
    ]
    for times in ((1.0, 4.0), (9.0, 5.0), (2.0, 6.0)):
        recorder.note_usage(wire.Usage((), 0, 0, 0, stage_seconds=times))
    picture = recorder.sum_up(state="ready", slots=(), info=info, restarts=0)
    assert [s.seconds for s in picture.stages] == [2.0, 5.0]
    assert picture.stages[1].nbytes == 12  # of the last step, when nothing runs any more
