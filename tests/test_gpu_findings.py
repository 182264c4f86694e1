"""What doctor says about a GPU, told by a driver and an nvidia-smi that are made up."""

import ctypes

import pytest

from flashformer.backends.base import Fit
from flashformer.errors import UsageError
from flashformer.serve import doctor as doctor_verb
from flashformer.serve.bench import find_model
from flashformer.serve.gpu_findings import ATTRIBUTES, gpu_findings, nvidia_smi, rows_of

H200 = {
    "sms": 132, "major": 9, "minor": 0, "cooperative": 1, "shared_bytes": 232448,
}  # fmt: skip


class Driver:
    """libcuda with GPUs of given numbers."""

    def __init__(self, *gpus):
        self.gpus = gpus

    def cuDeviceGet(self, device, number):
        device._obj.value = number
        return 0 if number < len(self.gpus) else 101

    def cuDeviceGetAttribute(self, value, attribute, device):
        (name,) = [name for name, number in ATTRIBUTES.items() if number == attribute]
        value._obj.value = self.gpus[device.value].get(name, 0)
        return 0

    def cuDeviceGetName(self, name, length, device):
        ctypes.memmove(name, b"NVIDIA H200\0", 12)
        return 0

    def cuDeviceGetPCIBusId(self, place, length, device):
        ctypes.memmove(place, b"0000:0F:00.0\0", 13)
        return 0


def card(*rest, bus="00000000:0F:00.0", index="0"):
    """A row of nvidia-smi; `rest`: total and free MiB, MIG, compute mode."""
    return [bus, index, "NVIDIA H200", *rest]


FREE_CARD = card("143771", "143000", "Disabled", "Default")
ELSEWHERE = "00000000:0A:00.0"


def findings(gpu, cards=(FREE_CARD,), apps=()):
    answers = {"gpu": cards, "compute-apps": [list(row) for row in apps]}
    return list(gpu_findings(Driver(gpu), lambda kind, fields: answers[kind]))


def test_a_free_gpu_is_described_and_nothing_is_wrong_with_it():
    found = findings(H200)
    assert [f.level for f in found] == ["ok", "ok"]
    for word in ("NVIDIA H200", "9.0", "132 SMs", "227 KB", "cooperative launch"):
        assert word in found[0].detail
    assert "NVIDIA H200" not in found[1].detail
    assert "143000 of 143771 MiB free" in found[1].detail


@pytest.mark.parametrize(
    ("changes", "row", "word"),
    [
        ({"major": 7}, None, "8.0"),
        ({"cooperative": 0}, None, "no cooperative launch"),
        ({"mps": 1}, None, "MPS"),
        ({"exec_timeout": 1}, None, "display"),
        ({}, card("143771", "143000", "Disabled", "Prohibited"), "Prohibited"),
        ({}, card("143771", "1000", "Disabled", "Default"), "another program"),
    ],
)
def test_what_is_in_the_way_is_named_with_its_cure(changes, row, word):
    warnings = [f for f in findings(H200 | changes, [row or FREE_CARD]) if f.level == "warn"]
    assert len(warnings) == 1
    assert warnings[0].cure
    assert word in f"{warnings[0].detail} {warnings[0].cure}"


def test_a_mig_slice_and_other_processes_are_told():
    slice_ = card("20000", "19000", "Enabled", "Default")
    found = findings(H200, [slice_], apps=[("00000000:0F:00.0", "17", "python3", "512")])
    details = " ".join(f.detail for f in found)
    assert "MIG" in details
    assert "python3 (pid 17, 512 MiB)" in details


def test_the_card_that_cuda_calls_the_first_is_told_of_not_the_one_that_nvidia_smi_does():
    busy = card("143771", "70", "Enabled", "Prohibited", bus=ELSEWHERE)
    free = card("143771", "143000", "Disabled", "Default", index="1")
    found = findings(H200, [busy, free], apps=[(ELSEWHERE, "17", "python3", "143701")])
    assert [f.level for f in found] == ["ok", "ok", "ok"]
    assert "143000 of 143771 MiB free" in found[1].detail
    assert found[2].subject == "other gpus"
    assert "0: NVIDIA H200 (70 MiB free)" in found[2].detail
    assert not any("python3" in f.detail or "MIG" in f.detail for f in found)


def test_a_card_that_nvidia_smi_does_not_list_gets_no_other_s_numbers():
    elsewhere = card("143771", "70", "Enabled", "Default", bus=ELSEWHERE)
    found = findings(H200, [elsewhere], apps=[(ELSEWHERE, "17", "python3", "143701")])
    assert [f.subject for f in found] == ["gpu"]


def test_without_nvidia_smi_the_driver_s_numbers_remain(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert nvidia_smi("gpu", "memory.total") == []
    assert [f.subject for f in gpu_findings(Driver(H200, H200))] == ["gpu"]


def test_answers_with_missing_fields_are_not_taken_for_rows():
    text = "17, /usr/bin/python3, 512\nNo running processes found\n"
    assert rows_of(text, 3) == [["17", "/usr/bin/python3", "512"]]
    assert rows_of("", 3) == []


def test_doctor_says_what_context_of_a_model_fits(monkeypatch):
    model = find_model(None, "llama-3.1-8b")
    fits = Fit("bf16", 16 << 30, 131072, 130 << 30, 131072)
    monkeypatch.setattr(doctor_verb, "gpu_fit", lambda *_: fits)
    found = doctor_verb.fit(model, 2)
    assert found.level == "ok"
    assert "131,072 tokens" in found.detail

    monkeypatch.setattr(doctor_verb, "gpu_fit", lambda *_: Fit("bf16", 1, 1, 1, 0))
    assert doctor_verb.fit(model, 2).level == "warn"


def test_doctor_without_a_gpu_still_answers(monkeypatch):
    def refuse(*_):
        raise UsageError("device cuda needs an NVIDIA GPU and none was found; use --device cpu")

    monkeypatch.setattr(doctor_verb, "gpu_fit", refuse)
    monkeypatch.setattr(doctor_verb, "gpu_bandwidth", refuse)
    assert "none was found" in doctor_verb.fit(find_model(None, "llama-3.1-8b"), 1).detail
    assert doctor_verb.bandwidth().level == "warn"
