"""Reading GGUF: well-formed files as they are, every other one refused by name."""

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvferry.errors import CheckpointError
from kvferry.text.gguf import MAX_ARRAY_ITEMS, MAX_ENTRIES, MAX_NAME_BYTES, MAX_STRING_BYTES, MAX_TENSORS, GgufFile

from .gguf_writer import ARRAY, BOOL, F32, I32, STRING, U32, U64, Entry, Tensor, gguf, string, tiny_llama

ENTRIES = {
    "general.architecture": Entry(STRING, "llama"),
    "count": Entry(U32, 7),
    "big": Entry(U64, 1 << 40),
    "flag": Entry(BOOL, True),
    "real": Entry(F32, 0.5),
    "words": Entry(ARRAY, ["a", "✈"]),
    "numbers": Entry(ARRAY, [1, -2, 3], I32),
}
TENSORS = [
    Tensor("a.weight", (2, 3), 0, struct.pack("<6f", *range(6))),
    Tensor("b.weight", (32,), 8, struct.pack("<e32b", 0.5, *range(32))),
]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(raw: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(raw)
        return path

    return write


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [32, 64])
def test_entries_and_tensors_are_read_back(write: Callable[[bytes], Path], version: int, alignment: int) -> None:
    entries = {**ENTRIES, "general.alignment": Entry(U32, alignment)}
    with GgufFile(write(gguf(entries, TENSORS, version, alignment))) as file:
        assert file.entries == {key: entry.value for key, entry in entries.items()}
        a, b = file.tensors.values()
        assert (a.name, a.shape, a.format.name) == ("a.weight", (2, 3), "F32")
        assert a.format.dequantize(file.read(a, 0, a.num_bytes)).tolist() == list(range(6))
        assert b.format.dequantize(file.read(b, 0, b.num_bytes)).tolist() == [i / 2 for i in range(32)]
        assert file.read(a, 12, 12) == TENSORS[0].stored[12:]


def count_head(tensors: int = 0, entries: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "file ends early"),
        (b"PK\3\4" + bytes(40), "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(16), "version 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian"),
        (count_head(tensors=MAX_TENSORS + 1), "number of tensors"),
        (count_head(entries=MAX_ENTRIES + 1), "number of entries"),
        (count_head(entries=1), "file ends early"),
        (count_head(entries=1) + struct.pack("<Q", MAX_NAME_BYTES + 1), "over the limit"),
        (count_head(entries=1) + string("k") + struct.pack("<IQ", STRING, MAX_STRING_BYTES + 1), "over the limit"),
        (count_head(entries=1) + string("k") + struct.pack("<IQ", STRING, 1000), "k: file ends early"),
        (count_head(entries=1) + string("k") + struct.pack("<I", STRING) + string(b"\xff"), "k: not UTF-8"),
        (count_head(entries=1) + string("k") + struct.pack("<I", 99), "k: unknown value type 99"),
        (count_head(entries=1) + string("k") + struct.pack("<IIQ", ARRAY, U32, MAX_ARRAY_ITEMS + 1), "over the limit"),
        (count_head(entries=1) + string("k") + struct.pack("<IIQ", ARRAY, U32, MAX_ARRAY_ITEMS), "k: file ends early"),
        (count_head(entries=1) + string("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1), "nested array"),
        (count_head(entries=2) + 2 * (string("k") + struct.pack("<IB", 0, 1)), "k: given twice"),
        (count_head(tensors=1) + string("t") + struct.pack("<I", 5), "t: 5 is over the limit of 4"),
        (gguf({}, [Tensor("t", (4,), 77, bytes(16))]), "t: tensor type 77"),
        (gguf({}, [Tensor("t", (33,), 8, bytes(34))]), "t: shape"),
        (gguf({}, [Tensor("t", (2, 0), 0, b"")]), "t: shape"),
        (gguf({}, [Tensor("t", (), 0, b"")]), "t: shape"),
        (gguf({}, [Tensor("t", (1 << 20, 1 << 20, 1 << 20), 0, b"")]), "t: file ends early"),
        (gguf({}, [Tensor("t", (4,), 0, bytes(12))]), "t: file ends early"),
        (gguf({}, [Tensor("t", (4,), 0, bytes(16), offset=32)]), "t: file ends early"),
        (gguf({}, [Tensor("t", (4,), 0, bytes(16), offset=1 << 63)]), "t: .* over the limit"),
        (gguf({}, [Tensor("t", (4,), 0, bytes(16))] * 2), "t: given twice"),
        (gguf({"general.alignment": Entry(U32, 0)}), "general.alignment"),
        (gguf({"general.alignment": Entry(STRING, "32")}), "general.alignment"),
    ],
)
def test_a_malformed_file_is_refused_by_name(write: Callable[[bytes], Path], raw: bytes, problem: str) -> None:
    path = write(raw)
    with pytest.raises(CheckpointError, match=problem) as caught:
        GgufFile(path)
    assert caught.value.path == str(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        GgufFile(tmp_path / "absent.gguf")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(cut=st.integers(0, 900), at=st.integers(0, 900), value=st.integers(0, 255))
def test_cut_and_damaged_files_give_the_typed_error_or_a_whole_file(
    write: Callable[[bytes], Path], cut: int, at: int, value: int
) -> None:
    raw = bytearray(gguf(ENTRIES, TENSORS))
    raw[at % len(raw)] = value
    try:
        with GgufFile(write(bytes(raw[: len(raw) - cut]))) as file:
            for tensor in file.tensors.values():
                assert len(file.read(tensor, 0, tensor.num_bytes)) == tensor.num_bytes
    except CheckpointError:
        pass


def test_every_cut_of_a_whole_model_is_noticed(write: Callable[[bytes], Path]) -> None:
    model = tiny_llama()
    raw = gguf(model.entries, list(model.tensors.values()))
    GgufFile(write(raw)).__exit__()
    for length in (*range(0, len(raw), 4999), len(raw) - 1):
        with pytest.raises(CheckpointError, match="file ends early"):
            GgufFile(write(raw[:length]))
