"""Traces of requests, as OpenTelemetry has them: spans over gateway and workers under one trace id. Off by default."""
