"""The address that a worker tells others."""

from __future__ import annotations

import pytest

from kvferry.advertise import advertised_host
from kvferry.errors import SettingError


def test_an_address_that_is_given_is_told_as_it_is() -> None:
    assert advertised_host("10.1.2.3", "nats://nowhere.invalid:1") == "10.1.2.3"


@pytest.mark.parametrize(
    "url",
    ["nats://127.0.0.1:4222", "127.0.0.1", "nats://user:hush@localhost:1", "nats://nowhere.invalid, nats://127.0.0.1"],
)
def test_auto_is_the_address_on_the_way_to_nats(url: str) -> None:
    assert advertised_host("auto", url) in ("127.0.0.1", "::1")


@pytest.mark.parametrize("url", ["nats://user:hush@nowhere.invalid:4222", "", "nats://127.0.0.1:port"])
def test_auto_without_a_way_names_the_setting_and_no_secret(url: str) -> None:
    with pytest.raises(SettingError, match="--advertise-host") as caught:
        advertised_host("auto", url)
    assert "hush" not in str(caught.value)
