"""A server in a process of its own, the plainest of its clients, and the result file.

`Running(...)` -> requests over raw sockets, so that the client costs as little as it can
"""

import argparse
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from flashformer.serve.benchmark.provenance import provenance, system

RESULTS = Path(__file__).parent.parent / "results" / "server"
PATH = "/v1/completions"
CONTEXT = 1024  # the longest of the default model
_METRIC = re.compile(r"^flashformer:(\w+) ([0-9.e+-]+)$", re.MULTILINE)


class Running:
    """`flashformer serve` on a free port of loopback."""

    def __init__(self, *flags: str, device: str = "cpu", context: int = CONTEXT) -> None:
        self._process = spawn(*flags, device=device, context=context)
        self.port = self._port()
        # From here on the log goes nowhere; a full pipe would stop the server.
        self._drain = subprocess.Popen(
            ["cat"], stdin=self._process.stderr, stdout=subprocess.DEVNULL
        )

    def _port(self) -> int:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if found := re.search(r"listens http://127\.0\.0\.1:(\d+)", line):
                return int(found[1])
        raise SystemExit("the server did not start")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The HTTP process."""
        return self._process.pid

    @property
    def engine_pid(self) -> int:
        """Its engine process."""
        for child in children(self.pid):
            command = Path(f"/proc/{child}/cmdline").read_bytes()
            if b"server.worker" in command:
                return child
        raise LookupError("there is no engine process")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it; the exit status."""
        if self._process.poll() is None:
            self._process.send_signal(number)
        status = self._process.wait(60)
        self._drain.wait(10)
        return status

    def ask(self, path: str = PATH, body: object = None) -> tuple[int, Any]:
        """Status and JSON (or bytes) of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            headers = {"Content-Type": "application/json"}
            verb = "GET" if body is None else "POST"
            connection.request(verb, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            data = answer.read()
            is_json = answer.headers.get_content_type() == "application/json"
            return answer.status, json.loads(data) if is_json else data

    def open(self, body: object, path: str = PATH) -> socket.socket:
        """A socket with a request sent."""
        sock = socket.create_connection(("127.0.0.1", self.port))
        sock.sendall(request_bytes(body, path))
        return sock

    def metrics(self) -> dict[str, float]:
        """Every metric without labels."""
        text = self.ask("/metrics")[1].decode()
        return {name: float(value) for name, value in _METRIC.findall(text)}

    def leftovers(self) -> dict[str, float]:
        """What requests hold right now; all zero on an idle server."""
        metrics = self.metrics()
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return {name: metrics[name] for name in names}

    def wait_idle(self, seconds: float = 30.0) -> float:
        """Wait until nothing is held; how long that took. `TimeoutError` if something stays."""
        began = time.monotonic()
        while any(self.leftovers().values()):
            if time.monotonic() - began > seconds:
                raise TimeoutError(f"something is still held: {self.leftovers()}")
            time.sleep(0.01)
        return time.monotonic() - began

    def resources(self) -> dict[str, dict[str, int]]:
        """Descriptors, threads and resident KiB of the two processes."""
        time.sleep(0.2)  # for the last connections to be closed on the other side as well
        return {
            "http": resources(self.pid),
            "engine": resources(self.engine_pid),
        }


def spawn(*flags: str, device: str = "cpu", context: int = CONTEXT) -> "subprocess.Popen[str]":
    """The process, which has only just begun to load."""
    command = [sys.executable, "-m", "flashformer", "serve", "--port", "0", "--seed", "0"]
    command += ["--device", device, "--context", str(context), *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def request_bytes(body: object, path: str = PATH) -> bytes:
    """A POST as it goes over the wire."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def resources(pid: int) -> dict[str, int]:
    """What a process holds of the system."""
    status = Path(f"/proc/{pid}/status").read_text()
    values = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return {
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),  # noqa: PTH208 - counts only
        "threads": int(values["Threads"]),
        "rss_kib": int(values["VmRSS"].split()[0]),
    }


def rss_growth(
    before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]
) -> dict[str, float]:
    """By which share the resident memory of each process grew."""
    return {name: round(after[name]["rss_kib"] / before[name]["rss_kib"] - 1, 4) for name in before}


def run_and_record(
    name: str,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    add: Callable[[argparse.ArgumentParser], None] | None = None,
) -> None:
    """Run a measurement from the command line and write its result file."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json")
    if add is not None:
        add(parser)
    arguments = parser.parse_args()
    before = system()
    began = time.monotonic()
    result = measure(arguments)
    document = {
        "kind": f"server-{name}",
        "provenance": provenance(),
        "system": before,
        "seconds": round(time.monotonic() - began, 1),
        **result,
    }
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    sys.stdout.write(json.dumps(result, indent=1)[:3000] + "\n")
    if not result["passed"]:
        raise SystemExit(1)
