"""deploy/ holds together: its files parse, and every command, option, setting, extra, port and name in them exists."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.__main__ import COMMANDS, make_app

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
README = (DEPLOY / "README.md").read_text()
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
MANIFESTS = [
    document
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
]
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
TARGETS = dict(re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
SECRETS = ("PREFECT_API_AUTH_STRING", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "PREFECT_SERVER_API_AUTH_STRING")
SECRETS += ("PREFECT_SERVER_DATABASE_PASSWORD",)

# Read by Prefect's command line or by prefect-kubernetes, which is not installed here, and not by its settings.
OTHER_VARIABLES = {
    "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR",
    "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_NAME",
    "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_KEY",
    "PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES",
}


def env_file(name: str) -> dict[str, str]:
    """The settings of a file of NAME=value lines, as compose, systemd and kustomize read it alike."""
    lines = (DEPLOY / name).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def pods() -> list[dict[str, Any]]:
    """The pod templates of all manifests, and those of the work pools' jobs."""
    jobs = [json.loads(path.read_text())["job_configuration"]["job_manifest"] for path in pool_files()]
    return [m["spec"]["template"]["spec"] for m in [*MANIFESTS, *jobs] if "template" in m.get("spec", {})]


def pool_files() -> list[Path]:
    return sorted((DEPLOY / "kubernetes").glob("pool-*.json"))


def commands() -> list[list[str]]:
    """Every command line of prefect or pixelmill in deploy/, with its arguments."""
    found = [
        service["command"] for service in COMPOSE["services"].values() if service.get("command", [""])[0] == "prefect"
    ]
    found += [box["args"] for pod in pods() for box in pod["containers"] if box.get("args", [""])[0] == "prefect"]
    found += [json.loads(line) for line in re.findall(r"^CMD (\[\"prefect.*\])$", DOCKERFILE, re.MULTILINE)]
    for path in FILES:
        if path.suffix in (".service", ".sh", ".md"):
            lines = re.findall(
                r"^(?:ExecStart=/opt/pixelmill/bin/|\s*|.*if )(prefect .*)$", path.read_text(), re.MULTILINE
            )
            found += [shlex.split(line.split(" >")[0].replace("\\", ""), comments=True) for line in lines]
    assert len(found) > 12
    return found


# --- images


def test_each_target_starts_from_one_that_is_there():
    known = {"python:${PYTHON}-slim-bookworm"}
    for target, start in [
        (name, base) for base, name in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)
    ]:
        assert start in known
        known.add(target)
    assert {"predict", "gpu", "train", "kubernetes"} <= known
    copied = set(re.findall(r"--from=(\S+)", DOCKERFILE))
    assert copied == {"build-predict", "build-gpu", "build-train", "build-kubernetes"}


def test_images_install_extras_that_exist():
    named = {extra for group in re.findall(r"'\.\[([\w,]+)\]'", DOCKERFILE) for extra in group.split(",")}
    assert named
    assert named <= EXTRAS.keys()


def test_only_training_has_torch():
    """What each stage installs, followed to the packages."""
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    with_torch = set()
    for stage in stages[1:]:
        name = stage.splitlines()[0].split(" AS ")[1]
        extras = {extra for group in re.findall(r"'\.\[([\w,]+)\]'", stage) for extra in group.split(",")}
        if any(requirement.startswith("torch") for extra in extras for requirement in EXTRAS[extra]):
            with_torch.add(name)
    assert with_torch == {"build-train"}


def test_every_copied_path_is_there_and_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for paths in re.findall(r"^COPY (?!--)(.*) \S+$", DOCKERFILE, re.MULTILINE):
        for path in paths.split():
            assert (ROOT / path).exists()
            assert {f"!{path}", f"!{path}/**"} & set(ignored)
    assert "deploy/secrets.env" in ignored


def test_no_image_runs_as_root():
    assert re.search(r"^USER 10001:10001$", DOCKERFILE.partition(" AS base\n")[2], re.MULTILINE)
    assert "USER root" not in DOCKERFILE


def test_every_image_that_is_used_is_a_target():
    targets = set(re.findall(r" AS (\S+)$", DOCKERFILE, re.MULTILINE))
    used = {service["image"] for service in COMPOSE["services"].values()}
    used |= {box["image"] for pod in pods() for box in pod["containers"]}
    used |= {json.loads(path.read_text())["variables"]["properties"]["image"]["default"] for path in pool_files()}
    ours = {image.partition(":")[2] for image in used if image.startswith("pixelmill:")}
    assert ours
    assert ours <= targets
    for service in COMPOSE["services"].values():
        if "build" in service:
            assert service["image"] == f"pixelmill:{service['build']['target']}"


