"""The Python API over real checkpoints and backends, as a user calls it."""

import dataclasses
import threading

import numpy as np
import pytest

from flashformer import LLM, SamplingParams
from flashformer.engine.logprobs import log_softmax
from flashformer.errors import UsageError

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPT = "One token takes one launch"


@pytest.fixture(scope="module")
def llm(checkpoint):
    with LLM(checkpoint("llama"), device="reference", max_batch=4, context=128) as loaded:
        yield loaded


def test_generate_returns_the_fields_that_users_know(llm):
    params = dataclasses.replace(GREEDY, logprobs=2)
    (result,) = llm.generate(PROMPT, params)
    (output,) = result.outputs
    assert result.prompt == PROMPT
    assert result.prompt_token_ids == llm.tokenizer.encode(PROMPT)
    assert result.finished
    assert len(output.token_ids) == len(output.logprobs) == 12
    assert output.text == llm.tokenizer.decode(output.token_ids)
    assert (output.index, output.finish_reason, output.stop_reason) == (0, "length", None)
    chosen = [entry[t].logprob for t, entry in zip(output.token_ids, output.logprobs, strict=True)]
    assert output.cumulative_logprob == pytest.approx(sum(chosen), rel=1e-12)
    assert output.logprobs[0][output.token_ids[0]].rank == 1
    assert result.metrics.ttft > 0
    assert result.metrics.decode_tok_s > 0


def test_every_form_of_prompt_gives_the_same_tokens(llm):
    ids = llm.tokenizer.encode(PROMPT)
    forms = [PROMPT, ids, {"prompt_token_ids": ids}, {"prompt": PROMPT}, tuple(ids), np.array(ids)]
    results = llm.generate(forms, GREEDY)
    assert len({tuple(r.outputs[0].token_ids) for r in results}) == 1
    assert [r.prompt for r in results] == [PROMPT, None, None, PROMPT, None, None]
    assert llm.generate(ids, GREEDY)[0].prompt_token_ids == ids
    assert llm.generate([], GREEDY) == []


def test_greedy_tokens_follow_from_the_logits_of_every_position(llm):
    ids = llm.tokenizer.encode(PROMPT)
    (output,) = llm.generate(ids, GREEDY)[0].outputs
    logits = llm.logits([*ids, *output.token_ids])
    assert logits.shape == (len(ids) + 12, llm.spec.vocab_size)
    assert logits.dtype == np.float32
    assert logits.argmax(1)[len(ids) - 1 : -1].tolist() == output.token_ids


def test_prompt_logprobs_follow_from_the_logits(llm):
    params = dataclasses.replace(GREEDY, prompt_logprobs=0, max_tokens=1)
    (result,) = llm.generate(PROMPT, params)
    ids = result.prompt_token_ids
    expected = log_softmax(llm.logits(PROMPT))
    found = [entry[t].logprob for t, entry in zip(ids[1:], result.prompt_logprobs[1:], strict=True)]
    assert found == [float(expected[i, t]) for i, t in enumerate(ids[1:])]


