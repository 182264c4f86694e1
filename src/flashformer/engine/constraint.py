"""What may come next in a text that must have a form: where a grammar meets the engine.

tokens chosen so far -> which tokens may follow.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt


class Constraint(Protocol):
    """The state of one sequence's form; a sequence that has one is decoded token by token."""

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens may follow, [vocab_size]; an end token is allowed where the text may end."""
        ...

    def accept(self, token_id: int) -> None:
        """Take the chosen token, which was allowed and does not end the text."""
        ...

    @property
    def complete(self) -> bool:
        """Whether nothing may follow, so that the text ends here without an end token."""
        ...
