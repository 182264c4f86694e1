"""The model of a launch: every program of the planner is accepted, every damaged one refused."""

import random
from dataclasses import replace
from itertools import cycle

import pytest

from flashformer.backends.cuda.machine import Device, fit_machine
from flashformer.backends.cuda.program import (
    CONSUMERS,
    FINISHER,
    PRODUCER,
    Arrive,
    Get,
    Launch,
    Meet,
    Put,
    Read,
    Write,
    build_program,
)
from flashformer.backends.cuda.validate import check_program
from flashformer.codegen.exchange import residual_travels
from flashformer.errors import PlanError
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.plan.plan import PlanOptions, make_plan
from specs import layer_spec, model_spec

H200 = Device("H200", 9, 0, 132, 227 << 10, cooperative=True)
MUTANTS = 10_000


def small_plan(num_sms=3, layers=None, **changes):
    fields = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16, "intermediate_size": 44}
    layers = layers or tuple(layer_spec(**fields) for _ in range(2))
    spec = model_spec(layers, max_position_embeddings=4096, **changes)
    machine = fit_machine(replace(H200, num_sms=num_sms), spec)
    return make_plan(spec, machine, PlanOptions("bf16", "bf16", 4096, 2))


@pytest.mark.parametrize("shape", ["llama-3.2-1b", "llama-3.1-8b", "qwen2.5-7b"])
def test_the_program_of_a_real_model_is_accepted(shape):
    spec = ModelSpec.from_hf(SHAPES[shape])
    check_program(build_program(make_plan(spec, fit_machine(H200, spec), PlanOptions())))


@pytest.mark.parametrize("windows", [(0, 0), (0, 40), (70, 70, 0, 70), (0, 0, 0, 0, 0)])
@pytest.mark.parametrize("positions", [(0,), (500,), (300, 3), (4000, 0, 700)])
def test_the_program_of_any_length_window_and_batch_is_accepted(windows, positions):
    fields = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 24, "intermediate_size": 333}
    layers = tuple(layer_spec(**fields, window=window) for window in windows)
    plan = small_plan(20, layers, hidden_size=333)
    check_program(build_program(plan, Launch(positions, 3)))


def test_rows_that_do_not_fill_their_last_tile_are_accepted():
    layer = layer_spec(num_q_heads=3, num_kv_heads=3, head_dim=24, intermediate_size=91)
    check_program(build_program(small_plan(4, (layer,) * 2, hidden_size=77), Launch((0,), 2)))


def test_a_wide_matrix_reads_its_activations_in_windows():
    plan = small_plan(8, (layer_spec(head_dim=16, intermediate_size=14000),) * 2, hidden_size=200)
    program = build_program(plan)
    reads = [e for e in program.roles[0][CONSUMERS] if isinstance(e, Read) and e.buffer == "mlp"]
    assert len({e.rect for e in reads}) > 1
    check_program(program)


# Damage: a class is a function (random, program) -> what it did, or None where it cannot act.


def pick(rng, program, kinds, roles=(CONSUMERS, FINISHER, PRODUCER), where=lambda e: True):
    """A random event of some kinds: its list and index."""
    processes = [events for cta in program.roles for r, events in enumerate(cta) if r in roles]
    found = [
        (events, i)
        for events in processes
        for i, event in enumerate(events)
        if isinstance(event, kinds) and where(event)
    ]
    return rng.choice(found)


def lose_a_write(rng, program):
    events, i = pick(rng, program, Write, where=lambda e: not e.buffer.startswith("past"))
    return events.pop(i)


def write_twice(rng, program):
    events, i = pick(rng, program, Write)
    events.insert(i, events[i])
    return events[i]


def shift_a_write(rng, program):
    events, i = pick(rng, program, Write)
    by = rng.choice([-2, -1, 1, 2])
    rect = events[i].rect
    moved = rect._replace(place=rect.place + by, place_end=rect.place_end + by)
    events[i] = events[i]._replace(rect=moved)
    return events[i]


def change_the_use_of_a_write(rng, program):
    events, i = pick(rng, program, Write)
    events[i] = events[i]._replace(use=events[i].use + rng.choice([-1, 1]))
    return events[i]


def lose_a_read(rng, program):
    events, i = pick(rng, program, Read, where=lambda e: not e.buffer.startswith("past"))
    return events.pop(i)


def read_another_use(rng, program):
    events, i = pick(rng, program, Read)
    events[i] = events[i]._replace(use=events[i].use + rng.choice([-1, 1]))
    return events[i]


def read_without_waiting(rng, program):
    events, i = pick(rng, program, Read, where=lambda e: e.waits)
    events[i] = events[i]._replace(waits=False)
    return events[i]


def read_less(rng, program):
    whole = {n: (b.rows, b.width) for n, b in program.buffers.items()}

    def matters(e):
        return e.buffer in program.inputs.get(e.where.stage, {}) and e.rect[1::2] == whole[e.buffer]

    events, i = pick(rng, program, Read, where=matters)
    rect = events[i].rect
    events[i] = events[i]._replace(rect=rect._replace(place=rect.place + 1))
    return events[i]


def unbalance_the_ring(rng, program):
    events, i = pick(rng, program, (Put, Get), where=lambda e: e.channel == "ring")
    what = rng.choice(["bytes", "count", "lose", "twice"])
    event = events[i]
    if what == "lose":
        events.pop(i)
    elif what == "twice":
        events.insert(i, event)
    elif what == "count":
        events[i] = event._replace(items=event.items + 1)
    else:
        events[i] = event._replace(nbytes=event.nbytes + rng.choice([-512, 512]))
    return event


