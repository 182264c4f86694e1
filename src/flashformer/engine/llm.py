"""The Python API: a checkpoint made ready to generate.

`LLM(path)` -> `generate`, `chat`, `stream`, `chat_stream`, `logits`.
"""

import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from flashformer.backends import machine_of, open_backend
from flashformer.codegen.cache import cache_dir
from flashformer.engine.chat import ChatTemplates, Message
from flashformer.engine.driver import Driver, Reader
from flashformer.engine.engine import Engine
from flashformer.engine.generation_config import GenerationDefaults, read_generation_config
from flashformer.engine.memory import (
    MemoryReport,
    available_memory,
    pages_of,
    report_memory,
    require_memory,
)
from flashformer.engine.outputs import (
    CompletionOutput,
    RequestOutput,
    StreamChunk,
    request_output,
    stream_chunk,
)
from flashformer.engine.prompts import Prompt, read_prompt, read_prompts, required
from flashformer.engine.sampling import SamplingParams
from flashformer.engine.tokenizer import Tokenizer
from flashformer.errors import UsageError
from flashformer.model.checkpoint import Checkpoint
from flashformer.model.default import default_checkpoint
from flashformer.model.spec import ModelSpec
from flashformer.model.weights import CheckpointWeights
from flashformer.plan.pack import Progress
from flashformer.plan.plan import Plan, PlanOptions, make_plan
from flashformer.plan.planner import longest_context
from flashformer.quant.formats import QUANTS, head_format

DEFAULT_CONTEXT = 4096


