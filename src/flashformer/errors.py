"""The errors a user can meet: one sentence each (what, where, expected, cure) and an exit code."""


class FlashFormerError(Exception):
    """Base of every error that FlashFormer raises on purpose; `str(error)` is one full sentence."""

    exit_code = 1


class UsageError(FlashFormerError):
    """The caller asked for something that makes no sense (bad option, bad parameter)."""

    exit_code = 2


class ParameterError(UsageError):
    """One parameter of a request is wrong; `parameter` is its name, for those who report it."""

    def __init__(self, parameter: str, sentence: str) -> None:
        super().__init__(f"{parameter} {sentence}")
        self.parameter = parameter


class ContextLengthError(UsageError):
    """A prompt, with what is wanted of it, does not fit into the context or its KV pages."""


class UnsupportedModelError(FlashFormerError):
    """The checkpoint or the machine needs a feature that FlashFormer does not have."""

    exit_code = 3


class CheckpointError(FlashFormerError):
    """A checkpoint's files are damaged, missing or contradict each other."""

    exit_code = 3


class OutOfMemoryError(FlashFormerError):
    """The model, its cache or its workspace does not fit; the message holds the numbers."""

    exit_code = 4


class PlanError(FlashFormerError):
    """A plan breaks one of the invariants in `plan/check.py`; it is never run."""


class CompileError(FlashFormerError):
    """The system's compiler is missing or refused a kernel."""
