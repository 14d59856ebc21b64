"""What is shipped for containers: every flag, path, port and variable in it exists, and the service runs as it says."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from medclip_lab.cli import build_parser
from medclip_lab.serving import Settings, create_app, keys
from medclip_lab.serving.guard import OPEN
from medclip_lab.serving.run import OPTIONS

from .conftest import png

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "configs" / "deploy"
USER = "10001"


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", (DEPLOY / "Dockerfile").read_text())
    lines = [line.partition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in lines]


def stage(name: str) -> list[tuple[str, str]]:
    """The instructions of a stage and of those it is built from."""
    found: list[tuple[str, str]] = []
    base = ""
    for word, rest in instructions():
        if word == "FROM":
            base, current = rest.split(" AS ")
            found = found if current != name else []
        if word != "ARG" and current == name:
            found.append((word, rest))
    base = next(rest for word, rest in found if word == "FROM").split(" AS ")[0]
    return found if base.startswith("$") else [*stage(base), *found]


def documents(name: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all((DEPLOY / name).read_text()) if document]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return documents("compose.yaml")[0]


@pytest.fixture(scope="module")
def deployment() -> dict[str, Any]:
    return documents("kubernetes/deployment.yaml")[0]


def container(deployment: dict[str, Any]) -> dict[str, Any]:
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    return dict(found)


@pytest.fixture(scope="module")
def commands(compose: dict[str, Any], deployment: dict[str, Any]) -> dict[str, list[str]]:
    """By where it stands, what the entry point is given."""
    return {
        "dockerfile": json.loads(next(rest for word, rest in stage("cpu") if word == "CMD")),
        "compose": compose["services"]["service"]["command"],
        "kubernetes": container(deployment)["args"],
    }


def paths_of(command: list[str]) -> list[str]:
    args = build_parser().parse_args(command)
    return [str(path) for path in (args.bundle, args.keys, *args.index)]


def test_every_command_is_one_of_the_service(commands: dict[str, list[str]]) -> None:
    for command in commands.values():
        args = build_parser().parse_args(command)  # leaves with an error at an unknown flag
        assert (args.verb, args.host, args.port) == ("serve", "0.0.0.0", 8000)
        assert args.keys is not None, "beyond this machine nobody is served without a key"
        assert Settings(bundle=args.bundle, host=args.host, keys=args.keys).host == "0.0.0.0"


def test_every_path_is_mounted(
    commands: dict[str, list[str]], compose: dict[str, Any], deployment: dict[str, Any]
) -> None:
    service = compose["services"]["service"]
    mounted = [volume.split(":")[-2] for volume in service["volumes"]]
    mounted += [f"/run/secrets/{name}" for name in service["secrets"]]
    assert set(compose["services"]["prometheus"]["secrets"]) | set(service["secrets"]) == set(compose["secrets"])
    mounts = container(deployment)["volumeMounts"]
    for command, places in (
        (commands["compose"], mounted),
        (commands["kubernetes"], [mount["mountPath"] for mount in mounts]),
    ):
        for path in paths_of(command):
            assert any(path == place or path.startswith(f"{place}/") for place in places), path
    volumes = {volume["name"] for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in mounts} == volumes
    assert all(mount.get("readOnly") for mount in mounts if mount["name"] != "tmp")
    assert all(volume.endswith(":ro") for volume in service["volumes"])


def test_probes_ask_what_needs_no_key(deployment: dict[str, Any], toy_settings: Settings) -> None:
    routes = set(create_app(toy_settings).openapi()["paths"])
    found = container(deployment)
    ports = {port["name"]: port["containerPort"] for port in found["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = found[probe]["httpGet"]
        assert asked["path"] in routes & set(OPEN)
        assert ports[asked["port"]] == 8000
    assert found["livenessProbe"]["httpGet"]["path"] == "/healthz", "a pod that is only busy is not killed"
    check = next(rest for word, rest in stage("cpu") if word == "HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    (url,) = re.findall(r"http://127\.0\.0\.1:8000(/\w+)", command[-1])
    assert url in routes & set(OPEN)
    compile(command[-1], "healthcheck", "exec")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_has_no_root_and_no_build_tools(target: str) -> None:
    found = stage(target)
    (user,) = [rest for word, rest in found if word == "USER"]
    assert user == f"{USER}:{USER}"
    text = " ".join(rest for _, rest in found)
    assert not re.search(r"apt-get|build-essential|gcc|git ", text)
    assert "pip uninstall --yes" in text
    assert [rest.split()[0] for word, rest in found if word == "COPY"] == [f"--from=build-{target}"]
    for name in ("HF_HUB_OFFLINE=1", "TRANSFORMERS_OFFLINE=1"):
        assert name in text
    assert json.loads(next(rest for word, rest in found if word == "ENTRYPOINT")) == ["medclip-lab"]


def test_extras_of_the_images_exist() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"'\.\[([\w,]+)\]'", (DEPLOY / "Dockerfile").read_text())
    assert len(named) == 2
    for names in named:
        assert {"serve", "dicom", "cpu"} <= set(names.split(",")) <= set(extras)


def test_what_is_copied_passes_the_ignore_file_and_nothing_else() -> None:
    allowed = {
        line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = {
        name
        for word, rest in stage("build")
        if word == "COPY"
        for name in rest.split()[:-1]
        if not name.startswith("-")
    }
    assert copied == allowed
    assert all((ROOT / name).exists() for name in allowed)


def test_compose_takes_away_what_is_not_needed(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert "privileged" not in service
    assert compose["services"]["service"]["build"]["target"] in ("cpu", "cuda")
    assert (DEPLOY / compose["services"]["service"]["build"]["context"] / "pyproject.toml").exists()
    (target,) = (
        target
        for job in documents("prometheus.yaml")[0]["scrape_configs"]
        for each in job["static_configs"]
        for target in each["targets"]
    )
    assert target.split(":") == ["service", "8000"]


def test_prometheus_gets_the_figures_by_the_key_that_opens_nothing_else(toy_settings: Settings, tmp_path: Path) -> None:
    from dataclasses import replace

    from starlette.testclient import TestClient

    (job,) = documents("prometheus.yaml")[0]["scrape_configs"]
    key = keys.new_key(tmp_path / "keys.json", ["text"])
    with TestClient(create_app(replace(toy_settings, keys=tmp_path / "keys.json"))) as client:
        headers = {"authorization": f"{job['authorization']['type']} {key}"}
        assert "medclip_requests_total" in client.get(job["metrics_path"], headers=headers).text
        assert client.get(job["metrics_path"]).status_code == 401
        for path in ("classify", "embed", "search", "explain", "zero-shot-image-classification"):
            assert client.post(f"/v1/{path}", json={}, headers=headers).status_code == 403, path


def test_pods_take_away_what_is_not_needed(deployment: dict[str, Any]) -> None:
    pod, found = deployment["spec"]["template"]["spec"], container(deployment)
    assert pod["automountServiceAccountToken"] is False
    told = pod["securityContext"]
    assert (told["runAsNonRoot"], told["runAsUser"], told["fsGroup"]) == (True, int(USER), int(USER))
    assert told["seccompProfile"] == {"type": "RuntimeDefault"}
    assert found["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert set(found["resources"]["limits"]) == {"cpu", "memory"}
    secret = next(volume["secret"] for volume in pod["volumes"] if "secret" in volume)
    assert secret["secretName"] == documents("kubernetes/secret.example.yaml")[0]["metadata"]["name"]
    assert secret["defaultMode"] & 0o007 == 0
    stopping = OPTIONS["timeout_graceful_shutdown"] + found["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > stopping


def test_objects_find_each_other(deployment: dict[str, Any]) -> None:
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    (budget,) = documents("kubernetes/deployment.yaml")[1:]
    service, policy = documents("kubernetes/network.yaml")
    assert deployment["spec"]["selector"]["matchLabels"] == labels == service["spec"]["selector"]
    assert policy["spec"]["podSelector"]["matchLabels"] == budget["spec"]["selector"]["matchLabels"] == labels
    assert policy["spec"]["egress"] == []
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    assert {port["targetPort"] for port in service["spec"]["ports"]} == {"http"}
    kept = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())
    assert all((DEPLOY / "kubernetes" / name).exists() for name in kept["resources"])
    assert "secret.example.yaml" not in kept["resources"]
    assert kept["images"][0]["name"] == container(deployment)["image"]


def test_the_secret_of_the_example_is_a_file_of_keys(tmp_path: Path) -> None:
    (secret,) = documents("kubernetes/secret.example.yaml")
    (tmp_path / "keys.json").write_text(secret["stringData"]["keys.json"])
    assert keys.Keys(tmp_path / "keys.json").caller("mcl_00000000_" + "A" * 43) is None


def test_the_commands_of_the_page_exist() -> None:
    text = (ROOT / "docs" / "serving.md").read_text()
    blocks = re.sub(r"\\\n\s*", " ", "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)))
    commands = [line.strip() for line in blocks.splitlines() if line.strip().startswith("medclip-lab ")]
    assert len(commands) > 8
    for command in commands:
        build_parser().parse_args(shlex.split(command.partition(" >")[0], comments=True)[1:])
    for name in re.findall(r"\(\.\./(configs/[^)]+)\)", text):
        assert (ROOT / name).exists(), name


def test_the_proxy_lets_through_what_the_service_takes() -> None:
    text = (DEPLOY / "nginx.conf").read_text()
    args = build_parser().parse_args(["serve", "bundle"])
    assert f"client_max_body_size {args.max_body_mib}m;" in text
    assert f"proxy_pass http://{args.host}:{args.port};" in text
    (waits,) = re.findall(r"proxy_read_timeout (\d+)s;", text)
    assert int(waits) > args.deadline
    for told in ("proxy_request_buffering off;", "proxy_max_temp_file_size 0;", "access_log off;"):
        assert told in text


@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl")
def test_kustomize_builds_it(tmp_path: Path) -> None:
    home = {**os.environ, "HOME": str(tmp_path)}
    built = subprocess.run(
        ["kubectl", "kustomize", str(DEPLOY / "kubernetes")], capture_output=True, text=True, env=home, timeout=120
    )
    assert built.returncode == 0, built.stderr
    found = {document["kind"]: document for document in yaml.safe_load_all(built.stdout)}
    assert set(found) == {"Namespace", "Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget"}
    assert all(found[kind]["metadata"]["namespace"] == "medclip" for kind in set(found) - {"Namespace"})
    assert found["Deployment"]["spec"]["template"]["spec"]["containers"][0]["image"].startswith("registry.example/")


NAMESPACES = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"]


def boxed() -> bool:
    """Whether this process may make what a container is made of."""
    if Path(sys.executable).is_relative_to(tempfile.gettempdir()):  # which is another folder in the box
        return False
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "nsenter", "setpriv", "ip"))):
        return False
    return (
        subprocess.run(["unshare", "--mount", "--net", "--pid", "--fork", "true"], capture_output=True).returncode == 0
    )


@pytest.fixture
def box(toy_settings: Settings, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The service in a box, and a key."""
    share = tmp_path / "share"
    shutil.copytree(toy_settings.bundle, share / "models" / "bundle")
    shutil.copytree(toy_settings.indexes[0], share / "models" / "index")
    key = keys.new_key(share / "keys.json", ["classify", "search"])
    for path in (share, *share.rglob("*")):
        os.chown(path, int(USER), int(USER))
    command = [
        "unshare",
        "--mount",
        "--net",
        "--pid",
        "--fork",
        "--kill-child",
        "bash",
        str(Path(__file__).with_name("box.sh")),
    ]
    command += [str(share), sys.base_prefix, os.environ["PATH"], f"PYTHONPATH={ROOT}", "PYTHONDONTWRITEBYTECODE=1"]
    command += ["HF_HUB_OFFLINE=1", "OMP_NUM_THREADS=1", sys.executable, "-m", "medclip_lab", "serve"]
    command += ["/srv/models/bundle", "--index", "/srv/models/index", "--keys", "/srv/keys.json", "--host", "0.0.0.0"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd="/", stdout=log, stderr=subprocess.STDOUT)
    yield process, key
    process.kill()
    process.wait()


