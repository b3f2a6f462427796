"""Request traces in the forms in which they are published.

Azure LLM inference   CSV with TIMESTAMP, ContextTokens, GeneratedTokens
Mooncake              JSON lines with timestamp (ms), input_length, output_length, hash_ids (blocks of 512 tokens)
"""

from __future__ import annotations

import csv
import json
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from kvferry.errors import SettingError
from kvferry_local.bench.workload import Planned

SETTING: Final = "--trace"
MAX_TRACE_BYTES: Final = 1 << 30
AZURE_FIELDS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
TIMESTAMP_CHARS: Final = 26  # Azure's have seven decimals, one more than Python reads


def read_trace(path: Path) -> list[Planned]:
    """In order of arrival. Raises `SettingError` that names file and line."""
    try:
        if path.stat().st_size > MAX_TRACE_BYTES:
            raise SettingError(SETTING, f"{path} is larger than {MAX_TRACE_BYTES} bytes")
        with path.open(encoding="utf-8", newline="") as file:
            rows = _azure(file) if path.suffix == ".csv" else _mooncake(file)
    except OSError as error:
        raise SettingError(SETTING, f"{path}: {error.strerror}") from None
    except _BadLine as error:
        raise SettingError(SETTING, f"{path}, line {error.number}: {error.problem}") from None
    except UnicodeDecodeError:
        raise SettingError(SETTING, f"{path} is not UTF-8") from None
    if not rows:
        raise SettingError(SETTING, f"{path} holds no request")
    return sorted(rows, key=lambda request: request.at)


class _BadLine(Exception):
    def __init__(self, number: int, problem: str) -> None:
        self.number = number
        self.problem = problem


def _azure(file: Any) -> list[Planned]:
    reader = csv.DictReader(file)
    if missing := [name for name in AZURE_FIELDS if name not in (reader.fieldnames or ())]:
        raise _BadLine(1, f"no column {missing[0]}")
    rows = []
    for row in reader:
        try:
            at = datetime.fromisoformat(row["TIMESTAMP"][:TIMESTAMP_CHARS]).timestamp()
            rows.append(Planned(at, max(1, int(row["ContextTokens"])), max(1, int(row["GeneratedTokens"]))))
        except (TypeError, ValueError) as error:
            raise _BadLine(reader.line_num, str(error)) from None
    return rows


def _mooncake(file: Any) -> list[Planned]:
    rows = []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            lengths = max(1, int(row["input_length"])), max(1, int(row["output_length"]))
            rows.append(Planned(float(row["timestamp"]) / 1000, *lengths, tuple(map(int, row.get("hash_ids", ())))))
        except KeyError as error:
            raise _BadLine(number, f"no field {error.args[0]}") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise _BadLine(number, str(error)) from None
    return rows
