"""Checks of a running deployment before any part of it is killed: containers, secrets, access, packages."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

import httpx
from verify_containers import KEYS, SERVICES, api_key, containers, docker, every, inspect, run, say, until

from lensrack import AuthenticationError, Client

URL: Final = f"http://127.0.0.1:{os.environ['PUBLISH_PORT']}"
PICTURES: Final = Path(__file__).resolve().parents[1] / "server" / "bundled" / "pictures"
SAMPLES: Final = {"digits": (PICTURES / "7.png", "7"), "faces": (PICTURES / "face.png", "face")}


def look() -> None:
    look_at_containers()
    look_at_secrets()
    look_at_access()
    look_at_inventory()


def look_at_containers() -> None:
    published = []
    for service in SERVICES:
        for each in containers(service):
            about = inspect(each)
            user = about["Config"]["User"].split(":")[0]
            assert about["HostConfig"]["ReadonlyRootfs"], f"{service}: its root file system can be written to"
            assert user not in ("", "0", "root") or service in ("grafana",), f"{service} runs as {user or 'root'}"
            assert about["HostConfig"]["CapDrop"] == ["ALL"], service
            for port, places in (about["NetworkSettings"]["Ports"] or {}).items():
                published += [(service, port, place["HostIp"]) for place in places or []]
    assert {address for _, _, address in published} == {"127.0.0.1"}, published
    assert "redis" not in {service for service, _, _ in published}
    for service in ("server", "worker"):
        tried = "id -u; ! touch /app/written /opt/venv/written /run/lensrack/written 2>/dev/null"
        assert docker("exec", containers(service)[0], "sh", "-c", tried) == "10001", service
    say(
        "no container runs as root or can write to its root file system; published on 127.0.0.1 only: "
        + ", ".join(f"{service} {port}" for service, port, _ in published)
    )


def look_at_secrets() -> None:
    redis = containers("redis")[0]
    said = docker("exec", redis, "redis-cli", "ping")
    assert "NOAUTH" in said, said
    password, token = docker("exec", redis, "cat", "/run/lensrack/redis_password"), api_key()
    assert len(password) == len(token) == 64, "32 random bytes"
    assert password not in docker("top", redis, "-eo", "pid,args")
    for hidden in (password, token):
        assert not any(hidden in run("sh", "-c", f"docker inspect {each}; docker logs {each} 2>&1") for each in every())
    for service in ("redis", "worker"):
        mounted = {mount["Destination"] for mount in inspect(containers(service)[0])["Mounts"]}
        assert KEYS not in mounted, f"{service} must not mount the keys"
    say("redis is not published and requires its password; password and API key are in no environment, argument or log")


# --- access -----------------------------------------------------------------------------------------------------------


def status(method: str, path: str, token: str | None, host: str | None = None) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    headers |= {"Host": host} if host else {}
    return httpx.request(method, f"{URL}{path}", headers=headers, timeout=30).status_code


def look_at_access() -> None:
    token = api_key()
    for none in (None, "wrong", f"{token[:-1]}x"):
        for line in ("GET /tasks", "GET /openapi.json", "POST /predict/digits", "POST /train"):
            method, path = line.split()
            expect(401, method, path, none)
    expect(200, "GET", "/tasks", token)
    for path in ("/metrics", "/%6detrics"):
        expect(404, "GET", path, token)
    expect(200, "GET", "/tasks", token, "lens.example")  # LENSRACK_ALLOWED_HOSTS
    expect(421, "GET", "/tasks", token, "evil.example")
    require_the_sdk_is_refused("")
    require_the_sdk_is_refused("wrong")
    say("requests without a key get 401, requests for another host name 421; the proxy hides /metrics")


def require_the_sdk_is_refused(token: str) -> None:
    with Client(URL, token) as client:
        try:
            client.predict("digits", SAMPLES["digits"][0])
        except AuthenticationError:
            return
    raise AssertionError(f"the key {token!r} was accepted from the SDK")


def expect(wanted: int, method: str, path: str, token: str | None, host: str | None = None) -> None:
    got = status(method, path, token, host)
    assert got == wanted, f"{method} {path}: expected {wanted}, got {got}"


def lesser_key() -> str:
    """Create a key with the command of compose.yaml's first lines; it can predict and nothing else."""
    made = docker("exec", containers("server")[0], "python", "-m", "server", "keys", "create", "--scope", "predict")
    token = made.splitlines()[-1]
    until("both servers know the new key", lambda: all(status("GET", "/tasks", token) == 200 for _ in range(8)))
    look_at_lesser_key(token)
    say("a key created with `compose exec server python -m server keys create` can predict, and cannot train or delete")
    return token


def look_at_lesser_key(token: str) -> None:
    with Client(URL, token) as client:
        ask_samples(client)
    for method, path in (("POST", "/train"), ("DELETE", "/tasks/digits")):
        expect(403, method, path, token)


def ask_samples(client: Client) -> dict[str, list[tuple[str, float]]]:
    """Return the answers of the bundled tasks for their sample pictures."""
    found = {}
    for task, (picture, label) in SAMPLES.items():
        answer = client.predict(task, picture, top_k=2)
        assert answer.label == label, f"{task}: expected {label}, got {answer.label} ({answer.score:.2f})"
        found[f"{task} {picture.name}"] = [(p.label, p.score) for p in answer]
    return found


# --- packages of the image --------------------------------------------------------------------------------------------

INSTALLED: Final = (
    "import importlib.metadata as m, json\n"
    "print(json.dumps([[each.metadata['Name'], each.version] for each in m.distributions()]))"
)


def look_at_inventory() -> None:
    """Checks that the image's package list equals what Python finds, without the tool that wrote the list."""
    server = containers("server")[0]
    place = inspect(server)["Config"]["Labels"]["lensrack.sbom"]
    listed = json.loads(docker("exec", server, "cat", place))
    assert listed["bomFormat"] == "CycloneDX", listed["bomFormat"]
    parts = [*listed["components"], listed["metadata"]["component"]]
    told = {(each["name"].lower(), each["version"]) for each in parts}
    there = {(name.lower(), version) for name, version in json.loads(docker("exec", server, "python", "-c", INSTALLED))}
    assert told == there, f"listed only: {told - there}; not listed: {there - told}"
    names = {name for name, _ in told}
    assert {"lensrack", "torch", "pillow", "fastapi"} <= names, names
    assert not names & {"pip", "cyclonedx-bom", "cyclonedx-python-lib"}, names
    assert not docker("exec", server, "sh", "-c", "ls -d /opt/pip /opt/inventory 2>/dev/null || true")
    docker("exec", server, "python", "-c", "import server.api.oip.grpc.server")  # what LENSRACK_GRPC_PORT needs
    say(f"{place} lists the {len(told)} Python packages of the image (CycloneDX {listed['specVersion']})")