class LLM:
    """A model, its engine and its tokenizer. Safe to use from several threads; close it in the end.

    Calls from several threads, or several open streams, share the batch. Raises `FlashFormerError`s
    with one sentence for everything that is wrong with a checkpoint, an option or a request.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        device: str = "auto",
        max_batch: int | None = None,
        context: int | None = None,
        quant: str | None = None,
        seed: int = 0,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Load a checkpoint folder or hub id; None: the small embedded default.

        `max_batch` is how many sequences run at a time (None: 8, or as many as a step of this model
        can have on this machine); `context` is in tokens (None: the model's, at most 4096); `quant`
        stores the weights as int8, fp8 or one of the int4 formats (None: as the checkpoint has
        them); `seed` is that of requests without one; `progress(what, done, total)` is called while
        loading.
        """
        _check_options(max_batch, context, quant, seed)
        self.checkpoint = Checkpoint.open(
            default_checkpoint(cache_dir()) if model is None else model
        )
        self.spec = ModelSpec.from_hf(self.checkpoint.config)
        folder = self.checkpoint.folder
        self.tokenizer = Tokenizer.from_folder(folder)
        self.chat_templates = _chat_templates(folder, self.tokenizer)
        self._defaults = read_generation_config(
            self.checkpoint.generation_config, self.spec.vocab_size
        )
        weights = CheckpointWeights(self.checkpoint, self.spec)
        machine = machine_of(device, self.spec, threads)
        options = PlanOptions(
            format=quant or weights.dtype,
            head_format=head_format(quant or weights.dtype, machine.kind),
            context=context or min(longest_context(self.spec), DEFAULT_CONTEXT),
            max_batch=max_batch or machine.max_batch,
        )
        foreseen = make_plan(self.spec, machine, options)
        self._available = None if machine.kind == "cuda" else available_memory()
        require_memory(foreseen, self._available)
        self.backend = open_backend(
            device,
            self.spec,
            weights,
            options,
            num_pages=pages_of(foreseen),
            threads=threads,
            progress=progress,
        )
        self.engine = Engine(
            self.backend,
            self.tokenizer,
            eos_token_ids=_eos_token_ids(self.spec, self._defaults, self.tokenizer),
            seed=seed,
        )
        self._driver = Driver(self.engine)
        self._closed = False

    @property
    def plan(self) -> Plan:
        """The plan that the backend runs."""
        return self.backend.plan

    @property
    def default_sampling_params(self) -> SamplingParams:
        """What holds for requests without parameters; `defaults_from_checkpoint` says why."""
        return self._defaults.params

    @property
    def defaults_from_checkpoint(self) -> Mapping[str, Any]:
        """The default parameters that generation_config.json set, with their values."""
        return self._defaults.from_checkpoint

    def memory_report(self) -> MemoryReport:
        """What the loaded model holds, in bytes."""
        return report_memory(self.plan, self.backend.num_pages, self._available)

    def generate(
        self,
        prompts: object,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Continue one prompt or a list of prompts; one output each, in the same order.

        A prompt is a text, a list of token ids or {"prompt_token_ids": ids}. `sampling_params`
        holds for all prompts, or is a list with one for each; None takes `default_sampling_params`.
        `use_tqdm` is accepted for scripts written for vLLM; there is no bar.
        """
        self._require_open()
        return self._run(read_prompts(prompts, self.tokenizer), sampling_params)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of conversations.

        The options are those of `ChatTemplates.render`. `continue_final_message` needs
        `add_generation_prompt=False`.
        """
        self._require_open()
        many = isinstance(messages, Sequence) and bool(messages) and _is_conversation(messages[0])
        prompts = [
            self._chat_prompt(
                conversation,
                tools,
                chat_template,
                add_generation_prompt,
                continue_final_message,
                chat_template_kwargs,
            )
            for conversation in (messages if many else [messages])
        ]
        return self._run(prompts, sampling_params)

    def stream(
        self, prompt: object, sampling_params: SamplingParams | None = None
    ) -> Generator[StreamChunk]:
        """Continue one prompt; a chunk a token as it comes, the last with `usage` and `metrics`.

        The request is checked now and starts with the first chunk asked for. Closing the iterator
        frees its slot.
        """
        self._require_open()
        return self._chunks(read_prompt(prompt, self.tokenizer), sampling_params)

    def chat_stream(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Generator[StreamChunk]:
        """Answer one conversation chunk by chunk; see `chat` and `stream`."""
        self._require_open()
        prompt = self._chat_prompt(
            messages,
            tools,
            chat_template,
            add_generation_prompt,
            continue_final_message,
            chat_template_kwargs,
        )
        return self._chunks(prompt, sampling_params)

    def logits(self, prompt: object) -> npt.NDArray[np.float32]:
        """The float32 logits of every position of a prompt: [len, vocab_size]."""
        self._require_open()
        token_ids = read_prompt(prompt, self.tokenizer).token_ids
        with self._driver.lock:
            return self.engine.logits(token_ids)

    def close(self) -> None:
        """End every request and free the model; a second call does nothing."""
        if not self._closed:
            self._closed = True
            with self._driver.lock:
                self._driver.abandon_all()
                self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[RequestOutput]:
        params = self._params_of_each(prompts, sampling_params)
        for prompt, own in zip(prompts, params, strict=True):
            self.engine.check(prompt.token_ids, own)  # all of them, before any of them starts
        readers: list[Reader] = []
        try:
            for prompt, own in zip(prompts, params, strict=True):
                readers.append(self._driver.open(prompt.token_ids, own))
            return [_collect(r, p) for r, p in zip(readers, prompts, strict=True)]
        finally:
            for reader in readers:
                reader.close()

    def _params_of_each(
        self, prompts: Sequence[Prompt], given: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if given is None or isinstance(given, SamplingParams):
            return [given or self.default_sampling_params] * len(prompts)
        params = list(given) if isinstance(given, Sequence) else [given]
        if not all(isinstance(own, SamplingParams) for own in params):
            raise UsageError(
                "sampling_params must be a SamplingParams, or a list with one for each prompt, "
                f"not a {type(given).__name__}."
            )
        if len(params) != len(prompts):
            raise UsageError(
                f"there are {len(prompts)} prompts but {len(params)} SamplingParams; give one for "
                "each prompt, or one for all."
            )
        return params

    def _chunks(self, prompt: Prompt, params: SamplingParams | None) -> Generator[StreamChunk]:
        (own,) = self._params_of_each([prompt], params)
        self.engine.check(prompt.token_ids, own)
        return self._read_chunks(prompt, own)

    def _read_chunks(self, prompt: Prompt, params: SamplingParams) -> Generator[StreamChunk]:
        self._require_open()
        reader = self._driver.open(prompt.token_ids, params)
        try:
            for delta in reader:
                yield stream_chunk(delta, reader.done)
        finally:
            reader.close()

    def _chat_prompt(
        self,
        messages: Any,  # noqa: ANN401 - checked by render
        tools: Sequence[Mapping[str, Any]] | None,
        chat_template: str | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> Prompt:
        tokenizer = required(self.tokenizer, "a conversation")
        text = self.chat_templates.render(
            messages,
            tools=tools,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=chat_template_kwargs,
        )
        return Prompt(text, tokenizer.encode(text, add_special_tokens=False))

    def _require_open(self) -> None:
        if self._closed:
            raise UsageError("this LLM is closed; make a new one.")


def _check_options(max_batch: object, context: object, quant: object, seed: object) -> None:
    for name, value, least in (("max_batch", max_batch, 1), ("context", context, 2)):
        if value is not None and (type(value) is not int or value < least):
            raise UsageError(f"{name} must be an integer of at least {least}, not {value!r:.40}.")
    if quant is not None and quant not in QUANTS:
        raise UsageError(f"quant must be None or one of {', '.join(QUANTS)}, not {quant!r:.40}.")
    if type(seed) is not int or not 0 <= seed < 2**64:
        raise UsageError(f"seed must be an integer from 0 to 2**64 - 1, not {seed!r:.40}.")


def _chat_templates(folder: Path, tokenizer: Tokenizer | None) -> ChatTemplates:
    if tokenizer is None:
        return ChatTemplates({}, {})
    return ChatTemplates.from_folder(folder, tokenizer.config, tokenizer.special_tokens)


def _eos_token_ids(
    spec: ModelSpec, defaults: GenerationDefaults, tokenizer: Tokenizer | None
) -> frozenset[int]:
    """All end tokens that config.json and generation_config.json name, else the tokenizer's."""
    ids = frozenset((*spec.eos_token_ids, *defaults.eos_token_ids))
    if ids or tokenizer is None or tokenizer.eos_token_id is None:
        return ids
    return frozenset({tokenizer.eos_token_id})


def _is_conversation(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _collect(reader: Reader, prompt: Prompt) -> RequestOutput:
    outputs = [CompletionOutput(index) for index in range(reader.request.params.n)]
    for delta in reader:
        outputs[delta.index].add(delta)
    return request_output(reader.request, prompt.text, outputs)
