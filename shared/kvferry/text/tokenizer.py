"""Text to token ids, with the model's own tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import tokenizers

from kvferry.errors import CheckpointError
from kvferry.text.errors import InvalidTextError
from kvferry.text.model_dir import ModelDir

TokenArray = npt.NDArray[np.uint32]

MAX_TOKENIZER_BYTES: Final = 64 << 20  # of tokenizer.json; a vocabulary of 256,000 takes about 20 MB


class Tokenizer:
    """Encodes and decodes for one model. Threads may share it: encoding keeps no state between calls.

    Raises `CheckpointError` when tokenizer.json is missing, too large or malformed.
    """

    def __init__(self, model: ModelDir) -> None:
        path = model.tokenizer_path
        try:
            with path.open("rb") as stream:
                raw = stream.read(MAX_TOKENIZER_BYTES + 1)
        except OSError as error:
            raise CheckpointError(str(path), error.strerror or "unreadable") from error
        if len(raw) > MAX_TOKENIZER_BYTES:
            raise CheckpointError(str(path), f"larger than {MAX_TOKENIZER_BYTES} bytes")
        try:
            self.backend: Final = tokenizers.Tokenizer.from_buffer(raw)
        except Exception as error:  # the library raises plain Exception for whatever it cannot parse
            raise CheckpointError(str(path), f"not a tokenizer: {error}") from error
        # Training leftovers: some published files would silently cut prompts at 512 tokens or pad them.
        self.backend.no_truncation()
        self.backend.no_padding()

        self.vocab_size: Final = self.backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id: Final = self._id_of(model.special_tokens.get("bos_token"), model.bos_token_id)
        eos = self._id_of(model.special_tokens.get("eos_token"), None)
        self.eos_token_ids: Final = model.eos_token_ids or (() if eos is None else (eos,))
        self.special_token_ids: Final = frozenset(
            token_id for token_id, token in self.backend.get_added_tokens_decoder().items() if token.special
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> TokenArray:
        """Token ids of `text`, u32 [num_tokens]; with `add_special_tokens` as the model wants a bare prompt.

        Special tokens spelled out in the text become those tokens, as in every server of the field.
        Raises `InvalidTextError` for a lone surrogate.
        """
        try:
            encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            position = _lone_surrogate(text)
            if position is None:
                raise
            raise InvalidTextError(position) from error
        return np.array(encoding.ids, dtype=np.uint32)

    def encode_chat(self, rendered: str) -> TokenArray:
        """Token ids of a rendered chat template, u32 [num_tokens]: it has written its special tokens itself."""
        return self.encode(rendered, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int] | TokenArray, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; ids without a token add nothing, broken UTF-8 becomes U+FFFD."""
        ids = token_ids.tolist() if isinstance(token_ids, np.ndarray) else list(token_ids)
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def _id_of(self, token: str | None, fallback: int | None) -> int | None:
        found = None if token is None else self.backend.token_to_id(token)
        return fallback if found is None else found


def _lone_surrogate(text: str) -> int | None:
    return next((position for position, char in enumerate(text) if "\ud800" <= char <= "\udfff"), None)
