"""No warp waits for the fill after next of a slot, which parity cannot tell from this one.

A model of who waits for which fill of the ring (kernel/ring.cuh, matvec.cuh, attention.cuh), and of
what a warp knows to have landed: what it has read, all that was read before its CTA last met, and
what can no longer have been on its way when the last fill that it has read was started.
"""

from itertools import product

import pytest

from flashformer.backends.cuda.geometry import SLOTS_AT_ONCE, most_in_flight
from flashformer.backends.cuda.machine import MIN_SLOTS

MAX_SLOTS = 24  # kernel/cta.cuh
GROUPS = range(2)  # of four warps each, that read the same slots: of tiles as of pages


def of_tiles(num_tiles, num_chunks):
    """Fills of a stage that each group reads, numbered from 0; and how many there are."""
    if num_chunks >= SLOTS_AT_ONCE:
        return of_window(num_tiles, range(num_chunks), turn=num_chunks)
    turns = {group: range(group, num_tiles, len(GROUPS)) for group in GROUPS}
    return {group: list(tiles) for group, tiles in turns.items()}, num_tiles


def of_window(num_tiles, window, turn):
    """The same of tiles that share a window of their activations."""
    reads = {
        group: [
            tile * len(window) + chunk - window.start
            for tile in range(num_tiles)
            for chunk in window
            if (chunk - group + tile * turn) % SLOTS_AT_ONCE == 0
        ]
        for group in GROUPS
    }
    return reads, num_tiles * len(window)


def of_pages(num_pages):
    """The same of attention: keys and values of every other page."""
    pages = {group: range(group, num_pages, len(GROUPS)) for group in GROUPS}
    return {
        group: [2 * p + i for p in pages[group] for i in (0, 1)] for group in GROUPS
    }, 2 * num_pages


def waits_beyond_the_next_fill(stages, num_slots, in_flight):
    """Fills for which a warp waits while the one before in that slot may not have landed."""
    found, start = [], 0
    for reads, num_fills in stages:
        for own in reads.values():
            last, seen = start - 1, set()
            for fill in (start + number for number in own):
                before = fill - num_slots
                landed = before < start or before in seen or before <= last - in_flight
                if not landed:
                    found.append(fill)
                seen.add(fill)
                last = fill
        start += num_fills
    return found


STAGES = [of_tiles(t, c) for t, c in product(range(8), range(1, 18))]
STAGES += [of_pages(p) for p in range(20)]
STAGES += [of_window(2, range(first, first + 1), turn=1) for first in range(4)]
WINDOWS = [range(first, first + size) for first, size in product((0, 4), range(1, 17))]


def in_turn(*stages):
    """Several parts of the ring that no barrier separates."""
    reads, num_fills = {group: [] for group in GROUPS}, 0
    for part, count in stages:
        for group in GROUPS:
            reads[group] += [num_fills + fill for fill in part[group]]
        num_fills += count
    return reads, num_fills


EVEN, ODD = ([of_window(2, w, turn=0) for w in WINDOWS if len(w) % 2 == odd] for odd in range(2))
STAGES += EVEN
# Activations in two parts, the second of which is there when a later group of tiles comes. (Of an
# odd number of chunks every part begins with a barrier.)
TWO = [(range(early), range(early, early + late)) for early in (2, 4, 6, 14) for late in (2, 4)]
STAGES += [
    in_turn(*(of_window(tiles, part, turn=0) for tiles in counts for part in parts))
    for parts in TWO
    for counts in ((1,), (2,), (2, 1), (2, 2), (2, 2, 2))
]


@pytest.mark.parametrize("num_slots", range(MIN_SLOTS, MAX_SLOTS + 1))
def test_no_warp_waits_for_the_fill_after_next_of_a_slot(num_slots):
    for stage in STAGES:
        assert not waits_beyond_the_next_fill([stage, stage], num_slots, most_in_flight(num_slots))


@pytest.mark.parametrize("num_slots", range(MIN_SLOTS, MAX_SLOTS + 1))
def test_the_same_with_an_odd_number_of_chunks_in_a_last_window(num_slots):
    for last in ODD:
        stages = [EVEN[0], last, STAGES[-1]]
        assert not waits_beyond_the_next_fill(stages, num_slots, most_in_flight(num_slots, True))


@pytest.mark.parametrize("num_slots", [n for n in range(MIN_SLOTS, MAX_SLOTS + 1) if n % 4])
def test_with_two_more_on_their_way_some_warp_would(num_slots):
    """Of a multiple of four slots, every warp reads the same ones all the time."""
    more = most_in_flight(num_slots) + 2
    assert any(waits_beyond_the_next_fill([stage], num_slots, more) for stage in STAGES)


def test_every_fill_has_its_readers():
    for reads, num_fills in STAGES:
        assert sorted(number for own in reads.values() for number in own) == list(range(num_fills))
