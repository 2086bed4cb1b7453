# SPDX-License-Identifier: Apache-2.0
"""The harness itself: a wrong kernel gets no time, and what is stored is reported."""

from pathlib import Path

import pytest
import torch

from benchmarks import record, report, rows, run, stored
from benchmarks.rows import Job
from mmkernels import OPS
from mmkernels.ops.merge_embeddings import cases
from mmkernels.testing import Inputs, timing
from mmkernels.testing.timing import Timing

SMALL = next(case for case in cases.CASES if case.name == "small")


@pytest.fixture(autouse=True)
def small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of a tiny case, and ceilings of the same size."""
    jobs = [Job("merge_embeddings", SMALL, "fp32", d, "cpu") for d in rows.DIRECTIONS]
    monkeypatch.setattr(rows, "jobs", lambda: jobs)
    monkeypatch.setattr(timing, "GEMM_SIDE", {"cpu": 64})
    monkeypatch.setattr(timing, "COPY_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(timing, "SAMPLE_S", 1e-4)


def benchmark(*options: str) -> int:
    return run.main(["--no-compile", "--rounds", "3", *options])


def test_rows_have_times_and_survive_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "device" / "results.json"
    assert benchmark("--json", str(path)) == 0
    assert "merge_embeddings  small" in capsys.readouterr().out
    loaded = record.load(path)
    assert [row.direction for row in loaded.rows] == ["fwd", "fwdbwd"]
    assert all(row.times_s["ours"]["median"] > 0 and row.kernel for row in loaded.rows)
    assert loaded.ceilings["cpu fp32"]["copy_bytes_per_s"] > 0
    loaded.save(tmp_path / "again.json")
    assert record.load(tmp_path / "again.json") == loaded


def test_a_wrong_output_prints_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    right = cases.run
    monkeypatch.setattr(cases, "run", lambda inputs: right(inputs) + 1e-3)
    assert benchmark("--json", str(tmp_path / "results.json")) == 1
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("merge_embeddings")]
    assert len(lines) == 2 and all("FAILED out: error 0.001" in line for line in lines)
    assert not any(row.times_s for row in record.load(tmp_path / "results.json").rows)


def test_nan_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cases.run
    monkeypatch.setattr(cases, "run", lambda inputs: right(inputs) * float("nan"))
    assert benchmark("--direction", "fwd") == 1


def test_a_wrong_gradient_fails_the_backward_row_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = cases.run

    def doubled(inputs: Inputs) -> torch.Tensor:
        out = right(inputs)
        return out + (out - out.detach())

    monkeypatch.setattr(cases, "run", doubled)
    assert benchmark("--direction", "fwd") == 0
    assert benchmark("--direction", "fwdbwd") == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_raising_kernel_fails_its_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(inputs: Inputs) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(cases, "run", broken)
    assert benchmark() == 1
    assert "FAILED RuntimeError: no such kernel" in capsys.readouterr().out


def test_a_broken_baseline_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(inputs: Inputs) -> torch.Tensor:
        raise NotImplementedError

    monkeypatch.setattr(cases, "library", broken)
    assert benchmark("--direction", "fwd") == 0
    assert "NotImplementedError" in capsys.readouterr().out


def test_no_matching_row_is_an_error() -> None:
    assert benchmark("--case", "nowhere") == 2


def test_a_run_that_is_stored_is_in_the_report(tmp_path: Path) -> None:
    assert benchmark("--json", str(tmp_path / "device" / "results.json")) == 0
    (device,) = stored.devices(tmp_path)
    assert device.name == "device" and len(device.rows) == 2
    assert device.files[0].table.count("| merge_embeddings | small |") == 2
    text = report.pages(tmp_path)[report.ROOT / "docs" / "benchmarks.md"]
    assert device.files[0].table in text and "## GPU\n\nNot measured." in text


def test_ratios_are_taken_within_a_round() -> None:
    """The second round was three times slower for everyone: the ratio does not move."""
    ours, other = Timing((1.0, 3.0, 1.0)), Timing((2.0, 6.0, 2.0))
    assert timing.ratio(other, ours) == 2.0
    assert ours.median == 1.0 and ours.p20 == 1.0 and ours.p80 > 2


def test_peak_extra_memory_leaves_the_result_out() -> None:
    x = torch.ones(1000)

    def call() -> tuple[torch.Tensor, ...]:
        return ((x + x) * x - x,)

    assert timing.peak_extra_bytes(call, "cpu") == x.nbytes


def test_every_op_has_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert {job.op for job in rows.jobs()} == set(OPS)
    quick = {(job.case.name, job.direction) for job in rows.jobs()} & set(rows.QUICK)
    assert quick == set(rows.QUICK)


def test_compare_tells_slower_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beyond the spread of both runs, and at least 5 %; a row that is gone counts."""
    from benchmarks import compare

    def table(name: str, *speedups: float, p80: float = 1.01) -> Path:
        times = {"ours": {"median": 1.0, "p20": 1.0, "p80": p80}}
        found = [
            record.Row("op", str(i), "fp32", "fwd", "cpu", times_s=times, speedup={"eager": s})
            for i, s in enumerate(speedups)
        ]
        record.new_run({}, found).save(tmp_path / name)
        return tmp_path / name

    before = table("before.json", 2.0, 2.0, 2.0)
    assert compare.main([str(before), str(table("same.json", 1.93, 2.0, 2.07))]) == 0
    assert "0 slower, 0 faster, 3 same" in capsys.readouterr().out
    assert compare.main([str(before), str(table("after.json", 1.85, 2.3))]) == 1
    told = capsys.readouterr().out
    assert "slower  op 0" in told and "faster  op 1" in told and "the row is gone" in told
    assert compare.main([str(before), str(table("noisy.json", 1.85, 2.0, 2.0, p80=1.2))]) == 0
