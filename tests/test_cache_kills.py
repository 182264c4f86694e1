"""A process that is killed while it fills the cache leaves nothing that the next start minds."""

import subprocess
import sys
from pathlib import Path

import pytest

from flashformer.codegen.cache import compiled, load_image
from specs import SpecWeights, plan_of


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHFORMER_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Repeats the same work, killed before its first, second, third ... call of the system, until it
# survives; after each, the next start must work and tidy up.
KILLED = """
import fcntl, os, signal, sys, warnings
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[1])
from specs import SpecWeights, plan_of
from flashformer.codegen import image_file
from flashformer.codegen.cache import cache_dir, clear, compiled, load_image
warnings.simplefilter("error")
image_file.PIECE_BYTES = 1 << 15
plan = plan_of()
weights = SpecWeights(plan.spec)
whole = load_image(plan, weights).copy()
clear()

def build(into):
    (into / "a").write_text("a")
    (into / "b").write_text("b")

def use():
    if sys.argv[2] == "image":
        assert np.array_equal(load_image(plan, weights), whole)
    else:
        assert sorted(file.name for file in compiled("cpu", ["key"], build).iterdir()) == ["a", "b"]

def kill_at(point):
    calls = []
    def guarded(call):
        def stand_in(*arguments, **options):
            calls.append(call)
            if len(calls) == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)
        return stand_in
    for place, names in [
        (os, ("pwrite", "fsync", "open")),
        (fcntl, ("flock",)),
        (Path, ("mkdir", "replace", "rename", "unlink", "write_text")),
    ]:
        for name in names:
            setattr(place, name, guarded(getattr(place, name)))

for point in range(1, 100):
    child = os.fork()
    if child == 0:
        kill_at(point)
        use()
        os._exit(0)
    killed = os.waitpid(child, 0)[1] == signal.SIGKILL
    use()
    left = [path for path in cache_dir().rglob("*") if path.suffix in (".tmp", ".lock")]
    assert not left, (point, left)
    clear()
    if not killed:
        print(point)
        break
"""


@pytest.mark.parametrize("what", ["image", "kernel"])
def test_a_process_that_is_killed_at_any_write_leaves_no_trace_for_the_next_start(what):
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10  # so many places were tried, the last one beyond the end


@pytest.mark.parametrize("what", ["image", "kernel"])
def test_what_a_killed_process_left_is_removed_by_work_on_another_entry(what, folder):
    plan, weights = plan_of(), SpecWeights(plan_of().spec)
    load_image(plan, weights)
    compiled("cpu", ["a"], lambda build: None)
    (folder / "images" / "dead.image.tmp").write_bytes(b"half")
    (folder / "images" / "dead.image.lock").touch()
    (folder / "kernels" / "dead.tmp").mkdir()
    (folder / "kernels" / "dead.tmp" / "half.o").touch()
    if what == "image":
        load_image(plan_of(layout="rows"), weights)
    else:
        compiled("cpu", ["b"], lambda build: None)
    assert not list((folder / f"{what}s").glob("dead*"))
