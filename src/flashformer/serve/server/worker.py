"""The engine process: loads one model, then steps for as long as the server holds its socket.

`python -m flashformer.serve.server.worker FD OPTIONS NAME` -> frames. It never waits for a client:
its only peer is the server, which always reads.
"""

import dataclasses
import faulthandler
import hashlib
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

import msgspec

from flashformer import __version__
from flashformer.backends.base import TimesStages
from flashformer.engine.constraint import Constraint
from flashformer.engine.engine import Engine
from flashformer.engine.llm import LLM
from flashformer.engine.sampling import SamplingParams
from flashformer.engine.sequence import Delta, Request
from flashformer.errors import ContextLengthError, ParameterError, UsageError
from flashformer.plan.plan import Plan
from flashformer.serve.failure import failure_of
from flashformer.serve.load import LoadOptions, open_llm
from flashformer.serve.server import wire
from flashformer.serve.server.child import open_channel, settle
from flashformer.serve.server.grammars import GrammarQueue
from flashformer.serve.server.messages import GenerateEvent, ModelInfo
from flashformer.serve.speed import read_bandwidth

DEFAULT_NAME = "flashformer-default"
EXIT_LOST_STEP = 70  # the backend failed; the server starts another engine and replays
_IDLE_SECONDS = 60.0
_LOADING_SECONDS = 0.1  # between two frames of progress
_USAGE_SECONDS = 0.05  # between two frames that say what is taken


