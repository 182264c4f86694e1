"""What the kernel does in a launch, as data: the events of every CTA's roles, for `validate`.

Plan + Launch -> `Program`. It says in Python what kernel/decode.cu says in C++, stage by stage and
in the same order. The tiles of a stage are one event, and so is what all threads of a role do.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from flashformer.backends.cuda.geometry import (
    Rect,
    StageShape,
    Unit,
    merges_of,
    page_bytes,
    stage_shape,
    units_of,
)
from flashformer.codegen.cuda_header import MATRICES, slot_bytes
from flashformer.codegen.exchange import max_chunks, residual_travels
from flashformer.model.spec import LayerSpec
from flashformer.plan.plan import Matrix, Plan
from flashformer.plan.planner import longest_context
from flashformer.quant.formats import TILE_ROWS

ROLES = ("consumers", "finisher", "producer")
CONSUMERS, FINISHER, PRODUCER = range(len(ROLES))
HALVES, SINGLES = 8, 4  # values of a packet
PART_BUFFERS = 2  # tiles whose sums may wait for the finisher; the kernel has at least as many
RING_SLOTS = 4  # the kernel has at least as many
MAX_LAYERS = 6
LONG = 8192  # positions that put a share of attention on every CTA


class Where(NamedTuple):
    """A stage of the launch."""

    stage: str
    layer: int
    step: int

    def __str__(self) -> str:
        return f"{self.stage} of layer {self.layer}, step {self.step}"


class Put(NamedTuple):
    """`items` of `nbytes` together into a channel of this CTA, waiting while it is full."""

    where: Where
    channel: str
    items: int
    nbytes: int = 0


class Get(NamedTuple):
    """The same out of the channel, waiting while it is empty."""

    where: Where
    channel: str
    items: int
    nbytes: int = 0


class Write(NamedTuple):
    """Places of a buffer, for its `use`-th time in the launch."""

    where: Where
    buffer: str
    use: int
    rect: Rect
    sources: tuple[tuple[str, Rect], ...] = ()  # that it is made of, beyond the stage's inputs


class Read(NamedTuple):
    """Places of a buffer; `waits`: for the tag of every packet."""

    where: Where
    buffer: str
    use: int
    rect: Rect
    waits: bool = True


class Arrive(NamedTuple):
    """Count up a counter in global memory (release)."""

    where: Where
    counter: str
    use: int


class Meet(NamedTuple):
    """Wait until `number` have arrived (acquire)."""

    where: Where
    counter: str
    use: int
    number: int


Event = Put | Get | Write | Read | Arrive | Meet
Roles = list[tuple[list[Event], list[Event], list[Event]]]


@dataclass(frozen=True, slots=True)
class Buffer:
    """What CTAs share in global memory, in places: packets, or values without a tag."""

    rows: int
    width: int
    tagged: bool = True  # a place says itself whether it is there; otherwise acquire and release
    dated: bool = False  # by the number of its use, not by one bit
    complete: bool = True  # every place is written in every use
    padding: int = 0  # places at a row's end that nobody needs to read
    existing: tuple[int, ...] = ()  # of keys and values: places that a row has before the launch
    new: int = 0  # and those that it gets


@dataclass(frozen=True, slots=True)
class Launch:
    """What is decoded: the position of every row's token, and for how many steps."""

    positions: tuple[int, ...]
    steps: int


@dataclass(slots=True)
class Program:
    """The events of every process of a launch."""

    roles: Roles  # of every CTA, in the order of ROLES
    buffers: dict[str, Buffer]
    capacities: dict[str, int]  # of the channels
    inputs: dict[str, dict[str, Rect]]  # what every CTA must have read before a stage's results
    stage_bytes: dict[str, int]  # of weights that all CTAs together must stream
    slot_bytes: int

    @property
    def processes(self) -> list[tuple[str, list[Event]]]:
        """Name and events of all."""
        return [
            (f"the {role} of CTA {cta}", events)
            for cta, roles in enumerate(self.roles)
            for role, events in zip(ROLES, roles, strict=True)
        ]


