"""docker-compose.yml for real: built, started, used, a worker killed under a stream, scaled, taken down.

The tests share one stack and run in the order of the file; the last one takes it down.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import yaml
from compose_stack import HOST, ROOT, ComposeStack, Container, docker, require_docker

from kvferry.runtime import blocking_clock
from kvferry_local.autoscale.target import ComposeTarget
from kvferry_local.bench.endpoint import Endpoint
from kvferry_local.bench.stream import Stream, stream

pytestmark = pytest.mark.timeout(1200)  # the first test waits for the build

ROLES = ("prefill", "decode")
SERVICES = ("gateway", "nats", *ROLES)
COMPILERS = ("cc", "gcc", "g++", "c++", "clang")
PATIENCE_S = 60.0
CHAT = {
    "model": "smollm2", "temperature": 0.0, "max_tokens": 600, "ignore_eos": True,
    "messages": [{"role": "user", "content": "Explain at length how ferries carried trains across rivers. " * 6}],
}  # fmt: skip


@pytest.fixture(scope="module")
def compose() -> Iterator[ComposeStack]:
    require_docker()
    stack = ComposeStack()
    try:
        stack.build()
        stack.up()
        yield stack
    finally:
        stack.down()


@pytest.fixture(scope="module")
def undisturbed(compose: ComposeStack) -> Stream:
    """What an answer is when nothing happens."""
    return asyncio.run(chat(compose))


async def chat(compose: ComposeStack, so_far: Stream | None = None, given: asyncio.Event | None = None) -> Stream:
    """Stream the one question to its end. `given` is set once a part of the answer is there."""
    so_far = so_far if so_far is not None else Stream()

    def on_text() -> None:
        if given is not None and len(so_far.arrivals) >= 20:
            given.set()

    async with asyncio.timeout(PATIENCE_S * 2):
        return await stream(Endpoint(HOST, compose.port), "/v1/chat/completions", CHAT, into=so_far, on_text=on_text)


async def metric(compose: ComposeStack, name: str) -> float:
    """The sum of one metric of the gateway over its labels."""
    text = (await Endpoint(HOST, compose.port).get("/metrics")).decode()
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


# -- as it starts ----------------------------------------------------------------------------------------------------


def test_a_chat_streams_through_both_workers_over_ucx(compose: ComposeStack, undisturbed: Stream) -> None:
    assert undisturbed.usage is not None
    assert undisturbed.usage["completion_tokens"] == CHAT["max_tokens"]
    assert len(undisturbed.arrivals) > 100  # events, not one lump
    rows = compose.cluster()
    assert sorted(row["role"] for row in rows) == ["decode", "prefill"]
    assert {row["transport"] for row in rows} == {"ucx"}
    assert {row["engine"] for row in rows} == {"native"}
    received = re.search(
        r'^kvferry_kv_bytes_total{direction="received"} (\S+)$',
        compose.one("decode").get(8001, "/metrics"),
        re.MULTILINE,
    )
    assert received is not None
    assert float(received[1]) > 0


def test_only_the_gateways_port_is_published_and_on_the_loopback(compose: ComposeStack) -> None:
    published = {port for container in compose.containers() for port in container.published}
    assert published == {("8000/tcp", "127.0.0.1", str(compose.port))}
    (port,) = yaml.safe_load(docker("compose", "config"))["services"]["gateway"]["ports"]
    assert (port["host_ip"], port["published"]) == ("127.0.0.1", "8000")


def test_only_the_gateway_is_on_a_network_with_a_way_out(compose: ComposeStack) -> None:
    for container in compose.containers():
        networks = json.loads(docker("network", "inspect", *container.networks))
        ways_out = [network["Labels"]["com.docker.compose.network"] for network in networks if not network["Internal"]]
        assert ways_out == (["edge"] if container.service == "gateway" else [])


@pytest.mark.parametrize("service", SERVICES)
def test_processes_are_without_root_and_cannot_write_their_file_system(compose: ComposeStack, service: str) -> None:
    container = compose.one(service)
    processes = json.loads(container.python(PROCESSES))
    assert processes
    for process in processes:
        assert set(process["Uid"].split()) == {"10001"}
        assert int(process["CapEff"], 16) == 0
        assert process["NoNewPrivs"] == "1"
    attempt = "import sys; open(sys.argv[1], 'w').close()"
    places = ["/etc/x", "/opt/kvferry/x", *([] if service == "nats" else ["/models/x", "/run/kvferry/x"])]
    for place in places:
        with pytest.raises(AssertionError, match="Read-only file system"):
            container.python(attempt, place)
    container.python(attempt, "/tmp/x")  # the attempt itself works where it may


PROCESSES = """
import json, pathlib
wanted = ("Uid", "CapEff", "NoNewPrivs")
found = []
for path in pathlib.Path("/proc").glob("[0-9]*/status"):
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
    found.append({name: lines[name].strip() for name in wanted})
