"""The fake backend with a device that runs ahead of the host: it draws many tokens by itself."""

import random
from dataclasses import dataclass, field

import numpy as np

from fake_backend import FakeBackend
from flashformer.backends.base import NOT_A_NUMBER, StepBatch
from flashformer.engine.sampler import Draw, TokenCounts, sample
from flashformer.engine.sampling import SamplingParams


@dataclass
class ManyTokens(FakeBackend):
    """Draws up to `ahead` tokens more than were asked for; `fail_steps` fail in a launch, too."""

    ahead: int = 3
    seed: int = 0
    max_stop_ids: int = 2
    launches: list = field(default_factory=list)

    def launch(self, rows, page_table, num_steps):
        self.land()
        self.launches.append(FakeLaunch(self, rows, page_table.copy(), num_steps))
        return self.launches[-1]

    def step(self, batch):
        self.land()
        return super().step(batch)

    def land(self):
        if self.launches:
            self.launches[-1].stop()
            self.launches[-1].finish()


class FakeLaunch:
    """Writes its pages until it ends: an engine that gives them away before is noticed."""

    def __init__(self, backend, rows, page_table, num_steps):
        assert len({row.slot for row in rows}) == len(rows) <= backend.plan.machine.max_rows
        self.backend, self.page_table, self.num_steps = backend, page_table, num_steps
        self.rows = rows
        self.token_ids = [row.token_id for row in rows]
        self.counts = [counted(row.choice) for row in rows]
        self.drawn, self.read = [], 0
        self.stopped = self.ended = False
        self.unless = lambda: False
        self.failure = None
        self.random = random.Random(backend.seed + backend.steps)

    def __iter__(self):
        return self

    def __next__(self):
        while len(self.drawn) == self.read and not self.ended:
            if self.unless():
                self.stop()
            self.draw()
        for _ in range(self.random.randrange(self.backend.ahead + 1)):
            self.draw()
        if self.read < len(self.drawn):
            self.read += 1
            return self.drawn[self.read - 1]
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        raise StopIteration

    def stop(self):
        self.stopped = True

    def finish(self):
        while not self.ended:
            self.draw()

    def draw(self):
        """One token of every row, unless the launch has ended."""
        if self.ended:
            return
        step = len(self.drawn)
        batch = StepBatch(
            np.array(self.token_ids, np.int32),
            np.array([row.position + step for row in self.rows], np.int32),
            np.array([row.slot for row in self.rows], np.int32),
            self.page_table,
            np.arange(len(self.rows), dtype=np.int32),
        )
        try:
            result = FakeBackend.step(self.backend, batch)
        except RuntimeError as error:
            self.failure, self.ended = error, True
            return
        tokens = [self.choose(i, step, result) for i in range(len(self.rows))]
        self.drawn.append(np.array(tokens, np.int32))
        self.token_ids = tokens
        over = any(t < 0 or t in r.choice.stop_ids for t, r in zip(tokens, self.rows, strict=True))
        self.ended = over or self.stopped or len(self.drawn) == self.num_steps

    def choose(self, i, step, result):
        if result.argmax[i] < 0:
            return NOT_A_NUMBER
        row, choice = self.rows[i], self.rows[i].choice
        draw = Draw(choice.seed, row.position + step + 1, choice.index)
        forbidden = choice.stop_ids if step < choice.min_tokens else ()
        token_id = sample(result.logits[i], params_of(choice), draw, self.counts[i], forbidden)
        self.counts[i].add(token_id)
        return token_id


def params_of(choice):
    return SamplingParams(
        temperature=choice.temperature,
        top_k=choice.top_k,
        top_p=choice.top_p,
        min_p=choice.min_p,
        repetition_penalty=choice.repetition_penalty,
        frequency_penalty=choice.frequency_penalty,
        presence_penalty=choice.presence_penalty,
        logit_bias=choice.bias,
        allowed_token_ids=choice.allowed_ids,
    )


def counted(choice):
    counts = TokenCounts(choice.counts)
    for token_id, count in choice.counts.items():
        for _ in range(count):
            counts.add(token_id)
    return counts
