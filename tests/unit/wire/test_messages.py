"""Every message survives the wire, and nothing else gets through it."""

from __future__ import annotations

import json
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.wire import samples
from unit.wire.strategies import bad_values, messages, replaced

from kvferry.errors import MalformedMessage, UnknownVersion, WireError
from kvferry.wire import flow
from kvferry.wire.codec import WIRE_VERSION, Codec, Message
from kvferry.wire.fields import pack_tokens, unpack_tokens
from kvferry.wire.messages import Answer, Beat, CacheNews, Codecs, ToGateway, ToWorker
from kvferry.wire.orders import Ping
from kvferry.wire.work import Work

CARRIED = samples.carried()
UNIONS = {
    "to_worker": (ToWorker, Codecs().to_worker),
    "to_gateway": (ToGateway, Codecs().to_gateway),
    "answer": (Answer, Codecs().answer),
    "beat": (Beat, Codecs().beat),
    "cache": (CacheNews, Codecs().cache),
    "flow": (flow.Flow, flow.FlowCodec()),
    "manifest": (flow.Manifest, flow.ManifestCodec()),
}


def members(union: Any) -> tuple[type[Message], ...]:
    return get_args(union) or (union,)


def case_name(value: Any) -> str | None:
    return samples.name(value) if isinstance(value, Message) else ""


every_sample = pytest.mark.parametrize(("codec", "sample"), CARRIED, ids=case_name)
every_union = pytest.mark.parametrize("union", UNIONS)


def test_there_is_a_sample_of_every_message_of_every_union() -> None:
    sampled = {type(sample) for _, sample in CARRIED}
    assert sampled == {member for union, _ in UNIONS.values() for member in members(union)}


@every_union
@settings(max_examples=150)
@given(data=st.data())
def test_any_message_comes_back_equal(union: str, data: st.DataObject) -> None:
    types, codec = UNIONS[union]
    message = data.draw(messages(*members(types)))
    payload = codec.encode(message)
    assert codec.decode(payload) == message
    assert codec.decode(memoryview(payload)) == message


@every_sample
def test_recorded_bytes_of_version_1_are_still_read_and_written(codec: Codec[Any], sample: Message) -> None:
    recorded = bytes.fromhex(json.loads(samples.GOLDEN.read_text())[samples.name(sample)])
    assert recorded[0] == 1
    assert codec.decode(recorded) == sample
    if WIRE_VERSION == 1:
        assert codec.encode(sample) == recorded


@pytest.mark.parametrize("older", samples.OLDER)
def test_what_was_written_before_a_field_was_appended_is_read_with_its_default(older: str) -> None:
    codec, message = samples.OLDER[older]
    recorded = bytes.fromhex(json.loads(samples.GOLDEN.read_text())[older])
    assert codec.decode(recorded) == message
    assert codec.encode(message) != recorded, "the field is written today"


@every_sample
def test_a_newer_sender_may_append_fields(codec: Codec[Any], sample: Message) -> None:
    payload = codec.encode(sample)
    fields = msgspec.msgpack.decode(payload[1:])
    for extra in ([7], ["text", {"a": [1, 2]}], [None, b"bytes"]):
        assert codec.decode(payload[:1] + msgspec.msgpack.encode([*fields, *extra])) == sample


@every_sample
def test_a_message_cut_at_any_byte_is_malformed(codec: Codec[Any], sample: Message) -> None:
    payload = codec.encode(sample)
    for length in range(len(payload)):
        with pytest.raises(MalformedMessage):
            codec.decode(payload[:length])
    with pytest.raises(MalformedMessage):
        codec.decode(payload + b"\0")


@every_sample
def test_every_other_version_is_refused_as_such(codec: Codec[Any], sample: Message) -> None:
    payload = codec.encode(sample)
    for version in set(range(256)) - {WIRE_VERSION}:
        with pytest.raises(UnknownVersion) as caught:
            codec.decode(bytes([version]) + payload[1:])
        assert caught.value.version == version


@every_sample
def test_every_field_refuses_a_wrong_type_and_a_value_over_its_limit(codec: Codec[Any], sample: Message) -> None:
    payload = codec.encode(sample)
    fields = msgspec.msgpack.decode(payload[1:])
    tried = 0
    for path, bad in bad_values(msgspec.inspect.type_info(type(sample)), fields):
        broken = payload[:1] + msgspec.msgpack.encode(replaced(fields, path, bad))
        try:
            codec.decode(broken)
        except MalformedMessage:
            tried += 1
        else:
            pytest.fail(f"{samples.name(sample)} took {bad!r:.80} at {path}")
    assert tried >= 3 * len(fields) - 2


