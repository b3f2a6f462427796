"""The name of a model's vocabulary: equal names, equal tokens under equal ids.

A gateway turns ids into text, a worker draws ids: where the two were given different models under one name, every
answer would be fluent nonsense. So a worker tells this name, and a gateway places nothing where it is another one.
"""

from __future__ import annotations

import hashlib
from operator import itemgetter
from pathlib import Path
from typing import Final

import msgspec

from kvferry.text.tokenizer import MAX_TOKENIZER_BYTES

NAME_CHARS: Final = 32  # of SHA-256 in hexadecimal


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _Vocabulary(msgspec.Struct):
    # BPE, WordPiece and WordLevel map tokens to ids; Unigram lists (token, score), its ids are the places.
    vocab: dict[str, int] | list[tuple[str, float]]


class _TokenizerFile(msgspec.Struct):
    model: _Vocabulary
    added_tokens: list[_AddedToken] = []


def vocabulary_id(tokenizer_path: Path) -> str:
    """Of a tokenizer.json, whatever else it says. Empty where it can't be read: what is not known is not compared."""
    try:
        with tokenizer_path.open("rb") as stream:
            raw = stream.read(MAX_TOKENIZER_BYTES + 1)
        if len(raw) > MAX_TOKENIZER_BYTES:
            return ""
        file = msgspec.json.decode(raw, type=_TokenizerFile)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    vocab = file.model.vocab
    ids = vocab if isinstance(vocab, dict) else {token: index for index, (token, _) in enumerate(vocab)}
    ids |= {token.content: token.id for token in file.added_tokens}
    ordered = sorted(ids.items(), key=itemgetter(1, 0))
    return hashlib.sha256(msgspec.json.encode(ordered)).hexdigest()[:NAME_CHARS]
