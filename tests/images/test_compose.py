"""docker-compose.yml for real: built, started, used, a worker killed under a stream, scaled, taken down.

What docs/deployment.md tells its reader to type is taken from there. The tests share one stack and run in the order of
the file; the last one takes it down.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import yaml
from compose_stack import HOST, ROOT, ComposeStack, Container, docker, require_docker
from pages import put, written

from kvferry.runtime import blocking_clock
from kvferry_local.autoscale.target import ComposeTarget
from kvferry_local.bench.endpoint import Endpoint
from kvferry_local.bench.stream import Stream, stream

pytestmark = pytest.mark.timeout(1200)  # the first test waits for the build

ROLES = ("prefill", "decode")
SERVICES = ("gateway", "nats", *ROLES)
COMPILERS = ("cc", "gcc", "g++", "c++", "clang")
PATIENCE_S = 60.0
PAGE: Final = ROOT / "docs" / "deployment.md"
UP, MODELS, DOWN = written("docs/deployment.md", "compose")
SIZE_SHARE = 0.15  # by which an image may differ from what the page says
CHAT = {
    "model": "smollm2", "temperature": 0.0, "max_tokens": 600, "ignore_eos": True,
    "messages": [{"role": "user", "content": "Explain at length how ferries carried trains across rivers. " * 6}],
}  # fmt: skip


@pytest.fixture(scope="module")
def compose() -> Iterator[ComposeStack]:
    require_docker()
    stack = ComposeStack()
    try:
        stack.run(UP)
        yield stack
    finally:
        stack.remove()


@pytest.fixture(scope="module")
def undisturbed(compose: ComposeStack) -> Stream:
    """What an answer is when nothing happens."""
    return asyncio.run(chat(compose))


async def chat(
    compose: ComposeStack,
    so_far: Stream | None = None,
    given: asyncio.Event | None = None,
    model: str = "smollm2",
) -> Stream:
    """Stream the one question to its end. `given` is set once a part of the answer is there."""
    so_far = so_far if so_far is not None else Stream()

    def on_text() -> None:
        if given is not None and len(so_far.arrivals) >= 20:
            given.set()

    async with asyncio.timeout(PATIENCE_S * 2):
        body = CHAT | {"model": model}
        return await stream(Endpoint(HOST, compose.port), "/v1/chat/completions", body, into=so_far, on_text=on_text)


async def metric(compose: ComposeStack, name: str) -> float:
    """The sum of one metric of the gateway over its labels."""
    text = (await Endpoint(HOST, compose.port).get("/metrics")).decode()
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def listed(compose: ComposeStack) -> list[str]:
    """The models, as the page asks for them."""
    return [model["id"] for model in json.loads(compose.run(put(MODELS, {"8000": compose.port})))["data"]]


# -- as it starts ----------------------------------------------------------------------------------------------------


def test_the_started_stack_serves_its_model(compose: ComposeStack) -> None:
    assert listed(compose) == ["smollm2"]


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


def stated_sizes() -> dict[str, float]:
    """Bytes of each image above its base, by the page."""
    rows = re.findall(r"^\| ([a-z, ]+) \| ([\d.]+) (MB|GB) \|", PAGE.read_text(), re.MULTILINE)
    unit = {"MB": 1e6, "GB": 1e9}
    return {name: float(number) * unit[of] for names, number, of in rows for name in names.split(", ")}


def size_of(image: str) -> int:
    return int(docker("image", "inspect", "--format", "{{.Size}}", image))


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_is_as_large_as_the_page_says(compose: ComposeStack, service: str) -> None:
    base = os.environ.get("PYTHON_IMAGE", "python:3.11-slim-bookworm")
    if not docker("image", "ls", "--quiet", base):
        docker("pull", "--quiet", base)  # the build has its layers, perhaps under no name
    above = size_of(compose.one(service).facts["Image"]) - size_of(base)
    assert above == pytest.approx(stated_sizes()[service], rel=SIZE_SHARE)


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


async def test_scaled_as_the_page_says_a_drained_worker_ends_and_its_container_starts_afresh(
    compose: ComposeStack,
) -> None:
    scale, status, drain = written(
        "docs/deployment.md", "test_scaled_as_the_page_says_a_drained_worker_ends_and_its_container_starts_afresh"
    )
    compose.run(scale)
    before = await all_ready(compose, 5)
    assert sorted(row["role"] for row in before) == ["decode", "decode", "decode", "prefill", "prefill"]
    assert len({row["name"] for row in before}) == 5
    shown = compose.run(status)
    assert all(re.search(rf"^{row['name']} .* ready ", shown, re.MULTILINE) for row in before), shown
    row = next(row for row in before if row["role"] == "decode")
    container = compose.worker_of(row)
    compose.run(put(drain, {"decode-3f2a90": row["name"]}))
    async with asyncio.timeout(PATIENCE_S):
        while row["incarnation"] in {other["incarnation"] for other in await asyncio.to_thread(compose.cluster)}:
            pass
    after = await all_ready(compose, 5)
    again = compose.worker_of(next(other for other in after if other["name"] == row["name"]))
    assert again.id == container.id
    assert again.facts["RestartCount"] == container.facts["RestartCount"] + 1
    assert again.facts["State"]["ExitCode"] == 0


async def test_scaled_up_a_stream_goes_on_when_its_decode_container_is_killed(
    compose: ComposeStack, undisturbed: Stream
) -> None:
    rows = await all_ready(compose, 5)
    assert all(row["exact"] for row in rows)  # so the texts must be equal, whoever computes
    answer, replaced = await chat_while(compose, lambda: docker("kill", busy_decoder(compose).id))
    assert answer.text == undisturbed.text
    assert replaced >= 1
    assert len(compose.containers("decode")) == 2  # a container that an operator killed stays so
    await all_ready(compose, 4)


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


# -- as it is told -----------------------------------------------------------------------------------------------------


async def test_a_model_of_ones_own_is_served_from_the_volume(
    compose: ComposeStack, undisturbed: Stream, model_dir: Path, tmp_path: Path
) -> None:
    """It is a copy of the default one, so the answer is known."""
    copy, serve = written("docs/deployment.md", "test_a_model_of_ones_own_is_served_from_the_volume")
    own = shutil.copytree(model_dir, tmp_path / "own")
    for path in (own, *own.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    compose.run(put(copy, {"/srv/llama": own}))
    compose.run(serve)
    rows = await all_ready(compose, 2)
    assert {(row["role"], row["model"]) for row in rows} == {(role, "llama") for role in ROLES}
    assert listed(compose) == ["llama"]
    assert (await chat(compose, model="llama")).text == undisturbed.text


async def test_a_second_model_has_workers_of_its_own(compose: ComposeStack, undisturbed: Stream) -> None:
    """The one that the volume holds from the test above, beside the default one."""
    compose.run(*written("docs/deployment.md", "test_a_second_model_has_workers_of_its_own"))
    rows = await all_ready(compose, 4)
    both = ("smollm2", "llama")
    assert sorted((row["model"], row["role"]) for row in rows) == sorted(product(both, ROLES))
    assert listed(compose) == list(both)
    for model in both:
        assert (await chat(compose, model=model)).text == undisturbed.text


async def test_with_the_override_of_the_page_the_gateway_wants_a_key(compose: ComposeStack, tmp_path: Path) -> None:
    (text,) = written("docs/deployment.md", "test_with_the_override_of_the_page_the_gateway_wants_a_key")
    keys, override = tmp_path / "api_keys", tmp_path / "docker-compose.override.yml"
    keys.write_text("sk-of-the-test requests_per_minute=60 tokens_per_minute=100000\n")
    keys.chmod(0o644)
    override.write_text(put(text, {"./api_keys": keys}))
    files = os.pathsep.join(("docker-compose.yml", str(override)))  # as if it lay beside the first
    compose.run(UP, COMPOSE_FILE=files, COMPOSE_REMOVE_ORPHANS="1")
    key = {"authorization": "Bearer sk-of-the-test"}
    async with httpx.AsyncClient(base_url=f"http://{HOST}:{compose.port}", trust_env=False, timeout=PATIENCE_S) as http:
        for headers, status in (({}, 401), ({"authorization": "Bearer sk-guessed"}, 401), (key, 200)):
            assert (await http.get("/v1/models", headers=headers)).status_code == status
        answer = await http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 4}, headers=key)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-ratelimit-limit-requests"] == "60"


# -- as it stops -----------------------------------------------------------------------------------------------------


async def test_what_was_stopped_and_taken_down_is_there_again_with_make(
    compose: ComposeStack, undisturbed: Stream
) -> None:
    up, down = written("docs/deployment.md", "test_what_was_stopped_and_taken_down_is_there_again_with_make")
    running = {container.id for container in compose.containers()}
    compose.compose("stop")
    ends = {c.id: (c.service, c.facts["State"]["ExitCode"]) for c in compose.containers(stopped=True)}
    assert {ends[id] for id in running} == {("gateway", 0), ("prefill", 0), ("decode", 0), ("nats", 0)}
    assert set(compose.left()) == {"containers", "networks", "volumes"}
    compose.run(down)
    assert set(compose.left()) == {"volumes"}
    compose.run(up)
    await all_ready(compose, 2)
    assert (await chat(compose)).text == undisturbed.text


def test_down_leaves_the_volumes_which_go_when_they_are_asked_to(compose: ComposeStack) -> None:
    compose.run(DOWN)
    assert set(compose.left()) == {"volumes"}
    compose.run("make compose-down ARGS=--volumes")
    assert compose.left() == {}


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
