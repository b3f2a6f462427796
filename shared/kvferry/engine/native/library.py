"""The C interface of the library, bound with ctypes. `src/kvferry.h` documents every function.

ctypes lets go of the GIL for the time of a call, so a step runs beside the event loop. Pointers that are handed over
are only used during the call, but for the cache's, whose memory the caller keeps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_uint32, c_uint64, c_void_p
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

from kvferry.cache import cache_dir
from kvferry.engine.columns import Wanted as Wanted
from kvferry.engine.native.build import PACKAGED, BuildError, build_cached, packaged_name
from kvferry.engine.native.cpu import cpu_flags, isas_to_try

ABI: Final = 6  # KVF_ABI
BARRIER_BYTES: Final = 256  # KVF_BARRIER_BYTES
PAGE_TOKENS: Final = 16  # KVF_PAGE_TOKENS: block sizes are multiples of it
OUT_OF_MEMORY: Final = -5  # KVF_E_MEMORY


class LibraryUnavailable(Exception):
    """There is no library for this machine. The text says why, in one line."""


class Weight(IntEnum):
    """What `kvf_model_load` takes."""

    EMBEDDING = 0
    INPUT_NORM = 1
    QKV = 2
    QKV_BIAS = 3
    Q_NORM = 4
    K_NORM = 5
    OUTPUT = 6
    OUTPUT_BIAS = 7
    POST_NORM = 8
    GATE = 9
    UP = 10
    GATE_BIAS = 11
    UP_BIAS = 12
    DOWN = 13
    DOWN_BIAS = 14
    NORM = 15
    HEAD = 16


class Range(ctypes.Structure):
    """kvf_range."""

    _fields_ = [("begin", c_int32), ("end", c_int32)]

    @classmethod
    def of(cls, part: range) -> Range:
        return cls(part.start, part.stop)


class Shape(ctypes.Structure):
    """kvf_shape."""

    _fields_ = [
        *((name, c_int32) for name in (
            "num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size",
            "max_len", "block_size", "quantization", "tied", "qkv_bias", "output_bias", "mlp_bias", "qk_norm",
            "threads",
        )),
        ("rms_norm_eps", c_float),
        # Of a rank; all zero: the model is whole.
        *((name, c_int32) for name in ("ranks", "rank", "max_rows")),
        *((name, Range) for name in ("heads", "kv_heads", "hidden", "intermediate", "vocab")),
    ]  # fmt: skip


class Piece(ctypes.Structure):
    """kvf_piece."""

    _fields_ = [
        (name, c_int32)
        for name in (
            "layer_start", "layer_end", "token_start", "token_end", "head_start", "head_end",
            "frame_heads", "frame_head",
        )
    ]  # fmt: skip


class Cache(ctypes.Structure):
    """kvf_cache."""

    _fields_ = [("shape", POINTER(Shape)), ("memory", c_void_p), ("num_blocks", c_int32)]


# kvf_sequence as a numpy record, so that a step's array is filled by columns.
SEQUENCE: Final = [
    ("tokens", "u8"), ("block_table", "u8"),
    ("num_rows", "i4"), ("start", "i4"), ("num_blocks", "i4"), ("logits", "i4"),
]  # fmt: skip

# name -> (result, arguments). A result of c_int32 is 0 or an error code and is checked.
_SIGNATURES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "kvf_isa": (c_char_p, ()),
    "kvf_abi": (c_uint32, ()),
    "kvf_may_run": (c_int32, ()),
    "kvf_error_text": (c_char_p, (c_int32,)),
    "kvf_model_create": (c_void_p, (POINTER(Shape), c_void_p, c_void_p, c_void_p, POINTER(c_int32))),
    "kvf_model_load": (c_int32, (c_void_p, c_int32, c_int32, c_void_p, c_int32, c_int32, c_int32)),
    "kvf_model_finish": (c_int32, (c_void_p,)),
    "kvf_model_free": (None, (c_void_p,)),
    "kvf_model_weight_bytes": (c_uint64, (c_void_p,)),
    "kvf_model_workspace_bytes": (c_uint64, (c_void_p,)),
    "kvf_cache_bytes": (c_uint64, (POINTER(Shape), c_int32)),
    "kvf_model_set_cache": (c_int32, (c_void_p, c_void_p, c_int32)),
    "kvf_shared_bytes": (c_uint64, (POINTER(Shape),)),
    "kvf_model_join": (c_int32, (c_void_p, c_void_p)),
    "kvf_barrier": (c_int32, (c_void_p, c_int32)),
    "kvf_step": (c_int32, (c_void_p, c_void_p, c_int32, c_void_p)),
    "kvf_logits": (c_int32, (c_void_p, c_int32, c_int32, c_void_p)),
    "kvf_gather": (c_int32, (POINTER(Cache), POINTER(Piece), c_int32, c_void_p, c_int32, c_void_p, c_uint64)),
    "kvf_scatter": (c_int32, (POINTER(Cache), POINTER(Piece), c_int32, c_void_p, c_int32, c_void_p, c_uint64)),
    "kvf_copy_blocks": (c_int32, (POINTER(Cache), c_void_p, c_int32)),
    "kvf_model_profile": (c_int32, (c_void_p, POINTER(c_double))),
}


class Library:
    """One loaded library.

    Raises `LibraryUnavailable` for a file that is none, of another interface, or that the kernel does not let run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.c = ctypes.CDLL(str(path))
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(self.c, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise LibraryUnavailable(f"{path}: {error}") from None
        if (abi := self.c.kvf_abi()) != ABI:
            raise LibraryUnavailable(f"{path}: interface {abi}, {ABI} is needed")
        self.isa: str = self.c.kvf_isa().decode()
        if not self.c.kvf_may_run():
            raise LibraryUnavailable(f"{self.isa}: the kernel does not let this process use its registers")

    def call(self, function: Callable[..., int], *arguments: Any) -> None:
        """Call one of `c`'s functions that return an error code. Raises RuntimeError, MemoryError."""
        if code := function(*arguments):
            raise self.failure(code)

    def failure(self, code: int) -> Exception:
        text = self.c.kvf_error_text(code).decode()
        return MemoryError(text) if code == OUT_OF_MEMORY else RuntimeError(text)


def open_library(isa: str = "auto", building: Callable[[str], None] | None = None) -> Library:
    """The library for this processor: the wheel's own, else the cache's, else built now (seconds).

    "auto" takes the best instruction set that can be had; a name takes that one. `building` hears the name of one
    that must be compiled, before it is. Raises `LibraryUnavailable`,
    or `SettingError` for a name that the processor lacks.
    """
    problem = ""
    for candidate in isas_to_try(isa, cpu_flags()):
        packaged = PACKAGED / packaged_name(candidate)
        try:
            path = packaged if packaged.is_file() else build_cached(candidate, cache_dir() / "native", building)
            library = Library(path)
            if library.isa != candidate:  # a compiler that did not know what it was asked for
                raise LibraryUnavailable(f"{path}: built for {library.isa}, not {candidate}")
            return library
        except (BuildError, LibraryUnavailable) as error:
            problem = problem or str(error)
    raise LibraryUnavailable(problem)
