"""The vocabulary of a GGUF file as Hugging Face's tokenizer files: byte-level BPE only.

GGUF names how text is split before BPE (`tokenizer.ggml.pre`) but does not spell it out. A name that is not
listed here is refused: a wrong split gives plausible tokens and a model that is quietly worse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from kvferry.text.gguf_config import GgufConfig

# Values of tokenizer.ggml.token_type.
CONTROL: Final = 3
USER_DEFINED: Final = 4
_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class _Split:
    """How text is cut into words before BPE. `pattern` None: GPT-2's own, which ByteLevel has built in."""

    pattern: str | None = None
    single_digits: bool = False  # every digit is a word
    whole_words: bool = False  # a word that is a token stays whole, whatever the merges say
    normalize: bool = False  # Unicode NFC first

    def pre_tokenizer(self) -> Any:
        steps: list[Any] = []
        if self.single_digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if self.pattern is not None:
            steps.append(pre_tokenizers.Split(Regex(self.pattern), behavior="isolated", invert=False))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pattern is None))
        return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


_SPLITS: Final[dict[str, _Split]] = {
    "gpt-2": _Split(),
    "smollm": _Split(single_digits=True),
    "llama-bpe": _Split(rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}", whole_words=True),
    "qwen2": _Split(rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}", normalize=True),
}


class GgufTokenizer:
    """tokenizer.json and tokenizer_config.json out of a GGUF file's `tokenizer.*` entries.

    Raises `CheckpointError` for another kind of vocabulary or one that does not fit the model.
    """

    def __init__(self, config: GgufConfig) -> None:
        self._config = config
        kind = config.text("tokenizer.ggml.model")
        if kind != "gpt2":
            raise config.error("tokenizer.ggml.model", f"{kind!r}, only byte-level BPE is imported")
        pre = config.text("tokenizer.ggml.pre", "gpt-2")
        if pre not in _SPLITS:
            raise config.error("tokenizer.ggml.pre", f"{pre!r} is not known, only {', '.join(_SPLITS)}")
        self._split = _SPLITS[pre]
        self._tokens: list[str] = config.items("tokenizer.ggml.tokens", str)
        if len(self._tokens) != config.vocab_size:
            raise config.error("tokenizer.ggml.tokens", f"{len(self._tokens)} tokens, {config.vocab_size} embeddings")
        if len(set(self._tokens)) != len(self._tokens):
            raise config.error("tokenizer.ggml.tokens", "a token is listed twice")
        self.bos_token_id = config.token_id("tokenizer.ggml.bos_token_id")
        self.pad_token_id = config.token_id("tokenizer.ggml.padding_token_id")
        # A chat model ends its turn with eot where that differs from eos: both end a sequence.
        ends = (config.token_id(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
        self.eos_token_ids = list(dict.fromkeys(token_id for token_id in ends if token_id is not None))

    def tokenizer_json(self) -> str:
        tokenizer = tokenizers.Tokenizer(
            models.BPE(
                vocab={token: token_id for token_id, token in enumerate(self._tokens)},
                merges=self._merges(),
                ignore_merges=self._split.whole_words,
            )
        )
        if self._split.normalize:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = self._split.pre_tokenizer()
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = self._post_processor()
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in self._of_type(USER_DEFINED)])
        tokenizer.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in self._of_type(CONTROL)]
        )
        return tokenizer.to_str(pretty=False)

    def tokenizer_config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json."""
        eos_token_id = self.eos_token_ids[0] if self.eos_token_ids else None
        ids = {
            "bos_token": self.bos_token_id,
            "eos_token": eos_token_id,
            "pad_token": self.pad_token_id,
            "unk_token": self._config.token_id("tokenizer.ggml.unknown_token_id"),
        }
        fields: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": self._config.max_context,
            **{name: self._tokens[token_id] for name, token_id in ids.items() if token_id is not None},
        }
        if template := self._config.text("tokenizer.chat_template", ""):
            fields["chat_template"] = template
        return fields

    def _merges(self) -> list[tuple[str, str]]:
        merges = []
        known = set(self._tokens)
        for merge in self._config.items("tokenizer.ggml.merges", str):
            left, _, right = merge.partition(" ")
            if not {left, right, left + right} <= known:
                raise self._config.error("tokenizer.ggml.merges", f"{merge!r} does not join two tokens to a third")
            merges.append((left, right))
        return merges

    def _of_type(self, wanted: int) -> list[str]:
        types = self._config.items("tokenizer.ggml.token_type", int)
        if len(types) != len(self._tokens):
            raise self._config.error("tokenizer.ggml.token_type", f"{len(types)} types, {len(self._tokens)} tokens")
        return [token for token, kind in zip(self._tokens, types, strict=True) if kind == wanted]

    def _post_processor(self) -> Any:
        byte_level = processors.ByteLevel(trim_offsets=False)
        if not self._config.flag("tokenizer.ggml.add_bos_token", False):
            return byte_level
        if self.bos_token_id is None:
            raise self._config.error("tokenizer.ggml.add_bos_token", "true without a bos_token_id")
        bos = self._tokens[self.bos_token_id]
        template = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, self.bos_token_id)]
        )
        return processors.Sequence([byte_level, template])
