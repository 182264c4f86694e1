"""`flashformer run`: one prompt, one answer.

PROMPT -> text on stdout, or JSON
"""

import sys
import time
from contextlib import closing
from typing import Annotated

import typer

from flashformer.serve import options
from flashformer.serve.answer import collect, sampling_params, write_text
from flashformer.serve.failure import EXIT_INTERRUPTED, EXIT_OK
from flashformer.serve.first_run import compile_in_background, quick_start
from flashformer.serve.load import LoadOptions, load_llm
from flashformer.serve.speed import measure_speed
from flashformer.serve.terminal import Terminal, no_text, write_json

Prompt = Annotated[
    str,
    typer.Argument(metavar="PROMPT", help="The text to continue; `-` reads standard input."),
]
Chat = Annotated[bool, typer.Option("--chat", help="Put the prompt into the chat template.")]


def run(
    prompt: Prompt,
    model: options.Model = None,
    max_tokens: options.MaxTokens = None,
    temp: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    chat: Chat = False,
    system: options.System = None,
    device: options.Device = "auto",
    quant: options.Quant = None,
    context: options.Context = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Continue PROMPT. The text streams to stdout; a line about speed ends on stderr."""
    text = read_prompt(prompt)
    given = {
        "max_tokens": max_tokens,
        "temperature": temp,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "stop": stop or None,
    }
    sampling_params(None, given)  # a wrong flag is told before the model is loaded
    started = time.perf_counter()
    with Terminal(quiet=quiet) as terminal:
        loaded = LoadOptions(model, device, quant, context, threads)
        start = quick_start(loaded, terminal)
        llm = load_llm(start.options, terminal)
        load_s = time.perf_counter() - started
        with closing(llm):
            params = sampling_params(llm.default_sampling_params, given)
            if chat or system is not None:
                first = [] if system is None else [{"role": "system", "content": system}]
                chunks = llm.chat_stream([*first, {"role": "user", "content": text}], params)
            else:
                chunks = llm.stream(text, params)
            answer = collect(chunks, None if as_json else write_text)
            if not as_json:
                write_text("\n")
            speed = measure_speed(answer, llm, load_s) if as_json or not quiet else None
        if start.kernel_is_missing:
            compile_in_background(loaded)
        if as_json:
            write_json(answer.to_json(speed.to_json() if speed else None))
        elif speed is not None:
            terminal.note(speed.line())
    return EXIT_INTERRUPTED if answer.finish_reason == "abort" else EXIT_OK


def read_prompt(prompt: str) -> str:
    """The prompt itself, or all of standard input for `-`, less one final line end."""
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise no_text(error) from None
