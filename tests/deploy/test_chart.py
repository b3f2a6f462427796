"""The Helm chart: linted and rendered by helm, held against the schemas of Kubernetes and what the services read."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda import v1alpha1 as keda
from cloudcoil.models.prometheus_operator import v1 as prometheus_operator
from helm import run_helm
from prometheus_server import documented_metrics

from kvferry.config.layers import load_settings
from kvferry.config.settings import Settings
from kvferry.scaling import SERVICES, Role
from kvferry_decode.settings import DecodeSettings
from kvferry_gateway.service import SHUTDOWN_SLACK_S
from kvferry_gateway.settings import GatewaySettings
from kvferry_prefill.settings import PrefillSettings

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "kvferry"
SETTINGS: dict[str, type[Settings]] = {"gateway": GatewaySettings, "prefill": PrefillSettings, "decode": DecodeSettings}
ROLES: tuple[Role, ...] = ("gateway", "prefill", "decode")
WORKERS: tuple[Role, ...] = ("prefill", "decode")
KUBERNETES = ("1.29", "1.37")
# Types of other projects, made from what those tell a cluster's API server of them.
OTHER_TYPES: dict[str, Any] = {
    "ServiceMonitor": prometheus_operator.ServiceMonitor,
    "PrometheusRule": prometheus_operator.PrometheusRule,
    "ScaledObject": keda.ScaledObject,
}
LEAST: dict[str, Any] = {
    "nats": {"urls": ["nats://nats:4222"]},
    "secret": {"name": "kvferry"},
    "model": {"claim": "models", "servedName": "smollm2"},
}
FULL: dict[str, Any] = {
    "image": {"registry": "registry.example/team", "tag": "1.2", "pullSecrets": [{"name": "pull"}]},
    "nats": {
        "urls": ["tls://nats-0:4222", "tls://nats-1:4222"], "user": "kv",
        "tls": {"caSecret": "nats-ca", "clientSecret": "nats-client"},
    },
    "secret": {"name": "kvferry", "apiKeys": True},
    "model": {"claim": "models", "subPath": "smollm2", "servedName": "smollm2", "maxModelLen": 4096},
    "gateway": {
        "scaling": {"replicas": 3, "targets": {"ttft_s": 0.5}, "settings": {"max_backlog_bytes": 2097152}},
        "environment": {"KVFERRY_CORS_ORIGINS": "*"},
        "service": {"type": "LoadBalancer", "port": 80, "annotations": {"a": "b"}},
        "tls": {"secret": "https"},
        "otherModels": [{"name": "qwen/3", "claim": "models", "subPath": "qwen3"}, {"name": "m", "claim": "more"}],
    },
    "prefill": {
        "scaling": {"replicas": 2, "resources": {"cpus": 8, "memory": "64Gi"}, "settings": {"drain_grace": 60.0}},
        "gpus": 1, "imageSuffix": "-cuda", "nodeSelector": {"gpu": "yes"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
    },
    "decode": {
        "scaling": {"autoscale": {"max_replicas": 20, "kv_use": 0.5, "tokens_per_s": 500}},
        "environment": {"KVFERRY_TRANSPORT": "tcp"},
        "affinity": {"nodeAffinity": {}},
    },
    "autoscaling": {"enabled": True, "prometheusUrl": "http://prometheus:9090", "triggerAuthentication": "prometheus"},
    "monitoring": {"serviceMonitor": True, "prometheusRule": True, "labels": {"release": "prometheus"}},
    "tracing": {"otlpEndpoint": "http://otel:4318", "sampleRatio": 0.25},
}  # fmt: skip
VALUES = {"least": LEAST, "full": FULL}


@cache
def _rendered(name: str) -> list[dict[str, Any]]:
    return render(VALUES[name])


def render(values: dict[str, Any]) -> list[dict[str, Any]]:
    done = run_helm("template", "demo", str(CHART), "--namespace", "llm", values=values)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


@pytest.fixture(params=VALUES)
def manifests(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return _rendered(request.param)


def of(manifests: list[dict[str, Any]], kind: str, role: str = "") -> dict[str, Any]:
    """The one manifest of a kind, of one role where there are several."""
    (found,) = (m for m in manifests if m["kind"] == kind and m["metadata"]["name"].endswith(role))
    return found


def pod_of(manifests: list[dict[str, Any]], role: Role) -> dict[str, Any]:
    pod: dict[str, Any] = of(manifests, "Deployment" if role == "gateway" else "StatefulSet", role)["spec"]["template"]
    return pod


def scaling_of(manifests: list[dict[str, Any]], role: Role, folder: Path) -> Any:
    """What the pods of a role read, by the reader that they read it with."""
    file = folder / f"{role}.yaml"
    file.write_text(of(manifests, "ConfigMap", f"{role}-scaling")["data"]["scaling.yaml"])
    return SERVICES[role].read(file)


def leaves(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {where: leaf for key, part in value.items() for where, leaf in leaves(part, (*path, key)).items()}


# -- by the tools ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", VALUES)
def test_helm_finds_nothing_to_complain_about(values: str) -> None:
    done = run_helm("lint", "--strict", str(CHART), values=VALUES[values])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ERROR" not in done.stdout
    assert "WARNING" not in done.stdout


@pytest.mark.parametrize("version", KUBERNETES)
def test_every_manifest_fits_the_schemas_of_kubernetes(manifests: list[dict[str, Any]], version: str) -> None:
    own = [manifest for manifest in manifests if manifest["kind"] not in OTHER_TYPES]
    assert len(own) >= 12
    for manifest in own:
        kubernetes_validate.validate(manifest, version, strict=True)


def as_understood(manifest: dict[str, Any]) -> Any:
    """By the project whose object it is: without the fields that it does not know."""
    read = OTHER_TYPES[manifest["kind"]].model_validate(manifest)
    return read.model_dump(mode="json", by_alias=True, exclude_unset=True)


def test_the_objects_of_other_projects_are_understood_by_their_types() -> None:
    others = [manifest for manifest in _rendered("full") if manifest["kind"] in OTHER_TYPES]
    assert {manifest["kind"] for manifest in others} == OTHER_TYPES.keys()
    for manifest in others:
        assert as_understood(manifest) == manifest
    scaled = of(others, "ScaledObject", "decode")
    misspelt = {**scaled, "spec": {**scaled["spec"], "coolDownPeriod": 1}}
    assert as_understood(misspelt) == scaled, "negative control"
    with pytest.raises(ValueError, match="minReplicaCount"):
        as_understood({**scaled, "spec": {**scaled["spec"], "minReplicaCount": "few"}})


def test_a_field_that_kubernetes_does_not_know_would_be_found() -> None:
    manifest = of(_rendered("least"), "Deployment")
    wrong = {**manifest, "spec": {**manifest["spec"], "replica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES[0], strict=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"nats": {"urls": []}}, "urls"),
        ({"nats": {"urls": ["nats://user:hush@nats:4222"]}}, "urls"),  # a secret in a manifest
        ({"secret": {"name": ""}}, "name"),
        ({"model": {"claim": "", "servedName": "m"}}, "claim"),
        ({"model": {"claim": "c", "servedName": "a,b"}}, "servedName"),
        ({"gateway": {"otherModels": [{"name": "a=b", "claim": "c"}]}}, "otherModels"),
        ({"prefil": {}}, "prefil"),
        ({"decode": {"environment": {"KVFERRY_NATS_PASSWORD": "hush"}}}, "KVFERRY_NATS_PASSWORD"),
        ({"decode": {"environment": {"KVFERRY_DRAIN_GRACE": "120"}}}, "KVFERRY_DRAIN_GRACE"),
        ({"autoscaling": {"enabled": True}}, "prometheusUrl"),
        ({"autoscaling": {"enabled": True, "prometheusUrl": "http://p:9090"}}, "decode.scaling.autoscale.tokens_per_s"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    done = run_helm("template", "demo", str(CHART), values=LEAST | change)
    assert done.returncode != 0
    assert named in done.stderr


# -- against the services --------------------------------------------------------------------------------------------


def test_without_values_the_pods_read_what_the_services_files_say(tmp_path: Path) -> None:
    for role in ROLES:
        assert scaling_of(_rendered("least"), role, tmp_path) == SERVICES[role].read()


def test_values_are_laid_over_the_files(tmp_path: Path) -> None:
    for role in ROLES:
        read = leaves(scaling_of(_rendered("full"), role, tmp_path).model_dump())
        changed = leaves(FULL[role]["scaling"])
        assert read == leaves(SERVICES[role].read().model_dump()) | changed


@pytest.mark.parametrize("role", ROLES)
def test_replicas_and_resources_are_those_of_the_file(
    manifests: list[dict[str, Any]], role: Role, tmp_path: Path
) -> None:
    scaling, pod = scaling_of(manifests, role, tmp_path), pod_of(manifests, role)["spec"]
    resources = pod["containers"][0]["resources"]
    assert int(resources["requests"]["cpu"]) == scaling.resources.cpus
    assert resources["requests"]["memory"] == resources["limits"]["memory"] == scaling.resources.memory
    scaled_by_keda = any(m["kind"] == "ScaledObject" and m["metadata"]["name"].endswith(role) for m in manifests)
    owner = of(manifests, "Deployment" if role == "gateway" else "StatefulSet", role)["spec"]
    assert owner.get("replicas") == (None if scaled_by_keda else scaling.replicas)


@pytest.mark.parametrize("drain_grace", [None, 3.5, 600.9])
@pytest.mark.parametrize("role", ROLES)
def test_a_pod_is_not_killed_before_it_has_drained(role: Role, drain_grace: float | None, tmp_path: Path) -> None:
    """Kubernetes counts from before the preStop hook; after it SIGTERM drains."""
    settings = {} if drain_grace is None else {"drain_grace": drain_grace}
    manifests = render(LEAST | {role: {"scaling": {"settings": settings}}})
    scaling, pod = scaling_of(manifests, role, tmp_path), pod_of(manifests, role)["spec"]
    (container,) = pod["containers"]
    drain_s = scaling.settings["drain_grace"]
    assert drain_s == (SERVICES[role].read().settings["drain_grace"] if drain_grace is None else drain_grace)
    pre_stop_s = 0.0
    if role == "gateway":
        # So that load balancers have seen that it is not ready, before it refuses what they send.
        program, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
        assert program == "sleep"
        pre_stop_s = float(seconds)
        assert pre_stop_s > container["readinessProbe"]["periodSeconds"]
    else:
        assert "lifecycle" not in container, "nothing sends requests to its port"
    assert pod["terminationGracePeriodSeconds"] >= pre_stop_s + drain_s + SHUTDOWN_SLACK_S
    dockerfile = (ROOT / "services" / role / "Dockerfile").read_text()
    assert "STOPSIGNAL" not in dockerfile
    assert re.search(r"^CMD \[", dockerfile, re.MULTILINE), "a shell as process 1 would swallow SIGTERM"


@pytest.mark.parametrize("role", ROLES)
def test_a_service_starts_with_exactly_the_environment_of_its_pod(
    manifests: list[dict[str, Any]], role: Role, tmp_path: Path
) -> None:
    (container,) = pod_of(manifests, role)["spec"]["containers"]
    environ = {entry["name"]: entry.get("value", f"demo-kvferry-{role}-0") for entry in container["env"]}
    assert len(environ) == len(container["env"]), "a name is given twice"
    known = {f"KVFERRY_{field.upper()}" for field in SETTINGS[role].model_fields}
    assert {name for name in environ if name.removesuffix("_FILE") not in known and name not in known} == set()
    scaling_of(manifests, role, tmp_path)
    environ["KVFERRY_SCALING_FILE"] = str(tmp_path)
    for name in [name for name in environ if name.endswith("_FILE") and name not in known]:
        (tmp_path / name).write_text("ab" * 32 + "\n")
        environ[name] = str(tmp_path / name)
    settings = load_settings(SETTINGS[role], config_file=None, environ=environ, flags={})
    assert getattr(settings, "cluster") == "kvferry"  # noqa: B009 - of every service's settings
    if isinstance(settings, PrefillSettings | DecodeSettings):
        assert settings.data_key_bytes == b"\xab" * 32
        assert settings.advertise_host == "auto"
    if isinstance(settings, DecodeSettings) and manifests is _rendered("full"):
        assert settings.transport == "tcp"


def test_the_gateway_is_told_of_every_model_and_sees_its_directory_and_a_worker_of_its_own_alone() -> None:
    manifests = _rendered("full")
    told, directories = {}, {}
    for role in ROLES:
        (container,) = pod_of(manifests, role)["spec"]["containers"]
        environ = {entry["name"]: entry.get("value", "x") for entry in container["env"]}
        settings = load_settings(
            SETTINGS[role], config_file=None, environ={"KVFERRY_MODEL": environ["KVFERRY_MODEL"]}, flags={}
        )
        if isinstance(settings, GatewaySettings):
            told[role] = {source.name: source.where for source in settings.sources}
        elif isinstance(settings, PrefillSettings | DecodeSettings):
            told[role] = {settings.source.name: settings.source.where}
        mounts = [mount for mount in container["volumeMounts"] if mount["mountPath"].startswith("/models")]
        claims = {
            volume["name"]: volume["persistentVolumeClaim"]["claimName"]
            for volume in pod_of(manifests, role)["spec"]["volumes"]
            if "persistentVolumeClaim" in volume
        }
        directories[role] = {m["mountPath"]: (claims[m["name"]], m.get("subPath")) for m in mounts}
        assert {m["readOnly"] for m in mounts} == {True}
    one = {"smollm2": "/models/served"}
    assert told == {
        "gateway": {**one, "qwen/3": "/models/other-0", "m": "/models/other-1"}, "prefill": one, "decode": one,
    }  # fmt: skip
    served = {"/models/served": ("models", "smollm2")}
    assert directories["gateway"] == {
        **served, "/models/other-0": ("models", "qwen3"), "/models/other-1": ("more", None),
    }  # fmt: skip
    assert directories["prefill"] == directories["decode"] == served


def test_a_release_without_a_gateway_is_the_workers_of_one_more_model() -> None:
    manifests = render(LEAST | {"gateway": {"enabled": False}, "monitoring": {"serviceMonitor": True}})
    roles = {manifest["metadata"]["labels"]["app.kubernetes.io/component"] for manifest in manifests}
    assert roles == {"prefill", "decode", "workers"}
    assert not any(manifest["kind"] == "Deployment" for manifest in manifests)


@pytest.mark.parametrize("role", ROLES)
def test_probes_and_ports_are_those_of_the_image(manifests: list[dict[str, Any]], role: Role) -> None:
    (container,) = pod_of(manifests, role)["spec"]["containers"]
    (exposed,) = re.findall(r"^EXPOSE (.+)$", (ROOT / "services" / role / "Dockerfile").read_text(), re.MULTILINE)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert sorted(ports.values()) == sorted(map(int, exposed.split()))
    https = role == "gateway" and manifests is _rendered("full")
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"].get("scheme", "HTTP") == ("HTTPS" if https else "HTTP")
        assert container[probe]["httpGet"]["port"] in ports
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"


@pytest.mark.parametrize("role", ROLES)
def test_every_pod_is_confined_and_sees_only_the_secrets_that_it_needs(
    manifests: list[dict[str, Any]], role: Role
) -> None:
    pod = pod_of(manifests, role)["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    writable = {mount["name"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"tmp"}
    (secret,) = (volume["secret"] for volume in pod["volumes"] if volume["name"] == "secret")
    keys = {item["key"] for item in secret["items"]}
    assert ("data-key" in keys) == (role != "gateway")
    full = manifests is _rendered("full")
    assert ("api-keys" in keys) == (role == "gateway" and full)
    assert {key for key in keys if key.startswith("nats-")} == {"nats-password" if full else f"nats-password-{role}"}
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert ("https" in volumes) == (role == "gateway" and full)
    assert {"nats-ca", "nats-client"} <= volumes or not full
    assert not any(manifest["kind"] == "Secret" for manifest in manifests)


def test_selectors_find_their_pods_and_no_others(manifests: list[dict[str, Any]]) -> None:
    labels = {role: pod_of(manifests, role)["metadata"]["labels"] for role in ROLES}

    def selected(selector: dict[str, str]) -> set[str]:
        return {role for role, own in labels.items() if selector.items() <= own.items()}

    for manifest in manifests:
        role = manifest["metadata"]["labels"]["app.kubernetes.io/component"]
        if manifest["kind"] == "Service":
            assert selected(manifest["spec"]["selector"]) == {role}
        elif manifest["kind"] in ("Deployment", "StatefulSet", "PodDisruptionBudget"):
            assert selected(manifest["spec"]["selector"]["matchLabels"]) == {role}


def test_the_data_plane_is_open_to_workers_alone() -> None:
    policy = of(_rendered("least"), "NetworkPolicy")["spec"]
    open_to_all = [rule for rule in policy["ingress"] if "from" not in rule]
    assert [port["port"] for rule in open_to_all for port in rule["ports"]] == [8001]
    (inside,) = (rule for rule in policy["ingress"] if "from" in rule)
    (peer,) = inside["from"]
    assert peer == {"podSelector": policy["podSelector"]}


def test_names_stay_within_what_the_bus_allows() -> None:
    done = run_helm("template", "x" * 53, str(CHART), values=LEAST)
    names = [m["metadata"]["name"] for m in yaml.safe_load_all(done.stdout) if m and m["kind"] in ("Deployment",)]
    assert all(len(f"{name}-0123456789-abcde") <= 64 for name in names)
    assert names


# -- autoscaling and monitoring --------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", WORKERS)
def test_keda_scales_by_the_rules_of_the_file(role: Role, tmp_path: Path) -> None:
    manifests = _rendered("full")
    scaling = scaling_of(manifests, role, tmp_path)
    rules, targets = scaling.autoscale, scaling_of(manifests, "gateway", tmp_path).targets
    spec = of(manifests, "ScaledObject", role)["spec"]
    assert spec["scaleTargetRef"]["name"] == of(manifests, "StatefulSet", role)["metadata"]["name"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (rules.min_replicas, rules.max_replicas)
    behaviour = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behaviour["scaleUp"]["stabilizationWindowSeconds"] == rules.up_after_s
    assert behaviour["scaleDown"]["stabilizationWindowSeconds"] == rules.down_after_s
    thresholds = [float(trigger["metadata"]["threshold"]) for trigger in spec["triggers"]]
    if role == "prefill":
        assert thresholds == pytest.approx([rules.utilisation, rules.clear_s])
    else:
        assert thresholds == pytest.approx([rules.tokens_per_s, rules.itl_share * targets["itl_s"], rules.kv_use])


def test_keda_asks_for_metrics_that_exist_of_this_releases_pods_alone() -> None:
    documented = documented_metrics()
    queries = [
        (manifest["metadata"]["labels"]["app.kubernetes.io/component"], trigger["metadata"]["query"])
        for manifest in _rendered("full")
        if manifest["kind"] == "ScaledObject"
        for trigger in manifest["spec"]["triggers"]
    ]
    assert len(queries) == 5
    for role, query in queries:
        selections = re.findall(r"(kvferry_\w+)\{(.*?)\}", query)
        for name, labels in selections:
            assert re.sub(r"_(sum|count)$", "", name) in documented
            assert labels.startswith(f'namespace="llm",pod=~"demo-kvferry-{role}-[0-9]+"')
        assert query.count("{") == len(selections) == len(re.findall(r"kvferry_\w+", query))


def test_every_service_with_metrics_is_monitored_on_a_port_that_it_has() -> None:
    manifests = _rendered("full")
    monitors = [manifest for manifest in manifests if manifest["kind"] == "ServiceMonitor"]
    assert len(monitors) == len(ROLES)
    for monitor in monitors:
        role = monitor["metadata"]["labels"]["app.kubernetes.io/component"]
        service = of(manifests, "Service", role)
        assert monitor["metadata"]["labels"]["release"] == "prometheus"
        assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
