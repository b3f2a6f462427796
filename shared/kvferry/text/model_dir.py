"""A Hugging Face model directory: what the gateway and the workers read from it besides the weights.

Only `config.json` and `tokenizer.json` must exist. The JSON files are read once, when the directory is
opened, so that a broken checkpoint stops the start and never a request.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvferry.errors import CheckpointError
from kvferry.wire.sampling import MAX_REPETITION_PENALTY

MAX_JSON_BYTES: Final = 16 << 20  # of one configuration file; tokenizer_config.json lists added tokens
MAX_TEMPLATE_BYTES: Final = 1 << 20  # of a chat template
MAX_EOS_TOKENS: Final = 64
MAX_TOKEN_ID: Final = (1 << 32) - 1

SPECIAL_TOKEN_FIELDS: Final = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))

# Fields of generation_config.json that shape a draw but have no counterpart in `wire.Sampling`, and the
# values at which they do nothing.
_UNAPPLIED_SAMPLING: Final[dict[str, tuple[object, ...]]] = {
    "typical_p": (1, None),
    "epsilon_cutoff": (0, None),
    "eta_cutoff": (0, None),
    "no_repeat_ngram_size": (0, None),
    "num_beams": (1, None),
    "penalty_alpha": (0, None),
}


@dataclass(frozen=True)
class SamplingDefaults:
    """Sampling that the model's makers recommend; None where they say nothing. `top_k` 0: no limit."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    unapplied: tuple[str, ...] = ()  # recommended fields that kvferry does not apply: worth one log line


class ModelDir:
    """An opened model directory.

    Raises `CheckpointError`, which names the file and the field, for whatever is missing or malformed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Final = Path(path).expanduser()
        if not self.path.is_dir():
            raise CheckpointError(str(self.path), "no such model directory")
        self.config: Final[dict[str, Any]] = self._read_json("config.json", required=True)
        generation = self._read_json("generation_config.json")
        self._tokenizer_config: Final = self._read_json("tokenizer_config.json")
        if not self.tokenizer_path.is_file():
            raise CheckpointError(str(self.tokenizer_path), "missing")

        self.vocab_size: Final = self._positive("vocab_size")
        self.max_context: Final = self._positive("max_position_embeddings")
        self.eos_token_ids: Final = self._token_ids(generation, "eos_token_id")
        bos = self._token_ids(generation, "bos_token_id")
        self.bos_token_id: Final = bos[0] if bos else None
        self.sampling: Final = self._sampling(generation)
        self.special_tokens: Final = self._special_tokens()
        self.chat_template: Final = self._chat_template()

    @property
    def name(self) -> str:
        """The name under which the model is served unless the user gives another."""
        return self.path.resolve().name

    @property
    def tokenizer_path(self) -> Path:
        return self.path / "tokenizer.json"

    def _read_text(self, file: str, limit: int) -> str | None:
        path = self.path / file
        try:
            with path.open("rb") as stream:
                raw = stream.read(limit + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(str(path), error.strerror or "unreadable") from error
        if len(raw) > limit:
            raise CheckpointError(str(path), f"larger than {limit} bytes")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(str(path), f"not UTF-8 at byte {error.start}") from error

    def _read_json(self, file: str, *, required: bool = False) -> dict[str, Any]:
        text = self._read_text(file, MAX_JSON_BYTES)
        path = str(self.path / file)
        if text is None:
            if required:
                raise CheckpointError(path, "missing")
            return {}
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(path, f"not JSON: {error}") from error
        if not isinstance(parsed, dict):
            raise CheckpointError(path, "not a JSON object")
        return parsed

    def _bad(self, file: str, field: str, problem: str) -> CheckpointError:
        return CheckpointError(str(self.path / file), f"{field}: {problem}")

    def _positive(self, field: str) -> int:
        value = self.config.get(field)
        if value is None:
            raise self._bad("config.json", field, "missing")
        if not _is_int(value) or not 0 < value <= MAX_TOKEN_ID:
            raise self._bad("config.json", field, f"not a positive 32-bit integer: {value!r}")
        return int(value)

    def _token_ids(self, generation: dict[str, Any], field: str) -> tuple[int, ...]:
        """One id or a list of them; generation_config.json wins over config.json."""
        file, value = "generation_config.json", generation.get(field)
        if value is None:
            file, value = "config.json", self.config.get(field)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if len(ids) > MAX_EOS_TOKENS:
            raise self._bad(file, field, f"more than {MAX_EOS_TOKENS} token ids")
        for token_id in ids:
            if not _is_int(token_id) or not 0 <= token_id < self.vocab_size:
                raise self._bad(file, field, f"not a token id below vocab_size {self.vocab_size}: {token_id!r}")
        return tuple(ids)

    def _sampling(self, generation: dict[str, Any]) -> SamplingDefaults:
        top_k = self._number(generation, "top_k", 0, MAX_TOKEN_ID)
        return SamplingDefaults(
            temperature=self._number(generation, "temperature", 0, 100),
            top_p=self._number(generation, "top_p", 0, 1, above=True),
            top_k=None if top_k is None else int(top_k),
            min_p=self._number(generation, "min_p", 0, 1),
            repetition_penalty=self._number(generation, "repetition_penalty", 0, MAX_REPETITION_PENALTY, above=True),
            unapplied=tuple(
                field
                for field, neutral in _UNAPPLIED_SAMPLING.items()
                if field in generation and generation[field] not in neutral
            ),
        )

    def _number(
        self, generation: dict[str, Any], field: str, low: float, high: float, *, above: bool = False
    ) -> float | None:
        value = generation.get(field)
        if value is None:
            return None
        if not (_is_int(value) or isinstance(value, float)) or not low <= value <= high or (above and value == low):
            raise self._bad("generation_config.json", field, f"not a number from {low} to {high}: {value!r}")
        return float(value)

    def _special_tokens(self) -> dict[str, str]:
        """Text of `bos_token`, `eos_token`, …: strings, or objects with `content`, as their savers chose."""
        tokens = {}
        for field in SPECIAL_TOKEN_FIELDS:
            value = self._tokenizer_config.get(field)
            if isinstance(value, dict):
                value = value.get("content")
            if value is None:
                continue
            if not isinstance(value, str):
                raise self._bad("tokenizer_config.json", field, "neither a string nor an added token")
            tokens[field] = value
        return tokens

    def _chat_template(self) -> str | None:
        """chat_template.jinja, else tokenizer_config.json (one template, or a list with a `default`)."""
        template = self._read_text("chat_template.jinja", MAX_TEMPLATE_BYTES)
        if template is not None:
            return template
        value = self._tokenizer_config.get("chat_template")
        if isinstance(value, list):
            named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
            if "default" not in named:
                raise self._bad("tokenizer_config.json", "chat_template", "a list without a 'default' template")
            value = named["default"]
        if value is None:
            return None
        if not isinstance(value, str):
            raise self._bad("tokenizer_config.json", "chat_template", "not a string")
        if len(value.encode("utf-8", "surrogatepass")) > MAX_TEMPLATE_BYTES:
            raise self._bad("tokenizer_config.json", "chat_template", f"larger than {MAX_TEMPLATE_BYTES} bytes")
        return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
