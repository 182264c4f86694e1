"""A real server on loopback for tests: own event loop in a thread, engine in its own process.

`Serving(ServeOptions(...))` is a context manager; `ask` and `stream` are the plainest of clients.
"""

import asyncio
import http.client
import json
import threading
import time
from dataclasses import dataclass, replace

from flashformer.engine.sampling import SamplingParams
from flashformer.serve.load import LoadOptions
from flashformer.serve.server.endpoint import RequestError
from flashformer.serve.server.messages import Grammar
from flashformer.serve.server.run import Server
from flashformer.serve.server.settings import ServeOptions

IDS = [5, 9, 2, 44, 17, 3, 8]
TINY = ServeOptions(
    load=LoadOptions(None, "reference", None, 256, None, max_batch=8), port=0, seed=0
)


class RawResponder:
    """Events as they are, one JSON object each."""

    def __init__(self):
        self.events = []

    def begin(self):
        return ["data: begin\n\n"]

    def add(self, event):
        entry = {
            "at": [event.prompt_index, event.sequence_index],
            "ids": list(event.token_ids),
            "text": event.text,
            "logprobs": [{str(k): v.logprob for k, v in e.items()} for e in event.logprobs],
            "reason": event.finish_reason,
            "cached": event.cached_tokens,
        }
        if event.prompt_logprobs is not None:
            entry["prompt_logprobs"] = len(event.prompt_logprobs)
        self.events.append(entry)
        return [f"data: {json.dumps(entry)}\n\n"]

    def end(self):
        return ["data: [DONE]\n\n"]

    def fail(self, error):
        body = {"status": error.status, "code": error.code, "message": error.message}
        return [f"data: {json.dumps({'error': body})}\n\n", "data: [DONE]\n\n"]

    def body(self):
        return {"events": self.events}


@dataclass
class RawRequest:
    stream: bool
    prompts: list
    params: SamplingParams
    form: Grammar | None = None

    def grammar(self, prompts, decode):
        return self.form

    def responder(self, prompts, decode):
        return RawResponder()


def parse_raw(body, info):
    """{"prompts": [[ids]], "stream": bool, fields of SamplingParams}."""
    try:
        fields = json.loads(body)
    except ValueError:
        raise RequestError(400, "the body is not JSON.", code="invalid_json") from None
    prompts = [tuple(prompt) for prompt in fields.pop("prompts", [IDS])]
    stream = fields.pop("stream", False)
    grammar = fields.pop("grammar", None)
    grammar = None if grammar is None else Grammar(*grammar)
    return RawRequest(stream, prompts, SamplingParams(**fields), grammar)


class Serving:
    """Runs a server while the context lasts; by then the model is loaded."""

    def __init__(self, options=TINY, endpoints=None, **limits):
        self.options = replace(options, limits=replace(options.limits, **limits))
        self._endpoints = endpoints or {"/raw": parse_raw}
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.server = self.loop = self.error = self.code = None

    def _run(self):
        async def main():
            self.loop = asyncio.get_running_loop()
            self.server = Server(self.options, self._endpoints, on_ready=self._on_ready)
            return await self.server.run()

        try:
            self.code = asyncio.run(main())
        except Exception as error:
            self.error = error
        self._started.set()

    def _on_ready(self, *_):
        self._started.set()

    def __enter__(self):
        self._thread.start()
        assert self._started.wait(120), "the server does not start"
        if self.error is not None:
            raise self.error
        self.port = int(self.server.url.rpartition(":")[2])
        self.client = self.server.client
        return self

    def __exit__(self, *_):
        self.stop()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the server does not end"

    def stop(self, times=1):
        for _ in range(times):
            try:
                self.loop.call_soon_threadsafe(self.server.stop)
            except RuntimeError:  # it has ended already
                return

    def join(self, seconds):
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def connections(self):
        return len(self.server.connections)

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, path="/raw", body=None, *, method=None, headers=None):
        """(status, JSON or bytes, headers) of one request."""
        connection = self.connect()
        try:
            content = (
                None if body is None else body if isinstance(body, bytes) else json.dumps(body)
            )
            named = {"Content-Type": "application/json"} if body is not None else {}
            verb = method or ("GET" if body is None else "POST")
            connection.request(verb, path, content, {**named, **(headers or {})})
            answer = connection.getresponse()
            data = answer.read()
            if data and answer.headers.get_content_type() == "application/json":
                data = json.loads(data)
            return answer.status, data, answer.headers
        finally:
            connection.close()

    def stream(self, body, path="/raw", headers=None):
        """The data of each server-sent event, as it comes."""
        connection = self.connect()
        try:
            named = {"Content-Type": "application/json", **(headers or {})}
            connection.request("POST", path, json.dumps({**body, "stream": True}), named)
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            for line in answer:
                if line.startswith(b"data: "):
                    yield line[6:].strip().decode()
        finally:
            connection.close()

    def tokens(self, body):
        """The token ids of a streamed answer to one prompt, its end checked."""
        *events, last = self.stream(body)
        assert last == "[DONE]"
        entries = [json.loads(event) for event in events[1:]]
        assert not any("error" in entry for entry in entries), entries[-1]
        return [i for entry in entries for i in entry["ids"]]

    def is_idle(self):
        """Whether nothing of any request is left anywhere."""
        stats = self.client.stats()
        taken = stats.num_running + stats.num_waiting + stats.pages_used
        return self.client.num_open == 0 and taken == 0

    def wait_idle(self, seconds=5.0):
        return wait_until(self.is_idle, seconds)


def wait_until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.002)
    return False
