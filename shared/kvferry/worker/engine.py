"""From settings to a warm runner: choose the engine, load the model, touch what the first step will use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvferry import ready
from kvferry.engine.choice import Choice, choose
from kvferry.engine.config import ModelConfig
from kvferry.engine.native.library import Library, LibraryUnavailable, open_library
from kvferry.engine.ranks.followers import Followers
from kvferry.engine.settings import EngineSettings
from kvferry.errors import SettingError
from kvferry.grammar.compiler import GrammarCompiler
from kvferry.log import get_logger
from kvferry.schedule.step import ModelRunner
from kvferry.text.vocabulary import vocabulary_id
from kvferry.worker.settings import WorkerSettings

log = get_logger(__name__)
# Fields of EngineSettings whose flag has another name.
_FLAGS: Final = {"kv_cache_bytes": "--kv-memory-mb"}


@dataclass(frozen=True, slots=True)
class Loaded:
    runner: ModelRunner
    choice: Choice
    grammars: GrammarCompiler
    vocabulary_id: str


def load_engine(settings: WorkerSettings, joined: Callable[[], Followers | None] = lambda: None) -> Loaded:
    """Blocking, for seconds; runs on a lane. `joined` returns the other ranks, if there are any, when they are there;
    they load meanwhile.

    Raises `SettingError`, `CheckpointError` or `RankLost`.
    """
    if not settings.model:
        raise SettingError("--model", "is not set; give a model directory, or --join a stack of one model")
    try:
        loaded = _load(settings, engine_settings(settings), joined)
    except SettingError as error:
        flag = _FLAGS.get(error.setting, "--" + error.setting.replace("_", "-"))
        raise SettingError(flag, error.problem) from None
    if settings.exactness == "exact" and not loaded.runner.exact:
        reason = f"the {loaded.choice.engine} engine is not exact ({loaded.choice.why}); use fast or auto"
        raise SettingError("--exactness", reason)
    return loaded


def warm_up(loaded: Loaded) -> None:
    """Blocking, too: with several ranks until all of them have taken part."""
    ready.report("warm-up")
    loaded.runner.warm_up()


def engine_settings(settings: WorkerSettings) -> EngineSettings:
    return EngineSettings(
        model_dir=Path(settings.source.where).expanduser(),
        device=settings.device,
        dtype=settings.dtype,
        num_blocks=settings.num_blocks or None,
        kv_cache_bytes=settings.kv_memory_mb << 20,
        block_size=settings.block_size,
        max_model_len=settings.max_model_len or None,
        threads=settings.threads,
        quantization=settings.quantization,
        isa=settings.isa,
        tensor_parallel_size=settings.tensor_parallel_size,
        remote_ranks=settings.remote_ranks,
    )


def _load(settings: WorkerSettings, engine: EngineSettings, joined: Callable[[], Followers | None]) -> Loaded:
    library: Library | None = None

    def library_problem() -> str | None:
        nonlocal library
        try:
            library = open_library(settings.isa, _building)
        except LibraryUnavailable as error:
            return str(error)
        return None

    choice = choose(settings.engine, engine, ModelConfig.read(engine.model_dir), library_problem)
    log.info("engine chosen", engine=choice.engine, why=choice.why)
    followers = joined()
    ready.report("import")
    # Imported only when chosen: a native worker never pays for torch.
    if choice.engine == "native":
        from kvferry.engine.native.runner import NativeRunner

        ready.report("load")
        return _loaded(NativeRunner(engine, _progress, library, followers), choice, engine.model_dir)
    try:
        from kvferry.engine.torch.runner import TorchRunner
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        problem = f"torch is wanted ({choice.why}) and not installed: pip install 'kvferry[worker]'"
        raise SettingError("engine", problem) from None

    ready.report("load")
    return _loaded(TorchRunner(engine, _progress, followers), choice, engine.model_dir)


def _loaded(runner: ModelRunner, choice: Choice, model_dir: Path) -> Loaded:
    compiler = GrammarCompiler(model_dir / "tokenizer.json", runner.vocab_size, runner.eos_token_ids)
    return Loaded(runner, choice, compiler, vocabulary_id(model_dir / "tokenizer.json"))


def _progress(share: float) -> None:
    ready.report("load", share=share)


def _building(isa: str) -> None:
    ready.report("build")
    log.info("building the native engine, once for this machine", isa=isa)