print(json.dumps(found))
"""


@pytest.mark.parametrize(("service", "compiler"), list(product(SERVICES, COMPILERS)))
def test_no_image_has_a_compiler(compose: ComposeStack, service: str, compiler: str) -> None:
    assert compose.one(service).python(WHICH, compiler).strip() == "None"


def test_only_the_workers_images_have_torch(compose: ComposeStack) -> None:
    probe = "import sys; from importlib.util import find_spec; print(find_spec(sys.argv[1]) is not None)"

    def has(service: str, package: str) -> bool:
        return docker("exec", compose.one(service).id, "python", "-c", probe, package).strip() == "True"

    assert not has("gateway", "torch")
    assert has("gateway", "kvferry")
    assert has("prefill", "torch")


WHICH = "import shutil, sys; print(shutil.which(sys.argv[1]))"


RUN_FILE = "print(open('/run/kvferry/run.json').read())"
ROLES_OF = {"gateway": {"gateway", "operator"}, "prefill": {"prefill"}, "decode": {"decode"}}


def test_nats_lets_nobody_in_without_the_credentials(compose: ComposeStack) -> None:
    gateway = compose.one("gateway")
    login = json.loads(gateway.python(RUN_FILE))["nats_logins"]["gateway"]
    assert "+OK" in gateway.python(NATS_LOGIN, login["user"], login["password"])
    assert "Authorization Violation" in gateway.python(NATS_LOGIN, login["user"], "guess")


@pytest.mark.parametrize("service", ROLES_OF)
def test_a_container_has_the_secrets_of_its_own_role_alone(compose: ComposeStack, service: str) -> None:
    facts = json.loads(compose.one(service).python(RUN_FILE))
    assert set(facts["nats_logins"]) == ROLES_OF[service]
    assert bool(facts["data_key"]) == (service != "gateway")


NATS_LOGIN = """
import json, socket, sys
with socket.create_connection(("nats", 4222), 5) as connection:
    lines = connection.makefile("rb")
    lines.readline()
    options = {"verbose": True, "pedantic": False, "user": sys.argv[1], "pass": sys.argv[2]}
    connection.sendall(b"CONNECT " + json.dumps(options).encode() + b"\\r\\n")
    print(lines.readline().decode())
