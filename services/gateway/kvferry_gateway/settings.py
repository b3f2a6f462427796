"""Settings of the gateway. Each limit stands in `docs/protocol.md`, too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field, SecretStr, model_validator

from kvferry.config.field import flag_name
from kvferry.config.settings import Port, ServiceSettings
from kvferry.model_source import ModelSource, model_sources
from kvferry_gateway.parsing.forms import ReasoningParserName, ToolParserName

Positive = Annotated[int, Field(ge=1)]
Duration = Annotated[float, Field(gt=0, le=24 * 3600)]


class GatewaySettings(ServiceSettings):
    """One gateway: one HTTP port, and every model that it is told of."""

    role: ClassVar[str] = "gateway"

    port: Port = Field(8000, description="HTTP port; 0: any free one.")
    tls_cert: Path | None = Field(
        None,
        description="PEM file of the certificate for HTTPS, and of those that lead to its authority; HTTP without. "
        "Read again when it changes, with its key.",
    )
    tls_key: Path | None = Field(None, description="PEM file of its private key; the certificate's file unless given.")
    tls_key_password: SecretStr = Field(SecretStr(""), description="Password of an encrypted private key.")
    model: tuple[str, ...] = Field(
        (),
        description="Model directories in Hugging Face form, for tokenizer, template and context length; "
        "NAME=DIRECTORY where requests call a model NAME.",
    )
    served_model_name: str = Field(
        "", description="Name in requests where there is one model; the directory's name unless given."
    )
    api_key_file: Path | None = Field(
        None,
        description="File of bearer keys, one a line, with their rate limits behind them; read again when it changes. "
        "Without it no key is asked for.",
    )
    requests_per_minute: Positive | None = Field(
        None, description="Requests that a key may make in a minute, at each gateway; the key's own limit comes first."
    )
    tokens_per_minute: Positive | None = Field(
        None, description="Tokens, prompt and output, that a key may use in a minute, at each gateway; likewise."
    )
    cors_origins: tuple[str, ...] = Field((), description="Origins whose pages may call this gateway; * is any.")
    max_body_bytes: Positive = Field(4 << 20, description="Largest request body in bytes; above it 413.")
    max_requests: Positive = Field(
        1024, description="Requests of one model under way at once; one more is refused with 429."
    )
    max_backlog_bytes: Positive = Field(
        1 << 20, description="Bytes that may wait for a client that takes none, before its stream is cancelled."
    )
    local_prefill_threshold: Annotated[int, Field(ge=0)] = Field(
        32,
        description="Prompts with fewer tokens are prefilled on the decode worker itself, longer ones where that is "
        "expected to be faster and to hurt no stream; 0: never by choice.",
    )
    accept_timeout: Duration = Field(0.3, description="Seconds that a worker has to accept a request; asked twice.")
    replace_wait: Duration = Field(60.0, description="Seconds that a stream waits for capacity after losing a worker.")
    failure_budget: Positive = Field(3, description="Failures that end a request.")
    receive_timeout: Duration = Field(
        30.0, description="Seconds within which a request must have arrived whole, head and body; then 408."
    )
    keep_alive_timeout: Annotated[int, Field(ge=1, le=24 * 3600)] = Field(
        75, description="Seconds that a connection is kept between two requests; more than a load balancer's before it."
    )
    sse_comment_interval: Duration = Field(15.0, description="Seconds of silence after which an SSE comment is sent.")
    request_deadline: Duration = Field(600.0, description="Seconds that a request may take in all.")
    tool_call_parser: ToolParserName = Field(
        "auto",
        description="Form in which the models write tool calls, as vLLM names it; auto: what a model's template shows.",
    )
    reasoning_parser: ReasoningParserName = Field(
        "auto",
        description="Whether <think>…</think> is told as `reasoning_content`: think, none, or as the template shows.",
    )
    drain_grace: Duration = Field(20.0, description="Seconds that requests under way have to end after SIGTERM.")

    trace_sample_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0,
        description="Of requests whose client sends no traceparent, the share that is traced, where otlp_endpoint is "
        "set; of others the client's sampled flag decides.",
    )

    @property
    def sources(self) -> tuple[ModelSource, ...]:
        """The models to serve. Raises `SettingError`."""
        return model_sources(self.model, self.served_model_name)

    @model_validator(mode="after")
    def _limits_need_keys(self) -> Self:
        for field in ("requests_per_minute", "tokens_per_minute"):
            if getattr(self, field) is not None and self.api_key_file is None:
                raise ValueError(f"{flag_name(type(self), field)} limits each key, and there is no --api-key-file")
        return self

    @model_validator(mode="after")
    def _key_needs_certificate(self) -> Self:
        if self.tls_key is not None and self.tls_cert is None:
            raise ValueError("--tls-key is the key of a certificate, and there is no --tls-cert")
        return self
