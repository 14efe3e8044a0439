"""One GPU per worker while there are enough; shared fairly when there are not."""

import stat
from pathlib import Path

import pytest

from baton.config import ServeConfig
from baton.fleet import Fleet
from baton.gpus import assign_gpus, visible_gpus

WORKERS = ["prefill-0", "decode-0", "decode-1"]


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An nvidia-smi that does this, and no other."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="ascii")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")


def test_visible_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, 'printf "0\\n1\\n"')
    assert visible_gpus({}) == ["0", "1"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3, GPU-7"}) == ["3", "GPU-7"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == []
    smi(tmp_path, monkeypatch, "echo no driver >&2; exit 9")
    assert visible_gpus({}) == []
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert visible_gpus({}) == []


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ([], {}),
        (["0"], {"prefill-0": ("0", 0.3), "decode-0": ("0", 0.3), "decode-1": ("0", 0.3)}),
        (["4", "5"], {"prefill-0": ("4", 0.45), "decode-0": ("5", 0.9), "decode-1": ("4", 0.45)}),
        (
            ["0", "1", "2", "3"],
            {"prefill-0": ("0", 0.9), "decode-0": ("1", 0.9), "decode-1": ("2", 0.9)},
        ),
    ],
)
def test_assign_gpus(gpus: list[str], expected: dict[str, tuple[str, float]]) -> None:
    assigned = {
        worker: (env["CUDA_VISIBLE_DEVICES"], float(env["BATON_GPU_MEMORY_UTILIZATION"]))
        for worker, env in assign_gpus(WORKERS, gpus, 0.9).items()
    }
    assert assigned.keys() == expected.keys()
    for worker, (gpu, share) in expected.items():
        assert assigned[worker] == (gpu, pytest.approx(share))


@pytest.mark.parametrize(("device", "expected"), [("auto", "6"), ("cuda", "6"), ("cpu", None)])
def test_a_fleet_hands_gpus_out(
    device: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    fleet = Fleet(ServeConfig.model_validate({"device": device}))
    env = fleet._worker("decode-0").env
    fleet.clean()
    assert env["CUDA_VISIBLE_DEVICES"] == (expected or "5,6")