"""


def test_no_secret_is_in_an_image_an_environment_a_command_line_or_a_log(compose: ComposeStack) -> None:
    facts = [json.loads(compose.one(service).python(RUN_FILE)) for service in ROLES_OF]
    secrets = {login["password"] for fact in facts for login in fact["nats_logins"].values()}
    secrets |= {fact["data_key"] for fact in facts} - {""}
    assert len(secrets) == 5  # four users, one key
    containers = compose.containers(stopped=True)
    assert {container.service for container in containers} == {*SERVICES, "credentials", "model"}
    seen = json.dumps([container.facts for container in containers]) + compose.compose("logs")
    assert facts[0]["nats_url"] in seen  # what is no secret would be found
    assert min(map(len, secrets)) >= 32
    assert [secret for secret in secrets if secret in seen] == []


def test_every_container_is_bounded_restarted_and_given_time_to_drain(compose: ComposeStack) -> None:
    for container in compose.containers():
        limits, config = container.facts["HostConfig"], container.facts["Config"]
        assert limits["Memory"] > 0
        assert limits["NanoCpus"] > 0
        assert limits["PidsLimit"] > 0
        assert limits["Init"]
        assert limits["RestartPolicy"]["Name"] == "unless-stopped"
        assert limits["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "3"}
        if container.service != "nats":
            mounted = container.python("print(open('/etc/kvferry/scaling.yaml').read())")
            assert config["StopTimeout"] > yaml.safe_load(mounted)["settings"]["drain_grace"]


# -- when something breaks -------------------------------------------------------------------------------------------


async def test_with_one_pair_a_stream_waits_for_the_restart_of_a_crashed_worker(
    compose: ComposeStack, undisturbed: Stream
) -> None:
    crashed = compose.one("decode")
    answer, replaced = await chat_while(compose, lambda: crash(crashed))
    assert answer.text == undisturbed.text
    assert replaced >= 1
    (again,) = compose.containers("decode")
    assert again.id == crashed.id
    assert again.facts["RestartCount"] == 1


def crash(container: Container) -> None:
    """SIGKILL to the worker itself, so that the container ends by itself and its restart policy counts."""
    container.python(
        "import os, pathlib, signal\n"
        "for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):\n"
        "    words = path.read_bytes().split(b'\\0')\n"
        "    if b'kvferry_decode' in words and b'python' in words[0]:\n"
        "        os.kill(int(path.parent.name), signal.SIGKILL)"
    )


async def test_scaled_up_a_stream_goes_on_when_its_decode_container_is_killed(
    compose: ComposeStack, undisturbed: Stream
) -> None:
    compose.up(prefill=2, decode=2)
    rows = await all_ready(compose, 4)
    assert sorted(row["role"] for row in rows) == ["decode", "decode", "prefill", "prefill"]
    assert len({row["name"] for row in rows}) == 4
    assert all(row["exact"] for row in rows)  # so the texts must be equal, whoever computes
    answer, replaced = await chat_while(compose, lambda: docker("kill", busy_decoder(compose).id))
    assert answer.text == undisturbed.text
    assert replaced >= 1
    assert len(compose.containers("decode")) == 1  # a container that an operator killed stays so


async def test_a_drained_worker_ends_and_its_container_starts_afresh(compose: ComposeStack) -> None:
    before = await all_ready(compose, 3)
    row = next(row for row in before if row["role"] == "prefill")
    container = compose.worker_of(row)
    docker("exec", compose.one("gateway").id, "kvferry", "drain", row["name"])
    async with asyncio.timeout(PATIENCE_S):
        while row["incarnation"] in {other["incarnation"] for other in await asyncio.to_thread(compose.cluster)}:
            pass
    after = await all_ready(compose, 3)
    again = next(other for other in after if other["name"] == row["name"])
    assert compose.worker_of(again).id == container.id
    assert compose.worker_of(again).facts["RestartCount"] == 1
    assert compose.worker_of(again).facts["State"]["ExitCode"] == 0


async def test_autoscale_orders_replicas_through_compose_and_they_drain(
    compose: ComposeStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in compose.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    target, seen = ComposeTarget(), {"prefill": 0, "decode": 0}  # what the gateway sees is not asked
    before = await target.replicas("smollm2", seen)
    assert before == {role: len(compose.containers(role)) for role in ROLES}
    await target.scale("smollm2", "decode", before["decode"] + 1)
    assert (await target.replicas("smollm2", seen))["decode"] == before["decode"] + 1
    rows = await all_ready(compose, sum(before.values()) + 1)
    ends = [compose.worker_of(row).id for row in rows if row["role"] == "decode"]
    await target.scale("smollm2", "decode", before["decode"])
    assert await target.replicas("smollm2", seen) == before
    await all_ready(compose, sum(before.values()))
    stopped = [c for c in compose.containers("decode", stopped=True) if c.id in ends]
    assert {container.facts["State"]["ExitCode"] for container in stopped} <= {0}  # one that is removed drained, too


def busy_decoder(compose: ComposeStack) -> Container:
    """The container of the decode worker that the stream is on."""
    deadline = blocking_clock() + PATIENCE_S
    while blocking_clock() < deadline:
        for row in compose.cluster():
            if row["role"] == "decode" and row["load"]["num_running"]:
                return compose.worker_of(row)
    raise AssertionError("no decode worker ever ran a sequence")


async def all_ready(compose: ComposeStack, count: int) -> list[dict[str, Any]]:
    """The gateway's rows once so many workers are ready. Containers are healthy a moment before it has heard so."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            rows = await asyncio.to_thread(compose.cluster)
            if len(rows) == count and all(row["state"] == "ready" for row in rows):
                return rows