def test_streamed_chunks_join_to_what_generate_returns(llm):
    for seed in range(20):
        params = SamplingParams(temperature=1.5, seed=seed, max_tokens=25, logprobs=1)
        (output,) = llm.generate(PROMPT, params)[0].outputs
        chunks = list(llm.stream(PROMPT, params))
        assert "".join(c.text for c in chunks) == output.text
        assert [t for c in chunks for t in c.token_ids] == output.token_ids
        assert [entry for c in chunks for entry in c.logprobs] == output.logprobs
        assert chunks[-1].finish_reason == output.finish_reason
        assert all(c.finish_reason is None and c.usage is None for c in chunks[:-1])
        usage = chunks[-1].usage
        assert usage.completion_tokens == len(output.token_ids)
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_only_the_last_chunk_of_several_sequences_has_the_usage(llm):
    params = SamplingParams(n=3, seed=1, max_tokens=5, ignore_eos=True)
    chunks = list(llm.stream(PROMPT, params))
    assert [c.usage is not None for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage.completion_tokens == 15
    assert {c.index for c in chunks} == {0, 1, 2}


def test_a_stop_string_ends_the_text_before_it_in_both_ways(llm):
    free = SamplingParams(temperature=1.2, seed=4, max_tokens=40, ignore_eos=True)
    text = llm.generate(PROMPT, free)[0].outputs[0].text
    stop = text[10:13]
    for include in (False, True):
        params = dataclasses.replace(free, stop=stop, include_stop_str_in_output=include)
        (output,) = llm.generate(PROMPT, params)[0].outputs
        assert output.text == text[: text.index(stop) + (len(stop) if include else 0)]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        chunks = list(llm.stream(PROMPT, params))
        assert "".join(c.text for c in chunks) == output.text


def test_min_tokens_lets_a_stop_string_pass(llm):
    free = SamplingParams(temperature=1.2, seed=4, max_tokens=40, ignore_eos=True)
    text = llm.generate(PROMPT, free)[0].outputs[0].text
    params = dataclasses.replace(free, stop=text[2:4], min_tokens=40)
    (output,) = llm.generate(PROMPT, params)[0].outputs
    assert (output.text, output.finish_reason) == (text, "length")


def test_a_victim_has_the_same_bits_alone_and_in_a_full_batch(llm):
    params = SamplingParams(temperature=0.9, seed=7, max_tokens=16, logprobs=20, ignore_eos=True)
    neighbours = [
        SamplingParams(max_tokens=9, presence_penalty=2, frequency_penalty=2, n=2),
        SamplingParams(max_tokens=30, logit_bias={5: 100.0}),
        SamplingParams(max_tokens=3, prompt_logprobs=5),
    ]
    alone = llm.generate(PROMPT, params)[0].outputs
    prompts = ["быстрая лиса " * 5, PROMPT, "x", "The next stage waits for it. " * 2]
    beside = llm.generate(prompts, [neighbours[0], params, *neighbours[1:]])[1].outputs
    assert alone == beside


def test_a_reused_prefix_gives_the_same_bits(checkpoint):
    prompt = "A stage ends where its last tile ends, and the next stage waits for it."
    params = SamplingParams(temperature=1, seed=3, logprobs=20, max_tokens=20, ignore_eos=True)
    with LLM(checkpoint("qwen3"), device="reference", max_batch=2, context=128) as llm:
        (first,) = llm.generate(prompt, params)
        (second,) = llm.generate(prompt, params)
        longer = prompt + first.outputs[0].text
        (reused,) = llm.generate(longer, params)
        llm.engine.kv_cache.forget()
        (fresh,) = llm.generate(longer, params)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 16)
    assert second.metrics.cached_tokens == 16
    assert first.outputs == second.outputs
    assert reused.num_cached_tokens > 16
    assert fresh.num_cached_tokens == 0
    assert reused.outputs == fresh.outputs


def test_cpu_and_reference_agree_and_the_cpu_keeps_its_bits(checkpoint):
    """Alone, beside neighbours and behind a reused prefix; logits within float16 KV rounding."""
    folder = checkpoint("llama")
    params = SamplingParams(temperature=0.8, seed=5, logprobs=20, max_tokens=24, ignore_eos=True)
    prompt = "Der schnelle Fuchs springt; el zorro veloz salta; быстрая лиса прыгает."
    with (
        LLM(folder, device="cpu", threads=2, max_batch=4, context=256) as cpu,
        LLM(folder, device="reference", max_batch=1, context=256) as reference,
    ):
        ours, exact = cpu.logits(prompt), reference.logits(prompt)
        assert np.abs(ours - exact).max() <= 5e-3 * np.abs(exact).max()
        (alone,) = cpu.generate(prompt, params)
        others = [prompt[:9], prompt[20:], prompt * 2]
        beside = cpu.generate([*others, prompt], [GREEDY, GREEDY, GREEDY, params])[-1]
        assert beside.num_cached_tokens > 0 == alone.num_cached_tokens
        assert beside.outputs == alone.outputs


