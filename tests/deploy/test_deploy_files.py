"""What is deployed, read as files: what they name exists, nothing is open, nothing runs as root, nothing is secret.

Where a Docker engine answers, `deploy/verify.sh` is run as well.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from lensrack import wire
from server.keys.keys_file import KeysFile
from server.settings import Settings
from tests.conftest import free_port

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
TEXTS = [
    ROOT / "Dockerfile",
    ROOT / "compose.yaml",
    *sorted(path for path in DEPLOY.rglob("*") if path.is_file() and "__pycache__" not in path.parts),
]
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
OURS = [name for name, service in SERVICES.items() if "IMAGE_NAME" in service["image"]]


def without_values(text: str) -> str:
    """As Compose reads it where neither `.env` nor the environment says anything: defaults only."""
    return re.sub(r"\$\{(\w+)(?::([-+])([^}]*))?\}", lambda found: found[3] if found[2] == "-" else "", text)


# --- the compose file -------------------------------------------------------------------------------------------------


def test_compose_takes_it() -> None:
    """By Compose itself, where it is installed; with the names that `.env` may change left as they are."""
    version = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False) if docker() else None
    tool = ["docker", "compose"] if version and version.returncode == 0 else ["docker-compose"]
    if shutil.which(tool[0]) is None:
        pytest.skip("Docker Compose is not installed")
    own = {key: value for key, value in os.environ.items() if not key.startswith("LENSRACK_")}
    for profile in ([], ["--profile", "gpu"]):
        command = [*tool, "-f", str(DEPLOY / "compose.yaml"), *profile, "config", "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, env=own, check=False)
        assert done.returncode == 0, done.stderr


def docker() -> str | None:
    return shutil.which("docker")


def test_the_production_shape_is_there() -> None:
    always = {name for name, service in SERVICES.items() if "profiles" not in service}
    assert always == {"secrets", "redis", "server", "worker", "proxy", "prometheus", "grafana"}
    assert {name for name in SERVICES if name not in always} == {"server-gpu", "worker-gpu"}
    for name in ("server-gpu", "worker-gpu"):
        (device,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert yaml.safe_load((ROOT / "compose.yaml").read_text())["include"] == [{"path": "deploy/compose.yaml"}]


def ports() -> Iterator[tuple[str, str]]:
    return ((name, port) for name, service in SERVICES.items() for port in service.get("ports", []))


def test_nothing_is_published_beyond_loopback() -> None:
    assert {name for name, _ in ports()} == {"proxy", "prometheus", "grafana"}
    for name, port in ports():
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", without_values(port)), f"{name}: {port}"
    assert not any(service.get("network_mode") == "host" for service in SERVICES.values())


def test_redis_is_reached_by_those_who_need_it_only() -> None:
    assert COMPOSE["networks"]["stores"] == {"internal": True}
    inside = {name for name, service in SERVICES.items() if "stores" in service.get("networks", [])}
    assert inside == {"redis", "server", "worker", "server-gpu", "worker-gpu"}
    assert SERVICES["redis"]["networks"] == ["stores"]


def test_redis_keeps_what_it_accepted_and_wants_a_password() -> None:
    told = " ".join(SERVICES["redis"]["command"][0].split())
    for part in ("--appendonly yes", "--appendfsync always", "--maxmemory-policy noeviction", "requirepass $$(cat "):
        assert part in told
    assert any(volume.startswith("redis:/data") for volume in SERVICES["redis"]["volumes"])


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_hardened(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged")
    assert service["restart"] == ("no" if name == "secrets" else "unless-stopped")
    assert service.get("user", "") not in ("root", "0", "0:0")


@pytest.mark.parametrize("name", SERVICES)
def test_everything_mounted_exists(name: str) -> None:
    """Files and folders of the checkout are there, and read-only; named volumes are declared."""
    for volume in map(without_values, SERVICES[name].get("volumes", [])):
        source, _, *mode = volume.split(":")
        if source.startswith((".", "/dev/null")):  # the latter in place of a file that `.env` may name
            assert (DEPLOY / source).exists(), f"{name} mounts {source}"
            assert mode == ["ro"], volume
        else:
            assert source in COMPOSE["volumes"], f"{name} mounts {source}"


def test_images_are_pinned() -> None:
    """By a tag that names a version; never `latest`."""
    images = [service["image"] for service in SERVICES.values() if "IMAGE_NAME" not in service["image"]]
    stages = re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE)
    bases = [name for name in re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) if name not in stages]
    for image in images + bases:
        assert re.fullmatch(r"[a-z0-9./-]+:v?\d+\.\d+[a-z0-9.-]*", image), image


def test_the_services_that_share_share_all_of_it() -> None:
    """Datasets, checkpoints and caches in one volume; bundles and jobs in one Redis."""
    for name in OURS:
        if name == "secrets":
            continue
        settings = SERVICES[name]["environment"]
        assert settings["LENSRACK_STORE"] == settings["LENSRACK_JOBS"] == "redis://redis:6379/0"
        assert settings["LENSRACK_WORKERS"] == "0"
        assert "data:/data" in SERVICES[name]["volumes"]
        assert SERVICES[name].get("command", ["serve"]) == (["work"] if "worker" in name else ["serve"])


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_setting_named_exists(path: Path) -> None:
    """The names of metrics are written in another way, and the SDK has two variables of its own."""
    known = {f"LENSRACK_{name.upper()}" for name in Settings.model_fields} | {"LENSRACK_URL", "LENSRACK_API_KEY"}
    named = set(re.findall(r"\bLENSRACK_[A-Z_]*[A-Z]\b", path.read_text()))
    assert named <= known, named - known


def unless_told(value: str) -> str:
    """What Compose makes of `${NAME:-default}` where the shell says nothing."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)


