"""Streamed text equals text decoded at once, for every kind of decoder and any tokens."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvferry.text.detokenizer import MAX_OPEN_TOKENS, Detokenizer, TokenTexts, byte_level_alphabet
from kvferry.text.tokenizer import Tokenizer

KINDS = ("byte-level", "sentencepiece", "wordpiece")
TOKENS = st.lists(st.integers(0, 450), max_size=60)


def stream_text(stream: Detokenizer, token_ids: list[int]) -> str:
    return "".join([stream.push(token_id) for token_id in token_ids]) + stream.finish()


@pytest.mark.parametrize("kind", KINDS)
@given(token_ids=TOKENS)
def test_streamed_text_equals_the_text_of_the_whole_sequence(
    kinds: dict[str, Tokenizer], kind: str, token_ids: list[int]
) -> None:
    tokenizer = kinds[kind]
    assert stream_text(TokenTexts(tokenizer).stream(), token_ids) == tokenizer.decode(token_ids)


@given(data=st.lists(st.integers(0, 255), max_size=80))
@example(data=[*"😀".encode(), 0xFF])
@example(data=[0xE2, 0x82, 0x41, 0xF0, 0x9F, 0x98])
def test_arbitrary_bytes_come_out_as_the_library_decodes_them(kinds: dict[str, Tokenizer], data: list[int]) -> None:
    alphabet = byte_level_alphabet()
    for kind, name in (("byte-level", alphabet.__getitem__), ("sentencepiece", lambda byte: f"<0x{byte:02X}>")):
        tokenizer = kinds[kind]
        token_ids = [tokenizer.backend.token_to_id(name(byte)) for byte in data]
        assert None not in token_ids
        assert stream_text(TokenTexts(tokenizer).stream(), token_ids) == tokenizer.decode(token_ids)


@given(token_ids=TOKENS)
def test_the_fast_path_and_push_together_give_the_same_text(kinds: dict[str, Tokenizer], token_ids: list[int]) -> None:
    tokenizer = kinds["byte-level"]
    texts = TokenTexts(tokenizer)
    stream, escaped = texts.stream(), b""
    for token_id in token_ids:
        ready = None if stream.is_open else texts.ready()[token_id]
        escaped += json.dumps(stream.push(token_id), ensure_ascii=False)[1:-1].encode() if ready is None else ready
    escaped += json.dumps(stream.finish(), ensure_ascii=False)[1:-1].encode()
    assert json.loads(b'"' + escaped + b'"') == tokenizer.decode(token_ids)


def test_a_naive_join_of_single_tokens_is_caught_by_the_comparison(kinds: dict[str, Tokenizer]) -> None:
    for kind, text in (("byte-level", "👩‍👩‍👧 ✈"), ("sentencepiece", "the ferry ✈"), ("wordpiece", "ferry")):
        tokenizer = kinds[kind]
        token_ids = [2, 3] if kind == "wordpiece" else tokenizer.encode(text, add_special_tokens=False).tolist()
        assert "".join(tokenizer.decode([token_id]) for token_id in token_ids) != tokenizer.decode(token_ids)


def test_text_appears_as_soon_as_its_character_is_complete(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["byte-level"]
    stream = TokenTexts(tokenizer).stream()
    alphabet = byte_level_alphabet()
    pieces = [stream.push(tokenizer.backend.token_to_id(alphabet[byte])) for byte in "a✈b".encode()]
    assert pieces == ["a", "", "", "✈", "b"]
    assert not stream.is_open


def test_an_unfinished_character_ends_as_a_replacement_character(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["byte-level"]
    stream = TokenTexts(tokenizer).stream()
    assert stream.push(tokenizer.backend.token_to_id(byte_level_alphabet()[0xE2])) == ""
    assert stream.is_open
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_and_unknown_ids_have_no_text(kinds: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = kinds[kind]
    stream = TokenTexts(tokenizer).stream()
    assert stream_text(stream, [*tokenizer.special_token_ids, 1 << 31]) == ""


def test_escaped_text_is_ready_for_a_json_string(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["byte-level"]
    texts = TokenTexts(tokenizer)
    ids = {text: tokenizer.encode(text, add_special_tokens=False)[0] for text in ('"', "\n", "a", "→")}
    assert [texts.ready()[int(token_id)] for token_id in ids.values()] == [b'\\"', b"\\n", b"a", "→".encode()]
    assert texts.ready()[tokenizer.backend.token_to_id("<|end|>")] == b""
    assert texts.ready()[tokenizer.backend.token_to_id(byte_level_alphabet()[0xE2])] is None
    assert texts.ready()[1 << 31] is None


def test_texts_with_a_mark_are_not_ready(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["byte-level"]
    texts = TokenTexts(tokenizer)
    marks = frozenset(b"a\\")
    for _ in range(2):  # as it is found, and as it is remembered
        for token in range(tokenizer.vocab_size + 3):
            text = texts.ready()[token]
            marked = text is not None and (b"a" in text or b"\\" in text)
            assert texts.ready(marks)[token] == (None if marked else text)
    assert len(texts.ready(marks)) <= len(texts.ready()), "ids without a token take no memory"
    assert texts.ready(marks) is texts.ready(frozenset(b"\\a"))


def test_other_decoders_offer_no_fast_path(kinds: dict[str, Tokenizer]) -> None:
    texts = TokenTexts(kinds["sentencepiece"])
    assert not texts.byte_level
    assert {texts.ready()[token_id] for token_id in range(300)} == {None}


def test_an_endless_run_of_byte_tokens_still_moves(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["sentencepiece"]
    stream = TokenTexts(tokenizer).stream()
    token_ids = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in "😀".encode()] * MAX_OPEN_TOKENS
    shown = "".join(stream.push(token_id) for token_id in token_ids)
    assert shown + stream.finish() == "😀" * MAX_OPEN_TOKENS
    assert shown


def test_streams_of_one_table_do_not_disturb_each_other(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["byte-level"]
    texts = TokenTexts(tokenizer)
    one, two = texts.stream(), texts.stream()
    alphabet = byte_level_alphabet()
    for byte in "✈".encode()[:2]:
        one.push(tokenizer.backend.token_to_id(alphabet[byte]))
    assert two.push(tokenizer.backend.token_to_id("a")) == "a"
    assert one.finish() == "\ufffd"


def test_the_byte_alphabet_is_the_librarys() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(byte_level_alphabet()) == sorted(ByteLevel.alphabet())