ASK = """
import sys, urllib.request as u
headers = {"Authorization": "Bearer " + sys.argv[2], "Content-Type": sys.argv[3]} if len(sys.argv) > 2 else {}
data = sys.stdin.buffer.read() if headers else None
print(u.urlopen(u.Request("http://127.0.0.1:8000" + sys.argv[1], data, headers), timeout=30).read().decode())
"""


@pytest.mark.skipif(not boxed(), reason="needs root, namespaces and an interpreter that is not in the temporary folder")
def test_it_runs_as_in_the_container_and_writes_nothing(
    box: tuple[subprocess.Popen[bytes], str], tmp_path: Path
) -> None:
    process, key = box
    service = 0

    def ask(*arguments: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        inside = ["nsenter", "--target", str(service), "--net", sys.executable, "-c", ASK, *arguments]
        return subprocess.run(inside, input=data, capture_output=True)

    for _ in range(600):
        assert process.poll() is None, (tmp_path / "log").read_text()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        service = int(children[0]) if children else 0
        if service and ask("/readyz").returncode == 0:
            break
        time.sleep(0.2)
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{service}/status").read_text().splitlines() if ":\t" in line
    )
    assert set(status["Uid"].split()) == {USER}
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    mounts = [line.split() for line in Path(f"/proc/{service}/mounts").read_text().splitlines()]
    writable = [
        place
        for _, place, _, options, *_ in mounts
        if "rw" in options.split(",") and not place.startswith(("/proc", "/sys", "/dev"))
    ]
    assert writable == ["/tmp"]
    assert "HOME" not in Path(f"/proc/{service}/environ").read_text()
    answer = ask("/v1/classify", key, "image/png", data=png(size=(900, 900)))
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["results"][0]["labels"]
    found = ask("/v1/search", key, "application/json", data=b'{"text": "The heart is enlarged.", "k": 2}')
    assert len(json.loads(found.stdout)["hits"]) == 2, found.stderr
    written = [path for path in Path(f"/proc/{service}/root/tmp").rglob("*") if not path.is_dir()]
    assert not written
    os.kill(service, 15)
    assert process.wait(timeout=30) == 0, "it stops when it is told to"
