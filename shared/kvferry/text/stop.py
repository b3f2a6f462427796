"""Stop strings in a stream of text.

An Aho-Corasick automaton over characters: its depth is the length of the longest tail of the text that
may still grow into a stop string, and exactly that tail is held back. Since it reads text and not tokens,
borders between tokens and between pushes do not matter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

MAX_STOP_STRINGS: Final = 64  # OpenAI takes 4, vLLM any number
MAX_STOP_CHARS: Final = 256  # of one stop string


class StopMatcher:
    """Finds the first stop string to be complete; of two that end together, the longer one.

    The stop string itself and all that follows is left out of the text. Work per character is amortised
    constant, whatever the number and length of the stop strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises `ValueError` for an empty stop string or one over the limits."""
        if len(stops) > MAX_STOP_STRINGS:
            raise ValueError(f"more than {MAX_STOP_STRINGS} stop strings")
        self._next: list[dict[str, int]] = [{}]  # trie: [node][character] -> node
        self._depth: list[int] = [0]
        self._match: list[int] = [0]  # length of the longest stop string that ends here, 0: none
        for stop in stops:
            if not 0 < len(stop) <= MAX_STOP_CHARS:
                raise ValueError(f"a stop string has 1 to {MAX_STOP_CHARS} characters")
            self._insert(stop)
        self._fail = self._failure_links()
        self._first = frozenset(self._next[0])
        self._node = 0
        self._held = ""  # always the last `depth[node]` characters
        self.matched: str | None = None  # the stop string that ended the text

    @property
    def is_idle(self) -> bool:
        """Whether nothing is held back and no stop string was found: text without a first character of one may pass
        by unseen."""
        return self._node == 0 and self.matched is None

    def push(self, text: str) -> tuple[str, bool]:
        """Text that may be shown now, and whether a stop string has ended it (then nothing more follows)."""
        if self.matched is not None:
            return "", True
        if self._node == 0 and self._first.isdisjoint(text):
            return text, False
        node, following, fail, match = self._node, self._next, self._fail, self._match
        pending = self._held + text
        for position, char in enumerate(text, start=len(self._held) + 1):
            while node and char not in following[node]:
                node = fail[node]
            node = following[node].get(char, 0)
            if match[node]:
                start = position - match[node]
                self.matched = pending[start:position]
                self._held = ""
                return pending[:start], True
        self._node = node
        ready = len(pending) - self._depth[node]
        self._held = pending[ready:]
        return pending[:ready], False

    def finish(self) -> str:
        """What was held back, when the text ends without a stop string. Ends the matcher."""
        held, self._held, self._node = self._held, "", 0
        return held

    def _insert(self, stop: str) -> None:
        node = 0
        for char in stop:
            child = self._next[node].get(char)
            if child is None:
                child = len(self._next)
                self._next[node][char] = child
                self._next.append({})
                self._depth.append(self._depth[node] + 1)
                self._match.append(0)
            node = child
        self._match[node] = len(stop)

    def _failure_links(self) -> list[int]:
        """[node] -> node of its longest proper suffix; hands down the stop strings that end in suffixes."""
        fail = [0] * len(self._next)
        queue = deque(self._next[0].values())
        while queue:
            node = queue.popleft()
            for char, child in self._next[node].items():
                suffix = fail[node]
                while suffix and char not in self._next[suffix]:
                    suffix = fail[suffix]
                fail[child] = self._next[suffix].get(char, 0)
                self._match[child] = self._match[child] or self._match[fail[child]]
                queue.append(child)
        return fail