class Worker:
    """One pump: take what the server sent, run a step, tell what it did."""

    def __init__(self, channel: wire.Channel, llm: LLM, grammars: GrammarQueue) -> None:
        self._channel = channel
        self._engine: Engine = llm.engine
        self._engine.unless = channel.has_news
        self._backend = llm.backend
        self._plan: Plan = llm.plan
        self._bytes_per_step = lru_cache(maxsize=4096)(self._plan.bytes_per_step)
        self._grammars = grammars
        self._requests: dict[int, list[Request]] = {}  # key -> one a prompt
        self._places: dict[Request, tuple[int, int]] = {}  # -> key, prompt_index
        self._not_started: set[int] = set()
        self._usage_told = 0.0
        self._self_test_token = self._self_test()

    def run(self) -> None:
        """Until the server hangs up (`EOFError`) or the backend fails."""
        while True:
            wait = 0.0 if self._engine.has_work else _IDLE_SECONDS
            for message in self._channel.receive(wait):
                self._take(message)
            for submit, constraints in self._grammars.finished():
                self._start(submit, constraints)
            if self._engine.has_work:
                self._step()
            elif wait == 0.0:  # what was left of the work has been cancelled
                self._channel.send(self._usage())

    def _take(self, message: wire.Message) -> None:
        if isinstance(message, wire.Submit):
            if message.grammar is None:
                self._start(message, ())
            else:
                self._grammars.start(message)
        elif isinstance(message, wire.Cancel):
            self._grammars.forget(message.key)
            self._drop(message.key)
        elif isinstance(message, wire.Ping):
            alive = self._engine.has_work or self._self_test() == self._self_test_token
            self._channel.send(wire.Pong(alive))

    def _start(self, submit: wire.Submit, constraints: Sequence[Constraint] | UsageError) -> None:
        """Queue every prompt of a request, or none of them."""
        try:
            if isinstance(constraints, UsageError):
                raise constraints
            params = SamplingParams(**submit.params)
            for prompt in submit.prompts:
                self._engine.check(prompt, params)
        except UsageError as error:
            parameter = error.parameter if isinstance(error, ParameterError) else None
            too_long = isinstance(error, ContextLengthError)
            self._channel.send(wire.Rejected(submit.key, str(error), parameter, too_long))
            return
        requests = []
        for index, prompt in enumerate(submit.prompts):
            request = self._engine.add(
                prompt,
                params,
                constraints=constraints[index * params.n : (index + 1) * params.n],
                resume=submit.resume[index] if submit.resume else (),
            )
            requests.append(request)
            self._places[request] = (submit.key, index)
        self._requests[submit.key] = requests
        self._not_started.add(submit.key)

    def _drop(self, key: int) -> None:
        """Forget a request, and end what of it has not ended."""
        self._not_started.discard(key)
        for request in self._requests.pop(key, ()):
            self._engine.cancel(request)
            del self._places[request]
            request.sequences = ()  # they know it too, and would wait for the garbage collector

    def _step(self) -> None:
        computed = sum(s.num_computed for s in self._engine.running)
        began = time.perf_counter()
        deltas = self._engine.step()
        seconds = time.perf_counter() - began
        events = tuple(event for delta in deltas if (event := self._event(delta)) is not None)
        running = self._engine.running
        started = {key for s in running if (key := self._key_of(s.request)) in self._not_started}
        started |= {key for key, _ in events if key in self._not_started}
        self._not_started -= started
        num_rows = max(len(deltas), sum(s.num_computed for s in running) - computed)
        now = time.monotonic()
        usage = None
        if now - self._usage_told > _USAGE_SECONDS or not self._engine.has_work:
            self._usage_told = now
            usage = self._usage(only_decoded=num_rows == len(deltas))
        self._channel.send(
            wire.Step(
                seconds=seconds,
                num_rows=num_rows,
                nbytes=self._bytes_of_step(deltas),
                started=tuple(started),
                events=events,
                usage=usage,
            )
        )
        for key in {key for key, event in events if event.finish_reason is not None}:
            if all(request.finished for request in self._requests.get(key, ())):
                self._drop(key)

    def _event(self, delta: Delta) -> tuple[int, GenerateEvent] | None:
        request = delta.request
        place = self._places.get(request)
        if place is None:
            return None
        key, prompt_index = place
        prompt_logprobs = None
        if delta.index == 0 and request.prompt_logprobs:
            prompt_logprobs = tuple(request.prompt_logprobs)
            request.prompt_logprobs = []  # told once
        return key, GenerateEvent(
            prompt_index=prompt_index,
            sequence_index=delta.index,
            text=delta.text,
            token_ids=delta.token_ids,
            logprobs=delta.logprobs,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            cached_tokens=request.cached_tokens,
            prompt_logprobs=prompt_logprobs,
            error=request.error if delta.finish_reason == "error" else None,
            client_fault=request.sequences[delta.index].constraint is not None,
        )

    def _usage(self, *, only_decoded: bool = False) -> wire.Usage:
        cache = self._engine.kv_cache
        times: tuple[float, ...] = ()
        if only_decoded and isinstance(self._backend, TimesStages):
            times = tuple(self._backend.stage_seconds().values())
        context, batch = self._mean_context()
        return wire.Usage(
            slots=tuple(
                (self._key_of(s.request), s.num_computed, len(s.request.prompt_token_ids))
                for s in self._engine.running
            ),
            num_waiting=self._engine.num_waiting,
            pages_used=cache.num_used,
            pages_cached=cache.num_cached,
            kv_step_bytes=self._bytes_per_step(context, batch) - self._bytes_per_step(0, batch),
            stage_seconds=times,
        )

    def _key_of(self, request: Request) -> int:
        return self._places.get(request, (-1, 0))[0]

    def _bytes_of_step(self, deltas: Sequence[Delta]) -> int:
        """Weights, and keys and values of every running sequence, once for each token in a row."""
        tokens = Counter[tuple[Request, int]]()
        for delta in deltas:
            tokens[delta.request, delta.index] += len(delta.token_ids)
        return self._bytes_per_step(*self._mean_context()) * max((1, *tokens.values()))

    def _mean_context(self) -> tuple[int, int]:
        """Of the running sequences, in whole pages, and how many they are."""
        lengths = [sequence.num_computed for sequence in self._engine.running]
        batch = max(1, len(lengths))
        page = self._plan.machine.page_tokens
        return -(-max(1, sum(lengths) // batch) // page) * page, batch

    def _self_test(self) -> int:
        """The greedy token after the first of the vocabulary: the same for ever."""
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        request = self._engine.add([0], params)
        token_id = -1
        while not request.finished:
            token_id = next((t for d in self._engine.step() for t in d.token_ids), token_id)
        return token_id


def load(options: LoadOptions, channel: wire.Channel) -> LLM:
    """The model, with progress told to the server."""
    told: dict[str, float] = {}

    def progress(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total or now - told.get(what, 0.0) > _LOADING_SECONDS:
            told[what] = now
            channel.send(wire.Loading(what, done, total))

    return open_llm(options, progress)


def describe(llm: LLM, name: str, *, is_embedded: bool) -> ModelInfo:
    """What clients may know of the model."""
    plan, defaults = llm.plan, llm.default_sampling_params
    memory = llm.memory_report()
    identity = repr((__version__, name, plan.spec, plan.machine.kind, plan.options))
    return ModelInfo(
        model_id=name,
        created=int(time.time()),
        context=llm.engine.context,
        vocab_size=plan.spec.vocab_size,
        max_batch=plan.options.max_batch,
        device=plan.machine.kind,
        machine=plan.machine.name,
        format=plan.options.format,
        image_bytes=memory.image_bytes,
        kv_bytes=memory.kv_bytes,
        kv_bytes_per_token=memory.kv_bytes_per_token,
        num_pages=llm.backend.num_pages,
        page_tokens=plan.machine.page_tokens,
        fingerprint="ff-" + hashlib.sha256(identity.encode()).hexdigest()[:12],
        stages=_stages(plan),
        default_params={
            field.name: getattr(defaults, field.name) for field in dataclasses.fields(defaults)
        },
        eos_token_ids=tuple(sorted(llm.engine.eos_token_ids)),
        bos_token_id=plan.spec.bos_token_id,
        is_embedded=is_embedded,
        has_tokenizer=llm.tokenizer is not None,
        has_chat_template=bool(llm.chat_templates.templates),
        chat_template=_template_source(llm.chat_templates.templates),
    )


def _template_source(templates: Mapping[str, str]) -> str:
    """The template that conversations with tools use, else the default."""
    return templates.get("tool_use") or templates.get("default", "")


def _stages(plan: Plan) -> tuple[tuple[str, int], ...]:
    """The weights that a token reads in each stage, its layers together, in the plan's order."""
    nbytes = dict.fromkeys((stage.name for stage in plan.stages), 0)
    for matrix in plan.matrices:
        if matrix.name in nbytes:  # not an untied embedding, of which a token reads one row
            nbytes[matrix.name] += matrix.nbytes
    return tuple(nbytes.items())


def main(argv: Sequence[str]) -> int:
    """Load, serve, and end with the server."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the watchdog asks where it hangs before it kills
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    options = msgspec.json.decode(argv[1], type=LoadOptions)
    grammars = GrammarQueue()
    channel = open_channel(int(argv[0]), [grammars.descriptor])
    try:
        try:
            llm = load(options, channel)
            grammars.use(llm)
            worker = Worker(channel, llm, grammars)
        except EOFError:
            raise
        except Exception as error:
            failure = failure_of(error)
            channel.send(wire.Failed(failure.kind, failure.message, failure.exit_code))
            return failure.exit_code
        memory = llm.memory_report()
        sentence = (
            f"{memory.image_bytes / 2**30:.2f} GiB of weights and {memory.kv_bytes / 2**30:.2f} "
            f"GiB of keys and values for {memory.max_batch} sequences of {memory.context} tokens"
        )
        channel.send(
            wire.Ready(
                describe(
                    llm,
                    argv[2] or options.model or DEFAULT_NAME,
                    is_embedded=options.model is None,
                ),
                str(llm.checkpoint.folder),
                sentence,
                read_bandwidth(llm.backend),
            )
        )
        settle()
        worker.run()
    except EOFError:
        return 0
    except Exception as error:  # whatever the backend raised: its memory is no longer trusted
        sys.stderr.write(f"engine: {type(error).__name__}: {error}\n")
        return EXIT_LOST_STEP
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
