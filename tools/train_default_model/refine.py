"""Refine a trained model with exercises, and with what it knew before so that it forgets nothing.

`python refine.py TRAINED DATA OUT --minutes 12`: one core of a CPU is enough. TRAINED is what
train.py wrote, DATA what data.py wrote. People try a model with `def fibonacci(n):`, and no library
defines that: so the exercises of a first course are learnt last, where they stay.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from chat_format import exchange_text
from conversations import about_the_model
from data import encode
from exercises import exercise_questions, exercises
from saving import save
from train import CLIP, Run, held_out

LR = 4e-4
WARMUP_STEPS = 20  # then the rate falls in a line to zero
CONTEXT = 1024
ROW_TOKENS = 256  # exercises are short
# Rows of a batch: of exercises, of conversations about them and the model, of the old corpus.
EXERCISE_ROWS, CHAT_ROWS, CORPUS_ROWS = 7, 2, 7
ROWS = EXERCISE_ROWS + CHAT_ROWS + CORPUS_ROWS
LOG_EVERY = 20


class Documents:
    """Texts that fill rows: every row begins with a whole text, as a prompt does."""

    def __init__(self, tokenizer: Tokenizer, texts: list[str], random: np.random.Generator) -> None:
        self._texts = [encode(tokenizer, [text]).astype(np.int64) for text in texts]
        self._random = random
        self._shuffled = self._endless()

    def row(self) -> Tensor:
        """Ids [ROW_TOKENS + 1] of texts one after the other, the last one cut."""
        parts: list[np.ndarray] = []
        while sum(map(len, parts)) <= ROW_TOKENS:
            parts.append(next(self._shuffled))
        return torch.from_numpy(np.concatenate(parts)[: ROW_TOKENS + 1])

    def _endless(self) -> Iterator[np.ndarray]:
        while True:
            for i in self._random.permutation(len(self._texts)):
                yield self._texts[i]


def batches(run: Run) -> Iterator[Tensor]:
    """Batches [rows, ROW_TOKENS + 1] of the three kinds."""
    random = np.random.default_rng(run.seed)
    tokenizer = Tokenizer.from_file(str(run.data / "tokenizer.json"))
    chats = [exchange_text(*pair) for pair in set(about_the_model() + exercise_questions())]
    practice = Documents(tokenizer, exercises(), random)
    talk = Documents(tokenizer, sorted(chats), random)
    while True:
        rows = [practice.row() for _ in range(EXERCISE_ROWS)]
        rows += [talk.row() for _ in range(CHAT_ROWS)]
        starts = random.integers(len(run.train_ids) - ROW_TOKENS, size=CORPUS_ROWS)
        rows += [run.train_ids[at : at + ROW_TOKENS + 1].long().cpu() for at in starts]
        yield torch.stack(rows).to(run.device)


def refine(run: Run) -> int:
    """Train until the deadline; the number of steps."""
    adam = torch.optim.AdamW(run.model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    began = time.perf_counter()
    for step, batch in enumerate(batches(run)):
        done = (time.perf_counter() - began) / (run.deadline - began)
        if done >= 1:
            return step
        loss = run.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), CLIP)
        for group in adam.param_groups:
            group["lr"] = LR * min((step + 1) / WARMUP_STEPS, 1 - done)
        adam.step()
        adam.zero_grad(set_to_none=True)
        if step % LOG_EVERY == 0:
            run.say(f"step {step}: loss {loss.item():.4f}")
    raise AssertionError("batches never end")


def load(run: Run, trained: Path) -> None:
    """Put a checkpoint's weights into the model."""
    weights: dict[str, Tensor] = {}
    for shard in trained.glob("*.safetensors"):
        weights.update(load_file(shard))
    run.model.load_state_dict(weights)


def main() -> None:
    """The command line."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trained", type=Path, help="folder that train.py wrote")
    parser.add_argument("data", type=Path, help="folder that data.py wrote")
    parser.add_argument("out", type=Path, help="folder for the refined checkpoint")
    parser.add_argument("--minutes", type=float, default=12, help="wall time of the training")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    deadline = started + 60 * given.minutes
    run = Run(given.data, given.out, ROWS, CONTEXT, given.seed, started, deadline)
    load(run, given.trained)
    steps = refine(run)
    refining = {
        "steps": steps,
        "tokens": steps * ROWS * ROW_TOKENS,
        "exercises": len(exercises()),
        "seconds": round(time.perf_counter() - started, 1),
        "device": f"{run.device_name}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    found = held_out(run)
    run.say(f"refined in {steps} steps: {found}")
    before = json.loads((given.trained / "training.json").read_text())
    report = {"trained": before, "refined": refining, **found}
    save(run.model, given.data / "tokenizer.json", given.out, report)


if __name__ == "__main__":
    main()