def build_program(plan: Plan, launch: Launch | None = None) -> Program:
    """The program of `launch`; default: two steps of a long and a short sequence.

    Many layers are represented by a few: every neighbourhood of windows that the model has.
    """
    layers = _representative(plan.spec.layers)
    plan = replace(plan, spec=replace(plan.spec, layers=layers))
    long = min(LONG, longest_context(plan.spec)) - 2
    launch = launch or Launch((max(0, long), min(3, max(0, long))), 2)
    return _Builder(plan, launch).build()


def _representative(layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
    """Of a run of layers with equal windows the first two."""
    kept: list[LayerSpec] = []
    for layer in layers:
        if len(kept) < 2 or not layer.window == kept[-1].window == kept[-2].window:
            kept.append(layer)
    return tuple(kept[:MAX_LAYERS])


class _Builder:
    def __init__(self, plan: Plan, launch: Launch) -> None:
        self.plan = plan
        self.launch = launch
        self.layer = self.plan.spec.layers[0]
        self.rows = len(self.launch.positions)
        self.buffers = self._buffers()
        self.whole = {n: Rect(0, b.rows, 0, b.width) for n, b in self.buffers.items()}

    def build(self) -> Program:
        ctas = range(self.plan.machine.num_ctas)
        roles: Roles = [([], [], []) for _ in ctas]
        for step in range(self.launch.steps):
            self._step(roles, step)
        hidden = {"hidden_attention": self.whole["hidden_attention"]}
        return Program(
            roles=roles,
            buffers=self.buffers,
            capacities={
                "ring": RING_SLOTS,
                "parts": PART_BUFFERS,
                "residual": 1,
                "candidates": 1,
                "past": 1,
            },
            inputs={
                "qkv": hidden,
                "o_proj": {"attention": self.whole["attention"]},
                "gate_up": {"hidden_mlp": self.whole["hidden_mlp"]},
                "down": {"mlp": self.whole["mlp"]},
                "lm_head": hidden,
                "sample": {"best": self.whole["best"]},
            },
            stage_bytes={name: self._matrix(name, 0).nbytes for name in (*MATRICES, "lm_head")},
            slot_bytes=slot_bytes(self.plan),
        )

    def _matrix(self, name: str, layer: int) -> Matrix:
        return self.plan.matrix(name, -1 if name == "lm_head" else layer)

    def _buffers(self) -> dict[str, Buffer]:
        plan, layer, rows = self.plan, self.layer, self.rows
        tiles = {name: self._matrix(name, 0).num_tiles for name in MATRICES}
        hidden = tiles["down"] * (TILE_ROWS // HALVES)
        qkv = tiles["qkv"] * (TILE_ROWS // SINGLES)
        residual = Buffer(rows, tiles["down"], dated=True)  # of a tile's rows at a time
        pairs = rows * layer.num_kv_heads
        found = {
            "hidden_attention": Buffer(rows, hidden),
            "hidden_mlp": Buffer(rows, hidden),
            "attention": Buffer(rows, layer.q_rows // HALVES),
            "mlp": Buffer(rows, tiles["gate_up"]),
            "qkv": Buffer(rows, qkv, padding=qkv - layer.qkv_rows // SINGLES),
            "best": Buffer(rows, plan.machine.num_ctas, tagged=False),
            "residual_attention": residual,
            "residual_mlp": residual,
            "partial": Buffer(
                rows * layer.num_q_heads, max_chunks(plan, layer), dated=True, complete=False
            ),
        }
        existing = tuple(p for p in self.launch.positions for _ in range(layer.num_kv_heads))
        width = max(self.launch.positions) + self.launch.steps
        past = Buffer(pairs, width, tagged=False, existing=existing, new=self.launch.steps)
        return found | {f"past {i}": past for i in range(len(plan.spec.layers))}

    def _step(self, roles: Roles, step: int) -> None:
        at = Where("embed", 0, step)
        for consumers, finisher, _ in roles:
            consumers.append(Put(at, "residual", 1))
            finisher.append(Get(at, "residual", 1))
        for layer in range(len(self.plan.spec.layers)):
            last = step * len(self.plan.spec.layers) + layer - 1  # use of the layer before
            embedded = layer == 0
            self._stage(
                roles,
                Where("qkv", layer, step),
                None if embedded else last,
                "hidden_attention",
                last + 1,
            )
            self._attention(roles, Where("attention", layer, step), last + 1)
            self._stage(roles, Where("o_proj", layer, step), last + 1, "attention", last + 1)
            self._stage(roles, Where("gate_up", layer, step), last + 1, "hidden_mlp", last + 1)
            self._stage(roles, Where("down", layer, step), last + 1, "mlp", last + 1)
        layers = len(self.plan.spec.layers)
        self._stage(
            roles, Where("lm_head", layers, step), (step + 1) * layers - 1, "hidden_attention", step
        )
        self._end_of_step(roles, Where("sample", layers, step), step)

    def _stage(self, roles: Roles, at: Where, input_use: int | None, source: str, use: int) -> None:
        """A matrix: its tiles through the ring, their sums to the finisher, its results out."""
        matrix = self._matrix(at.stage, at.layer)
        shape = stage_shape(self.plan, matrix, self.plan.machine.max_rows)
        for cta, (first, end) in enumerate(pairwise(matrix.first_tile)):
            consumers, finisher, producer = roles[cta]
            # Whoever has no tile needs the input only if it is some other stage's, too.
            if first == end and at.stage == "qkv" and input_use is not None:
                consumers.append(Read(at, source, input_use, self.whole[source]))
            most = shape.group if shape.num_windows > 1 else max(1, end - first)
            for group in range(first, end, most):
                tiles = min(most, end - group)
                for begin, stop in shape.windows():
                    if input_use is not None:
                        consumers.append(
                            Read(at, source, input_use, self._columns(source, shape, begin, stop))
                        )
                    items = tiles * (stop - begin), tiles * shape.nbytes(begin, stop)
                    producer.append(Put(at, "ring", *items))
                    consumers.append(Get(at, "ring", *items))
            if first < end:
                consumers.append(Put(at, "parts", end - first))
                finisher.append(Get(at, "parts", end - first))
                finisher += self._results(at, use, cta, first, end)
            if at.stage == "lm_head":
                finisher.append(Put(at, "candidates", 1))

    def _columns(self, source: str, shape: StageShape, begin: int, stop: int) -> Rect:
        """The packets of a window of activations."""
        if shape.num_windows == 1:
            return self.whole[source]
        width = self.buffers[source].width
        packets = shape.chunk_runs * shape.run_cols // HALVES
        return Rect(0, self.rows, begin * packets, min(stop * packets, width))

    def _results(self, at: Where, use: int, cta: int, first: int, end: int) -> list[Event]:
        def tiles(packets: int) -> Rect:
            return Rect(0, self.rows, first * packets, end * packets)

        if at.stage == "qkv":
            return [Write(at, "qkv", use, tiles(TILE_ROWS // SINGLES))]
        if at.stage == "gate_up":
            own = self._matrix(at.stage, at.layer).stored_tiles[first:end].tolist()
            return [Write(at, "mlp", use, Rect(0, self.rows, t, t + 1)) for t in own]
        if at.stage == "lm_head":
            return [Write(at, "best", use, Rect(0, self.rows, cta, cta + 1))]
        name = "mlp" if at.stage == "o_proj" else "attention"
        packets = tiles(TILE_ROWS // HALVES)
        if not residual_travels(self.plan):
            return [Write(at, f"hidden_{name}", use, packets)]
        events: list[Event] = []
        sources = []
        if at.stage == "down" or at.layer > 0:  # a step's first residual is the embedding
            source = "residual_mlp" if at.stage == "down" else "residual_attention"
            from_use = use if at.stage == "down" else use - 1
            events.append(Read(at, source, from_use, tiles(1)))
            sources.append((source, tiles(1)))
        events.append(Write(at, f"hidden_{name}", use, packets, tuple(sources)))
        if at.stage == "o_proj" or at.layer + 1 < len(self.plan.spec.layers):
            events.append(Write(at, f"residual_{name}", use, tiles(1), tuple(sources)))
        return events

    def _attention(self, roles: Roles, at: Where, use: int) -> None:
        layer = self.plan.spec.layers[at.layer]
        positions = [p + at.step for p in self.launch.positions]
        for cta, units in enumerate(units_of(self.plan, layer, positions)):
            consumers, _, producer = roles[cta]
            if at.layer == 0 and at.step > 0:
                producer.append(Get(at._replace(step=at.step - 1), "past", 1))
            for unit in units:
                pages = 2 * unit.pages
                if pages:
                    seen = self._pages_of(unit)
                    producer.append(Read(at, f"past {at.layer}", 0, seen, waits=False))
                    producer.append(Put(at, "ring", pages, pages * page_bytes(self.plan, layer)))
                consumers += self._unit(at, use, unit, positions[unit.row])
        for cta, heads in enumerate(merges_of(self.plan, layer, positions)):
            for merge in heads:
                place = merge.row * layer.num_q_heads + merge.head
                partials = Rect(place, place + 1, 0, merge.num_chunks)
                start = merge.head * layer.head_dim // HALVES
                packets = Rect(merge.row, merge.row + 1, start, start + layer.head_dim // HALVES)
                roles[cta][CONSUMERS].extend(
                    (
                        Read(at, "partial", use, partials),
                        Write(at, "attention", use, packets, (("partial", partials),)),
                    )
                )

    def _pages_of(self, unit: Unit) -> Rect:
        """The positions of the unit's pages that count."""
        tokens, past = self.plan.machine.page_tokens, unit.past
        first = past.first_page + unit.chunk * past.chunk_pages
        places = max(past.first, first * tokens), min(past.base, (first + unit.pages) * tokens)
        pair = unit.row * self.layer.num_kv_heads + unit.kv_head
        return Rect(pair, pair + 1, *places)

    def _unit(self, at: Where, use: int, unit: Unit, position: int) -> list[Event]:
        layer, row = self.layer, unit.row
        group = layer.num_q_heads // layer.num_kv_heads
        pair = row * layer.num_kv_heads + unit.kv_head

        def heads(first: int, count: int, values: int) -> Rect:
            start = first * layer.head_dim // values
            return Rect(row, row + 1, start, start + count * layer.head_dim // values)

        query = heads(unit.kv_head * group, group, SINGLES)
        sources = [("qkv", query)]
        if unit.with_own:
            for kind in range(2):
                first = layer.num_q_heads + kind * layer.num_kv_heads + unit.kv_head
                sources.append(("qkv", heads(first, 1, SINGLES)))
        events: list[Event] = [Read(at, buffer, use, rect) for buffer, rect in sources]
        if unit.pages:
            nbytes = 2 * unit.pages * page_bytes(self.plan, layer)
            events.append(Get(at, "ring", 2 * unit.pages, nbytes))
        result = Write(
            at, "attention", use, heads(unit.kv_head * group, group, HALVES), tuple(sources)
        )
        chunks = unit.past.num_chunks
        if chunks == 1:
            events.append(result)
        else:
            first = row * layer.num_q_heads + unit.kv_head * group
            place = Rect(first, first + group, unit.chunk, unit.chunk + 1)
            events.append(Write(at, "partial", use, place, tuple(sources)))
        if unit.with_own:
            own = Rect(pair, pair + 1, position, position + 1)
            events.append(Write(at, f"past {at.layer}", 0, own, tuple(sources[1:])))
        return events

    def _end_of_step(self, roles: Roles, at: Where, step: int) -> None:
        for consumers, _, _ in roles:
            consumers += [
                Get(at._replace(stage="lm_head"), "candidates", 1),
                Arrive(at, "step", step),
                Meet(at, "step", step, len(roles)),
                Read(at, "best", step, self.whole["best"], waits=False),
            ]
            if step + 1 < self.launch.steps:
                consumers.insert(-1, Put(Where("attention", 0, step), "past", 1))