@every_sample
def test_a_message_of_another_union_is_malformed(codec: Codec[Any], sample: Message) -> None:
    payload = codec.encode(sample)
    for union, (types, other) in UNIONS.items():
        if type(sample) in members(types):
            assert other.decode(payload) == sample
        elif union != "manifest":  # alone in its frame, so a tag is all that could tell
            with pytest.raises(MalformedMessage):
                other.decode(payload)


@every_union
@settings(max_examples=300)
@given(payload=st.binary(max_size=200))
def test_garbage_is_a_wire_error_and_nothing_else(union: str, payload: bytes) -> None:
    _, codec = UNIONS[union]
    for given_bytes in (payload, bytes([WIRE_VERSION]) + payload):
        with pytest.raises(WireError):
            codec.decode(given_bytes)


@every_union
@settings(max_examples=300)
@given(data=st.data())
def test_a_message_with_flipped_bytes_is_a_message_or_a_wire_error(union: str, data: st.DataObject) -> None:
    _, codec = UNIONS[union]
    sample = data.draw(st.sampled_from([sample for made, sample in CARRIED if type(made) is type(codec)]))
    payload = bytearray(codec.encode(sample))
    for place in data.draw(st.lists(st.integers(0, len(payload) - 1), min_size=1, max_size=4)):
        payload[place] = data.draw(st.integers(0, 255))
    try:
        decoded = codec.decode(bytes(payload))
    except WireError:
        return
    assert codec.decode(codec.encode(decoded)) == decoded


@every_union
def test_zero_bytes_are_malformed(union: str) -> None:
    for empty in (b"", memoryview(b""), bytes([WIRE_VERSION])):
        with pytest.raises(MalformedMessage):
            UNIONS[union][1].decode(empty)


@every_union
def test_a_bomb_of_nested_arrays_or_false_lengths_is_malformed(union: str) -> None:
    codec = UNIONS[union][1]
    version = bytes([WIRE_VERSION])
    deep = version + b"\x91" * 100_000 + b"\xc0"
    deep_in_an_appended_field = version + b"\x92\xa4ping" + b"\x91" * 100_000 + b"\xc0"
    huge_array = version + b"\xdd\xff\xff\xff\xff"
    huge_bytes = version + b"\x92\xc6\xff\xff\xff\xff"
    huge_map = version + b"\xdf\xff\xff\xff\xff"
    for payload in (deep, deep_in_an_appended_field, huge_array, huge_bytes, huge_map):
        with pytest.raises(MalformedMessage):
            codec.decode(payload)


def test_a_bomb_inside_the_fields_that_an_old_receiver_skips_is_malformed() -> None:
    codec = Codecs().to_worker
    payload = codec.encode(Ping(1))
    assert payload[1] == 0x92, "an array of two: tag and nonce"
    appended = payload[:1] + b"\x93" + payload[2:]
    assert codec.decode(appended + b"\xc0") == Ping(1)
    with pytest.raises(MalformedMessage):
        codec.decode(appended + b"\x91" * 1_000_000 + b"\xc0")


@every_sample
def test_messages_cannot_be_changed(codec: Codec[Any], sample: Message) -> None:
    with pytest.raises(AttributeError):
        setattr(sample, type(sample).__struct_fields__[0], None)


def test_work_is_ordered_by_priority_then_arrival_then_ticket() -> None:
    def work(priority: int, arrival: float, ticket: int) -> Work:
        return msgspec.structs.replace(
            samples.WORK, priority=priority, arrival=arrival, ticket=ticket.to_bytes(16, "big")
        )

    ordered = [work(0, 1.0, 9), work(0, 2.0, 1), work(0, 2.0, 2), work(1, 0.0, 0)]
    assert sorted([ordered[2], ordered[0], ordered[3], ordered[1]], key=lambda work: work.order) == ordered


@given(st.lists(st.integers(0, (1 << 32) - 1)))
def test_tokens_survive_their_column(tokens: list[int]) -> None:
    column = pack_tokens(tokens)
    assert len(column) == 4 * len(tokens)
    assert unpack_tokens(column).tolist() == tokens


def test_a_flow_message_of_the_largest_size_fits_its_limit() -> None:
    largest = flow.Credit((1 << 32) - 1, flow.MAX_CREDITS, ((1 << 32) - 1,) * flow.MAX_CREDITS)
    assert len(flow.FlowCodec().encode(largest)) <= flow.MAX_FLOW_BYTES
