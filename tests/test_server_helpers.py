"""Templates and grammars that explode end in a sentence, and nobody else notices."""

import asyncio
import json
import os
import signal
import time
from dataclasses import replace

import pytest

from flashformer.engine.sampling import SamplingParams
from flashformer.serve.server.client import EngineClient
from flashformer.serve.server.helpers import HelperPool
from flashformer.serve.server.messages import GenerateRequest, Grammar, RejectedError
from flashformer.serve.server.settings import Limits
from flashformer.serve.server.wire import CheckGrammar, Render, Setup
from serving import IDS, TINY, Serving

BOMBS = {
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{% set x = 'A' * 2000000000 * 4 %}{{ x }}",
    "output": "{% for a in range(99999) %}{{ 'A' * 100000 }}{% endfor %}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "escape": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "power": "{{ 9 ** (9 ** 9) }}",
}


def job(content="hi"):
    return Render([{"role": "user", "content": content}], None, True, False, None)


def setup(templates):
    return Setup(templates, {}, "", 64, ())


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_bomb_ends_in_a_second_and_the_next_job_is_served(bomb):
    async def main():
        limits = Limits(render_time=1.0)
        pool = HelperPool(setup({"default": BOMBS[bomb]}), limits)
        await pool.start()
        began = time.monotonic()
        with pytest.raises(RejectedError) as caught:
            await pool.render(job())
        seconds = time.monotonic() - began
        again = time.monotonic()
        pool._setup = setup({"default": "{{ messages[0].content }}"})
        for helper in list(pool._all):
            await helper.ask(pool._setup, 5.0)
        assert await pool.render(job("fine")) == "fine"
        waited = time.monotonic() - again
        await pool.close()
        return seconds, waited, str(caught.value)

    seconds, waited, sentence = asyncio.run(main())
    assert seconds < 1.5
    assert waited < 1.5
    assert "template" in sentence


def test_a_job_whose_client_leaves_does_not_cost_a_helper():
    async def main():
        template = "{% for a in range(2000) %}{% for b in range(200) %}{% endfor %}{% endfor %}ok"
        pool = HelperPool(setup({"default": template}), Limits())
        await pool.start()
        for _ in range(20):
            task = asyncio.create_task(pool.render(job()))
            await asyncio.sleep(0.003)
            task.cancel()
        assert await pool.render(job()) == "ok"
        assert pool.num_killed == 0
        await pool.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "(" * 50),
        Grammar("json_schema", json.dumps({"type": "no such type"})),
        Grammar("json_schema", "{"),
        Grammar("lark", "start: nothing"),
        Grammar("json_schema", json.dumps({"enum": [str(i) for i in range(20000)]}) + " " * 300000),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused_before_it_reaches_the_engine(serving, grammar):
    began = time.monotonic()
    status, answer, _ = serving.ask(body={"grammar": [grammar.kind, grammar.source]})
    assert status == 400, answer
    assert time.monotonic() - began < 13.0
    assert serving.client.stats().engine_restarts == 0


@pytest.fixture(scope="module")
def serving():
    with Serving() as running:
        yield running


def test_a_text_keeps_to_its_grammar_whatever_runs_beside_it(serving):
    body = {"grammar": ["regex", "[ab]{4}c"], "seed": 3, "max_tokens": 20, "n": 3}
    status, answer, _ = serving.ask(body=body)
    assert status == 200, answer
    for index in range(3):
        text = "".join(e["text"] for e in answer["events"] if e["at"] == [0, index])
        assert len(text) == 5
        assert set(text[:4]) <= set("ab")
        assert text[4] == "c"
    assert [e["reason"] for e in answer["events"] if e["reason"]] == ["stop"] * 3


def test_a_grammar_is_followed_across_the_loss_of_an_engine(serving):
    body = {"grammar": ["regex", "(ab){90}c"], "seed": 3, "max_tokens": 250}
    expected = serving.tokens(body)
    stream = serving.stream(body)
    first = [next(stream) for _ in range(9)]
    os.kill(serving.client.engine_pid, signal.SIGKILL)
    events = [*first[1:], *stream]
    assert [i for e in events[:-1] for i in json.loads(e)["ids"]] == expected


def test_closing_the_iterator_cancels_the_request():
    async def main():
        client = EngineClient(replace(TINY, load=TINY.load))
        await client.start()
        params = SamplingParams(max_tokens=200, ignore_eos=True)
        events = client.generate(GenerateRequest("r", (tuple(IDS),), params))
        assert (await anext(events)).token_ids
        assert client.num_open == 1
        await events.aclose()
        assert client.num_open == 0
        for _ in range(200):
            if client.stats().num_running == client.stats().pages_used == 0:
                break
            await asyncio.sleep(0.01)
        assert client.stats().pages_used == 0
        with pytest.raises(RejectedError, match="vocabulary"):
            client.detokenize([10**6])
        ids = await client.tokenize("some text")
        assert client.detokenize(ids).endswith("some text")
        chat = await client.render_chat([{"role": "user", "content": "hi"}])
        assert "hi" in client.detokenize(chat)
        await client.close()

    asyncio.run(main())


def test_a_huge_text_does_not_hold_up_the_event_loop():
    async def main():
        client = EngineClient(TINY)
        await client.start()
        task = asyncio.create_task(client.tokenize("a few words " * 40_000))
        worst = 0.0
        while not task.done():
            began = time.monotonic()
            await asyncio.sleep(0.001)
            worst = max(worst, time.monotonic() - began)
        ids = await task
        assert client.decode(ids[-40:]).endswith("a few words ")
        assert ids[-9:] == (await client.tokenize("a few words " * 40))[-9:]
        await client.close()
        return worst

    assert asyncio.run(main()) < 0.2  # the text takes more than half a second


def test_what_no_frame_can_hold_is_the_request_s_fault():
    async def main():
        pool = HelperPool(setup({"default": "ok"}), Limits())
        await pool.start()
        for content in ("\ud800", 1 << 70, object()):
            with pytest.raises(RejectedError):
                await pool.render(job(content))
        with pytest.raises(RejectedError):
            await pool.check(Grammar("regex", "\ud800"))
        assert await pool.render(job()) == "ok"
        assert isinstance(CheckGrammar(Grammar("regex", "a")).grammar, Grammar)
        await pool.close()

    asyncio.run(main())
