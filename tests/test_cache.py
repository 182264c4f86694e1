"""The cache saves work and is never the reason of a wrong result or a failure."""

import errno
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from flashformer.codegen import cache, image_file
from flashformer.codegen.cache import (
    CacheWarning,
    allocate_image,
    cache_dir,
    clear,
    compiled,
    entries,
    load_image,
)
from flashformer.errors import CompileError
from specs import SpecWeights, plan_of

PLAN = plan_of()
WEIGHTS = SpecWeights(PLAN.spec)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHFORMER_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def packings(monkeypatch):
    """One item for every time that weights are packed."""
    calls = []
    original = cache.pack

    def counted(*arguments):
        calls.append(arguments[0])
        time.sleep(0.02)  # long enough for others to arrive while it is under way
        original(*arguments)

    monkeypatch.setattr(cache, "pack", counted)
    return calls


@pytest.fixture
def quiet():
    """Any CacheWarning fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        yield


def image_path(folder):
    (path,) = (folder / "images").glob("*.image")
    return path


def all_files(folder):
    return [path.name for path in folder.rglob("*") if path.is_file()]


@pytest.mark.usefixtures("quiet")
def test_the_second_load_reads_the_same_bytes_without_packing(folder, packings):
    first = load_image(PLAN, WEIGHTS)
    second = load_image(PLAN, WEIGHTS)
    assert np.array_equal(first, second)
    assert len(packings) == 1
    assert all_files(folder) == [image_path(folder).name]


@pytest.mark.usefixtures("quiet")
def test_other_weights_or_another_layout_are_packed_again(packings):
    load_image(PLAN, WEIGHTS)
    other = load_image(PLAN, SpecWeights(PLAN.spec, seed=1))
    load_image(plan_of(layout="rows"), WEIGHTS)
    assert len(packings) == 3
    assert not np.array_equal(other, load_image(PLAN, WEIGHTS))


@pytest.mark.usefixtures("quiet")
def test_another_number_of_threads_uses_the_same_image(packings):
    load_image(PLAN, WEIGHTS)
    load_image(plan_of(num_ctas=1), WEIGHTS)
    assert len(packings) == 1


def test_a_cached_image_is_mapped_and_outlives_its_file(folder):
    packed = load_image(PLAN, WEIGHTS)
    mapped = load_image(PLAN, WEIGHTS)
    assert not mapped.flags.writeable
    for path in (folder / "images").glob("*.image"):
        path.unlink()
    assert np.array_equal(mapped, packed)


@pytest.mark.parametrize("nbytes", [1, 4096, (2 << 20) + 1])
def test_allocated_memory_is_zero_aligned_and_writable(nbytes):
    image = allocate_image(nbytes)
    assert image.nbytes == nbytes
    assert image.ctypes.data % (2 << 20) == 0
    assert not image.any()
    image[:] = 1


def test_progress_names_what_is_done_and_ends_at_the_whole():
    seen = []
    for _ in range(2):
        load_image(PLAN, WEIGHTS, progress=lambda *report: seen.append(report))
    ends = {what: (done, total) for what, done, total in seen}
    assert list(ends) == ["packing", "writing the image", "reading the image"]
    assert all(done == total for done, total in ends.values())


def test_any_damage_of_the_file_is_found_and_mended(folder, packings):
    whole = load_image(PLAN, WEIGHTS).copy()
    path = image_path(folder)
    original = path.read_bytes()
    size = len(original)
    random = np.random.default_rng(0)
    places = [0, PLAN.image_bytes - 1, PLAN.image_bytes, size - 60, size - 20, size - 1]
    places += random.integers(0, size, 14).tolist()
    damaged = [
        original[:place] + bytes([original[place] ^ 1 << place % 8]) + original[place + 1 :]
        for place in places
    ]
    damaged += [original[:-1], original[: size // 2], b"", original + b"\0", bytes(size)]
    weight = PLAN.matrices[0].offset
    swapped = bytearray(original)
    swapped[weight : weight + 4096], swapped[weight + 4096 : weight + 8192] = (
        original[weight + 4096 : weight + 8192],
        original[weight : weight + 4096],
    )
    for count, content in enumerate([*damaged, bytes(swapped)], start=2):
        path.write_bytes(content)
        with pytest.warns(CacheWarning, match="damaged"):
            image = load_image(PLAN, WEIGHTS)
        assert np.array_equal(image, whole)
        assert len(packings) == count
        assert path.read_bytes() == original


def test_chunks_of_an_image_are_written_and_read_in_any_number(monkeypatch, tmp_path):
    monkeypatch.setattr(image_file, "CHUNK_BYTES", 8192)
    monkeypatch.setattr(image_file, "PIECE_BYTES", 4096)
    image = np.random.default_rng(2).integers(0, 256, 50001, np.uint8)
    image_file.write_image(tmp_path / "x", image, {"key": "k"})
    found = image_file.map_image(tmp_path / "x", image.nbytes, {"key": "k"})
    assert np.array_equal(found, image)
    assert image_file.map_image(tmp_path / "x", image.nbytes, {"key": "other"}) is None
    assert image_file.map_image(tmp_path / "x", image.nbytes - 1, {"key": "k"}) is None


def test_a_cache_that_cannot_be_made_is_done_without(folder, packings):
    folder.write_text("a file where the folder should be")
    with pytest.warns(CacheWarning, match="working without"):
        image = load_image(PLAN, WEIGHTS)
    assert np.array_equal(image, load_image_elsewhere())
    assert folder.read_text() == "a file where the folder should be"


def load_image_elsewhere():
    image = np.zeros(PLAN.image_bytes, np.uint8)
    cache.pack(PLAN, WEIGHTS, image)
    return image


def read_only(*_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_a_read_only_cache_still_serves_what_it_holds(monkeypatch, folder, packings):
    load_image(PLAN, WEIGHTS)
    monkeypatch.setattr(cache, "_acquire", read_only)
    monkeypatch.setattr(os, "utime", read_only)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        load_image(PLAN, WEIGHTS)
    assert len(packings) == 1
    with pytest.warns(CacheWarning, match="Read-only file system"):
        load_image(plan_of(layout="rows"), WEIGHTS)
    assert len(packings) == 2
    assert all_files(folder) == [image_path(folder).name]


def test_a_disk_that_fills_up_leaves_nothing_half_written(monkeypatch, folder):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.warns(CacheWarning, match="No space left"):
        image = load_image(PLAN, WEIGHTS)
    assert np.array_equal(image, load_image_elsewhere())
    assert all_files(folder) == []


def test_an_image_that_would_fill_the_disk_is_not_stored(monkeypatch, folder):
    monkeypatch.setattr(cache, "SPARE_BYTES", 1 << 62)
    with pytest.warns(CacheWarning, match="GiB are needed"):
        load_image(PLAN, WEIGHTS)
    assert all_files(folder) == []


def test_weights_that_cannot_be_packed_leave_nothing_behind(folder):
    class Failing(SpecWeights):
        def tensor(self, role, layer=-1):
            raise OSError(errno.EIO, "the disk of the weights is broken")

    with pytest.raises(OSError, match="broken"):
        load_image(PLAN, Failing(PLAN.spec))
    assert all_files(folder) == []


@pytest.mark.usefixtures("quiet")
def test_callers_at_the_same_time_pack_once(packings):
    with ThreadPoolExecutor(4) as threads:
        images = list(threads.map(lambda _: load_image(PLAN, WEIGHTS), range(4)))
    assert len(packings) == 1
    assert all(np.array_equal(image, images[0]) for image in images)


def test_the_cache_is_private(folder):
    load_image(PLAN, WEIGHTS)
    compiled("cpu", ["x"], lambda build: None)
    for path in (folder, folder / "images", folder / "kernels"):
        assert path.stat().st_mode & 0o777 == 0o700
    assert image_path(folder).stat().st_mode & 0o777 == 0o600


def write_kernel(text="kernel"):
    return lambda build: (build / "kernel.so").write_text(text)


@pytest.mark.usefixtures("quiet")
def test_a_kernel_is_built_once_for_its_key():
    builds = []

    def build(into):
        builds.append(into)
        (into / "kernel.so").write_text("kernel")

    first = compiled("cpu-avx2", ["a", b"b"], build)
    assert compiled("cpu-avx2", ["a", "b"], build) == first
    assert (first / "kernel.so").read_text() == "kernel"
    assert first.name.startswith("cpu-avx2-")
    assert len(builds) == 1
    assert compiled("cpu-avx2", ["ab", ""], build) != first


def test_a_build_that_fails_leaves_nothing_behind_and_can_be_repeated(folder):
    def fail(into):
        (into / "half.o").write_text("half")
        raise CompileError("The compiler said no.")

    with pytest.raises(CompileError, match="said no"):
        compiled("cpu", ["a"], fail)
    assert all_files(folder) == []
    assert (compiled("cpu", ["a"], write_kernel()) / "kernel.so").exists()


@pytest.mark.usefixtures("quiet")
def test_threads_that_want_the_same_kernel_build_it_once():
    builds = []

    def build(into):
        builds.append(into)
        time.sleep(0.05)
        (into / "kernel.so").write_text("kernel")

    with ThreadPoolExecutor(4) as threads:
        paths = list(threads.map(lambda _: compiled("cpu", ["a"], build), range(4)))
    assert len(builds) == 1
    assert len(set(paths)) == 1


def test_without_a_cache_a_kernel_is_built_in_a_temporary_folder(folder):
    folder.write_text("a file where the folder should be")
    with pytest.warns(CacheWarning, match="working without"):
        path = compiled("cpu", ["a"], write_kernel())
    assert (path / "kernel.so").read_text() == "kernel"
    assert folder not in path.parents


def test_kernels_in_a_folder_that_others_may_write_to_are_not_run(folder):
    trusted = compiled("cpu", ["a"], write_kernel("trusted"))
    (trusted / "kernel.so").write_text("planted")
    (folder / "kernels").chmod(0o777)
    with pytest.warns(CacheWarning, match="cannot be used"):
        path = compiled("cpu", ["a"], write_kernel("trusted"))
    assert (path / "kernel.so").read_text() == "trusted"


def test_entries_are_listed_with_sizes_and_ages_and_can_be_cleared_by_kind(folder):
    load_image(PLAN, WEIGHTS)
    kernel = compiled("cpu-1.2", ["a"], write_kernel("12345"))
    os.utime(kernel, (time.time() - 100,) * 2)
    found = {entry.kind: entry for entry in entries()}
    assert [entry.kind for entry in entries()] == ["kernels", "images"]
    assert found["kernels"].nbytes == 5
    assert found["kernels"].name == kernel.name
    assert 99 < found["kernels"].idle_seconds < 200
    assert found["images"].nbytes == image_path(folder).stat().st_size
    assert clear("kernels") == (1, 5)
    assert [entry.kind for entry in entries()] == ["images"]
    assert clear() == (1, found["images"].nbytes)
    assert entries() == []
    assert all_files(folder) == []


def test_use_makes_an_entry_young_again(folder):
    load_image(PLAN, WEIGHTS)
    os.utime(image_path(folder), (time.time() - 1000,) * 2)
    load_image(PLAN, WEIGHTS)
    assert entries()[0].idle_seconds < 100


def test_an_entry_that_is_being_made_is_not_cleared(folder):
    def build(into):
        (into / "kernel.so").write_text("kernel")
        assert clear() == (0, 0)
        assert (into / "kernel.so").exists()

    assert (compiled("cpu", ["a"], build) / "kernel.so").exists()


def test_the_folder_is_chosen_by_the_environment(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("FLASHFORMER_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "flashformer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "flashformer"
