# SPDX-License-Identifier: Apache-2.0
"""Pages of results: made from the JSON alone and up to date, losses and failures shown, goals judged by real rows."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import (
    batches,
    end_to_end,
    goals,
    plots,
    reasons,
    record,
    report,
    resampler,
    rows,
    stored,
)
from benchmarks.goals import GOALS, Goal, judged
from benchmarks.record import Row
from mmkernels import OPS

AMX = "cpu-intel-xeon-amx"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A copy of the committed JSON."""
    copy = tmp_path / "results"
    shutil.copytree(report.RESULTS, copy, ignore=shutil.ignore_patterns("*.svg"))
    return copy


def test_pages_are_what_the_json_makes_them() -> None:
    for path, text in report.pages().items():
        assert path.read_text() == text, f"{path.name}: run `python -m benchmarks.report`"


def test_another_number_makes_other_pages(results: Path) -> None:
    assert report.pages(results) == report.pages()
    path = results / AMX / "merge_embeddings.json"
    run = record.load(path)
    row = next(r for r in run.rows if (r.case, r.dtype, r.direction) == ("llava_7b", "fp32", "fwd"))
    row.speedup["eager"] = 0.432
    run.save(path)
    changed, before = report.pages(results), report.pages()
    for page in ("README.md", "docs/benchmarks.md"):
        assert "0.43" in changed[report.ROOT / page] != before[report.ROOT / page]
    lost = "- merge_embeddings llava_7b fp32 fwd: 0.43 × eager, 131% more time"
    assert lost in changed[report.ROOT / "docs" / "benchmarks.md"]


def test_pages_of_another_machine_alone(results: Path) -> None:
    for folder in results.iterdir():
        if folder.name != "cpu-amd-epyc-zen4":
            shutil.rmtree(folder)
    made = report.pages(results)
    assert "Not measured on a CPU with AMX." in made[report.ROOT / "README.md"]
    assert "## cpu-amd-epyc-zen4" in made[report.ROOT / "docs" / "benchmarks.md"]


def test_models_of_the_fine_tuners_page(results: Path) -> None:
    path = results / AMX / "models.json"
    run = json.loads(path.read_text())
    run["models"][0]["speedup"]["fwd"]["patched"] = 0.123
    path.write_text(json.dumps(run))
    assert "| 0.12 |" in report.pages(results)[report.ROOT / "docs" / "finetuner.md"]


def test_a_failed_row_says_so_everywhere(results: Path) -> None:
    path = results / AMX / "compact_kv.json"
    run = record.load(path)
    run.rows[0] = Row(*stored_key(run.rows[0]), "cpu", failure="out: error 1, 9 | of the bound")
    run.save(path)
    pages = report.pages(results)
    assert "| compact_kv | qwen2_7b_quarter | fwd | FAILED |" in pages[report.ROOT / "README.md"]
    page = pages[report.ROOT / "docs" / "benchmarks.md"]
    assert "- FAILED compact_kv qwen2_7b_quarter fp32 fwd: out: error 1" in page
    assert "FAILED out: error 1, 9 \\| of the bound |" in page


def stored_key(row: Row) -> tuple[str, str, str, str]:
    return row.op, row.case, row.dtype, row.direction


def test_the_newest_row_counts(results: Path) -> None:
    run = record.load(results / AMX / "compact_kv.json")
    run.rows[0].speedup["eager"] = 77.0
    for date, shown in (("2020-01-01", False), ("2099-01-01", True)):
        replace(run, date=date).save(results / AMX / "again.json")
        assert ("| 77.00 |" in report.pages(results)[report.ROOT / "README.md"]) == shown


def test_goals_name_rows_that_exist() -> None:
    jobs = {(j.op, j.case.name, j.dtype, j.direction, j.frozen) for j in rows.jobs()}
    source = Path(end_to_end.__file__).read_text()
    for goal in GOALS:
        assert bool(goal.cases) != bool(goal.demand), goal
        for key in goal.keys():
            if goal.op in OPS:
                assert key in jobs, key
            elif goal.op == "resampler":
                assert key[1] in resampler.LAYERS, key
            else:
                assert goal.op == "end_to_end" and f'"{key[1]}"' in source, key


