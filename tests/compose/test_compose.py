"""compose.yaml as far as it can be tested without a Docker engine."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clients.cli.arguments import build_parser, normalize
from services.decoder.config import parse_args as parse_decoder
from services.kv_manager.config import parse_args as parse_manager
from services.kv_manager.config import parse_size
from tests.compose.files import MONITORING, ROOT, compose, read_yaml

SERVICES: dict[str, dict[str, Any]] = compose()["services"]
DEMO_MODEL = str(ROOT / "services" / "decoder" / "demo_model" / "checkpoint")
DECODERS = ("decoder-1", "decoder-2")


def decoder_flags(name: str) -> list[str]:
    """A decoder's command, with the mounted model at the place of this checkout's."""
    return [DEMO_MODEL if part == "/model" else part for part in SERVICES[name]["command"]]


def test_the_manager_takes_its_command() -> None:
    config = parse_manager(SERVICES["kv-manager"]["command"])
    assert config.listen.endswith(":50050")
    assert config.pool_dir == Path("/pool")
    assert config.metrics_listen is not None


@pytest.mark.parametrize("name", DECODERS)
def test_the_decoders_take_their_commands(name: str) -> None:
    config = parse_decoder(decoder_flags(name))
    assert config.kv_manager == "kv-manager:50050"
    assert config.worker_id == name
    assert config.metrics_listen is not None


def test_the_load_test_takes_its_command() -> None:
    service = SERVICES["loadtest"]
    program = service["entrypoint"]
    assert program[:4] == ["python3", "-m", "clients.cli", "loadtest"]
    args = build_parser().parse_args(normalize([*program[3:], *service["command"]]))
    assert args.decoder == ["decoder-1:50051", "decoder-2:50051"]
    assert args.kv_manager == "kv-manager:50050"
    assert args.verify == "auto"


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_held_short(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service["user"].startswith("0")
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
    assert service["restart"] == ("no" if name == "loadtest" else "unless-stopped")


@pytest.mark.parametrize("name", SERVICES)
def test_every_published_port_is_of_loopback_only(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", ()))


def test_no_port_is_published_twice() -> None:
    ports = [port.rsplit(":", 1)[0] for service in SERVICES.values() for port in service.get("ports", ())]
    assert len(ports) == len(set(ports))


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_from_the_checkout_is_there(name: str) -> None:
    for volume in SERVICES[name].get("volumes", ()):
        source = volume.split(":")[0]
        assert source in compose()["volumes"] or (ROOT / source).exists(), volume


def test_the_pool_volume_has_room_for_the_pool_and_more() -> None:
    command = SERVICES["kv-manager"]["command"]
    pool_bytes = parse_size(command[command.index("--pool-bytes") + 1])
    options = dict(option.split("=") for option in compose()["volumes"]["pool"]["driver_opts"]["o"].split(","))
    assert parse_size(options["size"].removesuffix("m") + "MiB") > pool_bytes
    assert options["uid"] == options["gid"] == "10001"
    for name in ("kv-manager", *DECODERS):
        limit = SERVICES[name]["deploy"]["resources"]["limits"]["memory"]
        assert int(limit.removesuffix("g")) << 30 > pool_bytes


def test_prometheus_scrapes_where_the_services_serve() -> None:
    scraped = {
        target
        for job in read_yaml(MONITORING / "prometheus" / "prometheus.yaml")["scrape_configs"]
        for static in job["static_configs"]
        for target in static["targets"]
    }
    served = set()
    for name in ("kv-manager", *DECODERS):
        command = SERVICES[name]["command"]
        served.add(f"{name}:{command[command.index('--metrics-listen') + 1].rsplit(':', 1)[1]}")
    assert scraped == served


@pytest.mark.parametrize("name", ["kv_manager", "decoder"])
def test_the_images_run_as_the_user_that_owns_the_pool(name: str) -> None:
    lines = (ROOT / "services" / name / "Dockerfile").read_text().splitlines()
    assert "USER 10001:10001" in lines


def imported_services(path: Path) -> Iterator[str]:
    """The top-level modules of `services` that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "services":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("services."):
            yield str(node.module).split(".")[1]


def test_the_manager_image_has_every_module_that_the_manager_imports() -> None:
    dockerfile = (ROOT / "services" / "kv_manager" / "Dockerfile").read_text()
    copied = set(re.findall(r"services/(\w+)\.py", dockerfile))
    todo = [*(ROOT / "services" / "kv_manager").glob("*.py"), *(ROOT / "services" / f"{name}.py" for name in copied)]
    imported = {name for path in todo for name in imported_services(path)}
    assert imported - {"kv_manager"} <= copied