# --- settings


def named_variables() -> set[str]:
    named = set(env_file("server.env")) | set(env_file("worker.env")) | set(env_file("secrets.env.example"))
    for path in FILES:
        named |= set(re.findall(r"\bPREFECT_[A-Z_]+[A-Z]\b(?!…)", path.read_text()))
    return {name for name in named if name.startswith("PREFECT_")}


def test_every_setting_of_prefect_exists():
    from prefect import settings

    assert not hasattr(settings, "PREFECT_SERVER_API_PROT")
    unknown = [name for name in named_variables() - OTHER_VARIABLES if not hasattr(settings, name)]
    assert not unknown


@pytest.mark.parametrize("name", ["server.env", "worker.env"])
def test_prefect_accepts_the_settings(name, tmp_path):
    """In a process of its own: there each value is parsed and validated."""
    values = env_file(name)
    code = (
        "from prefect.settings import get_current_settings\n"
        "print(*get_current_settings().to_environment_variables(exclude_unset=True))"
    )
    environment = {**values, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {name for name in values if name.startswith("PREFECT_")} <= set(done.stdout.split())


def test_the_lease_storage_is_a_module():
    module = env_file("server.env")["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"]
    __import__(module)


def test_a_silent_run_is_given_three_heartbeats():
    silent, _ = yaml.safe_load((DEPLOY / "automations.yaml").read_text())["automations"]
    assert silent["trigger"]["within"] == 3 * int(env_file("worker.env")["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])


def test_prefect_accepts_the_automations():
    from prefect.events.schemas.automations import AutomationCore

    from flows.predict import predict

    silent, rerun = [
        AutomationCore.model_validate(each)
        for each in yaml.safe_load((DEPLOY / "automations.yaml").read_text())["automations"]
    ]
    assert silent.actions[0].type == "change-flow-run-state"
    assert rerun.actions[0].type == "run-deployment"
    assert rerun.trigger.match_related.root["prefect.resource.name"] == predict.name
    setup = (DEPLOY / "setup.sh").read_text()
    assert f"'{silent.name}' '{rerun.name}'" in setup


# --- commands


def test_every_option_of_prefect_exists():
    from prefect.cli._app import _app as app

    for line in commands():
        arguments = [argument for argument in line[1:] if argument != "--no-prompt"]
        arguments = [re.sub(r"^\$\w+$|^.*/\$?\w.*\$pool.*$", "x", argument) for argument in arguments]
        app.parse_args(arguments, exit_on_error=False, print_error=False)


def test_every_command_of_pixelmill_parses():
    blocks = re.findall(r"^```\w*\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    shown = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("pixelmill ")]
    assert {arguments[0] for arguments in shown} >= {"doctor", "vacuum", "verify"}
    for arguments in shown:
        assert arguments[0] in COMMANDS
        make_app().parse_args(arguments, exit_on_error=False, print_error=False)


def test_the_scripts_are_shell():
    subprocess.run(["sh", "-n", str(DEPLOY / "setup.sh")], check=True)
    subprocess.run(["sh", "-n", "-c", COMPOSE["services"]["setup"]["command"][-1]], check=True)


# --- ports, names, secrets


def test_ports_agree():
    port = env_file("server.env")["PREFECT_SERVER_API_PORT"]
    service = next(m for m in MANIFESTS if m["kind"] == "Service" and m["metadata"]["name"] == "pixelmill-server")
    assert str(service["spec"]["ports"][0]["port"]) == port
    assert COMPOSE["services"]["server"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    urls = [url for path in FILES for url in re.findall(r"https?://[\w.-]+:(\d+)/api", path.read_text())]
    assert set(urls) == {port}
    probes = [
        probe["httpGet"]["port"]
        for pod in pods()
        for box in pod["containers"]
        for name, probe in box.items()
        if name.endswith("Probe") and "httpGet" in probe
    ]
    named = {p["name"] for pod in pods() for box in pod["containers"] for p in box.get("ports", ())}
    assert set(probes) <= named


def test_kustomization_names_every_manifest():
    kustomization = yaml.safe_load((DEPLOY / "kustomization.yaml").read_text())
    assert sorted(kustomization["resources"]) == sorted(
        str(path.relative_to(DEPLOY)) for path in (DEPLOY / "kubernetes").glob("*.yaml")
    )
    for generator in kustomization["configMapGenerator"]:
        for name in generator["envs"]:
            assert env_file(name)


def test_what_manifests_refer_to_is_there():
    """Service accounts, config maps, secrets, claims and selectors."""
    kustomization = yaml.safe_load((DEPLOY / "kustomization.yaml").read_text())
    by_kind = {(m["kind"], m["metadata"]["name"]) for m in MANIFESTS}
    config_maps = {generator["name"] for generator in kustomization["configMapGenerator"]}
    accounts = {pod["serviceAccountName"] for pod in pods() if "{{" not in pod.get("serviceAccountName", "{{")}
    accounts |= {
        json.loads(path.read_text())["variables"]["properties"]["service_account_name"]["default"]
        for path in pool_files()
    }
    assert {("ServiceAccount", name) for name in accounts} <= by_kind
    for pod in pods():
        for box in pod["containers"]:
            for source in box.get("envFrom", ()):
                assert source.get("configMapRef", {"name": "pixelmill-server"})["name"] in config_maps
                assert source.get("secretRef", {"name": "pixelmill-job"})["name"] in (
                    "pixelmill-server",
                    "pixelmill-job",
                )
        for volume in pod.get("volumes", ()):
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in by_kind
    labels = [
        m["spec"]["template"]["metadata"]["labels"] for m in MANIFESTS if m["kind"] in ("Deployment", "StatefulSet")
    ]
    for manifest in MANIFESTS:
        if manifest["kind"] in ("Service", "PodDisruptionBudget"):
            selector = manifest["spec"]["selector"]
            selector = selector.get("matchLabels", selector)
            assert any(selector.items() <= each.items() for each in labels)


def test_no_pod_and_no_container_is_privileged():
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        for box in pod["containers"]:
            assert box["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert box["resources"]["limits"]["memory"]


def test_variables_of_the_pools_are_all_used():
    for path in pool_files():
        template = json.loads(path.read_text())
        used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
        assert used == set(template["variables"]["properties"])
    gpu = json.loads((DEPLOY / "kubernetes" / "pool-gpu.json").read_text())
    [box] = gpu["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]["containers"]
    assert box["resources"]["limits"]["nvidia.com/gpu"] == "{{ gpus }}"


def test_a_worker_of_systemd_has_one_gpu_and_one_run():
    unit = (DEPLOY / "systemd" / "pixelmill-worker@.service").read_text()
    assert "Environment=CUDA_VISIBLE_DEVICES=%i\n" in unit
    assert "--limit 1 " in unit


def test_the_model_of_the_readme_is_the_one_that_is_deployed():
    deployments = yaml.safe_load((DEPLOY / "prefect.yaml").read_text())["deployments"]
    [model] = {d["parameters"]["model"] for d in deployments if d["entrypoint"] == "flows.predict.predict"}
    assert [f"{name}@production" for name in re.findall(r"^pixelmill promote (\S+)$", README, re.MULTILINE)] == [model]


@pytest.mark.parametrize("place", ["systemd", "compose"])
def test_every_pool_of_the_deployments_has_a_worker(place):
    deployments = yaml.safe_load((DEPLOY / "prefect.yaml").read_text())["deployments"]
    units = "".join(path.read_text() for path in (DEPLOY / "systemd").glob("*.service"))
    services = [" ".join(service.get("command", [])) for service in COMPOSE["services"].values()]
    text = units if place == "systemd" else "\n".join(services)
    pools = {deployment["work_pool"]["name"] for deployment in deployments}
    assert pools == set(re.findall(r"--pool (\w+)", text))


def test_setup_names_the_variable_that_is_not_set():
    """Those that prefect.yaml reads; without one, Prefect would deploy an empty text."""
    named = set(re.findall(r"\{\{ \$(\w+) \}\}", (DEPLOY / "prefect.yaml").read_text())) | {"PREFECT_API_URL"}
    for missing in named:
        given = dict.fromkeys(named - {missing}, "x") | {"PATH": "/nowhere"}
        done = subprocess.run(["/bin/sh", str(DEPLOY / "setup.sh")], env=given, capture_output=True, text=True)
        assert f"{missing}: is not set" in done.stderr
        assert done.returncode


def test_secrets_have_no_value_anywhere():
    example = env_file("secrets.env.example")
    assert set(example) == set(SECRETS)
    assert set(example.values()) == {""}
    for path in FILES:
        for name in SECRETS:
            for value in re.findall(rf"\b{name}(?:=|: )(\S+)", path.read_text()):
                assert value.startswith(("${", "…")), f"{path}: {name} has a value"
    assert "/deploy/secrets.env\n" in (ROOT / ".gitignore").read_text()


def test_links_of_the_readme():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (DEPLOY / target).exists(), target
    for name in re.findall(r"`((?:kubernetes|systemd)/[\w@.*-]+)`", README):
        assert list(DEPLOY.glob(name)), name
