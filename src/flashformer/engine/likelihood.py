"""How well a model foresees a text: the measure by which weight formats are compared.

`LLM`, text -> `Likelihood`
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashformer.engine.llm import LLM
from flashformer.errors import UsageError


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The probability that a model gives to a text, token by token."""

    losses: npt.NDArray[np.float64]  # [num_tokens], nats: -log of each token's probability
    choices: npt.NDArray[np.int32]  # [num_tokens], the token that the model held most probable
    num_bytes: int  # of the text in UTF-8

    @property
    def nats_per_token(self) -> float:
        """Mean loss."""
        return float(self.losses.mean())

    @property
    def perplexity(self) -> float:
        """Exp of the mean loss: among how many equally likely tokens the model is undecided."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between models with different tokenizers."""
        return float(self.losses.sum()) / math.log(2) / self.num_bytes


def measure_likelihood(llm: LLM, text: str, window: int) -> Likelihood:
    """Score every token of `text`, each from the tokens before it in its window.

    The text is cut into windows of at most `window` tokens that do not overlap; each starts with
    the begin token if the tokenizer has one, else its first token is not scored. Raises
    `UsageError` for a model without a tokenizer, an empty text and a window that does not fit.
    """
    if llm.tokenizer is None:
        raise UsageError(f"{llm.checkpoint.folder} has no tokenizer, so it cannot read a text.")
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    first = llm.tokenizer.encode("", add_special_tokens=True)
    if len(ids) + len(first) < 2:
        raise UsageError("the text is empty; there is nothing to measure.")
    losses, choices = [], []
    stride = window - len(first)
    for start in range(0, len(ids), stride):
        piece = [*first, *ids[start : start + stride]]
        if len(piece) > 1:
            given = max(len(first), 1)  # tokens that are not scored
            logits = llm.logits(piece)[given - 1 : -1]
            losses.append(_losses(logits, np.asarray(piece[given:])))
            choices.append(logits.argmax(axis=1).astype(np.int32))
    return Likelihood(np.concatenate(losses), np.concatenate(choices), len(text.encode()))


def _losses(
    logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """-log softmax(logits) [tokens, vocab_size] of the targets [tokens]."""
    highest = logits.max(axis=1)
    sums = np.exp(logits - highest[:, None], dtype=np.float32).sum(axis=1, dtype=np.float64)
    chosen = logits[np.arange(len(targets)), targets]
    losses: npt.NDArray[np.float64] = highest.astype(np.float64) + np.log(sums) - chosen
    return losses
