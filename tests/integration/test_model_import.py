"""The default model as it is served: what the import of its GGUF file must come to.

The digests are those of transformers' own loading of the same file (`from_pretrained(gguf_file=…)`, 5.24,
in bfloat16), tensor by tensor over names and bytes; the token ids are those of its tokenizer.
"""

import hashlib
import json
from pathlib import Path

import pytest
from safetensors import safe_open

from kvferry.text.chat_template import ChatTemplate
from kvferry.text.detokenizer import TokenTexts
from kvferry.text.model_dir import ModelDir
from kvferry.text.tokenizer import Tokenizer

WEIGHTS = "08587497151051bb64ba4ae8288856623bb8c6cd5dc22bb3bda06ebda07a1bcd"
ENCODED = {
    "Hello world": [19556, 905],
    "It's 12345 and 3.14": [1589, 506, 216, 33, 34, 35, 36, 37, 284, 216, 35, 30, 33, 36],
    "naïve café 你好 😀\n\n  x\t<|im_end|> y": [
        *(3546, 46494, 37366, 216, 18645, 250, 48392, 138, 40303, 218, 8866, 1792, 197, 2, 329),
    ],
    "I'll  we've   \n\n\n a": [57, 3060, 216, 392, 3543, 333, 16506, 253],
}


@pytest.fixture(scope="module")
def model(model_dir: Path) -> ModelDir:
    return ModelDir(model_dir)


@pytest.fixture(scope="module")
def tokenizer(model: ModelDir) -> Tokenizer:
    return Tokenizer(model)


def weights_digest(path: Path) -> str:
    import torch

    digest = hashlib.sha256()
    with safe_open(path / "model.safetensors", framework="pt") as file:
        for name in sorted(file.keys()):
            digest.update(name.encode())
            digest.update(file.get_tensor(name).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def test_every_weight_is_the_references_bit_for_bit(model: ModelDir) -> None:
    assert weights_digest(model.path) == WEIGHTS


def test_the_configuration_is_that_of_the_published_model(model: ModelDir) -> None:
    config = model.config
    shape = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    assert [config[field] for field in shape] == [30, 576, 9, 3, 64]
    assert (config["rope_theta"], config["rms_norm_eps"], config["tie_word_embeddings"]) == (100000.0, 1e-5, True)
    assert (model.vocab_size, model.max_context, model.eos_token_ids) == (49152, 8192, (2,))


@pytest.mark.parametrize("text", ENCODED)
def test_text_is_encoded_as_the_reference_does(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text).tolist()
    assert token_ids == ENCODED[text]
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == text


def test_a_conversation_becomes_the_prompt_that_the_model_was_trained_on(model: ModelDir, tokenizer: Tokenizer) -> None:
    template = ChatTemplate.of(model)
    assert template is not None
    prompt = template.render([{"role": "user", "content": "Hi"}])
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert prompt == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    token_ids = tokenizer.encode_chat(prompt).tolist()
    assert token_ids.count(1) == 3
    assert token_ids.count(2) == 2


def test_every_token_streams_as_the_library_decodes_it(tokenizer: Tokenizer) -> None:
    texts = TokenTexts(tokenizer)
    assert texts.byte_level
    ready = 0
    for token_id in range(tokenizer.vocab_size):
        stream = texts.stream()
        text = stream.push(token_id) + stream.finish()
        assert text == tokenizer.decode([token_id])
        if (escaped := texts.ready()[token_id]) is not None:
            assert json.loads(b'"' + escaped + b'"') == text
            ready += 1
    assert ready > 0.98 * tokenizer.vocab_size  # few tokens split a character
