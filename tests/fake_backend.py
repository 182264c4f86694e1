"""A backend whose logits depend on a sequence's tokens as its KV pages hold them, and on no more.

A row stores, in its page, a hash of the entry before it, its token and its position; its logits are
drawn from a hash of all entries that the page table shows. A wrong page, position or token, a page
that two sequences write or a reused prefix that is not the sequence's own changes the logits.
"""

from dataclasses import dataclass, field

import numpy as np

from flashformer.backends.base import StepBatch, StepResult
from flashformer.engine.sampler import Draw, TokenCounts, sample
from flashformer.engine.sampling import SamplingParams
from flashformer.model.spec import LayerSpec, ModelSpec, RopeSpec
from flashformer.plan.machine import Machine
from flashformer.plan.plan import Plan, PlanOptions, make_plan

PAGE_TOKENS = 4
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
MASK = (1 << 64) - 1


def tiny_spec(vocab_size=64, max_positions=4096, eos=(1,), bos=0):
    layer = LayerSpec(
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=16,
        intermediate_size=32,
        rope_idx=0,
        window=0,
        qk_norm=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        attention_scale=0.25,
    )
    return ModelSpec(
        model_type="llama",
        hidden_size=32,
        vocab_size=vocab_size,
        rms_norm_eps=1e-5,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        layers=(layer,),
        ropes=(RopeSpec("default", 10000.0, 16, max_positions),),
        bos_token_id=bos,
        eos_token_ids=tuple(eos),
    )


def fake_plan(
    spec=None, *, context=64, max_batch=8, max_rows=16, page_tokens=PAGE_TOKENS, prompt_rows=0
) -> Plan:
    machine = Machine(
        kind="reference",
        name="fake",
        arch="numpy",
        num_ctas=1,
        layout="rows",
        page_tokens=page_tokens,
        kv_format="f32",
        max_rows=max_rows,
        prompt_rows=prompt_rows,
    )
    options = PlanOptions(format="f32", head_format="f32", context=context, max_batch=max_batch)
    return make_plan(spec or tiny_spec(), machine, options)


def mix(*values):
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = ((state ^ value) * 0xBF58476D1CE4E5B9) & MASK
        state ^= state >> 29
    return state


def true_logits(token_ids, vocab_size=64, spread=3.0):
    """What a sequence that starts with `token_ids` must see after the last of them."""
    entries = []
    for position, token_id in enumerate(token_ids):
        entries.append(mix(entries[-1] if entries else 7, token_id, position))
    return _logits(entries, vocab_size, spread)


def _logits(entries, vocab_size, spread):
    rng = np.random.Generator(np.random.Philox(key=mix(*entries)))
    return (rng.standard_normal(vocab_size) * spread).astype(np.float32)


@dataclass
class FakeBackend:
    plan: Plan = field(default_factory=fake_plan)
    num_pages: int = 0
    spread: float = 3.0
    script: dict = field(default_factory=dict)  # position -> token that wins by far there
    poison: set = field(default_factory=set)  # a row whose token is in it gets a NaN
    fail_steps: set = field(default_factory=set)
    steps: int = 0
    batches: list = field(default_factory=list)
    closed: bool = False

    def __post_init__(self):
        if not self.num_pages:
            options = self.plan.options
            pages = -(-options.context // self.plan.machine.page_tokens)
            self.num_pages = options.max_batch * pages
        self.pages = [[None] * self.plan.machine.page_tokens for _ in range(self.num_pages)]

    def step(self, batch: StepBatch) -> StepResult:
        self.steps += 1
        if self.steps in self.fail_steps:
            raise RuntimeError("the machine is on fire")
        self._check(batch)
        self.batches.append(
            [(int(s), int(p)) for s, p in zip(batch.slots, batch.positions, strict=True)]
        )
        rows = list(zip(batch.token_ids, batch.positions, batch.slots, strict=True))
        for token_id, position, slot in rows:
            before = self._entry(batch, slot, position - 1) if position else 7
            self._store(batch, slot, position, mix(before, int(token_id), int(position)))
        logits = np.empty((len(batch.logit_rows), self.plan.spec.vocab_size), np.float32)
        for i, row in enumerate(batch.logit_rows):
            token_id, position, slot = rows[row]
            entries = [self._entry(batch, slot, p) for p in range(position + 1)]
            logits[i] = _logits(entries, logits.shape[1], self.spread)
            if int(position) in self.script:
                logits[i, self.script[int(position)]] = 100.0
            if int(token_id) in self.poison:
                logits[i, 3] = np.nan
        argmax = np.where(np.isnan(logits).any(axis=1), -1, np.argmax(logits, axis=1))
        return StepResult(logits, argmax.astype(np.int32))

    def close(self):
        self.closed = True

    def _entry(self, batch, slot, position):
        page_tokens = self.plan.machine.page_tokens
        page = batch.page_table[slot, position // page_tokens]
        assert page >= 0, "a position without a page was read"
        entry = self.pages[page][position % page_tokens]
        assert entry is not None, "a position that was never stored was read"
        return entry

    def _store(self, batch, slot, position, entry):
        page_tokens = self.plan.machine.page_tokens
        page = batch.page_table[slot, position // page_tokens]
        assert page >= 0, "a row has no page"
        owners = set(np.argwhere(batch.page_table == page)[:, 0].tolist())
        assert owners == {int(slot)}, "a shared page was written"
        self.pages[page][position % page_tokens] = entry

    def _check(self, batch):
        plan = self.plan
        rows = len(batch.token_ids)
        assert 1 <= rows <= plan.machine.max_rows + plan.machine.prompt_rows
        assert rows == len(batch.positions) == len(batch.slots)
        for array in (batch.token_ids, batch.positions, batch.slots, batch.logit_rows):
            assert array.dtype == np.int32
        assert ((batch.token_ids >= 0) & (batch.token_ids < plan.spec.vocab_size)).all()
        assert (batch.positions < plan.options.context).all()
        assert ((batch.slots >= 0) & (batch.slots < plan.options.max_batch)).all()
        assert (np.diff(batch.logit_rows) > 0).all()
        assert batch.page_table.dtype == np.int32
        long_parts = 0
        for slot in set(batch.slots.tolist()):
            own = batch.positions[batch.slots == slot]
            assert (np.diff(own) == 1).all(), "rows of a sequence are not in order of position"
            long_parts += len(own) > 1
            if plan.machine.prompt_rows:
                assert len({p // plan.machine.prompt_rows for p in own}) == 1, (
                    "a chunk goes too far"
                )
        assert long_parts <= 1, "two prompt chunks in one step"


def run(engine, limit=2000):
    """All deltas until the engine is idle, with the page invariants checked after every step."""
    deltas = []
    for _ in range(limit):
        if not engine.has_work:
            return deltas
        deltas += engine.step()
        engine.kv_cache.check()
    raise AssertionError("the engine does not come to an end")


def tokens_of(deltas, request, index=0):
    own = [d for d in deltas if d.request is request and d.index == index]
    return [t for d in own for t in d.token_ids]


def expected_tokens(prompt, params, seed, max_tokens, index=0, eos=(1,), vocab_size=64):
    """The tokens by the definition alone, without pages, batches or chunks."""
    tokens = list(prompt)
    counts = TokenCounts(prompt)
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else eos)}
    for step in range(max_tokens):
        forbidden = sorted(stops) if step < params.min_tokens else []
        draw = Draw(seed, len(tokens), index)
        token = sample(true_logits(tokens, vocab_size), params, draw, counts, forbidden)
        counts.add(token)
        tokens.append(token)
        if token in stops:
            break
    return tokens[len(prompt) :]