def test_settings_take_what_the_files_give() -> None:
    """Every value that is written down is one that the setting allows."""
    given = dict(re.findall(r"^# (LENSRACK_\w+)=(.*)$", (DEPLOY / ".env.example").read_text(), re.MULTILINE))
    assert len(given) > 5
    for name in OURS:
        own = {key: value for key, value in SERVICES[name].get("environment", {}).items() if value is not None}
        values = {key.removeprefix("LENSRACK_").lower(): unless_told(value) for key, value in (given | own).items()}
        settings = Settings(**values)
        assert settings.workers in (0, 1)
    passed_on = set(SERVICES["server"]["environment"])
    assert set(given) <= passed_on, "what .env may set is passed on"


def test_variables_of_the_compose_file_are_told_of() -> None:
    told = (DEPLOY / ".env.example").read_text()
    for variable in set(re.findall(r"(?<!\$)\$\{(\w+)", (DEPLOY / "compose.yaml").read_text())):
        assert f"# {variable}=" in told, variable


# --- the image --------------------------------------------------------------------------------------------------------


def test_the_image_is_not_roots() -> None:
    last = DOCKERFILE.split("\nFROM ")[-1]
    (user,) = re.findall(r"^USER (\S+)$", last, re.MULTILINE)
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user), "by number, so that who checks for root can tell"
    assert last.index("\nUSER ") > last.rindex("\nRUN "), "nothing is done as root after it"
    assert "HEALTHCHECK" in last
    assert "/healthz" in last
    assert 'ENTRYPOINT ["python", "-m", "server"]' in last
    assert 'CMD ["serve"]' in last


def test_every_stage_that_installs_knows_where_packages_come_from() -> None:
    """An ARG ends with its stage, and a stage that has none of them would ask the public index."""
    for stage in DOCKERFILE.split("\nFROM ")[1:]:
        if "/bin/pip " in stage:
            named = set(re.findall(r"^ARG (PIP_\w+)$", stage, re.MULTILINE))
            assert named == {"PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"}


def test_no_index_is_named_where_pips_own_is_meant() -> None:
    """Naming it would overrule a machine's pip.conf. Only torch without CUDA has an index of its own."""
    installing = [line for line in DOCKERFILE.splitlines() if not line.startswith("#")]
    assert re.findall(r"https?://(?!127)[^\s\"}]+", "\n".join(installing)) == ["https://download.pytorch.org/whl/cpu"]
    assert 'install ${index:+--index-url "$index"}' in DOCKERFILE, "an empty one is none"
    for path in ("Makefile", "compose.yaml", "deploy/compose.yaml", "deploy/release.sh", "docs/howto-backbone.md"):
        assert "pypi.org" not in (ROOT / path).read_text(), path


def test_the_image_takes_torch_as_the_project_does() -> None:
    """It is installed before pyproject.toml is there, so that its layer outlives a change of that file."""
    server = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["server"]
    asked = [each for each in server if each.startswith("torch")]
    assert len(asked) == 2
    assert all(f"'{each}'" in DOCKERFILE for each in asked)


