"""Token ids to text, one at a time.

Two kinds of tokenizer decoder, and what each asks of a stream:

- **Byte-level BPE** (GPT-2, Llama 3, Qwen, SmolLM): every token is a byte string and the text is their
  concatenation. A table made once per process holds each token's bytes, and, for tokens that are whole
  UTF-8 by themselves, its text ready for a JSON string. Only tokens that split a character need state.
- **All others** (SentencePiece with byte fallback, WordPiece, …): a token's text depends on its
  neighbours. The library decodes a short window, and the difference to the window before is the new text.

Both give, joined, exactly what `Tokenizer.decode` gives for the whole sequence.
"""

from __future__ import annotations

import codecs
import json
from abc import ABC, abstractmethod
from functools import lru_cache, partial
from typing import Any, Final

from kvferry.text.tokenizer import Tokenizer

# After so many tokens without a settled character a window is shown as it stands: a stream of nothing but
# byte tokens then still moves, though a later bad byte can no longer unmake what was shown.
MAX_OPEN_TOKENS: Final = 256
WORD_START: Final = "\u2581"  # SentencePiece's space
MAX_MARK_SETS: Final = 16  # tables kept, of the sets of bytes that requests look for
_MAX_CHARACTER_BYTES: Final = 4  # of UTF-8


class Detokenizer(ABC):
    """The text of one stream. `push` for every token in order, then `finish` once."""

    @property
    @abstractmethod
    def is_open(self) -> bool:
        """Whether tokens are held back. Then the next token must go through `push`."""

    @abstractmethod
    def push(self, token_id: int) -> str:
        """New text, "" while a character is incomplete and for special tokens and ids without a token."""

    @abstractmethod
    def finish(self) -> str:
        """Text of what is still held back, U+FFFD for bytes that never became a character."""


class ReadyTexts(dict[int, bytes | None]):
    """The gateway's fast path: by token id, its text as UTF-8, escaped for a JSON string and without quotes (b"" for
    special tokens); None: use `Detokenizer.push`. It may be used whenever the stream's detokeniser is not open, and
    such a token need not be pushed."""

    def __missing__(self, token_id: int) -> bytes | None:
        return None


NOT_READY: Final = ReadyTexts()  # each token must be pushed


class _Unmarked(ReadyTexts):
    """Those of other texts that have none of some bytes; each is looked through when it first comes."""

    def __init__(self, texts: ReadyTexts, marks: frozenset[int]) -> None:
        super().__init__()
        self._texts = texts
        self._marks = marks

    def __missing__(self, token_id: int) -> bytes | None:
        text = self._texts[token_id]
        if text is not None:
            self[token_id] = text = text if self._marks.isdisjoint(text) else None
        return text


