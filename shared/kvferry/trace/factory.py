"""Whether a process tells of traces, and where."""

from __future__ import annotations

import importlib.metadata

from kvferry.config.field import flag_name
from kvferry.config.settings import ServiceSettings
from kvferry.errors import SettingError
from kvferry.runtime import Runtime
from kvferry.trace.span import SpanExporter


def open_exporter(settings: ServiceSettings, runtime: Runtime) -> SpanExporter | None:
    """None: no collector is named, and nothing of OpenTelemetry is imported. Raises `SettingError`."""
    if not settings.otlp_endpoint:
        return None
    try:
        from kvferry.trace.otlp import OtlpExporter
    except ImportError:
        setting = flag_name(type(settings), "otlp_endpoint")
        raise SettingError(setting, "needs OpenTelemetry, which kvferry[otel] installs") from None
    version = importlib.metadata.version("kvferry")
    resource = {
        "service.name": f"kvferry-{settings.role}",
        "service.namespace": settings.cluster,
        "service.instance.id": f"{settings.name}-{runtime.random_u64():016x}",
        "service.version": version,
    }
    return OtlpExporter(settings.otlp_endpoint, resource, version)