def test_a_conversation_is_rendered_encoded_and_answered(llm):
    messages = [{"role": "user", "content": "x"}]
    (result,) = llm.chat(messages, GREEDY)
    assert result.prompt == "<|begin|><|user|>x<|end|><|assistant|>"
    assert result.prompt_token_ids[0] == llm.spec.bos_token_id
    assert result.prompt_token_ids.count(llm.spec.bos_token_id) == 1
    both = llm.chat([messages, messages], GREEDY)
    assert [r.outputs for r in both] == [result.outputs] * 2
    text = "".join(c.text for c in llm.chat_stream(messages, GREEDY))
    assert text == result.outputs[0].text
    continued = llm.chat(
        [*messages, {"role": "assistant", "content": "So"}],
        GREEDY,
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert continued[0].prompt.endswith("So")


def test_closing_a_stream_frees_its_slot_at_once(llm):
    streams = [llm.stream(PROMPT, dataclasses.replace(GREEDY, max_tokens=50)) for _ in range(4)]
    for stream in streams:
        next(stream)
    assert llm.engine.num_running == 4
    with pytest.raises(UsageError, match="in use"):
        llm.logits([1, 2])
    streams[0].close()
    assert llm.engine.num_running == 3
    del streams[1:]
    stream = None
    assert llm.engine.num_running == 0
    llm.engine.kv_cache.check()
    assert stream is None


def test_a_stream_that_never_started_holds_nothing(llm):
    stream = llm.stream(PROMPT, GREEDY)
    assert not llm.engine.has_work
    stream.close()
    assert not llm.engine.has_work


def test_interleaved_streams_each_get_their_own_text(llm):
    prompts = [PROMPT, "The weights", "ends"]
    expected = [r.outputs[0].text for r in llm.generate(prompts, GREEDY)]
    texts = ["", "", ""]
    streams = [llm.stream(p, GREEDY) for p in prompts]
    for _ in range(12):
        for i, stream in enumerate(streams):
            texts[i] += next(stream).text
    assert texts == expected


def test_threads_share_the_batch_and_get_their_own_text(llm):
    prompts = [PROMPT[i:] for i in range(8)]
    expected = [r.outputs[0].text for r in llm.generate(prompts, GREEDY)]
    found = {}

    def work(i):
        found[i] = "".join(c.text for c in llm.stream(prompts[i], GREEDY))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[i] for i in range(8)] == expected
    assert not llm.engine.has_work


def test_an_interrupted_generate_gives_everything_back(llm, monkeypatch):
    calls = []

    def interrupt(batch, step=llm.backend.step):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(batch)

    monkeypatch.setattr(llm.backend, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT] * 6, GREEDY)
    assert not llm.engine.has_work
    llm.engine.kv_cache.check()


def test_a_bad_request_among_good_ones_starts_none(llm):
    with pytest.raises(UsageError, match="128"):
        llm.generate([PROMPT, [1] * 128], GREEDY)
    assert not llm.engine.has_work


@pytest.mark.parametrize(
    ("prompts", "params", "sentence"),
    [
        (5, None, "a prompt must be a text"),
        ([PROMPT, None], None, "a prompt must be a text"),
        ([1.5], None, "must be integers"),
        ({"text": "x"}, None, "a prompt must be a text"),
        ({"prompt_token_ids": "ab"}, None, "must be a list of token ids"),
        (b"bytes", None, "not a bytes"),
        ("\ud800", None, "surrogate"),
        (PROMPT, {"temperature": 0}, "sampling_params must be a SamplingParams"),
        ([PROMPT], [GREEDY, GREEDY], "1 prompts but 2 SamplingParams"),
        (PROMPT, SamplingParams(stop_token_ids=[321]), "vocabulary ends at 320"),
        (PROMPT, SamplingParams(min_tokens=127), "leaves room for"),
    ],
)
def test_a_wrong_call_is_refused_with_one_sentence(llm, prompts, params, sentence):
    for call in (llm.generate, llm.stream):
        if call == llm.stream and isinstance(prompts, list):
            continue
        with pytest.raises(UsageError, match=sentence) as caught:
            call(prompts, params)
        assert "\n" not in str(caught.value)
    assert not llm.engine.has_work


def test_a_closed_llm_says_so_and_closing_twice_is_fine(checkpoint):
    llm = LLM(checkpoint("llama"), device="reference", context=64)
    stream = llm.stream(PROMPT, GREEDY)
    late = llm.stream(PROMPT, GREEDY)
    next(stream)
    llm.close()
    llm.close()
    assert list(stream) == []
    for call in (lambda: llm.generate(PROMPT), lambda: llm.logits(PROMPT), lambda: next(late)):
        with pytest.raises(UsageError, match="closed"):
            call()
