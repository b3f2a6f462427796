"""How settings name models, alone and together."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from pydantic import SecretStr

from kvferry.command import service_command
from kvferry.config.layers import load_settings
from kvferry.errors import SettingError
from kvferry.model_source import ModelSource, check_different, model_sources
from kvferry.runfile import RunFile
from kvferry_decode.settings import DecodeSettings
from kvferry_gateway.settings import GatewaySettings


def run_file(*models: str) -> RunFile:
    return RunFile(cluster="c", pid=os.getpid(), nats_url="nats://h:1", data_key=SecretStr("ab" * 32), model=models)


def test_a_model_is_called_what_it_is_told_or_what_its_directory_is_called_behind_all_links(tmp_path: Path) -> None:
    (tmp_path / "qwen").mkdir()
    (tmp_path / "current").symlink_to(tmp_path / "qwen")
    assert ModelSource.parse("/models/qwen") == ModelSource("", "/models/qwen")
    assert ModelSource.parse(str(tmp_path / "current")).served_name == "qwen"
    named = ModelSource.parse("Qwen/Qwen3-4B=/models/a=b")
    assert named == ModelSource("Qwen/Qwen3-4B", "/models/a=b")
    assert (named.served_name, str(named)) == ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B=/models/a=b")


@pytest.mark.parametrize("text", ["=/models/a", "a=", " =/models/a", "x" * 129 + "=/a", "a\nb=/a"])
def test_what_names_no_model_is_refused(text: str) -> None:
    with pytest.raises(SettingError) as refused:
        ModelSource.parse(text)
    assert refused.value.setting == "--model"


def test_one_model_may_be_named_apart_but_not_two_ways_and_not_several() -> None:
    assert model_sources(["/a"], "m") == (ModelSource("m", "/a"),)
    assert model_sources(["m=/a"], "m") == (ModelSource("m", "/a"),)
    assert model_sources([], "m") == ()
    for models in (["n=/a"], ["m=/a", "n=/b"]):
        with pytest.raises(SettingError) as refused:
            model_sources(models, "m")
        assert refused.value.setting == "--served-model-name"
    check_different(["m", "n"])
    with pytest.raises(SettingError, match="two models are called 'm'"):
        check_different(["m", "n", "m"])


def test_a_flag_of_several_values_stands_there_once_or_more_often() -> None:
    seen: list[GatewaySettings] = []

    async def serve(settings: GatewaySettings) -> None:
        seen.append(settings)

    command = service_command(GatewaySettings, serve, summary="x")
    for words in (["--model", "a=/a,/b"], ["--model", "a=/a", "--model", "/b"], []):
        result = CliRunner().invoke(command, words, env={"KVFERRY_MODEL": "/c,d=/d"}, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert [settings.model for settings in seen] == [("a=/a", "/b"), ("a=/a", "/b"), ("/c", "d=/d")]


def test_a_worker_joins_a_stack_of_one_model_and_must_be_told_which_of_several() -> None:
    def joined(*models: str, **flags: object) -> DecodeSettings:
        return load_settings(DecodeSettings, config_file=None, environ={}, flags=flags, run_file=run_file(*models))

    assert joined("m=/a").source == ModelSource("m", "/a")
    assert joined("m=/a", "n=/b").model == ""
    assert joined("m=/a", "n=/b", model="n=/b").source == ModelSource("n", "/b")
    gateway = load_settings(
        GatewaySettings, config_file=None, environ={}, flags={}, run_file=run_file("m=/a,b", "n=/b")
    )
    assert gateway.sources == (ModelSource("m", "/a,b"), ModelSource("n", "/b")), "a run file is no list with commas"
    assert (run_file("m=/a", "n=/b").first_model, run_file().first_model) == ("m", "")