def test_the_slowest_row_judges_a_goal() -> None:
    goal = Goal(
        "g", "CPU fp32", 2.0, op="o", cases=("a", "b", "c"), dtype="fp32", or_of_ceiling=0.9
    )

    def verdict(*rows: Row) -> str:
        found = judged(goal, {(r.op, r.case, r.dtype, r.direction, r.frozen): r for r in rows})
        return goals.table([found], {}).splitlines()[-1]

    def row(case: str, speedup: float, fraction: float | None = None) -> Row:
        return Row("o", case, "fp32", "", "cpu", speedup={"eager": speedup}, fraction=fraction)

    assert "| – | not measured |" in verdict()
    assert "| 2.00 b, worst of 3 (best 3.00), 1 not measured | met |" in verdict(
        row("a", 3.0), row("b", 2.0)
    )
    assert "| missed by 25% |" in verdict(row("a", 1.5, 0.5), row("b", 9.0))
    assert "| missed by 0.5% |" in verdict(row("a", 1.99))
    assert "| met |" in verdict(row("a", 0.9, 0.95))  # the bare GEMM alone is slower than eager
    assert "| missed by 53% |" in verdict(row("a", 0.94, 0.92))
    assert "FAILED a" in verdict(Row("o", "a", "fp32", "", "cpu", failure="wrong"), row("b", 3.0))


def test_a_missed_goal_tells_what_was_measured(results: Path) -> None:
    head = {"op": "o", "case": "a", "dtype": "fp32", "direction": "", "frozen": ""}
    part = {**head, "kind": "part", "part": "reading", "share": 0.25}
    both = {"ours": {"flops": 1e9, "median": 1.0}, "eager": {"flops": 2e9, "median": 1.0}}
    flops = {**head, "kind": "FLOPs", "gemm_flops_per_s": 4e9, **both}
    assert reasons.said(part) == "reading takes 25% of it"
    assert "2.00 × fewer FLOPs, at 25% of a GEMM's speed, eager's at 50%" in reasons.said(flops)
    told = stored.reasons(stored.devices(results))
    goal = Goal("g", "CPU fp32", 2.0, op="o", cases=("a",), dtype="fp32")
    for speedup, shown in ((1.0, True), (3.0, False)):
        row = Row("o", "a", "fp32", "", "cpu", speedup={"eager": speedup})
        line = goals.table([judged(goal, {tuple(head.values()): row})], {tuple(head.values()): "!"})
        assert line.endswith("| ! |") == shown
    missed = [v for v in goals.verdicts(report._rows(stored.chosen(stored.devices(results), stored.on_amx)), {})
              if v.word == "missed"]  # fmt: skip
    for v in missed:
        assert v.worst is not None
        key = (v.worst.op, v.worst.case, v.worst.dtype, v.worst.direction, v.worst.frozen)
        assert v.goal.why or key in told, v.goal


def test_time_against_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "CASES", (("patch_merge", "internvl"),))
    path = tmp_path / "device" / "batches.json"
    path.parent.mkdir()
    assert batches.main([str(path), "--rounds", "1", "--numbers", "1", "2"]) == 0
    (device,) = stored.devices(tmp_path)
    assert [p["B"] for p in device.files[0].found] == [1, 2, 1, 2]
    assert "| patch_merge | internvl | fp32 |" in device.files[0].table
    assert list(plots.of(device)) == ["batches"]


def test_only_an_h200_judges_the_goals_of_an_h200(results: Path) -> None:
    run = record.load(results / AMX / "compact_kv.json")
    cuda = [replace(row, device="cuda") for row in run.rows]
    for gpu, judges in (("NVIDIA H100", False), ("NVIDIA H200", True)):
        found = replace(run, rows=cuda, machine={**run.machine, "gpu": gpu})
        assert [stored.on_h200(found, row) for row in found.rows] == [judges] * 2
        assert not any(stored.on_amx(found, row) for row in found.rows)


def test_every_picture_is_there_and_can_be_drawn_again(tmp_path: Path) -> None:
    devices = stored.devices(report.RESULTS)
    for device in devices:
        there = {p.stem for p in (report.RESULTS / device.name).glob("*.svg")}
        assert there == set(plots.of(device)), device.name
    smallest = {}
    for device in sorted(devices, key=lambda d: -len(d.rows)):
        smallest |= plots.of(device)
    assert set(smallest) == {"speedups", "roofline", "queries", "batches"}
    for name, draw in smallest.items():
        for path in (tmp_path / "once.svg", tmp_path / "again.svg"):
            plots.write(draw, path)
        assert (tmp_path / "once.svg").read_bytes() == path.read_bytes(), name


@pytest.mark.parametrize("page", ["no markers", "<!-- x:end --><!-- x:start -->"])
def test_only_what_stands_between_markers_is_replaced(page: str) -> None:
    whole = "before\n<!-- x:start -->\nold\n<!-- x:end -->\nafter\n"
    assert report.between(whole, "x", "new") == whole.replace("old", "new")
    with pytest.raises(ValueError, match="must contain"):
        report.between(page, "x", "new")
