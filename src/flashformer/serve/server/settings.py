"""What the person who starts a server may choose, and what a client may ask of it at most."""

from dataclasses import dataclass, field

from flashformer.serve.load import LoadOptions


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what clients may use; times in seconds."""

    body_bytes: int = 8 << 20
    header_bytes: int = 32 << 10
    num_headers: int = 100
    header_time: float = 10.0  # until the headers are complete
    body_time: float = 30.0  # until the body is complete
    connections: int = 1024
    queue_sequences: int = 256  # that wait for a slot
    queue_tokens: int = 4 << 20  # of all open prompts together
    queue_time: float = 30.0
    request_time: float = 600.0
    stall_time: float = 30.0  # that a client may take nothing of what is sent
    ping_time: float = 15.0  # between signs of life on a silent stream
    drain_time: float = 5.0  # for open requests after SIGTERM
    render_time: float = 1.0
    grammar_time: float = 2.0
    helper_bytes: int = 2 << 30  # address space of a helper process
    step_time: float = 60.0  # after which a silent engine counts as hung
    max_restarts: int = 3  # of the engine in `restart_window`
    restart_window: float = 600.0


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """One server."""

    load: LoadOptions
    name: str | None = None  # of the model for clients; None: as it was given
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()  # names in the Host header beside the server's own
    seed: int | None = None  # of requests without one; None: another one at every start
    limits: Limits = field(default_factory=Limits)
