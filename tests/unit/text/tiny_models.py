"""Small real tokenizers of the three kinds that models come with."""

from collections.abc import Callable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The ferry carries keys and values from prefill to decode.",
    "naïve café, Übergröße, 你好世界, こんにちは, 😀😃 👩‍👩‍👧",
    '{"json": "quoted \\"text\\"", "n": [1, 2, 3]}\n\n\tindented',
] * 4
SPECIAL = ["<|bos|>", "<|end|>"]

MakeModel = Callable[..., Path]


def byte_level_tokenizer() -> tokenizers.Tokenizer:
    """As Llama 3, Qwen and SmolLM have it, with an added token that is no special one."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>"), AddedToken("é!"), AddedToken("→")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
    )
    return tokenizer


def sentencepiece_tokenizer() -> tokenizers.Tokenizer:
    """As Llama 2 and Mistral have it: ▁ for spaces, bytes for what the vocabulary lacks."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "▁ferry", "a", "b", "▁a", "é", "你", "\ufffd", "▁▁", "x▁y", ".", "'s", ""]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def wordpiece_tokenizer() -> tokenizers.Tokenizer:
    """A decoder with neither bytes nor byte fallback: the library alone knows how its tokens join."""
    pieces = ["[UNK]", "[SEP]", "fer", "##ry", "the", "##s", ".", "\ufffd", ",", "don", "'", "t", "你", "##😀"]
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab={p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[SEP]"])
    return tokenizer
