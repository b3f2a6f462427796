"""Importing GGUF: the same weights and tokens in Hugging Face form, whole or not at all."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file

from kvferry.errors import CheckpointError
from kvferry.text import gguf_import
from kvferry.text.chat_template import ChatTemplate
from kvferry.text.dequantize import BLOCK_FORMATS
from kvferry.text.gguf_import import import_gguf
from kvferry.text.model_dir import ModelDir
from kvferry.text.tokenizer import Tokenizer

from .gguf_writer import (
    ARRAY,
    BOOL,
    HIDDEN,
    I32,
    STRING,
    TYPE_F32,
    TYPE_Q8_0,
    U32,
    Entry,
    Tensor,
    TinyLlama,
    tiny_llama,
)
from .tiny_models import byte_level_tokenizer


def silent(stage: str, done: int, total: int) -> None:
    assert stage == "import"
    assert 0 < done <= total


def imported(model: TinyLlama, folder: Path) -> Path:
    return import_gguf(model.write(folder / "tiny.gguf"), folder / "tiny", silent)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_arrive_under_hugging_face_names_with_rows_in_its_order(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(tied=tied)
    loaded = load_file(imported(model, tmp_path) / "model.safetensors")
    assert loaded.keys() == model.weights.keys()
    for name, values in model.weights.items():
        assert torch.equal(loaded[name], torch.from_numpy(values).bfloat16()), name


def test_rows_as_they_lie_in_the_file_would_not_pass(tmp_path: Path) -> None:
    model = tiny_llama()
    loaded = load_file(imported(model, tmp_path) / "model.safetensors")
    stored = np.frombuffer(model.tensors["blk.0.attn_q.weight"].stored, np.float32).reshape(-1, HIDDEN)
    assert not torch.equal(loaded["model.layers.0.self_attn.q_proj.weight"], torch.from_numpy(stored.copy()).bfloat16())


def test_small_slabs_give_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_llama().write(tmp_path / "tiny.gguf")
    whole = import_gguf(source, tmp_path / "whole", silent) / "model.safetensors"
    monkeypatch.setattr(gguf_import, "MAX_SLAB_VALUES", 5 * HIDDEN)
    slabs = import_gguf(source, tmp_path / "slabs", silent) / "model.safetensors"
    assert slabs.read_bytes() == whole.read_bytes()


def test_quantised_weights_and_biases_arrive(tmp_path: Path) -> None:
    model = tiny_llama()
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (HIDDEN * HIDDEN // 32, 34), dtype=np.uint8)
    blocks[:, :2] = rng.uniform(0, 1, (len(blocks), 1)).astype("<f2").view(np.uint8)
    model.tensors["blk.1.attn_q.weight"] = Tensor("blk.1.attn_q.weight", (HIDDEN, HIDDEN), TYPE_Q8_0, blocks.tobytes())
    for layer in range(2):
        for part, size in (("q", 64), ("k", 32), ("v", 32), ("output", 64)):
            name = f"blk.{layer}.attn_{part}.bias"
            model.tensors[name] = Tensor(name, (size,), TYPE_F32, np.arange(size, dtype=np.float32).tobytes())
    path = imported(model, tmp_path)
    loaded = load_file(path / "model.safetensors")
    values = torch.from_numpy(BLOCK_FORMATS[TYPE_Q8_0].dequantize(blocks.tobytes())).reshape(4, 8, 2, HIDDEN)
    expected = values.transpose(1, 2).reshape(HIDDEN, HIDDEN).bfloat16()
    assert torch.equal(loaded["model.layers.1.self_attn.q_proj.weight"], expected)
    bias = loaded["model.layers.0.self_attn.k_proj.bias"].tolist()
    assert bias[:16] == [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15]
    assert loaded["model.layers.0.self_attn.v_proj.bias"].tolist() == list(range(32))
    assert ModelDir(path).config["attention_bias"] is True


def test_the_directory_opens_and_loads_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = imported(tiny_llama(), tmp_path)
    model = ModelDir(path)
    assert (model.eos_token_ids, model.bos_token_id, model.max_context) == ((1,), 0, 128)
    assert model.config["rms_norm_eps"] == 1e-5
    template = ChatTemplate.of(model)
    assert template is not None
    assert template.render([{"content": "hi"}]) == "hi"
    reference = AutoModelForCausalLM.from_pretrained(path)
    assert reference.lm_head.weight is reference.model.embed_tokens.weight
    assert torch.isfinite(reference(torch.arange(10)[None]).logits).all()


def test_the_tokenizer_encodes_as_the_original(tmp_path: Path) -> None:
    original = byte_level_tokenizer()
    mine = Tokenizer(ModelDir(imported(tiny_llama(), tmp_path)))
    for text in ("The ferry carries 12 keys", "naïve 你好 😀", "<|end|> x", "\n\n  "):
        plain = tokenizers.Tokenizer.from_str(original.to_str())
        assert mine.encode_chat(text).tolist() == plain.encode(text, add_special_tokens=False).ids
    assert mine.special_token_ids == {0, 1}


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["We", "'re", "Ġ2024", ",", "Ġé", "ĉĊ", "Ċ", "go"]),
        ("smollm", ["We", "'re", "Ġ", "2", "0", "2", "4", ",", "Ġé", "ĉĊ", "Ċ", "go"]),
        ("llama-bpe", ["We", "'re", "Ġ", "202", "4", ",", "Ġé", "ĉĊĊ", "go"]),
        ("qwen2", ["We", "'re", "Ġ", "2", "0", "2", "4", ",", "Ġé", "ĉĊĊ", "go"]),
    ],
)
def test_text_is_split_as_the_named_pre_tokenizer_does(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    model = tiny_llama()
    model.entries["tokenizer.ggml.pre"] = Entry(STRING, pre)
    tokenizer = Tokenizer(ModelDir(imported(model, tmp_path))).backend
    split = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("We're 2024, é\t\n\ngo")]
    assert [piece.replace("Ã©", "é") for piece in split] == pieces


def test_a_model_that_starts_with_bos_gets_it(tmp_path: Path) -> None:
    model = tiny_llama()
    model.entries["tokenizer.ggml.add_bos_token"] = Entry(BOOL, True)
    tokenizer = Tokenizer(ModelDir(imported(model, tmp_path)))
    assert tokenizer.encode("a").tolist() == [0, *tokenizer.encode_chat("a").tolist()]


def test_both_ends_of_a_chat_model_end_a_sequence(tmp_path: Path) -> None:
    model = tiny_llama()
    model.entries["tokenizer.ggml.eot_token_id"] = Entry(U32, 0)
    assert ModelDir(imported(model, tmp_path)).eos_token_ids == (1, 0)


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("general.architecture", Entry(STRING, "mamba")),
        ("llama.block_count", Entry(U32, 0)),
        ("llama.block_count", Entry(STRING, "2")),
        ("llama.expert_count", Entry(U32, 8)),
        ("llama.rope.scaling.type", Entry(STRING, "yarn")),
        ("llama.rope.dimension_count", Entry(U32, 8)),
        ("llama.attention.head_count_kv", Entry(U32, 3)),
        ("tokenizer.ggml.model", Entry(STRING, "llama")),
        ("tokenizer.ggml.pre", Entry(STRING, "nobody-knows")),
        ("tokenizer.ggml.tokens", Entry(ARRAY, ["a", "b"])),
        ("tokenizer.ggml.token_type", Entry(ARRAY, [1, 1], I32)),
        ("tokenizer.ggml.merges", Entry(ARRAY, ["no such"])),
        ("tokenizer.ggml.merges", Entry(ARRAY, [1], I32)),
        ("tokenizer.ggml.eos_token_id", Entry(U32, 1 << 20)),
    ],
)
def test_what_cannot_be_run_is_refused_by_key(tmp_path: Path, key: str, entry: Entry) -> None:
    model = tiny_llama()
    model.entries[key] = entry
    with pytest.raises(CheckpointError, match=key):
        imported(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize("key", ["general.architecture", "llama.embedding_length", "tokenizer.ggml.tokens"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    model = tiny_llama()
    del model.entries[key]
    with pytest.raises(CheckpointError, match=f"{key}: missing"):
        imported(model, tmp_path)


def test_a_missing_a_misshapen_and_a_surplus_tensor_are_named(tmp_path: Path) -> None:
    name = "blk.1.ffn_up.weight"
    missing, misshapen, surplus = tiny_llama(), tiny_llama(), tiny_llama()
    del missing.tensors[name]
    misshapen.tensors[name] = Tensor(name, (HIDDEN, HIDDEN), TYPE_F32, bytes(4 * HIDDEN * HIDDEN))
    surplus.tensors["rope_freqs.weight"] = Tensor("rope_freqs.weight", (8,), TYPE_F32, bytes(32))
    for model, problem in ((missing, f"{name}: missing"), (misshapen, f"{name}: shape"), (surplus, "rope_freqs")):
        with pytest.raises(CheckpointError, match=problem):
            imported(model, tmp_path)


def test_an_existing_destination_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="exists already"):
        imported(tiny_llama(), tmp_path)
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["mine"]


def test_an_import_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    source = tiny_llama().write(tmp_path / "tiny.gguf")
    with pytest.raises(KeyboardInterrupt):
        import_gguf(source, tmp_path / "tiny", interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_an_import_that_is_killed_leaves_nothing_that_looks_like_a_model(tmp_path: Path) -> None:
    source = tiny_llama().write(tmp_path / "tiny.gguf")
    program = (
        "import os, signal, sys\n"
        "from kvferry.text.gguf_import import import_gguf\n"
        "def die(stage, done, total):\n"
        "    if done == total: os.kill(os.getpid(), signal.SIGKILL)\n"
        "import_gguf(sys.argv[1], sys.argv[2], die)\n"
    )
    command = [sys.executable, "-c", program, str(source), str(tmp_path / "tiny")]
    ended = subprocess.run(command, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "tiny").exists()
    left = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert left
    for path in left:
        with pytest.raises(CheckpointError, match="missing"):
            ModelDir(path)


def test_the_files_are_readable_by_others(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        path = imported(tiny_llama(), tmp_path)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o755
    assert (path / "config.json").stat().st_mode & 0o777 == 0o644
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == [1]
