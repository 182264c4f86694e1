"""Checkpoint files: views without copies, memory given back, and every damage one sentence."""

import json
import os
import shutil
import struct
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from flashformer.errors import CheckpointError, FlashFormerError, UnsupportedModelError
from flashformer.model.checkpoint import Checkpoint, check_finite
from flashformer.model.spec import ModelSpec
from flashformer.model.weights import CheckpointWeights

MAX_SECONDS = 2.0


def copy(source, folder):
    return Path(shutil.copytree(source, folder))


def header_of(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_file(path, header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def assert_one_sentence(error):
    assert "\n" not in str(error)
    assert str(error).endswith(".")


def refused(folder, names="."):
    """Opening must end in one sentence, soon."""
    start = time.monotonic()
    with pytest.raises(FlashFormerError, match=names) as caught:
        Checkpoint.open(folder)
    assert time.monotonic() - start < MAX_SECONDS
    assert_one_sentence(caught.value)
    return caught.value


def load_everything(folder):
    opened = Checkpoint.open(folder)
    spec = ModelSpec.from_hf(opened.config, opened.generation_config)
    weights = CheckpointWeights(opened, spec)
    for role, layer in (("embed_tokens", -1), ("q_proj", 0), ("down_proj", 1), ("lm_head", -1)):
        weights.tensor(role, layer).tobytes()


def test_a_tensor_is_a_read_only_view_of_the_mapped_file(checkpoint):
    opened = Checkpoint.open(checkpoint("llama"))
    tensor = opened.tensor("model.layers.0.self_attn.q_proj.weight")
    base = tensor
    while isinstance(base, np.ndarray):
        base = base.base
    assert base is opened.files[0].mapping or base.obj is opened.files[0].mapping
    with pytest.raises(ValueError, match="read-only"):
        tensor[0, 0] = 1


def test_a_tensor_that_the_file_does_not_align_is_copied(tmp_path, checkpoint):
    folder = copy(checkpoint("llama"), tmp_path / "c")
    header, body = header_of(folder / "model.safetensors")
    text = json.dumps(header)
    text += " " * (1 + len(text) % 2)  # an odd header: all 16-bit tensors start at odd bytes
    expected = Checkpoint.open(checkpoint("llama")).tensor("model.norm.weight").tobytes()
    write_file(folder / "model.safetensors", text.encode(), body)
    tensor = Checkpoint.open(folder).tensor("model.norm.weight")
    assert tensor.flags.aligned
    assert tensor.tobytes() == expected


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_released_tensors_leave_the_resident_memory(tmp_path, checkpoint):
    folder = copy(checkpoint("llama"), tmp_path / "c")
    rows, row_bytes = 1 << 15, 1 << 10
    (folder / "model.safetensors").unlink()
    save_file({"big": np.ones((rows, row_bytes // 4), np.float32)}, folder / "model.safetensors")
    opened = Checkpoint.open(folder)

    def resident_kb():
        lines = Path("/proc/self/smaps").read_text().split(str(folder / "model.safetensors"))
        return int(lines[1].split("Rss:")[1].split()[0])

    assert opened.tensor("big").sum() == rows * row_bytes / 4
    full = rows * row_bytes // 1024
    slack = 2 * 2048  # the system may drop whole huge pages at both ends
    assert resident_kb() >= full
    opened.release("big", rows // 4, rows // 4)
    assert abs(resident_kb() - full * 3 // 4) <= slack
    opened.release("big")
    assert resident_kb() <= slack
    assert (opened.tensor("big")[-1] == 1).all()


def test_the_fingerprint_follows_the_config_and_every_file(tmp_path, checkpoint):
    folder = copy(checkpoint("llama-sharded"), tmp_path / "c")
    seen = [Checkpoint.open(folder).fingerprint]
    assert Checkpoint.open(folder).fingerprint == seen[0]
    shard = next(folder.glob("model-00002*"))
    os.utime(shard, ns=(1, 1))
    seen.append(Checkpoint.open(folder).fingerprint)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    seen.append(Checkpoint.open(folder).fingerprint)
    header, body = header_of(shard)
    write_file(shard, header | {"__metadata__": {"format": "xx"}}, body)
    os.utime(shard, ns=(1, 1))
    seen.append(Checkpoint.open(folder).fingerprint)
    assert len(set(seen)) == 4


# Hub ids


def test_a_hub_id_that_is_not_cached_is_one_sentence_when_offline(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused("some-org/some-model", "some-org/some-model; .*offline|cannot be reached")


def test_a_hub_id_opens_from_the_cache_of_huggingface_hub(tmp_path, monkeypatch, checkpoint):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some-org--some-model"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for i, file in enumerate(sorted(checkpoint("llama").iterdir())):
        shutil.copy(file, repository / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    opened = Checkpoint.open("some-org/some-model")
    assert opened.folder == snapshot
    assert opened.names == Checkpoint.open(checkpoint("llama")).names


@pytest.mark.parametrize("name", ["", "no/such/folder", "a\0b", "x" * 5000, "~nobody-here/x y"])
def test_a_path_that_names_nothing_is_refused(name):
    refused(name)


# Damaged folders


def test_a_file_is_not_taken_for_a_folder(checkpoint):
    refused(checkpoint("llama") / "config.json", "is a file")


def test_an_empty_folder_is_refused(tmp_path):
    refused(tmp_path, "no weights")


def test_weights_without_a_config_are_refused(tmp_path, checkpoint):
    folder = copy(checkpoint("llama"), tmp_path / "c")
    (folder / "config.json").unlink()
    refused(folder, "no file config.json")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\ud800", "[" * 100_000, '{"a": 1e999999'])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, checkpoint, text):
    folder = copy(checkpoint("llama"), tmp_path / "c")
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(folder, "config.json is no JSON")


def test_a_huge_config_is_refused_unread(tmp_path, checkpoint):
    folder = copy(checkpoint("llama"), tmp_path / "c")
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    refused(folder, "larger than 8 MB")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_devices_fifos_and_folders_are_no_files(tmp_path, checkpoint, name):
    makers = (os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero"))
    for i, make in enumerate(makers):
        folder = copy(checkpoint("llama"), tmp_path / str(i))
        (folder / name).unlink()
        make(folder / name)
        refused(folder, name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_out_of_the_folder_are_refused(tmp_path, checkpoint, name):
    folder = copy(checkpoint("llama"), tmp_path / "c")
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to("../outside")
    refused(folder, "links to")


def test_dangling_and_circular_links_are_refused(tmp_path, checkpoint):
    for i, target in enumerate(("nowhere", "model.safetensors")):
        folder = copy(checkpoint("llama"), tmp_path / str(i))
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(target)
        refused(folder, "model.safetensors")


def test_a_gguf_file_is_refused_as_such_alone_and_in_a_folder_without_a_config(tmp_path):
    (tmp_path / "model.gguf").touch()
    refused(tmp_path / "model.gguf", "GGUF")
    refused(tmp_path, "GGUF")


@pytest.mark.parametrize(("name", "kind"), [("m.gguf", "GGUF"), ("pytorch_model.bin", "pickled")])
def test_weights_in_other_formats_are_named(tmp_path, checkpoint, name, kind):
    folder = copy(checkpoint("llama"), tmp_path / "c")
    (folder / "model.safetensors").rename(folder / name)
    assert isinstance(refused(folder, kind), UnsupportedModelError)


def test_a_folder_without_weights_is_refused(tmp_path, checkpoint):
    folder = copy(checkpoint("llama"), tmp_path / "c")
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights")


@pytest.mark.parametrize(
    "place",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "missing.safetensors",
        "sub/../../x.safetensors",
        "config.json",
        "a\0.safetensors",
        "x" * 300 + ".safetensors",
        3,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_may_only_name_files_of_the_folder(tmp_path, checkpoint, place):
    folder = copy(checkpoint("llama-sharded"), tmp_path / "c")
    shutil.copy(next(folder.glob("model-00001*")), tmp_path / "model.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = place
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert isinstance(refused(folder), CheckpointError)


@pytest.mark.parametrize("index", [{}, [], {"weight_map": []}, {"weight_map": {}}])
def test_an_index_needs_a_map(tmp_path, checkpoint, index):
    folder = copy(checkpoint("llama-sharded"), tmp_path / "c")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "index")


def test_a_tensor_must_be_in_the_shard_that_the_index_names(tmp_path, checkpoint):
    folder = copy(checkpoint("llama-sharded"), tmp_path / "c")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    places = index["weight_map"]
    wrong = next(p for p in places.values() if p != places["model.norm.weight"])
    places["model.norm.weight"] = wrong
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, r"model\.norm\.weight.*does not hold it")


# Damaged files


def entry(**fields):
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | fields


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b"\xff" * 20,
        {"a": 1},
        {"a": {}},
        {"a": entry(dtype=5)},
        {"a": entry(dtype="F3")},
        {"a": entry(shape=[2, -2])},
        {"a": entry(shape=[2, 2.0])},
        {"a": entry(shape=[True, 4])},
        {"a": entry(shape=[2**62, 2**62])},
        {"a": entry(shape=[1] * 1000)},
        {"a": entry(shape="ab")},
        {"a": entry(data_offsets=[0])},
        {"a": entry(data_offsets=[16, 0])},
        {"a": entry(data_offsets=[-16, 0])},
        {"a": entry(data_offsets=[0, 2**63])},
        {"a": entry(data_offsets=[8, 24])},
        {"a": entry(shape=[2], data_offsets=[0, 8])},
        {"a": entry(), "b": entry()},
        {"a": entry(), "__metadata__": {"x": 1}},
        {"a" * 100: entry(shape=[3, 2])},
        b'{"a":' + json.dumps(entry()).encode() + b',"n":' + b"9" * 5000 + b"}",
    ],
)
def test_a_header_that_does_not_describe_the_file_is_refused(tmp_path, checkpoint, header):
    folder = copy(checkpoint("llama"), tmp_path / "c")
    write_file(folder / "model.safetensors", header, bytes(16))
    refused(folder, "damaged")


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**40, 2**63, 2**64 - 1])
def test_a_header_length_that_makes_no_sense_is_refused(tmp_path, checkpoint, length):
    folder = copy(checkpoint("llama"), tmp_path / "c")
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    refused(folder, "damaged")


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_mutated_file_is_loaded_or_refused_with_one_sentence(tmp_path, checkpoint, data):
    folder = tmp_path / "c"
    if not folder.exists():
        copy(checkpoint("llama"), folder)
    original = (checkpoint("llama") / "model.safetensors").read_bytes()
    (header_bytes,) = struct.unpack("<Q", original[:8])
    mutated = bytearray(original)
    for _ in range(data.draw(st.integers(0, 3))):
        where = data.draw(st.integers(0, 7 + header_bytes))
        mutated[where] = data.draw(st.integers(0, 255))
    end = data.draw(st.one_of(st.just(len(original)), st.integers(0, len(original))))
    path = folder / "model.safetensors"
    path.unlink()  # an earlier example may still have the old file mapped
    path.write_bytes(mutated[:end])
    start = time.monotonic()
    try:
        load_everything(folder)
    except FlashFormerError as error:
        assert_one_sentence(error)
    else:
        assert end == len(original)
    assert time.monotonic() - start < MAX_SECONDS


# Weights that are not numbers


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [(0, 0), (1500, 999), (2999, 1000)])
def test_a_weight_that_is_not_finite_is_found_wherever_it_is(dtype, bad, where):
    weights = np.zeros((3000, 1001), dtype)
    weights[where] = bad
    with pytest.raises(CheckpointError, match="q_proj"):
        check_finite(weights, "q_proj")


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_the_largest_and_smallest_numbers_are_finite(dtype):
    info = ml_dtypes.finfo(dtype)
    values = [info.max, info.min, info.tiny, info.smallest_subnormal, 0, -0.0]
    check_finite(np.array(values, dtype), "norm")
    check_finite(np.zeros((0, 4), dtype), "norm")
    check_finite(np.zeros((8, 8), dtype)[::2], "rows of a view")
