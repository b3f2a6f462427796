"""Which engine runs, and what is said about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import SHAPES, build

from kvferry.engine.choice import PAGE_TOKENS, Choice, choose
from kvferry.engine.config import ModelConfig
from kvferry.engine.native import library
from kvferry.engine.settings import EngineSettings
from kvferry.errors import SettingError


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    import torch

    return ModelConfig.read(build(SHAPES[0], tmp_path_factory.mktemp("checkpoint"), dtype=torch.bfloat16))


SETTINGS = EngineSettings(Path("model"))
OBSTACLES = [
    ({"device": "cuda"}, "device"),
    ({"dtype": "float32"}, "dtype"),
    ({"dtype": "float16"}, "dtype"),
    ({"block_size": 8}, "block_size"),
    ({"block_size": 40}, "block_size"),
    ({"remote_ranks": 1, "tensor_parallel_size": 2}, "remote_ranks"),
]


def there_is_one() -> str | None:
    return None


def not_asked() -> str | None:
    pytest.fail("the library was looked for in vain")


def test_auto_takes_native_where_it_can_run(config: ModelConfig) -> None:
    assert choose("auto", SETTINGS, config, there_is_one).engine == "native"
    assert choose("native", replace(SETTINGS, block_size=32), config, there_is_one) == Choice("native", "asked for")


def test_auto_falls_back_to_torch_and_says_why(config: ModelConfig) -> None:
    choice = choose("auto", SETTINGS, config, lambda: "there is no C++ compiler")
    assert choice == Choice("torch", "the native library is not available: there is no C++ compiler")


@pytest.mark.parametrize(("fields", "setting"), OBSTACLES)
def test_a_setting_that_native_cannot_serve_is_named(
    config: ModelConfig, fields: dict[str, object], setting: str
) -> None:
    settings = replace(SETTINGS, **fields)  # type: ignore[arg-type]
    choice = choose("auto", settings, config, not_asked)
    assert choice.engine == "torch"
    assert choice.why.startswith(f"{setting} is ")
    assert str(fields[setting]) in choice.why
    with pytest.raises(SettingError, match=f"native cannot be had: {setting} is") as error:
        choose("native", settings, config, not_asked)
    assert error.value.setting == "engine"


def test_the_checkpoints_own_dtype_counts_where_none_is_asked(config: ModelConfig) -> None:
    wide = replace(config, dtype="float32")
    assert "float32 in the checkpoint" in choose("auto", SETTINGS, wide, not_asked).why
    assert choose("auto", replace(SETTINGS, dtype="bfloat16"), wide, there_is_one).engine == "native"


def test_asking_for_torch_never_looks_for_the_library(config: ModelConfig) -> None:
    assert choose("torch", SETTINGS, config, not_asked) == Choice("torch", "asked for")


@pytest.mark.parametrize("wanted", ["auto", "torch"])
def test_int8_never_falls_back_to_an_engine_that_would_ignore_it(config: ModelConfig, wanted: str) -> None:
    settings = replace(SETTINGS, quantization="int8")
    with pytest.raises(SettingError) as error:
        choose(wanted, settings, config, lambda: "there is no C++ compiler")  # type: ignore[arg-type]
    assert error.value.setting == "quantization"
    assert choose("auto", settings, config, there_is_one).engine == "native"


def test_the_page_size_is_the_librarys() -> None:
    assert PAGE_TOKENS == library.PAGE_TOKENS
