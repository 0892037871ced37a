"""PrefixCache: finds pages that already hold the KV of a prompt's beginning.

A cached page is known by what precedes it and what it holds: (uid of the parent page's content, the page's own
tokens). The uids form the hash chain; the dictionary compares the tokens themselves on a hit, so two different
prefixes can never be taken for one another. A uid is never used twice: when a page is evicted, the entries that hang
on it can no longer be reached. The pool evicts a sequence's end before its beginning, so that seldom costs anything.
"""

from collections.abc import Sequence
from typing import NamedTuple

ROOT = 0  # the uid that stands for "nothing before"


class _Entry(NamedTuple):
    key: tuple[int, bytes]
    uid: int


class PrefixCache:
    """Maps chains of full pages to the pages that hold their KV. Keeps no reference counts: that is the pool's job."""

    def __init__(self) -> None:
        self._page_of: dict[tuple[int, bytes], int] = {}
        self._entries: dict[int, _Entry] = {}
        self._roots: dict[str, int] = {}
        self._next_uid = ROOT + 1

    def __len__(self) -> int:
        return len(self._entries)

    def root(self, salt: str) -> int:
        """The uid under which requests of this salt begin; only requests with equal salts share pages."""
        if not salt:
            return ROOT
        if salt not in self._roots:
            self._roots[salt] = self._new_uid()
        return self._roots[salt]

    def match(self, root: int, pages_of_tokens: Sequence[bytes]) -> list[int]:
        """The longest run of cached pages that begins with `root` and holds these tokens, one `bytes` a page."""
        uid, found = root, []
        for tokens in pages_of_tokens:
            page = self._page_of.get((uid, tokens))
            if page is None:
                break
            found.append(page)
            uid = self._entries[page].uid
        return found

    def uid(self, page: int) -> int:
        """The uid of a cached page's content; KeyError if the page is not cached."""
        return self._entries[page].uid

    def insert(self, page: int, parent: int, tokens: bytes) -> int:
        """Makes `page` findable below `parent` and returns its content's uid.

        If another page already holds the same content, that one stays the cached one and its uid is returned.
        """
        key = (parent, tokens)
        if (other := self._page_of.get(key)) is not None:
            return self._entries[other].uid
        self.forget(page)
        entry = _Entry(key, self._new_uid())
        self._page_of[key] = page
        self._entries[page] = entry
        return entry.uid

    def forget(self, page: int) -> None:
        """The page is about to hold something else."""
        entry = self._entries.pop(page, None)
        if entry is not None:
            del self._page_of[entry.key]

    def clear(self) -> None:
        self._page_of.clear()
        self._entries.clear()

    def _new_uid(self) -> int:
        self._next_uid += 1
        return self._next_uid - 1
