"""Which KV page holds which positions: allocation, sharing of equal prefixes, page tables.

slot + token ids -> pages. The numbers themselves live in the backend.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]


@dataclass(slots=True)
class _Slot:
    """The pages of one running sequence."""

    budget: int  # pages it may ever need; those it does not hold yet are reserved for it
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of its full pages, in order


class KvCache:
    """Pages of `page_tokens` positions, counted by their users and found again by their content.

    A full page is indexed by a chained hash of all tokens up to its end, so an equal index key
    means equal keys and values. Pages that nobody uses stay indexed until room is needed, the
    longest unused first. A shared page is never written: only full pages are shared, and a sequence
    writes behind them. Every slot reserves its worst case when it opens, so an open slot never
    lacks a page.
    """

    def __init__(self, num_pages: int, page_tokens: int, max_batch: int, context: int) -> None:
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.page_table: Int32 = np.full((max_batch, self.pages_for(context)), -1, np.int32)
        self._free = list(range(num_pages - 1, -1, -1))  # without content worth keeping
        self._idle: OrderedDict[int, None] = OrderedDict()  # indexed, unused; oldest first
        self._users = [0] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._slots: dict[int, _Slot] = {}

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` positions."""
        return -(-num_tokens // self.page_tokens)

    @property
    def num_available(self) -> int:
        """Pages that are neither used nor reserved."""
        reserved = sum(slot.budget - len(slot.pages) for slot in self._slots.values())
        return len(self._free) + len(self._idle) - reserved

    @property
    def num_used(self) -> int:
        """Pages that open slots hold."""
        return self.num_pages - len(self._free) - len(self._idle)

    @property
    def num_cached(self) -> int:
        """Pages that nobody uses and whose content can still be found."""
        return len(self._idle)

    @property
    def num_free_slots(self) -> int:
        """Rows of the page table that no sequence holds."""
        return len(self.page_table) - len(self._slots)

    def open(
        self, token_ids: Sequence[int], max_tokens: int, reuse: bool = True
    ) -> tuple[int, int] | None:
        """A slot for a sequence of at most `max_tokens` stored positions: (slot, cached tokens).

        The cached tokens are positions whose keys and values are there already; at least one token
        of `token_ids` is always left to compute. None: no slot or not enough pages now.
        """
        found = self._find(token_ids, max_tokens, reuse)
        if found is None:
            return None
        keys, pages = found
        budget = self.pages_for(max_tokens)
        slot = next(i for i in range(len(self.page_table)) if i not in self._slots)
        self._slots[slot] = _Slot(budget, pages, keys)
        for page in pages:
            self._users[page] += 1
            self._idle.pop(page, None)
        self.page_table[slot, : len(pages)] = pages
        return slot, len(pages) * self.page_tokens

    def fits(self, token_ids: Sequence[int], max_tokens: int, reuse: bool = True) -> bool:
        """Whether `open` would succeed."""
        return self._find(token_ids, max_tokens, reuse) is not None

    def extend(self, slot: int, num_tokens: int) -> None:
        """Give the slot pages for its first `num_tokens` positions."""
        held = self._slots[slot]
        while len(held.pages) < self.pages_for(num_tokens):
            page = self._take()
            self._users[page] = 1
            self.page_table[slot, len(held.pages)] = page
            held.pages.append(page)

    def index(self, slot: int, token_ids: Sequence[int], num_tokens: int) -> None:
        """Make the full pages among the slot's first `num_tokens` computed positions findable."""
        held = self._slots[slot]
        while (len(held.keys) + 1) * self.page_tokens <= num_tokens:
            place = len(held.keys)
            key = self._key(held.keys[-1] if held.keys else b"", token_ids, place)
            held.keys.append(key)
            if key not in self._page_of:
                self._page_of[key] = held.pages[place]
                self._key_of[held.pages[place]] = key

    def close(self, slot: int, *, keep: bool = True) -> None:
        """Give the slot's pages back; with `keep=False` nobody finds their content again."""
        held = self._slots.pop(slot)
        self.page_table[slot] = -1
        # Last page first: when room is needed, the end of a prefix goes before its beginning.
        for page in reversed(held.pages):
            if not keep and page in self._key_of:
                del self._page_of[self._key_of.pop(page)]
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def forget(self) -> None:
        """Drop every indexed content; open slots keep their pages."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._page_of.clear()
        self._key_of.clear()

    def check(self) -> None:
        """Assert that no page is lost, used twice or reserved twice; for tests."""
        users = [0] * self.num_pages
        for index, slot in self._slots.items():
            held = len(slot.pages)
            assert held <= slot.budget, "a slot holds more pages than it reserved"
            assert self.page_table[index, :held].tolist() == slot.pages
            assert (self.page_table[index, held:] == -1).all()
            for page in slot.pages:
                users[page] += 1
        assert users == self._users, "the counts of users are wrong"
        used = [page for page, count in enumerate(users) if count]
        everywhere = sorted([*self._free, *self._idle, *used])
        assert everywhere == list(range(self.num_pages)), "a page is lost or listed twice"
        assert {key: page for page, key in self._key_of.items()} == self._page_of
        assert set(self._idle) <= set(self._key_of), "an idle page cannot be found"
        assert not set(self._free) & set(self._key_of), "a free page can be found"
        assert self.num_available >= 0, "more pages are reserved than exist"
        for index in set(range(len(self.page_table))) - set(self._slots):
            assert (self.page_table[index] == -1).all()

    def _find(
        self, token_ids: Sequence[int], max_tokens: int, reuse: bool
    ) -> tuple[list[bytes], list[int]] | None:
        """Keys and pages of the cached prefix, if there is a slot and room for the rest."""
        if not self.num_free_slots:
            return None
        keys, pages = self._match(token_ids) if reuse else ([], [])
        idle = sum(page in self._idle for page in pages)
        if self.pages_for(max_tokens) - len(pages) > self.num_available - idle:
            return None
        return keys, pages

    def _match(self, token_ids: Sequence[int]) -> tuple[list[bytes], list[int]]:
        keys: list[bytes] = []
        pages: list[int] = []
        for place in range((len(token_ids) - 1) // self.page_tokens):
            key = self._key(keys[-1] if keys else b"", token_ids, place)
            page = self._page_of.get(key)
            if page is None:
                break
            keys.append(key)
            pages.append(page)
        return keys, pages

    def _key(self, previous: bytes, token_ids: Sequence[int], place: int) -> bytes:
        """A cryptographic hash: nobody can craft a prompt that finds another prompt's pages."""
        start = place * self.page_tokens
        ids = np.asarray(token_ids[start : start + self.page_tokens], "<i4")
        return blake2b(previous + ids.tobytes(), digest_size=16).digest()

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page
