"""Streams that tell more than text, and what special tokens and stops make of a text. No sockets, no bus."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from scripted_worker import EOS, tokens_of, write_model
from unit.gateway.test_streams import Client, D, Desk, turn

from kvferry.errors import MalformedMessage
from kvferry.text.detokenizer import TokenTexts
from kvferry.text.tokenizer import Tokenizer
from kvferry.wire.fields import pack_tokens
from kvferry.wire.logprobs import TokenLogprobs, pack_logprobs
from kvferry.wire.tokens import LogprobColumns, TokenBatch
from kvferry_gateway.answers.logprobs import LOWEST, ToldToken, chat_logprobs, text_logprobs
from kvferry_gateway.parsing.parts import Content, Part
from kvferry_gateway.streams.attempt import Lost
from kvferry_gateway.streams.stream import TextRules, TokenStream
from kvferry_gateway.streams.told import ToldStream

TEXT = "aü."
TOKENS = tokens_of(TEXT)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> TokenTexts:
    return TokenTexts(Tokenizer(write_model(tmp_path_factory.mktemp("model") / "tiny")))


def found(token: int) -> TokenLogprobs:
    return TokenLogprobs(-0.5 * token, (token, 1), (-0.5 * token, -9.0))


class ToldDesk(Desk):
    """Its stream wants log-probabilities and makes events of (text, tokens)."""

    def __init__(self, texts: TokenTexts, *stops: str) -> None:
        super().__init__(texts)
        self.table.remove(self.attempt)
        self.events: list[tuple[str, tuple[int, ...]]] = []
        self.stream: ToldStream = ToldStream(texts, stops, 1000, wants_logprobs=True, make_event=self._event)
        self.begin()

    def _event(self, parts: Sequence[Part], told: Sequence[ToldToken]) -> bytes:
        text = "".join(part.text for part in parts if isinstance(part, Content))
        self.events.append((text, tuple(item.token for item in told)))
        return b"x"

    def batch(self, *rows: tuple[int, int], logprobs: LogprobColumns | None) -> None:
        self.seq[D] += 1
        self.dispatcher.take(
            TokenBatch(
                D, self.seq[D] - 1, pack_tokens([self.attempt.stream_id] * len(rows)),
                pack_tokens([i for i, _ in rows]), pack_tokens([t for _, t in rows]), logprobs=logprobs,
            )
        )  # fmt: skip

    def scored(self, *rows: tuple[int, int]) -> None:
        self.batch(*rows, logprobs=pack_logprobs([(row, found(token)) for row, (_, token) in enumerate(rows)]))


async def test_each_token_is_told_once_with_the_text_that_it_completes(texts: TokenTexts) -> None:
    desk = ToldDesk(texts)
    desk.scored((2, TOKENS[2]), (0, TOKENS[0]))
    desk.scored((1, TOKENS[1]), (0, TOKENS[0]), (3, TOKENS[3]))
    desk.scored((4, EOS))
    desk.stream.finish()
    assert desk.events == [("a", (TOKENS[0],)), ("ü", tuple(TOKENS[1:3])), (".", (TOKENS[3],)), ("", (EOS,))]
    assert [item.logprobs for item in desk.stream.told] == [found(token) for token in [*TOKENS, EOS]]
    assert [item.text_offset for item in desk.stream.told] == [0, 1, 1, 2, 3]


async def test_an_end_with_nothing_left_to_tell_tells_nothing(texts: TokenTexts) -> None:
    desk = ToldDesk(texts)
    desk.scored((0, TOKENS[0]))
    desk.stream.finish()
    assert desk.events == [("a", (TOKENS[0],))]


async def test_a_token_without_wanted_log_probabilities_ends_the_attempt(texts: TokenTexts) -> None:
    desk = ToldDesk(texts)
    desk.scored((0, TOKENS[0]))
    desk.say((1, TOKENS[1]))
    assert desk.attempt.over.result() == Lost("error")
    assert desk.stream.tokens == TOKENS[:1]
    desk.table.remove(desk.attempt)
    desk.begin()
    desk.scored((1, TOKENS[1]), (2, TOKENS[2]))
    assert desk.stream.tokens == TOKENS[:3], "another worker knows better"


async def test_a_stream_that_fails_before_its_prompt_is_told_tells_no_token_either(texts: TokenTexts) -> None:
    """Of an echoed prompt: its client would take the first token for the prompt (simulation, seed 1311)."""
    desk, client = ToldDesk(texts), Client()
    desk.stream.hold_back()
    desk.stream.attach(client, 5.0, 1000, lambda: None)
    desk.scored((0, TOKENS[0]))
    await turn()
    desk.stream.close(b"the error", 6.0)
    assert client.writes == [b"the error"]


async def test_a_batch_with_columns_that_do_not_fit_is_not_taken(texts: TokenTexts) -> None:
    desk = ToldDesk(texts)
    with pytest.raises(MalformedMessage):
        desk.batch((0, TOKENS[0]), logprobs=pack_logprobs([(1, found(5))]))
    assert desk.stream.tokens == []


async def test_a_plain_stream_takes_its_tokens_from_a_batch_with_log_probabilities(texts: TokenTexts) -> None:
    desk = Desk(texts)
    desk.dispatcher.take(
        TokenBatch(
            D, 0, pack_tokens([desk.attempt.stream_id]), pack_tokens([0]), pack_tokens([TOKENS[0]]),
            logprobs=pack_logprobs([(0, found(5))]),
        )
    )  # fmt: skip
    assert desk.text == "a"


async def test_tokens_of_a_stop_string_are_told_though_their_text_is_not(texts: TokenTexts) -> None:
    desk = ToldDesk(texts, "ü.")
    desk.scored(*enumerate(TOKENS))
    desk.stream.finish()
    assert desk.stream.stopped
    assert "".join(text for text, _ in desk.events) == "a"
    assert [token for _, tokens in desk.events for token in tokens] == TOKENS


@pytest.mark.parametrize(
    ("rules", "stops", "shown"),
    [
        (TextRules(), (), "ab!"),
        (TextRules(silent=frozenset(tokens_of("!")), skip_special_tokens=False), (), "ab<|end|>"),
        (TextRules(skip_special_tokens=False), (), "ab<|end|>!"),
        (TextRules(), ("b",), "a"),
        (TextRules(include_stop=True), ("b",), "ab"),
        (TextRules(min_tokens=2), ("b",), "ab!"),
        (TextRules(min_tokens=1), ("b",), "a"),
    ],
)  # fmt: skip
def test_rules_of_a_text(texts: TokenTexts, rules: TextRules, stops: tuple[str, ...], shown: str) -> None:
    stream = TokenStream(texts, stops, 100, rules)
    for token in (*tokens_of("ab"), EOS, *tokens_of("!")):
        stream.append(token)
    stream.finish()
    assert stream.take().decode() == shown


def test_no_log_probability_is_infinite_or_no_number(texts: TokenTexts) -> None:
    told = [ToldToken(2, 0, TokenLogprobs(float("nan"), (3,), (float("-inf"),)))]
    entry = chat_logprobs(told, texts)["content"][0]
    assert (entry["logprob"], entry["top_logprobs"][0]["logprob"]) == (LOWEST, LOWEST)
    columns = text_logprobs(told, texts)
    assert columns["token_logprobs"] == [LOWEST]
    assert columns["top_logprobs"] == [{chr(1): LOWEST, chr(2): LOWEST}]


def test_the_frame_of_an_event_names_the_place_that_the_text_comes_from(texts: TokenTexts) -> None:
    stream = TokenStream(texts, (), 100, frame=lambda numerics_id: (numerics_id.encode() + b"[", b"]"))
    stream.placed("m1")
    stream.placed("m2")
    for token in tokens_of("ab"):
        stream.append(token)
    stream.put(b"(end)")
    assert stream.take() == b"m2[a]m2[b](end)"
