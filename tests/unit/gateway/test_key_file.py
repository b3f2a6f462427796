"""The key file: what stands behind a key."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.errors import SettingError
from kvferry_gateway.http.auth import ApiKeys, first_key
from kvferry_gateway.http.rate_limit import RateLimits

DEFAULT = RateLimits(requests=10, tokens=1000)


def limits_of(path: Path, key: bytes) -> RateLimits:
    found = ApiKeys(path, DEFAULT).find(b"Bearer " + key)
    assert found is not None
    return found.allowance.limits


@pytest.mark.parametrize(
    ("line", "limits"),
    [
        ("key", DEFAULT),
        ("key requests_per_minute=60", RateLimits(60, 1000)),
        ("  key\ttokens_per_minute=7  requests_per_minute=2 ", RateLimits(2, 7)),
        ("key tokens_per_minute=unlimited", RateLimits(10, None)),
        ("key\nother tokens_per_minute=5\nkey requests_per_minute=10", DEFAULT),
    ],
)
def test_a_line_is_a_key_and_its_limits(tmp_path: Path, line: str, limits: RateLimits) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# keys\n\n{line}\n")
    assert limits_of(path, b"key") == limits


@pytest.mark.parametrize(
    "line",
    [
        "secret more",
        "secret requests_per_minute",
        "secret requests_per_minute=0",
        "secret requests_per_minute=-1",
        "secret requests_per_minute=1.5",
        "secret requests_per_day=1",
        "secret tokens_per_minute=1 tokens_per_minute=2",
        "key requests_per_minute=2",
    ],
)
def test_what_is_wrong_in_a_line_is_told_without_showing_it(tmp_path: Path, line: str) -> None:
    path = tmp_path / "keys"
    path.write_text(f"key\n{line}\n")
    with pytest.raises(SettingError, match="line 2") as refused:
        ApiKeys(path)
    assert refused.value.setting == "--api-key-file"
    for word in ("secret", "more"):
        assert word not in str(refused.value).replace(str(path), "")


def test_who_may_read_the_file_finds_a_key_in_it(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# for us\n\nkey requests_per_minute=60\nother\n")
    assert first_key(path) == b"key"
    assert ApiKeys(path).find(b"Bearer " + first_key(path)) is not None
