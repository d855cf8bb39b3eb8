"""The decoder's command line: defaults, and errors that name the flag and the fix."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from services.decoder import config
from services.decoder.errors import ConfigError


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_the_defaults_are_those_of_the_design(model_dir: Path) -> None:
    parsed = config.parse_args(["--model", str(model_dir)])
    assert parsed.model == model_dir.resolve()
    assert (parsed.listen, parsed.kv_manager) == ("127.0.0.1:50051", "127.0.0.1:50050")
    assert parsed.max_seqs == 32, "row S9"
    assert parsed.max_waiting == 1024
    assert (parsed.backend, parsed.kv_dtype, parsed.kv_layout, parsed.kv_capacity) == ("auto", "auto", "hnd", None)
    assert parsed.paged, "row S7: paged unless told otherwise"
    assert not parsed.reserve_full, "row S21: on demand"
    assert not parsed.shares_prefixes_between_tenants


def test_row_s7_no_paged_switches_it_off(model_dir: Path) -> None:
    assert not config.parse_args(["--model", str(model_dir), "--no-paged"]).paged
    assert config.parse_args(["--model", str(model_dir), "--paged"]).paged


def test_row_s6_capacity_is_the_smaller_of_model_and_setting() -> None:
    assert config.resolve_kv_capacity(None, 40_960) == 2048
    assert config.resolve_kv_capacity(None, 512) == 512
    assert config.resolve_kv_capacity(100, 512) == 100
    assert config.resolve_kv_capacity(512, 512) == 512
    with pytest.raises(ConfigError, match=r"^--kv-capacity: 513 .* maximum of 512 .*use 512 or less"):
        config.resolve_kv_capacity(513, 512)


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", "", "99999999999"])
def test_row_s6_a_bad_capacity_is_refused_at_start_with_the_reason(model_dir: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"^--kv-capacity: .*give a whole number"):
        config.parse_args(["--model", str(model_dir), f"--kv-capacity={value}"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-seqs", "0"], r"^--max-seqs: 0 is out of range; give"),
        (["--max-waiting", "-1"], r"^--max-waiting: -1 is out of range; give a whole number from 0"),
        (["--max-waiting", "some"], r"^--max-waiting: 'some' is not a number; give a whole number"),
        (["--max-num-batched-tokens", "x"], r"^--max-num-batched-tokens: 'x' is not a number; give"),
        (["--max-num-batched-tokens", "16"], r"^--max-num-batched-tokens: 16 is less than --max-seqs 32.*raise it"),
        (["--listen", "nowhere"], r"^--listen: 'nowhere' is not an address; write HOST:PORT"),
        (["--listen", "127.0.0.1:70000"], r"^--listen: .*0 to 65535"),
        (["--kv-manager", "http://x:1"], r"^--kv-manager: .* is not an address; write"),
        (["--kv-manager", "127.0.0.1:0"], r"^--kv-manager: .* has port 0; write the port"),
        (["--backend", "torch"], r"^--backend: invalid choice: 'torch' \(choose from"),
        (["--kv-dtype", "int4"], r"^--kv-dtype: invalid choice: 'int4' \(choose from"),
        (["--reserve", "some"], r"^--reserve: invalid choice"),
        (["--worker-id", "a b"], r"^--worker-id: 'a b' is not 1 to 64 characters of"),
        (["--worker-id", "x" * 65], r"^--worker-id: .* is not 1 to 64 characters of"),
        (["--threads", "-2"], r"^--threads: -2 is out of range"),
        (["--grace", "soon"], r"^--grace: 'soon' is not a number; give seconds"),
        (["--grace", "nan"], r"^--grace: nan is out of range"),
        (["--log-level", "loud"], r"^--log-level: invalid choice"),
        (["--blocks", "3"], r"unrecognized arguments: --blocks 3"),
    ],
)
def test_a_bad_value_is_refused_with_flag_and_fix(model_dir: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.parse_args(["--model", str(model_dir), *flags])


def test_a_model_that_is_no_checkpoint_folder_is_refused(tmp_path: Path) -> None:
    a_file = tmp_path / "model.safetensors"
    a_file.touch()
    for given, message in [
        (tmp_path / "absent", "does not exist; give the folder"),
        (a_file, "is a file; give the folder"),
        (tmp_path, "has no config.json; give the folder"),
    ]:
        with pytest.raises(ConfigError, match=rf"^--model: .*{message}"):
            config.parse_args(["--model", str(given)])
    with pytest.raises(ConfigError, match="--model"):
        config.parse_args([])


def test_the_worker_id_comes_from_host_and_address(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node 7")
    default = config.parse_args(["--model", str(model_dir)])
    assert default.worker_id == "node_7-127.0.0.1-50051"
    over_socket = config.parse_args(["--model", str(model_dir), "--listen", "unix:/run/d.sock"])
    assert over_socket.worker_id == "node_7-unix-_run_d.sock"
    given = config.parse_args(["--model", str(model_dir), "--worker-id", "w.1"])
    assert given.worker_id == "w.1"


def test_worker_ids_stay_distinct_and_short_enough(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "h" * 80)
    ids = [config.parse_args(["--model", str(model_dir), "--listen", f"127.0.0.1:{n}"]).worker_id for n in (0, 0, 7, 8)]
    assert len(set(ids)) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,64}", worker_id) for worker_id in ids)


def test_backends_resolve_or_say_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.resolve_backend("mlx") == "mlx"
    monkeypatch.setattr(config, "NATIVE_MODULE", "services.decoder.ops.absent")
    assert config.resolve_backend("auto") == "mlx"
    with pytest.raises(ConfigError, match=r"^--backend: native is not available: .*use --backend mlx"):
        config.resolve_backend("native")


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        config.parse_args(["--help"])
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    assert "--no-paged" in shown
    assert "python -m services.decoder --model" in shown


def test_native_is_fast_unless_the_checkpoint_is_float32_or_told_otherwise() -> None:
    assert config.resolve_precision(None, "native", "bf16") == "fast"
    assert config.resolve_precision(None, "native", "f32") == "exact"
    assert config.resolve_precision("exact", "native", "bf16") == "exact"
    assert config.resolve_precision("fast", "native", "f32") == "fast"


def test_mlx_is_always_exact() -> None:
    assert config.resolve_precision(None, "mlx", "bf16") == "exact"
    with pytest.raises(ConfigError, match=r"--precision: fast needs --backend native"):
        config.resolve_precision("fast", "mlx", "bf16")


def test_s13_s20_k_v_that_the_gpus_kernels_do_not_read_is_refused_by_name() -> None:
    for backend, precision in (("native", "fast"), ("mlx", "exact"), ("cuda", "exact")):
        config.check_kv("bf16", "nhd", backend, precision)
    config.check_kv("int8", "nhd", "native", "fast")
    with pytest.raises(ConfigError, match=r"^--kv-dtype: .* no int8"):
        config.check_kv("int8", "hnd", "cuda", "exact")
    with pytest.raises(ConfigError, match=r"^--kv-layout: .* hnd only"):
        config.check_kv("bf16", "nhd", "cuda", "fast")


def test_the_dtype_of_k_v_is_the_checkpoints_unless_given() -> None:
    assert config.resolve_kv_dtype("auto", "bf16") == "bf16"
    assert config.resolve_kv_dtype("int8", "bf16") == "int8"
