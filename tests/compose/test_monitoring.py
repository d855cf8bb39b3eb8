"""The dashboard and the alerts name metrics that the services have; Prometheus' own checker judges the rest where it is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any, cast

import pytest
from prometheus_client.registry import Collector

from protos import decoder_pb2 as pb
from services.decoder.engine import Engine, EngineSettings
from services.decoder.lease_watch import LeaseWatch
from services.decoder.metrics import DecoderCollector
from services.decoder.request_meter import RequestFigures
from services.kv_manager.call_meter import CallMeter
from services.kv_manager.config import Config
from services.kv_manager.lessor import Lessor
from services.kv_manager.locks import prepare_pool_dir
from services.kv_manager.metrics import ManagerCollector
from tests.compose.files import MONITORING, ROOT, compose, read_yaml

SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "info": ("_info",),
    "histogram": ("_bucket", "_sum", "_count"),
}
# Of Prometheus itself, and of its client library's collector of the process.
OTHERS = {"up", "process_resident_memory_bytes", "process_cpu_seconds_total"}
DASHBOARD: dict[str, Any] = json.loads((MONITORING / "grafana" / "dashboards" / "leasehold.json").read_text())
RULES = read_yaml(MONITORING / "prometheus" / "alerts.yaml")["groups"][0]["rules"]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


def names_of(collector: Collector) -> set[str]:
    """The names under which its samples are stored."""
    return {family.name + suffix for family in collector.collect() for suffix in SUFFIXES[family.type]}


@pytest.fixture
async def names(tmp_path: Any) -> set[str]:
    """Every metric of both services."""
    pool_dir = prepare_pool_dir(tmp_path / "pool")
    lessor = Lessor(Config(pool_dir=pool_dir), pool_dir, lambda: 0.0)
    decoder = DecoderCollector(RequestFigures())
    decoder.watch = LeaseWatch(cast(Any, None))
    decoder.engine = Engine(cast(Any, None), decoder.watch, EngineSettings(), lambda events: None)
    decoder.info = pb.GetModelInfoResponse()
    return names_of(ManagerCollector(lessor, CallMeter("x"))) | names_of(decoder) | OTHERS


def metrics_in(text: str) -> set[str]:
    """The metrics that a text names."""
    return set(re.findall(r"\b(?:leasehold|process)_[a-z0-9_]+|\bup\b(?=\{)", text))


@pytest.mark.parametrize("expression", EXPRESSIONS + [rule["expr"] for rule in RULES])
def test_every_query_is_of_metrics_that_exist(expression: str, names: set[str]) -> None:
    assert metrics_in(expression)
    assert metrics_in(expression) <= names


def test_the_operations_page_names_metrics_that_exist(names: set[str]) -> None:
    assert metrics_in(OPERATIONS) <= names


def test_metrics_follow_the_conventions(names: set[str]) -> None:
    for name in names - OTHERS:
        assert re.fullmatch(r"leasehold_(decoder|kv_manager)_[a-z0-9_]+", name)
        assert not name.endswith(("_ms", "_total_total", "_seconds_seconds"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_every_alert_says_what_is_wrong_and_is_explained_and_tested(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert "{{" in rule["annotations"]["summary"]
    assert f"`{rule['alert']}`" in OPERATIONS
    assert rule["alert"] in (MONITORING / "prometheus" / "alerts_test.yaml").read_text()


def test_the_dashboard_is_laid_out_without_overlaps() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        mine = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in mine) < 24
        assert cells.isdisjoint(mine), panel["title"]
        cells |= mine
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_every_panel_says_what_it_shows_in_which_unit() -> None:
    for panel in DASHBOARD["panels"]:
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert [target["refId"] for target in panel["targets"]] == list("ABCDEFG")[: len(panel["targets"])]


def test_grafana_finds_the_dashboard_and_prometheus_where_compose_puts_them() -> None:
    grafana = compose()["services"]["grafana"]
    provisioning = MONITORING / "grafana" / "provisioning"
    mounts = {source: target for source, target, *_ in (volume.split(":") for volume in grafana["volumes"])}
    [provider] = read_yaml(provisioning / "dashboards" / "leasehold.yaml")["providers"]
    [source] = read_yaml(provisioning / "datasources" / "prometheus.yaml")["datasources"]
    assert provider["options"]["path"] == mounts["./services/monitoring/grafana/dashboards"]
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"].startswith(provider["options"]["path"])
    assert source["url"] == "http://prometheus:9090"
    [variable] = [item for item in DASHBOARD["templating"]["list"] if item["name"] == "datasource"]
    assert variable["query"] == source["type"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
@pytest.mark.parametrize(
    "arguments",
    [("check", "config", "prometheus.yaml"), ("check", "rules", "alerts.yaml"), ("test", "rules", "alerts_test.yaml")],
    ids=" ".join,
)
def test_promtool_accepts_the_files(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=MONITORING / "prometheus", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
