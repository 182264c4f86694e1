"""What an answer must look like and how it is read, once its prompt is known.

tools + response_format + the end of the prompt -> the grammar and the parsers of an answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from flashformer.errors import ParameterError
from flashformer.serve.protocol.formats import (
    AnswerFormat,
    answer_rule,
    forced_calls,
    reasoning_rule,
)
from flashformer.serve.protocol.reasoning import CLOSE, OPEN, ReasoningParser
from flashformer.serve.protocol.tools import ToolUse
from flashformer.serve.protocol.transcript import Transcript
from flashformer.serve.server.endpoint import Decode
from flashformer.serve.server.messages import Grammar

_TAIL = 16  # tokens of a prompt in which a block of reasoning would be opened or closed


@dataclass(frozen=True, slots=True)
class AnswerRules:
    """The rules of every answer to one request."""

    form: AnswerFormat
    use: ToolUse = ToolUse()  # noqa: RUF009 - frozen
    shape: Grammar | None = None  # of an answer that is no call

    def check(self) -> None:
        """Refuse combinations that no answer could follow."""
        if self.use.mode == "auto" and self.use.active and self.form.tools is None:
            raise ParameterError(
                "tools",
                "cannot be offered: the model's chat template shows no tools; use tool_choice "
                "required or a named function, which a grammar makes possible",
            )
        if self.shape is not None and self._may_call and self.form.tools == "mistral":
            raise ParameterError(
                self.shape.field, "cannot be combined with tools for this model; give one of them"
            )

    @property
    def forced(self) -> bool:
        """Whether the answer consists of calls."""
        return self.use.active and self.use.mode == "required"

    @property
    def _may_call(self) -> bool:
        return self.use.active and self.use.mode == "auto"

    def grammar(self, prompt: Sequence[int], decode: Decode) -> Grammar | None:
        """What llguidance must hold the answer to; None: anything."""
        if not self.forced and self.shape is None:
            return None
        reasons = self._reasoning(prompt, decode)
        if self.shape is not None and not self._may_call and not self.forced and reasons is None:
            return self.shape
        rules = []
        answers = []
        if self.shape is not None and not self.forced:
            rules.append(answer_rule(self.shape))
            answers.append("answer")
        if self.use.active:
            rules.append(forced_calls(self.form, self.use.allowed, parallel=self.use.parallel))
            answers.append("calls")
        start = f"start: ({' | '.join(answers)})"
        if reasons is not None:
            opened = "think" if reasons.inside else f'(SPACE "{OPEN}" think)?'
            start = f"start: {opened} ({' | '.join(answers)})"
            rules.append(reasoning_rule())
        field = "tools" if self.forced or self.shape is None else self.shape.field
        return Grammar("lark", "\n".join([start, *rules]), field)

    def transcript(self, prompt: Sequence[int], decode: Decode) -> Transcript:
        """An empty answer with its parsers."""
        parser = None
        if self.use.active:
            parser = self.form.tool_parser(self.use.allowed, forced=self.forced)
        reasoning = self._reasoning(prompt, decode)
        return Transcript(reasoning, parser, self.use.parallel)

    def _reasoning(self, prompt: Sequence[int], decode: Decode) -> ReasoningParser | None:
        """None where the model does not reason, or the prompt has closed the block already."""
        if not self.form.reasons:
            return None
        end = decode(prompt[-_TAIL:]).rstrip()
        if end.endswith(CLOSE):
            return None
        return ReasoningParser(inside=end.endswith(OPEN))
