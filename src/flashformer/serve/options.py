"""The flags that several verbs share, each written once with its environment variable."""

from typing import Annotated

import typer

from flashformer.quant.formats import QUANTS
from flashformer.quant.layout import quants_of

_ON_CPU = quants_of("panel")
_ON_GPU = [name for name in QUANTS if name not in _ON_CPU]

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        envvar="FLASHFORMER_MODEL",
        help="Checkpoint folder or hub id. Default: the small embedded model.",
    ),
]
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        envvar="FLASHFORMER_MODEL",
        help="Checkpoint folder or hub id. Default: the small embedded model.",
    ),
]
Device = Annotated[
    str,
    typer.Option(envvar="FLASHFORMER_DEVICE", help="auto, cpu, cuda or reference."),
]
Quant = Annotated[
    str | None,
    typer.Option(
        envvar="FLASHFORMER_QUANT",
        help=f"Store the weights as {', '.join(_ON_CPU)}, on a GPU also {', '.join(_ON_GPU)}. "
        "Default: as in the checkpoint.",
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        min=1,
        envvar="FLASHFORMER_CONTEXT",
        help="Tokens a sequence may hold, prompt included. Default: the model's, at most 4096.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        "-t",
        min=1,
        envvar="FLASHFORMER_THREADS",
        help="Threads of the CPU backend. Default: all cores that this process may use.",
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        "-n",
        min=1,
        envvar="FLASHFORMER_MAX_TOKENS",
        help="New tokens at most. Default: until the end token or the end of the context.",
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option("--temp", envvar="FLASHFORMER_TEMP", help="Temperature; 0 is greedy."),
]
TopP = Annotated[
    float | None,
    typer.Option(envvar="FLASHFORMER_TOP_P", help="Keep the likeliest tokens of this total."),
]
TopK = Annotated[
    int | None,
    typer.Option(envvar="FLASHFORMER_TOP_K", help="Keep this many likeliest tokens; 0: all."),
]
MinP = Annotated[
    float | None,
    typer.Option(
        envvar="FLASHFORMER_MIN_P", help="Drop tokens below this share of the likeliest one."
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(envvar="FLASHFORMER_SEED", help="The same seed gives the same text."),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="Stop before this text; may be given several times."),
]
System = Annotated[
    str | None,
    typer.Option(envvar="FLASHFORMER_SYSTEM", help="System message of the chat template."),
]
Commit = Annotated[
    str | None,
    typer.Option(
        envvar="FLASHFORMER_COMMIT",
        help="For the result file: the commit that this copy of the sources is, without a .git.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", envvar="FLASHFORMER_QUIET", help="Nothing on stderr but errors."),
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error (for reports of bugs).")
]
