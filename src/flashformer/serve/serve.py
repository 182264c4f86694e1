"""`flashformer serve`: the model behind an HTTP API that OpenAI and Anthropic clients speak.

MODEL -> a server on loopback, until Ctrl-C or SIGTERM
"""

import logging
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashformer.errors import UsageError
from flashformer.serve import options
from flashformer.serve.load import LoadOptions
from flashformer.serve.terminal import Terminal

if TYPE_CHECKING:
    from flashformer.serve.server.settings import ServeOptions
    from flashformer.serve.server.wire import Ready

AUTO_KEY = "auto"

Host = Annotated[
    str,
    typer.Option(
        envvar="FLASHFORMER_HOST",
        help="Address to listen on. One that other machines reach needs --api-key.",
    ),
]
Port = Annotated[
    int, typer.Option(min=0, max=65535, envvar="FLASHFORMER_PORT", help="0: any free port.")
]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(
        envvar="FLASHFORMER_API_KEY",
        help="Key that clients must send; may be given several times. `auto` makes one.",
    ),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(envvar="FLASHFORMER_API_KEY_FILE", help="File with one key a line."),
]
AllowedHost = Annotated[
    list[str] | None,
    typer.Option(help="Further name of this server in clients' Host header."),
]
ServedName = Annotated[
    str | None,
    typer.Option(
        "--served-model-name",
        envvar="FLASHFORMER_SERVED_MODEL_NAME",
        help="Name of the model for clients. Default: as given.",
    ),
]
MaxBatch = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=8,
        envvar="FLASHFORMER_MAX_BATCH",
        help="Texts that are written at the same time; the others wait. "
        "Default: 8, or as many as a step can hold on the GPU.",
    ),
]
Queue = Annotated[int, typer.Option(min=0, envvar="FLASHFORMER_QUEUE", help="Texts that may wait.")]
QueueTime = Annotated[
    float, typer.Option(min=0.1, envvar="FLASHFORMER_QUEUE_TIME", help="Seconds in the queue.")
]
RequestTime = Annotated[
    float, typer.Option(min=0.1, envvar="FLASHFORMER_REQUEST_TIME", help="Seconds a request.")
]
DrainTime = Annotated[
    float,
    typer.Option(
        min=0.0, envvar="FLASHFORMER_DRAIN_TIME", help="Seconds for open requests at the end."
    ),
]
StepTime = Annotated[
    float,
    typer.Option(
        min=0.1,
        envvar="FLASHFORMER_STEP_TIME",
        help="Seconds after which a silent engine is killed and started again.",
    ),
]


def serve(
    model: options.ModelArgument = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    allowed_host: AllowedHost = None,
    served_model_name: ServedName = None,
    device: options.Device = "auto",
    max_batch: MaxBatch = None,
    context: options.Context = None,
    quant: options.Quant = None,
    threads: options.Threads = None,
    seed: options.Seed = None,
    queue: Queue = 256,
    queue_time: QueueTime = 30.0,
    request_time: RequestTime = 600.0,
    drain_time: DrainTime = 5.0,
    step_time: StepTime = 60.0,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Serve MODEL over HTTP, as OpenAI's and Anthropic's clients expect it."""
    _require_packages()
    from flashformer.serve.server.settings import Limits, ServeOptions

    with Terminal(quiet=quiet) as terminal:
        keys = _keys(api_key or [], api_key_file)
        limits = Limits(
            queue_sequences=queue,
            queue_time=queue_time,
            request_time=request_time,
            drain_time=drain_time,
            step_time=step_time,
        )
        return _run(
            ServeOptions(
                load=LoadOptions(model, device, quant, context, threads, max_batch),
                name=served_model_name,
                host=host,
                port=port,
                api_keys=keys,
                allowed_hosts=tuple(allowed_host or ()),
                seed=seed,
                limits=limits,
            ),
            terminal,
        )


def _run(serve_options: "ServeOptions", terminal: Terminal) -> int:
    from flashformer.serve.server.routes import ENDPOINTS
    from flashformer.serve.server.run import serve as run_server

    def say_ready(ready: "Ready", url: str) -> None:
        terminal.clear()
        info = ready.info
        terminal.note(
            f"model   {info.model_id} ({info.format} on {info.device}, {info.machine}); "
            f"up to {info.max_batch} texts at a time"
        )
        terminal.note(f"memory  {ready.memory}")
        terminal.note(f"listens {url} ({key_sentence(len(serve_options.api_keys))})")
        terminal.note(f"try     {url} in a browser, or curl {url}/v1/models")

    if not terminal.quiet:
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
        logging.getLogger("flashformer.server").setLevel(logging.INFO)
    return run_server(serve_options, ENDPOINTS, on_progress=terminal.progress, on_ready=say_ready)


def key_sentence(count: int) -> str:
    """Who may use the server."""
    return "only from this machine, no key" if count == 0 else "a key is needed"


def _keys(given: list[str], file: Path | None) -> tuple[str, ...]:
    """All keys; one that is made here is shown even with --quiet, or nobody could use it."""
    keys = []
    for key in given:
        if key == AUTO_KEY:
            key = f"ff-{secrets.token_urlsafe(24)}"
            Terminal().note(f"API key {key}")
        keys.append(key)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--api-key-file {file} cannot be read ({error}).") from None
        if not lines:
            raise UsageError(f"--api-key-file {file} holds no key; write one key a line.")
        keys.extend(lines)
    return tuple(keys)


def _require_packages() -> None:
    """One sentence for an installation without the server's extra."""
    try:
        import httptools  # noqa: F401
        import llguidance  # noqa: F401
        import msgspec  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"serve needs the package {error.name}, which is not installed; "
            "run `pip install 'flashformer[serve]'`"
        ) from None
