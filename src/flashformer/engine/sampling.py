"""What a caller may ask of a request: every field checked, one sentence for every mistake.

keyword arguments -> `SamplingParams`; `check_vocabulary` compares it with a model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass

from flashformer.engine.checks import boolean, integer, number, shown, text, token_ids
from flashformer.errors import ParameterError

MAX_SEQUENCES = 8
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 256
MAX_STOP_IDS = 128
MAX_BIASED_IDS = 1024
MAX_BIAS = 100.0
GREEDY_BELOW = 1e-3  # a temperature below this is greedy: the division would only make noise


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens of one request are chosen and when it ends; the field names are vLLM's.

    The order of the choice is in `engine.sampler`. Raises `ParameterError` (a `UsageError`).
    """

    n: int = 1  # independent continuations of the prompt
    temperature: float = 1.0  # 0: greedy, the lowest id on a tie
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None  # None: derived from the engine's seed and the request's number
    stop: tuple[str, ...] = ()  # a string or a list of strings
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = None  # None: until an end-of-sequence token or the context's end
    min_tokens: int = 0
    logprobs: int | None = None  # how many of the best tokens to report at each position
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    max_new_tokens: InitVar[int | None] = None  # another name of max_tokens
    do_sample: InitVar[bool | None] = None  # False: greedy

    def __post_init__(self, max_new_tokens: int | None, do_sample: bool | None) -> None:
        if max_new_tokens is not None:
            if self.max_tokens is not None and self.max_tokens != max_new_tokens:
                raise ParameterError(
                    "max_new_tokens", "and max_tokens are one parameter; give only one of them"
                )
            self._set("max_tokens", max_new_tokens)
        if do_sample is not None:
            boolean("do_sample", do_sample)
            if not do_sample:
                self._set("temperature", 0.0)
        self._check_choice()
        self._check_end()
        self._check_report()

    @property
    def greedy(self) -> bool:
        """Whether the largest logit always wins."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    @property
    def adjusting(self) -> bool:
        """Whether logits are changed before the temperature."""
        return bool(self.logit_bias) or self.allowed_token_ids is not None or self.penalised

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_choice(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("repetition_penalty", 0.01, 10.0),
        ):
            self._set(name, number(name, getattr(self, name), low, high))
        self._set("top_p", number("top_p", self.top_p, 0.0, 1.0))
        if self.top_p == 0.0:
            raise ParameterError("top_p", "must be above 0; 1 switches it off")
        self._set("top_k", max(0, integer("top_k", self.top_k, -1, 2**31 - 1)))
        if self.seed is not None:
            self._set("seed", integer("seed", self.seed, 0, 2**64 - 1))
        if self.logit_bias is not None:
            self._set("logit_bias", _bias(self.logit_bias))
        if self.allowed_token_ids is not None:
            ids = token_ids("allowed_token_ids", self.allowed_token_ids, 2**31)
            if not ids:
                raise ParameterError("allowed_token_ids", "must hold at least one token id")
            self._set("allowed_token_ids", tuple(sorted(set(ids))))

    def _check_end(self) -> None:
        self._set("stop", _stop_strings(self.stop))
        self._set("stop_token_ids", token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_IDS))
        self._set("n", integer("n", self.n, 1, MAX_SEQUENCES))
        if self.max_tokens is not None:
            self._set("max_tokens", integer("max_tokens", self.max_tokens, 1, 2**31 - 1))
        self._set("min_tokens", integer("min_tokens", self.min_tokens, 0, 2**31 - 1))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ParameterError(
                "min_tokens",
                f"must not exceed max_tokens, but {self.min_tokens} > {self.max_tokens}",
            )
        boolean("ignore_eos", self.ignore_eos)

    def _check_report(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                self._set(name, integer(name, value, 0, MAX_LOGPROBS))
        for name in ("skip_special_tokens", "include_stop_str_in_output"):
            boolean(name, getattr(self, name))


def check_vocabulary(
    params: SamplingParams, vocab_size: int, eos_token_ids: Iterable[int] = ()
) -> None:
    """Refuse token ids outside the vocabulary, and limits that would leave no token to choose."""
    named: dict[str, Iterable[int]] = {
        "stop_token_ids": params.stop_token_ids,
        "logit_bias": params.logit_bias or (),
        "allowed_token_ids": params.allowed_token_ids or (),
    }
    for name, ids in named.items():
        for token_id in ids:
            if token_id >= vocab_size:
                raise ParameterError(
                    name,
                    f"holds token id {token_id}, but the model's vocabulary ends at "
                    f"{vocab_size - 1}",
                )
    if params.min_tokens and params.allowed_token_ids is not None:
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
        if ends.issuperset(params.allowed_token_ids):
            raise ParameterError(
                "allowed_token_ids",
                "holds only tokens that end the text, which min_tokens forbids; allow another "
                "token or set min_tokens to 0",
            )


def _bias(value: object) -> dict[int, float]:
    name = "logit_bias"
    if not isinstance(value, Mapping):
        raise ParameterError(name, f"must map token ids to numbers, not be {shown(value)}")
    if len(value) > MAX_BIASED_IDS:
        raise ParameterError(name, f"may name at most {MAX_BIASED_IDS} tokens, not {len(value)}")
    bias = {}
    for key, added in value.items():
        # JSON has no integer keys: "17" is how a client writes token 17.
        is_text = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10
        token_id = integer(name, int(key) if is_text else key, 0, 2**31 - 1)
        bias[token_id] = number(name, added, -MAX_BIAS, MAX_BIAS)
    return bias


def _stop_strings(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, bytes | Mapping) or not isinstance(value, Iterable):
        raise ParameterError("stop", f"must be a string or a list of strings, not {shown(value)}")
    strings = (value,) if isinstance(value, str) else tuple(value)
    if len(strings) > MAX_STOP_STRINGS:
        raise ParameterError(
            "stop", f"may hold at most {MAX_STOP_STRINGS} strings, not {len(strings)}"
        )
    for string in strings:
        if not isinstance(string, str):
            raise ParameterError("stop", f"must hold strings only, not {shown(string)}")
        if not string:
            raise ParameterError("stop", "must not hold an empty string: it would stop at once")
        text("stop", string, MAX_STOP_BYTES)
    return strings
