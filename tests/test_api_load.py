"""Loading a model: options, side files, defaults, and memory foreseen before it is allocated."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

import flashformer
from flashformer import LLM, SamplingParams
from flashformer.backends import reference
from flashformer.backends.reference import reference_machine
from flashformer.engine.memory import available_memory, require_memory
from flashformer.errors import (
    CheckpointError,
    FlashFormerError,
    OutOfMemoryError,
    ParameterError,
    UsageError,
)
from flashformer.serve.load import LoadOptions, plan_of

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPT = "One token takes one launch"


@pytest.fixture(scope="module")
def llm(checkpoint):
    with LLM(checkpoint("llama"), device="reference", max_batch=4, context=128) as loaded:
        yield loaded


def test_seeds_of_requests_without_one_come_from_the_llm(checkpoint):
    def texts(seed):
        with LLM(checkpoint("llama"), device="reference", context=64, seed=seed) as llm:
            params = SamplingParams(temperature=1.5, max_tokens=8, ignore_eos=True)
            return [r.outputs[0].text for r in llm.generate([PROMPT] * 3, params)]

    assert texts(3) == texts(3)
    assert len({*texts(3), *texts(9)}) == 6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"device": "tpu"}, "auto, cpu, cuda, reference"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_batch": True}, "max_batch"),
        ({"max_batch": 9}, "batch of 9 .* of 1 to 8"),
        ({"context": 1}, "context"),
        ({"context": 10**9}, "512 positions"),
        ({"context": 1.5}, "context"),
        ({"quant": "int3"}, "int8, fp8, int4, "),
        ({"seed": -1}, "seed"),
        ({"seed": "1"}, "seed"),
    ],
)
def test_wrong_options_are_refused_with_one_sentence(checkpoint, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        LLM(checkpoint("llama"), **{"device": "reference", **options})


@pytest.fixture
def four_rows(monkeypatch):
    """A machine whose step has four rows, as a GPU with little shared memory a CTA."""
    machine = replace(reference_machine(), max_rows=4)
    monkeypatch.setattr(reference, "reference_machine", lambda: machine)


@pytest.mark.usefixtures("four_rows")
def test_where_nobody_chose_a_batch_the_machine_does(checkpoint):
    folder = checkpoint("llama")
    with LLM(folder, device="reference", context=64) as llm:
        assert llm.plan.options.max_batch == llm.memory_report().max_batch == 4
        assert len(llm.generate([PROMPT] * 5, GREEDY)) == 5
    assert plan_of(LoadOptions(str(folder), "reference", None, 64, None, None)) == llm.plan


@pytest.mark.usefixtures("four_rows")
def test_a_batch_that_somebody_chose_is_had_or_refused(checkpoint):
    with LLM(checkpoint("llama"), device="reference", context=64, max_batch=3) as llm:
        assert llm.plan.options.max_batch == 3
    with pytest.raises(UsageError, match=r"batch of 8 .* choose a max_batch .* of 1 to 4\."):
        LLM(checkpoint("llama"), device="reference", max_batch=8)


@pytest.mark.parametrize("quant", ["int8", "int4", "int4g128"])
def test_quant_decides_the_format_of_the_weights(checkpoint, quant):
    with LLM(checkpoint("llama"), device="reference", quant=quant, context=64) as llm:
        assert (llm.plan.options.format, llm.plan.options.head_format) == (quant, quant)
        assert len(llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids) == 12


@pytest.mark.parametrize(
    ("variant", "name"), [("llama", "bf16"), ("llama-f16", "f16"), ("llama-f32", "f32")]
)
def test_without_quant_the_format_is_the_checkpoint_s(checkpoint, variant, name):
    with LLM(checkpoint(variant), device="reference", context=64) as llm:
        assert (llm.plan.options.format, llm.plan.options.head_format) == (name, name)


def test_a_checkpoint_without_tokenizer_still_takes_token_ids(copied):
    (copied / "tokenizer.json").unlink()
    with LLM(copied, device="reference", context=64) as llm:
        assert llm.tokenizer is None
        (output,) = llm.generate([3, 4, 5], GREEDY)[0].outputs
        assert (len(output.token_ids), output.text) == (12, "")
        for call in (
            lambda: llm.generate(PROMPT),
            lambda: llm.chat([{"role": "user", "content": "x"}]),
        ):
            with pytest.raises(UsageError, match=r"needs a tokenizer, .* no tokenizer\.json"):
                call()


def write(folder, name, value):
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def test_defaults_come_from_generation_config(copied):
    config = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "repetition_penalty": 1.1,
        "eos_token_id": [7, 9],
        "max_length": 20,
    }
    write(copied, "generation_config.json", config)
    with LLM(copied, device="reference", context=64) as llm:
        params = llm.default_sampling_params
        assert (params.temperature, params.top_k, params.top_p) == (0.6, 20, 0.95)
        assert params.repetition_penalty == 1.1
        assert set(llm.defaults_from_checkpoint) == {
            "temperature",
            "top_k",
            "top_p",
            "repetition_penalty",
        }
        request = llm.engine.add([3], params)
        assert request.stop_ids == {1, 7, 9}


@pytest.mark.parametrize("config", [{}, {"do_sample": False, "temperature": 0.6, "top_p": 0.5}])
def test_a_checkpoint_that_does_not_sample_is_greedy(copied, config):
    write(copied, "generation_config.json", config)
    with LLM(copied, device="reference", context=64) as llm:
        assert llm.default_sampling_params == SamplingParams(temperature=0)
        assert dict(llm.defaults_from_checkpoint) == ({"temperature": 0.0} if config else {})
        params = SamplingParams(temperature=0)
        assert llm.generate(PROMPT)[0].outputs == llm.generate(PROMPT, params)[0].outputs


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("generation_config.json", {"do_sample": True, "temperature": -1}),
        ("generation_config.json", {"do_sample": True, "top_p": "x"}),
        ("generation_config.json", {"eos_token_id": 321}),
        ("generation_config.json", {"eos_token_id": ["a"]}),
        ("generation_config.json", "["),
        ("tokenizer_config.json", "[]"),
        ("tokenizer.json", "{}"),
    ],
)
def test_a_damaged_side_file_is_named(copied, name, value):
    write(copied, name, value)
    with pytest.raises(CheckpointError, match=name) as caught:
        LLM(copied, device="reference", context=64)
    assert "\n" not in str(caught.value)


def test_the_embedded_default_runs_and_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHFORMER_CACHE_DIR", str(tmp_path))
    with LLM(device="reference", context=64) as llm:
        assert llm.generate("Hi", GREEDY)[0].outputs[0].text


def test_the_memory_report_counts_image_and_pages(llm):
    report = llm.memory_report()
    pages = 4 * 128 // llm.plan.machine.page_tokens
    assert llm.backend.num_pages == pages
    assert report.kv_bytes == 4 * 128 * llm.plan.kv_bytes_per_token
    assert report.total_bytes == report.image_bytes + report.kv_bytes
    assert report.available_bytes is None or report.available_bytes > report.total_bytes


def test_too_little_memory_is_foreseen_with_numbers_and_an_option_that_fits(llm, checkpoint):
    image = llm.plan.image_bytes
    kv = llm.memory_report().kv_bytes
    assert require_memory(llm.plan, image + kv).total_bytes == image + kv
    assert require_memory(llm.plan, None).available_bytes is None
    with pytest.raises(OutOfMemoryError, match="max_batch=1 fits"):
        require_memory(llm.plan, image + kv // 2)
    with pytest.raises(OutOfMemoryError, match=r"quant='int8'.* fits"):
        require_memory(llm.plan, image)
    with pytest.raises(OutOfMemoryError, match="choose a smaller model"):
        require_memory(llm.plan, 1000)
    with LLM(checkpoint("llama"), device="reference", max_batch=2, context=512) as longer:
        assert longer.plan.options.context == 512


def test_a_model_that_does_not_fit_is_refused_before_anything_is_allocated(checkpoint, monkeypatch):
    monkeypatch.setattr("flashformer.engine.llm.available_memory", lambda: 1 << 20)
    monkeypatch.setattr("flashformer.engine.llm.open_backend", None)  # calling it would fail
    with pytest.raises(OutOfMemoryError, match=r"needs 0\.0\d GiB .* 0\.00 GiB"):
        LLM(checkpoint("llama"), device="reference", context=512)


def test_available_memory_respects_the_limits_of_cgroups(tmp_path):
    def put(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    assert available_memory(tmp_path) is None
    put("proc/meminfo", "MemTotal: 900 kB\nMemAvailable:    800 kB\n")
    assert available_memory(tmp_path) == 800 * 1024
    put("proc/self/cgroup", "0::/a/b\n")
    put("sys/fs/cgroup/a/b/memory.max", "max\n")
    put("sys/fs/cgroup/a/memory.max", "500000\n")
    put("sys/fs/cgroup/a/memory.current", "400000\n")
    put("sys/fs/cgroup/a/memory.stat", "anon 3\ninactive_file 50000\n")
    assert available_memory(tmp_path) == 150000
    put("proc/self/cgroup", "5:cpu,memory:/\n")
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "70000")
    put("sys/fs/cgroup/memory/memory.usage_in_bytes", "90000")
    assert available_memory(tmp_path) == 0


def test_public_names_are_there_and_importing_the_package_is_cheap():
    for name in flashformer.__all__:
        assert getattr(flashformer, name) is not None
    assert set(flashformer.__all__) <= set(dir(flashformer))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = flashformer.no_such_name
    assert issubclass(ParameterError, UsageError)
    assert issubclass(flashformer.OutOfMemoryError, FlashFormerError)
    heavy = "('numpy', 'jinja2', 'tokenizers', 'torch', 'typing_extensions')"
    code = f"import sys, flashformer; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