class TokenTexts:
    """What is known about the text of each token of one tokenizer. Made once per process, shared by streams."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer: Final = tokenizer
        decoder = json.loads(tokenizer.backend.to_str())["decoder"]
        self.byte_level: Final = _is_byte_level(decoder)
        self._bytes: Final = _token_bytes(tokenizer) if self.byte_level else {}
        self._special_bytes: Final = {
            token_id: (tokenizer.backend.id_to_token(token_id) or "").encode()
            for token_id in tokenizer.special_token_ids
        }
        self._byte_tokens: Final = _byte_tokens(tokenizer) if _has_byte_fallback(decoder) else None
        self._ready: Final = ReadyTexts()
        for token_id, text in self._bytes.items():
            try:
                self._ready[token_id] = json.dumps(text.decode("utf-8"), ensure_ascii=False)[1:-1].encode()
            except UnicodeDecodeError:
                continue  # part of a character
        self._unmarked: Final = lru_cache(MAX_MARK_SETS)(partial(_Unmarked, self._ready))

    def ready(self, marks: frozenset[int] = frozenset()) -> ReadyTexts:
        """Texts that need no state of a stream and have none of these bytes."""
        return self._unmarked(marks) if marks else self._ready

    def stream(self, *, skip_special_tokens: bool = True, shown: frozenset[int] = frozenset()) -> Detokenizer:
        """A detokeniser for one new stream. `skip_special_tokens`: they have no text, but for those in `shown`."""
        if self.byte_level:
            special_bytes = self._special_bytes
            if skip_special_tokens:
                special_bytes = {token: special_bytes[token] for token in shown if token in special_bytes}
            return ByteDetokenizer(self._bytes, special_bytes)
        hidden = self._tokenizer.special_token_ids - shown if skip_special_tokens else frozenset()
        return WindowDetokenizer(self._tokenizer, self._byte_tokens, hidden)

    def is_special(self, token_id: int) -> bool:
        """Whether it is a mark for the model rather than text."""
        return token_id in self._tokenizer.special_token_ids

    def bytes_of(self, token_id: int) -> bytes:
        """What a token stands for by itself, special tokens as they are spelled; b"" for ids without a token."""
        backend = self._tokenizer.backend
        if token_id in self._tokenizer.special_token_ids or not self.byte_level:
            name = backend.id_to_token(token_id) or ""
            if self._byte_tokens is not None and token_id in self._byte_tokens:
                return bytes([int(name[3:5], 16)])
            return name.replace(WORD_START, " ").encode()
        return self._bytes.get(token_id, b"")


class ByteDetokenizer(Detokenizer):
    """Concatenates token bytes; holds back an incomplete UTF-8 character."""

    def __init__(self, token_bytes: dict[int, bytes], special_bytes: dict[int, bytes]) -> None:
        """`special_bytes`: those of special tokens that are shown."""
        self._bytes = token_bytes
        self._special_bytes = special_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def is_open(self) -> bool:
        return bool(self._utf8.getstate()[0])

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._special_bytes.get(token_id) or self._bytes.get(token_id, b""))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer(Detokenizer):
    """Decodes `context + held` with the library; what goes beyond `context` alone is new.

    `context` is the shortest run of the last shown tokens that has a text, so that a decoder that treats
    the start of a text differently (drops its first space) treats both windows alike.
    """

    def __init__(self, tokenizer: Tokenizer, byte_tokens: frozenset[int] | None, hidden: frozenset[int]) -> None:
        """`byte_tokens`: ids of <0x00> to <0xFF>; None without byte fallback. `hidden`: ids that have no text."""
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._byte_tokens = byte_tokens
        self._context: list[int] = []
        self._context_text = ""
        self._held: list[int] = []

    @property
    def is_open(self) -> bool:
        return bool(self._held)

    def push(self, token_id: int) -> str:
        if token_id in self._hidden or self._tokenizer.backend.id_to_token(token_id) is None:
            return ""
        self._held.append(token_id)
        in_run = self._byte_tokens is not None and token_id in self._byte_tokens
        # Byte fallback judges a run of byte tokens as a whole: it is text only once the run has ended.
        if in_run and len(self._held) < MAX_OPEN_TOKENS:
            return ""
        text = self._new_text()
        incomplete = text.endswith("\ufffd") and (in_run or self._byte_tokens is None)
        if incomplete and len(self._held) < MAX_OPEN_TOKENS + _MAX_CHARACTER_BYTES:
            return ""
        self._settle(in_run)
        return text

    def finish(self) -> str:
        text = self._new_text() if self._held else ""
        self._held = []
        return text

    def _new_text(self) -> str:
        return self._tokenizer.decode(self._context + self._held, skip_special_tokens=False)[len(self._context_text) :]

    def _settle(self, in_run: bool) -> None:
        """All is shown. In a run of byte tokens the context is its last character, not a part of it."""
        shown = self._context + self._held
        self._held = []
        longest = _MAX_CHARACTER_BYTES if in_run else len(shown)
        for length in range(1, min(longest, len(shown)) + 1):
            self._context = shown[-length:]
            self._context_text = self._tokenizer.decode(self._context, skip_special_tokens=False)
            if self._context_text and not (in_run and "\ufffd" in self._context_text):
                return


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    if decoder is None:
        return False
    if decoder["type"] == "Sequence" and len(decoder["decoders"]) == 1:
        return _is_byte_level(decoder["decoders"][0])
    return bool(decoder["type"] == "ByteLevel")


def _has_byte_fallback(decoder: dict[str, Any] | None) -> bool:
    if decoder is None:
        return False
    return decoder["type"] == "ByteFallback" or any(map(_has_byte_fallback, decoder.get("decoders", ())))


def _byte_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    names = (f"<0x{byte:02{case}}>" for byte in range(256) for case in "Xx")
    ids = map(tokenizer.backend.token_to_id, names)
    return frozenset(token_id for token_id in ids if token_id is not None)


def _token_bytes(tokenizer: Tokenizer) -> dict[int, bytes]:
    """The bytes of every token of a byte-level vocabulary, b"" for special tokens."""
    byte_of = {char: byte for byte, char in enumerate(byte_level_alphabet())}
    table = {}
    for token, token_id in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        if token_id in tokenizer.special_token_ids:
            table[token_id] = b""
        elif all(char in byte_of for char in token):
            table[token_id] = bytes(byte_of[char] for char in token)
        else:  # an added token in plain text, which the decoder takes as it is
            table[token_id] = token.encode()
    return table


def byte_level_alphabet() -> list[str]:
    """[256] -> the printable character that stands for each byte in byte-level BPE (GPT-2's table).

    Bytes that are printable in Latin-1 stand for themselves; the others take U+0100, U+0101, … in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet, spare = [], 0x100
    for byte in range(256):
        if byte in printable:
            alphabet.append(chr(byte))
        else:
            alphabet.append(chr(spare))
            spare += 1
    return alphabet