def test_the_image_lists_what_it_holds_and_not_what_lists_it() -> None:
    """verify.sh reads the list in the image; here only that it gets there, and its tool does not."""
    *_, inventory, last = DOCKERFILE.split("\nFROM ")
    assert "cyclonedx-bom" in inventory
    assert "cyclonedx-bom" not in last
    (place,) = re.findall(r'lensrack\.sbom="([^"]+)"', last)
    assert re.search(rf"^COPY --from=inventory \S+ {re.escape(place)}$", last, re.MULTILINE)
    assert not re.search(r"^COPY --from=inventory (?!/build/sbom)", last, re.MULTILINE)


def test_the_image_is_open_to_nobody_by_itself() -> None:
    """The address is the container's; that it may be open is said by whoever publishes it."""
    assert "LENSRACK_HOST=0.0.0.0" in DOCKERFILE
    assert not re.search(r"^(ENV|ARG)?\s*LENSRACK_ALLOW_OPEN", DOCKERFILE, re.MULTILINE)
    assert not any("LENSRACK_ALLOW_OPEN" in service.get("environment", {}) for service in SERVICES.values())


@pytest.mark.parametrize("name", ["server", "server-gpu"])
def test_a_server_takes_its_keys_from_a_file_that_only_servers_mount(name: str) -> None:
    assert SERVICES[name]["environment"]["LENSRACK_KEYS_FILE"] == "/run/lensrack-keys/keys"
    assert "keys:/run/lensrack-keys:ro" in SERVICES[name]["volumes"]
    mounting = {
        each for each, service in SERVICES.items() if any("keys:/" in one for one in service.get("volumes", []))
    }
    assert mounting == {"secrets", "server", "server-gpu"}
    for folder in ("/run/lensrack-keys", "/run/lensrack-grafana"):
        assert folder in DOCKERFILE, "a new volume takes its owner from the image's folder"


def test_each_password_is_mounted_where_it_is_needed_alone() -> None:
    def mounting(volume: str) -> set[str]:
        return {
            name
            for name, service in SERVICES.items()
            if any(f"{volume}:/" in one for one in service.get("volumes", []))
        } - {"secrets"}

    assert mounting("grafana-secret") == {"grafana"}
    assert mounting("secrets") == {"redis", *(name for name in OURS if name != "secrets")}


def test_what_has_no_password_is_published_for_this_machine_alone_unless_said_so() -> None:
    """The server's own address does not publish Prometheus."""
    for name in ("prometheus", "grafana"):
        (port,) = SERVICES[name]["ports"]
        assert port.startswith(f"${{{name.upper()}_ADDRESS:-127.0.0.1}}:")


def test_what_draws_the_secrets_draws_them_once_and_the_server_can_read_them(tmp_path: Path) -> None:
    """The service's own script, here with folders of ours."""
    (script,) = SERVICES["secrets"]["command"]
    for folder in ("lensrack-keys", "lensrack-grafana", "lensrack"):
        (tmp_path / folder).mkdir()
        script = re.sub(rf"/run/{folder}(?![\w-])", str(tmp_path / folder), script)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    seen = []
    for _ in range(2):
        command = ["sh", "-euc", script.replace("$$", "$")]
        done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "", "nothing of it goes into a log"
        seen.append({path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()})
    assert seen[0] == seen[1]
    assert seen[0].keys() == {"redis_password", "grafana_password", "api_key", "keys"}
    ((key, token),) = KeysFile(tmp_path / "lensrack-keys" / "keys").read()
    assert (key.scopes, key.tasks, token) == ({"admin"}, "", seen[0]["api_key"].strip())
    assert stat.S_IMODE((tmp_path / "lensrack-keys" / "keys").stat().st_mode) == 0o440


def test_metrics_do_not_leave_through_the_proxy() -> None:
    assert SERVICES["server"]["environment"]["LENSRACK_OPEN_METRICS"] == "true"
    config = (DEPLOY / "proxy" / "haproxy.cfg").read_text()
    assert re.search(
        r"^\s+http-request return status 404 .* if \{ path,url_dec -m str /metrics \}$", config, re.MULTILINE
    )
    assert wire.Problem.model_validate_json((DEPLOY / "proxy" / "metrics.json").read_text()).status == 404


def test_everything_copied_into_the_image_is_sent_to_the_engine() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    copied = {source for line in lines for source in line.split()}
    assert copied == sent
    assert all((ROOT / source).exists() for source in copied)


# --- secrets and strangers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_secret_is_in_a_file(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"rediss?://[^/\s]*:[^/\s]*@", text), "a URL with a password"
    words = r"(password|secret|token|api_key)\S*\s*[:=]\s*"
    assert not re.search(rf"(?im){words}['\"]?[A-Za-z0-9+_-][A-Za-z0-9+/_-]{{11,}}['\"]?\s*$", text), "a word for one"
    assert not re.search(r"-----BEGIN [A-Z ]*PRIVATE KEY", text)
    assert not re.search(r"\b[0-9a-f]{40,}\b", text)


