"""Workers and a model for tests of the gateway: they speak the real protocol and say what a test wants.

A `ScriptedWorker` accepts requests, beats, publishes token batches, and keeps everything that it was sent. The
tiny model has one token per byte, so that every character that is not ASCII is split between tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from kvferry.bus.base import BusMessage, BusSettings, Subscription
from kvferry.bus.memory import MemoryBroker, MemoryBus
from kvferry.certificate import pinned_context
from kvferry.runtime import SeededRuntime, SystemRuntime
from kvferry.text.detokenizer import byte_level_alphabet
from kvferry.text.model_dir import ModelDir
from kvferry.wire.beats import ExitNotice, Heartbeat, Held, Load, WorkerState
from kvferry.wire.fields import pack_tokens
from kvferry.wire.messages import Codecs
from kvferry.wire.orders import Cancel, Ping, Pong
from kvferry.wire.record import WorkerAddress, WorkerRecord
from kvferry.wire.subjects import beat_subject, exit_subject, mail_subject, process_subject
from kvferry.wire.tokens import End, EndReason, Spent, TokenBatch
from kvferry.wire.work import Accepted, DecodeRequest, PrefillRequest, Rejected, Work
from kvferry_gateway.service import Gateway, HttpServer, listen
from kvferry_gateway.settings import GatewaySettings

CLUSTER = "test"
MODEL = "tiny"
EOS = 0
VOCAB_SIZE = 257  # EOS and one token per byte
PATIENCE_S = 60.0
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}assistant:"

M = TypeVar("M")
Row = tuple[int, int, int]  # stream_id, index, token


def write_model(
    path: Path,
    *,
    max_context: int = 256,
    chat: bool = True,
    template: str = TEMPLATE,
    special: Sequence[str] = (),
    backwards: bool = False,
) -> ModelDir:
    """A model directory without weights. Token 0 is EOS, token 1 + b is byte b, or 256 - b; `special` tokens follow."""
    alphabet = enumerate(byte_level_alphabet())
    vocab = {"<|end|>": EOS, **{char: 256 - byte if backwards else 1 + byte for byte, char in alphabet}}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", *special])
    files: dict[str, Any] = {
        "config": {
            "vocab_size": len(vocab) + len(special),
            "max_position_embeddings": max_context,
            "eos_token_id": EOS,
        },
        "tokenizer_config": {"chat_template": template} if chat else {},
    }
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    for file, content in files.items():
        (path / f"{file}.json").write_text(json.dumps(content))
    return ModelDir(path)


def tokens_of(text: str) -> list[int]:
    return [1 + byte for byte in text.encode()]


def text_of(tokens: Sequence[int]) -> str:
    return bytes(token - 1 for token in tokens if token != EOS).decode("utf-8", "replace")


class ScriptedWorker:
    """`answer` decides on each request (None: silence), `accepted` is called with what was accepted."""

    def __init__(self, bus: MemoryBus, role: str, name: str, incarnation: int, **record: Any) -> None:
        self.bus = bus
        self.role = role
        self.incarnation = incarnation
        self.subject = mail_subject(process_subject(CLUSTER, role, name, incarnation), "gateway")
        fields: dict[str, Any] = {
            "role": role, "name": name, "incarnation": incarnation, "pid": 1, "subject": self.subject,
            "model": MODEL, "transport": "memory", "address": WorkerAddress(incarnation, (f"memory:{name}",)),
            "kv_format_id": "format", "numerics_id": "numerics", "max_model_len": 256, "block_size": 16,
            "num_blocks": 64, "kv_token_bytes": 64, "grammars": True,
        }  # fmt: skip
        self.record = WorkerRecord(**(fields | record))
        self.state: WorkerState = "ready"
        self.load = Load(free_blocks=64)
        self.held: list[Held] = []  # rows of the next heartbeats, for every gateway
        self.inbox: list[Any] = []  # everything that came, in order
        self.seq = 0
        self.answer: Callable[[Work], Accepted | Rejected | None] = lambda work: Accepted(work.ticket, work.attempt)
        self.accepted: Callable[[Work], None] = lambda work: None
        self.frozen = False
        self._codecs = Codecs()
        self._arrived = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscription: Subscription | None = None
        self._beat = 0
        self.beats = True

    async def start(self) -> None:
        self._subscription = await self.bus.subscribe(self.subject, self._on_message)
        self._spawn(self._beat_loop())

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.bus.close()

    # -- what it says ----------------------------------------------------------------------------------------

    def publish(
        self,
        work: Work,
        rows: Sequence[tuple[int, int]] = (),
        end: tuple[EndReason, int] | None = None,
        *,
        cached: int | None = None,
        spent: Spent | None = None,
        lose: bool = False,
        incarnation: int | None = None,
    ) -> None:
        """One batch of (index, token) rows. `lose`: its number is used up, but it is never sent."""
        batch = TokenBatch(
            self.incarnation if incarnation is None else incarnation,
            self.seq,
            pack_tokens([work.stream_id] * len(rows)),
            pack_tokens([index for index, _ in rows]),
            pack_tokens([token for _, token in rows]),
            () if end is None else (End(work.stream_id, end[1], end[0]),),
            () if cached is None else ((work.stream_id, cached),),
            spent=() if spent is None else (spent,),
        )
        self.seq += 1
        if not lose:
            gateway = work.gateway.rpartition(".")[0]  # a test may give D's work to P
            self.send(mail_subject(gateway, self.role), self._codecs.to_gateway.encode(batch))

    def say(self, work: Work, tokens: Sequence[int], *, reason: EndReason = "stop") -> None:
        """All of `tokens` that the gateway does not have yet, one batch each, and the end."""
        start = len(work.generated) // 4
        for index in range(start, len(tokens)):
            self.publish(work, [(index, tokens[index])])
        self.publish(work, end=(reason, len(tokens)))

    def send(self, subject: str, payload: bytes) -> None:
        self._spawn(self.bus.publish(subject, payload))

    async def beat(self) -> None:
        self._beat += 1
        gateways = {item.work.gateway for item in self.inbox if isinstance(item, (PrefillRequest, DecodeRequest))}
        sequences = {gateway: tuple(self.held) for gateway in gateways}
        beat = Heartbeat(self._beat, self.state, self.record, self.load, sequences)
        subject = beat_subject(CLUSTER, self.role, self.record.name, self.incarnation)
        await self.bus.publish(subject, self._codecs.beat.encode(beat))

    async def exit(self, cause: str) -> None:
        """It dies, and its supervisor says so."""
        self.freeze()
        assert self._subscription is not None
        await self._subscription.close()
        subject = exit_subject(CLUSTER, self.role, self.record.name, self.incarnation)
        await self.bus.publish(subject, self._codecs.beat.encode(ExitNotice(self.incarnation, cause)))  # type: ignore[arg-type]

    def freeze(self) -> None:
        self.frozen = True

    def hold(self, work: Work, state: Any, next_index: int, progress: tuple[int, int] = (0, 0)) -> None:
        self.held = [row for row in self.held if row.stream_id != work.stream_id]
        self.held.append(Held(work.stream_id, state, next_index, 0, *progress))
        self._arrived.set()

    def forget(self, work: Work) -> None:
        self.held = [row for row in self.held if row.stream_id != work.stream_id]

    # -- what it hears ---------------------------------------------------------------------------------------

    def got(self, kind: type[M]) -> list[M]:
        return [item for item in self.inbox if isinstance(item, kind)]

    @property
    def works(self) -> list[Work]:
        return [item.work for item in self.inbox if isinstance(item, (PrefillRequest, DecodeRequest))]

    async def until(self, condition: Callable[[], Any]) -> Any:
        """Wait until what has come makes `condition` true."""
        async with asyncio.timeout(PATIENCE_S):
            while not (value := condition()):
                self._arrived.clear()
                await self._arrived.wait()
        return value

    async def wait_for(self, kind: type[M], count: int = 1) -> M:
        """The `count`-th message of a kind."""
        await self.until(lambda: len(self.got(kind)) >= count)
        return self.got(kind)[count - 1]

    def _on_message(self, message: BusMessage) -> None:
        if self.frozen:
            return
        request = self._codecs.to_worker.decode(message.payload)
        self.inbox.append(request)
        self._arrived.set()
        match request:
            case PrefillRequest(work) | DecodeRequest(work):
                answer = self.answer(work)
                if answer is not None:
                    self._spawn(self._respond(message, answer, work))
            case Cancel():
                self.held = [row for row in self.held if self._key_of(row) != (request.ticket, request.attempt)]
            case Ping(nonce):
                self._spawn(message.respond(self._codecs.answer.encode(Pong(nonce, self.incarnation))))

    def _key_of(self, row: Held) -> tuple[bytes, int] | None:
        return next((work.key for work in self.works if work.stream_id == row.stream_id), None)

    async def _respond(self, message: BusMessage, answer: Accepted | Rejected, work: Work) -> None:
        await message.respond(self._codecs.answer.encode(answer))
        if isinstance(answer, Accepted):
            self.hold(work, "running" if self.role == "decode" else "computing", len(work.generated) // 4)
            self.accepted(work)

    async def _beat_loop(self) -> None:
        while True:
            if self.beats and not self.frozen:
                await self.beat()
            await asyncio.sleep(0.05)

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class Cluster:
    """A gateway on a real socket, an in-memory bus, and scripted workers."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.model_options: dict[str, Any] = settings.pop("model_options", {})
        self._model_name: str = settings.pop("model_name", MODEL)
        self._others: dict[str, dict[str, Any]] = settings.pop("other_models", {})  # name -> options
        self.settings = GatewaySettings(**({"cluster": CLUSTER, "port": 0, "local_prefill_threshold": 0} | settings))
        self.broker = MemoryBroker(SeededRuntime(1))
        self.workers: dict[str, ScriptedWorker] = {}
        self._path = path
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Cluster:
        models = {self._model_name: write_model(self._path / MODEL, **self.model_options)}
        models |= {name: write_model(self._path / name, **options) for name, options in self._others.items()}
        runtime = SystemRuntime()
        self.bus = MemoryBus(self.broker, BusSettings("memory", "gateway", "inbox.gateway"), runtime)
        await self.bus.start()
        self._stack.push_async_callback(self.bus.close)
        self.gateway = await Gateway.start(self.settings, runtime, self.bus, models, pid=7, created=1)
        self._stack.push_async_callback(self.gateway.stop)
        listener = self._stack.enter_context(contextlib.closing(listen("127.0.0.1", 0)))
        self.http = HttpServer(self.gateway, listener, 5.0)
        await self.http.start()
        self._stack.push_async_callback(self._stop_http)
        certificate = self.settings.tls_cert
        self.url = f"{'https' if certificate else 'http'}://127.0.0.1:{self.http.address[1]}"
        verify = pinned_context(certificate, "tls_cert") if certificate else True
        # Connections of a test are its own: none is taken over with what an earlier answer left in it.
        self.client = await self._stack.enter_async_context(
            httpx.AsyncClient(base_url=self.url, timeout=PATIENCE_S, trust_env=False, verify=verify)
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        for worker in self.workers.values():
            await worker.close()
        await self._stack.aclose()

    async def _stop_http(self) -> None:
        await self.gateway.completions.drain(0.0)
        await self.http.stop()

    @property
    def metrics(self) -> Any:
        return self.gateway.fleet.metrics

    async def worker(
        self,
        role: str,
        name: str,
        script: Callable[[ScriptedWorker], Callable[[Work], None]] | None = None,
        *,
        running: int = 0,
        **record: Any,
    ) -> ScriptedWorker:
        """Start one and wait until the gateway has seen it. `script` makes what it does upon acceptance.

        `running`: sequences in its batch, by its heartbeats. Equals are chosen by chance, the busier one last.
        """
        bus = MemoryBus(self.broker, BusSettings("memory", name, f"inbox.{name}"), SystemRuntime())
        await bus.start()
        incarnation = 1000 + len(self.workers)
        worker = ScriptedWorker(bus, role, name, incarnation, **record)
        worker.load = Load(free_blocks=worker.record.num_blocks, num_running=running)
        if script is not None:
            worker.accepted = script(worker)
        self.workers[f"{name}/{incarnation}"] = worker
        await worker.start()
        async with asyncio.timeout(PATIENCE_S):
            while self.gateway.fleet.registry.state_of(incarnation) is None:
                await asyncio.sleep(0.005)
        return worker

    async def pair(self) -> tuple[ScriptedWorker, ScriptedWorker]:
        return await self.worker("prefill", "prefill-0"), await self.worker("decode", "decode-0")

    async def speaker(self, said: str | Sequence[int], **record: Any) -> ScriptedWorker:
        """A decode worker that answers every request with this text, or these tokens, and an end, by itself."""
        tokens = [*(tokens_of(said) if isinstance(said, str) else said), EOS]

        def script(worker: ScriptedWorker) -> Callable[[Work], None]:
            def speak(work: Work) -> None:
                limit = work.sampling.max_tokens
                worker.say(work, tokens[:limit], reason="stop" if len(tokens) <= limit else "length")

            return speak

        return await self.worker("decode", f"decode-{len(self.workers)}", script, **record)


def completion(prompt: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "max_tokens": 64, "temperature": 0, **fields}


def chat(content: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "temperature": 0, **fields}


class Events:
    """The server-sent events of one answer, read as they come."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.comments = 0
        self._lines: AsyncIterator[str] = response.aiter_lines()

    async def next(self) -> Any:
        """The next event's JSON; None for [DONE]."""
        async for line in self._lines:
            if line.startswith(":"):
                self.comments += 1
            if line.startswith("data: "):
                payload = line.removeprefix("data: ")
                return None if payload == "[DONE]" else json.loads(payload)
        raise AssertionError("the stream ended without [DONE]")

    async def rest(self) -> list[Any]:
        events = []
        while (event := await self.next()) is not None:
            events.append(event)
        return events


def text_in(events: Sequence[Any]) -> str:
    choices = [event["choices"][0] for event in events if event.get("choices")]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)
