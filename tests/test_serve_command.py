"""`flashformer serve` as a person starts and ends it."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serving import wait_until


@pytest.fixture
def process():
    command = [sys.executable, "-m", "flashformer", "serve", "--port", "0"]
    started = subprocess.Popen(
        [*command, "--device", "reference", "--context", "128", "--api-key", "auto"],
        stderr=subprocess.PIPE,
        text=True,
    )
    yield started
    started.kill()
    started.wait()


def said(process):
    """What it says until it listens."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("listens"):
            return "".join(lines)
    raise AssertionError(lines)


def children(pid):
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def alive(pid):
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_it_says_what_it_serves_where_and_for_whom(process):
    text = said(process)
    assert "model   flashformer-default" in text
    assert "up to 8 texts at a time" in text
    assert "of weights and" in text
    assert "a key is needed" in text
    key = re.search(r"API key (ff-\S+)", text)[1]
    port = int(re.search(r"listens http://127\.0\.0\.1:(\d+)", text)[1])
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/v1/models")
    assert connection.getresponse().status == 401
    connection.close()
    connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
    answer = connection.getresponse()
    assert json.loads(answer.read())["data"][0]["id"] == "flashformer-default"
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 0
    rest = process.stderr.read()
    assert "GET /v1/models 200" in rest
    assert key not in rest


def test_ctrl_c_ends_it_with_130_and_nothing_stays(process):
    said(process)
    family = children(process.pid)
    assert len(family) == 3  # an engine and two helpers
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130
    assert not any(alive(pid) for pid in family)


def test_a_killed_server_leaves_no_process_behind(process):
    said(process)
    family = children(process.pid)
    process.kill()
    process.wait()
    began = time.monotonic()
    assert wait_until(lambda: not any(alive(pid) for pid in family), 5)
    assert time.monotonic() - began < 2.0


def test_a_bind_that_others_reach_needs_a_key(cli):
    assert "--api-key" in cli("serve", "--host", "0.0.0.0").error(2)


def test_a_port_in_use_is_told_before_anything_is_loaded(cli, process):
    port = re.search(r"listens http://127\.0\.0\.1:(\d+)", said(process))[1]
    sentence = cli("serve", "--port", port, "--device", "reference").error(2)
    assert f"127.0.0.1:{port} cannot be used" in sentence


def test_a_model_that_is_not_there_is_one_sentence(cli):
    sentence = cli("serve", "/no/such/folder", "--port", "0", "--device", "reference").error(3)
    assert "/no/such/folder" in sentence


def test_a_file_of_keys_must_hold_some(cli, tmp_path):
    (tmp_path / "empty").write_text("\n")
    assert "holds no key" in cli("serve", "--api-key-file", tmp_path / "empty").error(2)
    assert "cannot be read" in cli("serve", "--api-key-file", tmp_path / "none").error(2)


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "llguidance", "msgspec"])
def test_without_the_extra_one_sentence_says_what_to_install(package, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{package!r}] = None\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "flashformer", "serve"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'flashformer[serve]'" in done.stderr