# --- the proxy --------------------------------------------------------------------------------------------------------

ERRORS = sorted((DEPLOY / "proxy" / "errors").glob("*.http"))


@pytest.mark.parametrize("path", ERRORS, ids=lambda path: path.stem)
def test_what_the_proxy_answers_by_itself_is_a_problem_document(path: Path) -> None:
    """As the server's own errors are, so that the SDK can read them."""
    head, _, body = path.read_bytes().partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0].startswith(f"HTTP/1.1 {path.stem} ".encode())
    assert b"\r\nContent-Type: application/problem+json\r\n" in head
    problem = wire.Problem.model_validate_json(body)
    assert problem.status == int(path.stem)
    assert f"/usr/local/etc/haproxy/errors/{path.name}" in (DEPLOY / "proxy" / "haproxy.cfg").read_text()


@pytest.mark.parametrize("tls", ["", "on"], ids=["plain", "TLS"])
def test_the_proxy_tells_the_server_who_asks_and_how(tls: str, tmp_path: Path) -> None:
    """A real one, with its own file; what a client says of itself does not pass."""
    if (haproxy := shutil.which("haproxy")) is None:
        pytest.skip("haproxy is not installed")
    certificate, port = tmp_path / "certificate.pem", free_port()
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=lens.example -keyout key.pem -out chain.pem"
    subprocess.run(make.split(), cwd=tmp_path, check=True, capture_output=True)
    certificate.write_text((tmp_path / "chain.pem").read_text() + (tmp_path / "key.pem").read_text())
    seen: list[dict[str, list[str]]] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/readyz":
                seen.append({name.lower(): self.headers.get_all(name) or [] for name in self.headers})
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = (DEPLOY / "proxy" / "haproxy.cfg").read_text()
        config = config.replace("/usr/local/etc/haproxy", str(DEPLOY / "proxy")).replace("bind :8000", f"bind :{port}")
        config = config.replace("/run/tls/certificate.pem", str(certificate))
        config = re.sub(r"server-template cpu .*", f"server cpu 127.0.0.1:{server.server_port} backup", config)
        (tmp_path / "haproxy.cfg").write_text(re.sub(r"\n.*server-template gpu .*", "", config))
        command = [haproxy, "-db", "-f", str(tmp_path / "haproxy.cfg")]
        with subprocess.Popen(command, env={**os.environ, "TLS": tls}, stdout=subprocess.DEVNULL) as proxy:
            claims = {"X-Forwarded-For": "6.6.6.6", "X-Forwarded-Proto": "gopher"}
            url = f"{'https' if tls else 'http'}://127.0.0.1:{port}/tasks"
            with httpx.Client(verify=False, headers=claims) as client:  # the certificate is its own
                deadline = time.monotonic() + 20
                while not answered(client, url):
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            proxy.terminate()
        server.shutdown()
    assert (seen[-1]["x-forwarded-proto"], seen[-1]["x-forwarded-for"]) == (["https" if tls else "http"], ["127.0.0.1"])


def answered(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == 200
    except httpx.TransportError:
        return False


def test_the_proxy_knows_its_way() -> None:
    config = (DEPLOY / "proxy" / "haproxy.cfg").read_text()
    assert set(re.findall(r"server-template \S+ \d+ (\S+):8000", config)) == {"server", "server-gpu"}
    assert re.search(r"^\s+http-check send meth GET uri /readyz$", config, re.MULTILINE)
    assert "option http-buffer-request" not in config, "uploads pass through, they are not gathered"
    if (haproxy := shutil.which("haproxy")) is None:
        pytest.skip("haproxy is not installed: its own check of the file is left out")
    local = config.replace("/usr/local/etc/haproxy", str(DEPLOY / "proxy"))
    done = subprocess.run([haproxy, "-c", "-f", "/dev/stdin"], input=local, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


# --- for real ---------------------------------------------------------------------------------------------------------


def test_scripts_can_be_run() -> None:
    for name in ("verify.sh", "own_engine.sh"):
        assert os.access(DEPLOY / name, os.X_OK)
        done = subprocess.run(["bash", "-n", str(DEPLOY / name)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_production_shape_outlives_the_death_of_every_part() -> None:
    if os.environ.get("VERIFY_DEPLOY") != "1":
        pytest.skip("half an hour of containers: `make verify-deploy` runs it")
    if not docker() or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no Docker engine answers")
    done = subprocess.run([str(DEPLOY / "verify.sh")], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
