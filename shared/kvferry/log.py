"""Structured logs: JSON lines when not on a terminal, readable lines on one; always on stderr.

Tracebacks are without the values of local variables, which may be secrets or prompts.

`request_id` and `attempt` are bound with `structlog.contextvars.bound_contextvars` where a request is
handled. Prompts and outputs are never logged.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO, cast

import structlog
from structlog.dev import plain_traceback
from structlog.typing import FilteringBoundLogger, Processor


def setup_logging(level: str, log_format: str, *, service: str, stream: TextIO | None = None) -> None:
    """Once per process, before the first line. `log_format` is auto, console or json; `service` is in every line.

    Lines of libraries that use the standard `logging` module come out in the same form.
    """
    stream = stream or sys.stderr
    on_terminal = stream.isatty()
    console = log_format == "console" or (log_format == "auto" and on_terminal)
    threshold = logging.getLevelNamesMapping()[level.upper()]

    def name_service(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event.setdefault("service", service)
        return event

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S.%f" if console else "iso", utc=not console),
        name_service,
    ]
    renderers: list[Processor] = (
        [structlog.dev.ConsoleRenderer(colors=on_terminal, pad_event_to=0, exception_formatter=plain_traceback)]
        if console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[*shared, *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # Libraries tell of each request at info; what they say there matters only when one debugs.
    root.setLevel(threshold if threshold == logging.DEBUG else max(threshold, logging.WARNING))


def get_logger(name: str) -> FilteringBoundLogger:
    """A logger whose lines carry `component=name`. May be called at import, before `setup_logging`."""
    return cast(FilteringBoundLogger, structlog.get_logger(component=name))
