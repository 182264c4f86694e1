"""Train the default model: token ids -> a checkpoint in HF's layout.

`python train.py DATA OUT --minutes 4.5`: one GPU, a fixed time. The schedule follows the clock, so
that any machine ends with a finished model. DATA is what data.py writes.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama import Llama, Shape
from saving import save

MUON_LR, ADAM_LR = 5e-3, 4e-3
WEIGHT_DECAY = 0.1
WARMUP, COOLDOWN = 0.03, 0.6  # shares of the training time; the rate falls in a line to zero
CLIP = 1.0
RESERVE_S = 12  # kept for the last evaluation and the last checkpoint
SAVE_EVERY_S = 60
LOG_EVERY = 50


@dataclass(slots=True)
class Run:
    """One training: the model, its data on the device, and the clock."""

    data: Path
    out: Path
    batch: int  # sequences a step
    tokens: int  # a sequence
    seed: int
    started: float
    deadline: float
    device: torch.device = field(init=False)
    corpus: dict[str, Any] = field(init=False)
    train_ids: Tensor = field(init=False)  # int16 [num_tokens]
    held_out_ids: Tensor = field(init=False)
    model: Llama = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        torch.set_float32_matmul_precision("high")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.corpus = json.loads((self.data / "corpus.json").read_text())
        self.train_ids, self.held_out_ids = self._ids("train"), self._ids("held_out")
        shape = Shape(self.corpus["vocab_size"], max_position_embeddings=self.tokens)
        self.model = Llama(shape).to(self.device)
        for layer in self.model.model.layers:  # all layers share what is compiled for the first
            layer.compile()

    @property
    def device_name(self) -> str:
        """The GPU's name, or cpu."""
        return torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"

    def loss(self, ids: Tensor) -> Tensor:
        """Mean loss of ids [batch, tokens + 1]; products in bf16."""
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.model(ids)

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{time.perf_counter() - self.started:6.1f} s] {text}", flush=True)

    def _ids(self, name: str) -> Tensor:
        ids = np.load(self.data / f"{name}.npz")["ids"].astype(np.int16)  # the vocabulary fits
        return torch.from_numpy(ids).to(self.device)


def windows(run: Run) -> Iterator[Tensor]:
    """Batches [batch, tokens + 1]; every epoch cuts the text elsewhere and shuffles the pieces."""
    random = np.random.default_rng(run.seed)
    ids, span = run.train_ids, torch.arange(run.tokens + 1, device=run.device)
    while True:
        first = random.integers(run.tokens)
        starts = random.permutation(np.arange(first, len(ids) - run.tokens - 1, run.tokens))
        for i in range(0, len(starts) - run.batch + 1, run.batch):
            chosen = torch.from_numpy(starts[i : i + run.batch]).to(run.device)
            yield ids[chosen[:, None] + span].long()


@torch.no_grad()
def held_out(run: Run, max_batches: int | None = None) -> dict[str, float]:
    """The mean loss over windows of the held-out text that do not overlap, for the report."""
    ids, span = run.held_out_ids, torch.arange(run.tokens + 1, device=run.device)
    starts = torch.arange(0, len(ids) - run.tokens - 1, run.tokens, device=run.device)
    full = starts[: len(starts) // run.batch * run.batch].view(-1, run.batch)[:max_batches]
    losses = [run.loss(ids[chosen[:, None] + span].long()) for chosen in full]
    loss = torch.stack(losses).mean().item()
    bytes_a_token = run.corpus["bytes"]["held_out"] / run.corpus["tokens"]["held_out"]
    return {
        "held_out_nats_per_token": round(loss, 4),
        "held_out_bits_per_byte": round(loss / math.log(2) / bytes_a_token, 4),
    }


def optimizers(model: Llama) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [w for w in model.model.layers.parameters() if w.ndim == 2]
    norms = [w for w in model.parameters() if w.ndim == 1]
    muon = torch.optim.Muon(
        matrices, lr=MUON_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(
        [
            {"params": [model.model.embed_tokens.weight], "weight_decay": WEIGHT_DECAY},
            {"params": norms, "weight_decay": 0.0},
        ],
        lr=ADAM_LR,
        betas=(0.9, 0.95),
    )
    return [muon, adam]


def learning_rate(done: float) -> float:
    """Share of the full rate after the share `done` of the time: warm up, hold, fall in a line."""
    return min(1.0, max(done / WARMUP, 0.01), (1 - done) / COOLDOWN)


def update(model: Llama, opts: list[torch.optim.Optimizer], rate: float) -> None:
    """One step of the optimizers at the share `rate` of their full rates."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    for opt, full in zip(opts, (MUON_LR, ADAM_LR), strict=True):
        for group in opt.param_groups:
            group["lr"] = rate * full
        opt.step()
        opt.zero_grad(set_to_none=True)


def checkpoint(run: Run, step: int, max_batches: int | None = None) -> None:
    """Measure the held-out loss and save; `max_batches` bounds the time of the measurement."""
    found = held_out(run, max_batches)
    tokens = step * run.batch * run.tokens
    report = {
        "num_parameters": sum(w.numel() for w in run.model.parameters()),
        "steps": step,
        "tokens": tokens,
        "epochs": round(tokens / len(run.train_ids), 2),
        **found,
        "seconds": round(time.perf_counter() - run.started, 1),
        "device": run.device_name,
        "torch": torch.__version__,
        "corpus": run.corpus,
    }
    save(run.model, run.data / "tokenizer.json", run.out, report)
    run.say(f"saved after {step} steps: {found}")


def train(run: Run) -> int:
    """Train until the deadline, saving now and then; the number of steps."""
    opts = optimizers(run.model)
    pending: list[Tensor] = []  # losses of steps that the GPU may not have finished
    began = saved = run.started
    for step, batch in enumerate(windows(run)):
        now = time.perf_counter()
        if step == 1:
            began = saved = now  # the first step was compilation
        done = (now - began) / (run.deadline - began) if step else 0.0
        if done >= 1:
            return step
        loss = run.loss(batch)
        loss.backward()
        update(run.model, opts, learning_rate(done))
        pending.append(loss.detach())
        if len(pending) > 2:  # never far ahead of the GPU, so that the clock is right
            value = pending.pop(0).item()
            if not math.isfinite(value):
                raise SystemExit(f"the loss of step {step - 2} is {value}; the last save holds")
            if step % LOG_EVERY == 0 or step < 5:
                speed = step * batch[:, 1:].numel() / (now - began)
                run.say(f"step {step}: loss {value:.4f}, {speed / 1e6:.3f} M tokens/s")
        if now - saved > SAVE_EVERY_S < run.deadline - now:
            checkpoint(run, step + 1, max_batches=1)
            saved = time.perf_counter()
    raise AssertionError("windows never end")


def main() -> None:
    """The command line."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder that data.py wrote")
    parser.add_argument("out", type=Path, help="folder for the checkpoint")
    parser.add_argument("--minutes", type=float, default=4.5, help="wall time of the whole run")
    parser.add_argument("--batch", type=int, default=128, help="sequences a step")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a sequence")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    deadline = started + 60 * given.minutes - RESERVE_S
    run = Run(given.data, given.out, given.batch, given.tokens, given.seed, started, deadline)
    size = sum(w.numel() for w in run.model.parameters()) / 1e6
    run.say(f"{size:.2f} M parameters, {len(run.train_ids) / 1e6:.1f} M tokens, {run.device_name}")
    checkpoint(run, train(run))


if __name__ == "__main__":
    main()