async def chat_while(compose: ComposeStack, disturb: Any) -> tuple[Stream, float]:
    """The answer to the question with a disturbance in mid-stream, and the re-placements that the gateway counted."""
    before = await metric(compose, "kvferry_replacement_total")
    so_far, given = Stream(), asyncio.Event()
    reading = asyncio.create_task(chat(compose, so_far, given))
    async with asyncio.timeout(PATIENCE_S):
        await given.wait()
    await asyncio.to_thread(disturb)
    assert not reading.done(), "the answer was whole before the disturbance"
    answer = await reading
    assert answer.usage is not None
    assert answer.usage["completion_tokens"] == CHAT["max_tokens"]  # none lost, none twice
    return answer, await metric(compose, "kvferry_replacement_total") - before


# -- as it stops -----------------------------------------------------------------------------------------------------


def test_a_stop_drains_and_down_leaves_nothing(compose: ComposeStack) -> None:
    running = {container.id for container in compose.containers()}
    compose.compose("stop")
    ends = {c.id: (c.service, c.facts["State"]["ExitCode"]) for c in compose.containers(stopped=True)}
    assert {ends[id] for id in running} == {("gateway", 0), ("prefill", 0), ("decode", 0), ("nats", 0)}
    assert compose.left()  # what `down` is to remove would be seen
    compose.down()
    assert compose.left() == []


# -- what cannot run here --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_the_gpu_profile_reserves_a_device_and_builds_with_cuda(role: str) -> None:
    require_docker()
    services = yaml.safe_load(docker("compose", "--profile", "gpu", "config"))["services"]
    worker, cpu_worker = services[f"{role}-gpu"], services[role]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 1, ["gpu"])
    assert worker["environment"] == cpu_worker["environment"] | {"KVFERRY_DEVICE": "cuda"}
    assert "/cu1" in worker["build"]["args"]["TORCH_INDEX"]
    assert worker["image"] != cpu_worker["image"]
    for same in ("user", "read_only", "cap_drop", "stop_grace_period", "networks", "volumes", "configs", "depends_on"):
        assert worker[same] == cpu_worker[same]
    assert f"{role}-gpu" not in yaml.safe_load(docker("compose", "config"))["services"]


def test_compose_makes_workers_of_a_second_model_like_those_of_the_first() -> None:
    require_docker()
    environ = {**os.environ, "KVFERRY_SECOND_MODEL": "/models/qwen", "KVFERRY_SECOND_NAME": "qwen"}
    files = ("-f", "docker-compose.yml", "-f", "deploy/compose/second-model.yml")
    services = yaml.safe_load(docker("compose", *files, "config", env=environ))["services"]
    assert services["gateway"]["environment"]["KVFERRY_MODEL"] == "smollm2=/models/served,qwen=/models/second"
    for role in ROLES:
        first, second = services[role], services[f"second-{role}"]
        different = {key for key in first | second if first.get(key) != second.get(key)}
        assert different == {"environment", "depends_on", "networks"}
        assert second["depends_on"].keys() - first["depends_on"].keys() == {"second-model"}
    assert services["second-model"]["command"] == ["fill-model", "/models/qwen", "second"]