def unbalance_a_channel(rng, program):
    events, i = pick(rng, program, (Put, Get), where=lambda e: e.channel != "ring")
    return events.pop(i) if rng.random() < 0.5 else events.insert(i, events[i])


def miss_a_barrier(rng, program):
    events, i = pick(rng, program, (Arrive, Meet))
    if rng.random() < 0.5 and isinstance(events[i], Arrive):
        events.insert(i, events[i])
        return events[i]
    return events.pop(i)


def wait_for_too_many_or_few(rng, program):
    events, i = pick(rng, program, Meet)
    events[i] = events[i]._replace(number=events[i].number + rng.choice([-1, 1]))
    return events[i]


def fill_in_another_order(rng, program):
    events, i = pick(rng, program, Put, (PRODUCER,))
    later = [j for j in range(i + 1, len(events)) if isinstance(events[j], Put)]
    if not later or events[later[0]][1:] == events[i][1:]:
        return None
    events[i], events[later[0]] = events[later[0]], events[i]
    return events[i]


def wait_after_use(rng, program):
    """A stage's results leave before its input or the sums of its tiles have come."""
    events, i = pick(rng, program, Write, (FINISHER,), lambda e: e.where.stage != "lm_head")
    first = next(j for j, e in enumerate(events) if e.where == events[i].where)
    event = events.pop(i)
    events.insert(first, event)
    embedded = event.where.stage == "qkv" and event.where.layer == 0
    return None if embedded else event


def read_the_past_too_early(rng, program):
    """The producer does not wait for the end of the step before."""
    events, i = pick(rng, program, Get, (PRODUCER,))
    consumers = next(roles[CONSUMERS] for roles in program.roles if roles[PRODUCER] is events)
    lost = events.pop(i)
    j = next(j for j, e in enumerate(consumers) if isinstance(e, Put) and e[:2] == lost[:2])
    consumers.pop(j)

    def is_new(e):
        return e.rect.place_end > program.buffers[e.buffer].existing[e.rect.row]

    later = [e for e in events if isinstance(e, Read) and e.where.step > lost.where.step]
    return lost if any(is_new(e) for e in later) else None


def store_no_past(rng, program):
    """A key and value that a later step needs is never stored, or in another place."""
    events, i = pick(rng, program, Write, (CONSUMERS,), lambda e: e.buffer.startswith("past"))
    event = events[i]
    if rng.random() < 0.5:
        return events.pop(i)
    by = rng.choice([-1, 1])
    rect = event.rect._replace(place=event.rect.place + by, place_end=event.rect.place_end + by)
    events[i] = event._replace(rect=rect)
    return event


def answer_before_the_barrier(rng, program):
    """A step's barrier comes before what it orders."""
    events, i = pick(rng, program, Arrive, (CONSUMERS,), lambda e: e.counter == "step")
    event = events.pop(i)
    before = rng.randrange(1, 4)
    at = max(j for j in range(i - before) if isinstance(events[j], Read) or j == 0)
    events.insert(at, event)
    return event


DAMAGES = [
    lose_a_write,
    write_twice,
    shift_a_write,
    change_the_use_of_a_write,
    lose_a_read,
    read_another_use,
    read_without_waiting,
    read_less,
    unbalance_the_ring,
    unbalance_a_channel,
    miss_a_barrier,
    wait_for_too_many_or_few,
    fill_in_another_order,
    wait_after_use,
    read_the_past_too_early,
    store_no_past,
    answer_before_the_barrier,
]


def damaged(program):
    """A copy whose lists may be changed."""
    roles = [tuple(list(events) for events in cta) for cta in program.roles]
    return replace(program, roles=roles)


@pytest.mark.parametrize(
    ("ctas", "hidden_size", "mutants"), [(2, 40, MUTANTS), (4, 20, MUTANTS // 4)]
)
def test_none_of_ten_thousand_damaged_programs_is_accepted(ctas, hidden_size, mutants):
    fields = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 16, "intermediate_size": 28}
    plan = small_plan(ctas, (layer_spec(**fields),) * 2, hidden_size=hidden_size)
    assert plan.machine.num_ctas == ctas
    assert residual_travels(plan) == (ctas == 4)
    program = build_program(plan, Launch((2300, 2), 2))
    check_program(program)
    consumers = [event for roles in program.roles for event in roles[CONSUMERS]]
    assert any(e.buffer == "partial" for e in consumers if isinstance(e, Read)), "several chunks"
    rng = random.Random(0)
    accepted, made = [], dict.fromkeys(DAMAGES, 0)
    for damage in cycle(DAMAGES):
        if sum(made.values()) == mutants:
            break
        mutant = damaged(program)
        what = damage(rng, mutant)
        if what is None:
            continue
        made[damage] += 1
        try:
            check_program(mutant)
        except PlanError:
            continue
        accepted.append((damage.__name__, what))

    assert not accepted, accepted[:5]
    assert min(made.values()) >= mutants // 100


def test_a_kernel_is_compiled_only_for_a_program_that_is_proven(monkeypatch):
    from flashformer.backends.cuda import compile as cuda_compile

    def refuse(program):
        raise PlanError("The CUDA program is wrong: somebody waits for ever.")

    monkeypatch.setattr(cuda_compile, "check_program", refuse)
    with pytest.raises(PlanError, match="waits for ever"):
        cuda_compile.compile_kernel(small_plan())
    monkeypatch.undo()
    cuda_compile.compile_kernel(small_plan())
    monkeypatch.setattr(cuda_compile, "check_program", refuse)
    cuda_compile.compile_kernel(small_plan())  # the cached kernel has its proof behind it
