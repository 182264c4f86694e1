"""Tables of request fields, and the one reader that checks a body against a table.

table + body -> `Values`; the tables are also what the documentation shows.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flashformer.engine import checks
from flashformer.engine.sampling import SamplingParams, check_vocabulary
from flashformer.errors import ParameterError
from flashformer.serve.server.endpoint import RequestError
from flashformer.serve.server.messages import ModelInfo

Check = Callable[[str, Any], Any]  # (field, value) -> the value to use, or ParameterError

MAX_NAME_BYTES = 256
MAX_TEXT_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a request; null means the same as a missing field."""

    name: str
    accepts: str  # type and range, for people
    meaning: str
    check: Check
    required: bool = False
    default: Any = None
    aliases: tuple[str, ...] = ()
    parameter: str | None = None  # of SamplingParams, which checks the value


@dataclass(frozen=True, slots=True)
class Values:
    """What a body said, by the names of the table."""

    of: Mapping[str, Any]  # checked values and defaults
    spelled: Mapping[str, str]  # how the body named each field that it gave

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 - a field of any type
        return self.of[name]


def read(fields: Iterable[Field], body: Mapping[str, Any]) -> Values:
    """Check a body against a table; fields that the table does not know are ignored."""
    values: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for field in fields:
        given = [(n, body[n]) for n in (field.name, *field.aliases) if body.get(n) is not None]
        if not given:
            if field.required:
                raise RequestError(
                    400,
                    f"{field.name} is missing; it must be {field.accepts}.",
                    field.name,
                    "missing_required_parameter",
                )
            values[field.name] = field.default
            continue
        name, value = given[0]
        if any(other != value for _, other in given[1:]):
            raise RequestError(
                400,
                f"{name} and {given[1][0]} are one parameter; give only one of them.",
                given[1][0],
                "invalid_value",
            )
        values[field.name] = field.check(name, value)
        spelled[field.name] = name
    return Values(values, spelled)


def sampling_params(
    fields: Iterable[Field], values: Values, info: ModelInfo, **fixed: object
) -> SamplingParams:
    """The fields of a table that are sampling parameters, over the model's defaults.

    `fixed` are parameters that follow from other fields; None leaves the default.
    """
    names = {field.parameter: field.name for field in fields if field.parameter is not None}
    given = {parameter: values[name] for parameter, name in names.items()} | fixed
    given = {parameter: value for parameter, value in given.items() if value is not None}
    try:
        params = SamplingParams(**{**info.default_params, **given})
        check_vocabulary(params, info.vocab_size, info.eos_token_ids)
    except ParameterError as error:
        name = names.get(error.parameter, error.parameter)
        name = values.spelled.get(name, name)
        sentence = str(error).removeprefix(error.parameter)
        raise RequestError(400, f"{name}{sentence}.", name, "invalid_value") from None
    return params


def markdown(fields: Iterable[Field]) -> str:
    """The table as the documentation shows it."""
    rows = ["| field | accepts | meaning |", "|---|---|---|"]
    for field in fields:
        names = ", ".join(f"`{name}`" for name in (field.name, *field.aliases))
        accepts = field.accepts.replace("|", "\\|")
        rows.append(f"| {names}{' (required)' * field.required} | {accepts} | {field.meaning} |")
    return "\n".join(rows)


def as_given(name: str, value: object) -> object:
    """For fields that `SamplingParams` checks."""
    return value


def boolean(name: str, value: object) -> bool:
    """True or false."""
    return checks.boolean(name, value)


def integer(low: int, high: int) -> Check:
    """A whole number within [low, high]."""
    return lambda name, value: checks.integer(name, value, low, high)


def string(max_bytes: int) -> Check:
    """A string of at most `max_bytes` of UTF-8."""
    return lambda name, value: checks.text(name, value, max_bytes)


def one_of(*choices: str) -> Check:
    """One of a few words."""

    def check(name: str, value: object) -> object:
        if not isinstance(value, str) or value not in choices:
            known = ", ".join(choices)
            raise ParameterError(name, f"must be one of {known}, not {checks.shown(value)}")
        return value

    return check


def mapping(name: str, value: object) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise ParameterError(name, f"must be an object, not {checks.shown(value)}")
    return value


def items(name: str, value: object, most: int, least: int = 1) -> list[Any]:
    """A JSON array of a bounded length."""
    if not isinstance(value, list):
        raise ParameterError(name, f"must be an array, not {checks.shown(value)}")
    if not least <= len(value) <= most:
        raise ParameterError(name, f"must hold {least} to {most} entries, not {len(value)}")
    return value


def refuse(why: str) -> Check:
    """For fields that ask for something that this server does not have; their neutral value is {}.

    A client that sends an empty or false value asks for nothing.
    """

    def check(name: str, value: object) -> None:
        if value not in (False, "", [], {}):
            raise ParameterError(name, why)

    return check


def require_model(values: Values, info: ModelInfo) -> None:
    """Refuse a request for another model."""
    name = values["model"]
    if name is not None and name != info.model_id:
        raise RequestError(
            404,
            f"there is no model {name!r} here; this server has {info.model_id!r}.",
            "model",
            "model_not_found",
        )
