# SPDX-License-Identifier: Apache-2.0
"""Makes every page and picture of results: ``python -m benchmarks.report``. Reads the committed JSON only.

docs/benchmarks.md whole, what stands between the markers of README.md and of docs/finetuner.md, and the pictures beside
the JSON. Nothing is measured here: what no JSON file holds is not measured.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import goals, plots, stored
from benchmarks.record import Row
from benchmarks.stored import Device, File
from benchmarks.tables import circumstances, markdown, ms

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HEADLINES = (  # op, case, direction: the README's choice, a shape or two an op that many models have
    ("patch_embed", "clip_l14_336", "fwd"),
    ("patch_embed", "clip_l14_336", "fwdbwd"),
    ("patch_embed", "qwen2_vl_still", "fwd"),
    ("cross_attention", "siglip_map_head", "fwd"),
    ("cross_attention", "blip2_layer", "fwd"),
    ("cross_attention", "blip2_layer", "fwdbwd"),
    ("patch_merge", "qwen2_vl", "fwd"),
    ("patch_merge", "internvl", "fwd"),
    ("merge_embeddings", "llava_7b", "fwd"),
    ("merge_embeddings", "llava_7b", "fwdbwd"),
    ("pack_embeddings", "llava_7b", "fwd"),
    ("pack_embeddings", "llava_7b", "fwdbwd"),
    ("mrope_positions", "qwen2_vl_64_images", "fwd"),
    ("mrope", "qwen2_5_vl_7b", "fwd"),
    ("rope_write_kv", "qwen2_5_vl_7b_prefill", "fwd"),
    ("rope_write_kv", "qwen2_5_vl_7b_decode", "fwd"),
    ("paged_attention", "decode_llama3_8b", "fwd"),
    ("paged_attention", "decode_qwen2_7b_16_questions", "fwd"),
    ("paged_attention", "prefill_qwen2_7b", "fwd"),
    ("compact_kv", "qwen2_7b_quarter", "fwd"),
    ("end_to_end", "packed training", ""),
    ("end_to_end", "16 questions on one image", ""),
)
HEAD = """# Benchmarks

Made by `python -m benchmarks.report` from the JSON in `benchmarks/results`; not written by hand.
[kernel-engineer.md](kernel-engineer.md) says how a row is measured. Compare within a table only: machines, hours and
commits differ.

- **× eager, × compile, × library**: how many times as fast as what transformers runs, as `torch.compile` of that, as
  the strongest public way. Below 1 is a loss.
- **of ceiling**: of what a copy or a GEMM of the same rounds allows; *bare gemm*: the op's own multiplication alone.
- **extra MB**: held during the call beside inputs and results, ours (eager's).
- **max error**: against fp64, ours (eager's), of the tensor nearest to its bound."""
ASKED = """Asked for by the founding design, on a CPU with AMX (2 threads) and on an H200. The newest row of each case
judges a goal, the slowest case of several."""
Newest = dict[tuple[str, ...], tuple[Row, File]]


def pages(results: Path = RESULTS) -> dict[Path, str]:
    """The text of every page that shows results."""
    devices = stored.devices(results)
    cpu = stored.chosen(devices, stored.on_amx)
    verdicts = goals.verdicts(_rows(cpu), _rows(stored.chosen(devices, stored.on_h200)))
    readme, finetuner = ROOT / "README.md", ROOT / "docs" / "finetuner.md"
    return {
        ROOT / "docs" / "benchmarks.md": _benchmarks(devices, verdicts),
        readme: between(readme.read_text(), "benchmarks", _readme(devices, cpu, verdicts)),
        finetuner: between(finetuner.read_text(), "models", _models(devices)),
    }


def _rows(newest: Newest) -> goals.Rows:
    return {key: row for key, (row, _) in newest.items()}


def between(page: str, name: str, text: str) -> str:
    """The page with another text between its two markers."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    if page.count(start) != 1 or page.count(end) != 1 or page.index(start) > page.index(end):
        raise ValueError(f"a page must contain {start} and, after it, {end}, once each")
    return f"{page.split(start)[0]}{start}\n{text}\n{end}{page.split(end)[1]}"


def _benchmarks(devices: list[Device], verdicts: Sequence[goals.Verdict]) -> str:
    """Goals, then a section a device."""
    parts = [
        HEAD,
        f"## Goals\n\n{ASKED} {_counted(verdicts)}",
        goals.table(verdicts, stored.reasons(devices)),
    ]
    parts += map(_device, devices)
    if not any(row.device == "cuda" for device in devices for row in device.rows):
        parts.append("## GPU\n\nNot measured.")
    if not any(file.path.stem == "batches" for device in devices for file in device.files):
        parts.append("## Batch scaling\n\nNot measured.")
    return "\n\n".join(parts) + "\n"


def _counted(verdicts: Sequence[goals.Verdict]) -> str:
    words = [v.word for v in verdicts]
    return f"Of {len(words)} goals {', '.join(f'{words.count(w)} are {w}' for w in goals.WORDS)}."


def _device(device: Device) -> str:
    """What lost and what failed, the pictures, and each file."""
    failed = [f"- FAILED {_name(row)}: {row.failure}" for row in device.rows if row.failure]
    lost = sorted((row for row in device.rows if row.lost), key=lambda row: row.speedup["eager"])
    told = [f"- {_name(row)}: {_slower(row.speedup['eager'])}" for row in lost]
    pictures = [f"![{name}]({_link(device, name)})" for name in plots.of(device)]
    compared = sum("eager" in row.speedup for row in device.rows)
    parts = [
        f"## {device.name}",
        f"{len(lost)} of {compared} rows are below 0.95 × eager{':' if lost else '.'}",
        "\n".join(told),
        "\n".join(failed),
        "\n\n".join(pictures),
        *(f"### {f.path.name}\n\n{circumstances(f.run)}\n\n{f.table}" for f in device.files),
    ]
    return "\n\n".join(part for part in parts if part)


def _slower(speedup: float) -> str:
    return f"{speedup:.2f} × eager, {1 / speedup - 1:.0%} more time"


def _name(row: Row) -> str:
    return f"{row.op} {row.named} {row.dtype} {row.direction}".strip()


def _link(device: Device, name: str) -> str:
    return f"../benchmarks/results/{device.name}/{name}.svg"


def _readme(devices: Sequence[Device], cpu: Newest, verdicts: Sequence[goals.Verdict]) -> str:
    """A line a headline, with where it was measured and how much of everything lost."""
    header = ("op", "case", "", *(f"{dtype} {what}" for dtype in ("fp32", "bf16")
              for what in ("ms", "× eager", "× library")))  # fmt: skip
    lines = [[*key, *_times(cpu, key, "fp32"), *_times(cpu, key, "bf16")] for key in HEADLINES]
    files = [file for _, file in cpu.values()]
    if not files:
        return "Not measured on a CPU with AMX. All rows: [docs/benchmarks.md](docs/benchmarks.md)."
    models = sorted({file.run.machine["cpu_family_model"] for file in files})
    dates = sorted(file.run.date[:10] for file in files)
    torches = sorted({str(file.run.versions["torch"]) for file in files})
    lost, n = (
        sum(row.lost for row, _ in cpu.values()),
        sum("eager" in row.speedup for row, _ in cpu.values()),
    )
    where = (
        f"{files[0].run.machine['cpu']} with AMX (family/model {' and '.join(models)}), "
        f"{files[0].run.machine['threads']} threads, {dates[0]} to {dates[-1]}, torch {' and '.join(torches)}. "
        f"Of all {n} rows {lost} are below 0.95 × eager. {_counted(verdicts)}"
    )
    gpu = any(row.device == "cuda" for device in devices for row in device.rows)
    more = "All rows, losses, goals, pictures, machines: [docs/benchmarks.md](docs/benchmarks.md)."
    return f"{where}\n\n{markdown(header, lines, 3)}\n\n{more}" + (
        "" if gpu else " GPU: not measured."
    )


def _times(newest: Newest, key: tuple[str, str, str], dtype: str) -> list[str]:
    """Our time and two speed-ups; what runs in integers stands with fp32."""
    op, case, direction = key
    here = {
        d: newest[k][0]
        for d in ("fp32", "bf16", "int64")
        if (k := (op, case, d, direction, "")) in newest
    }
    row = here.get("int64" if "int64" in here and dtype == "fp32" else dtype)
    if row is None:
        return ["–" if "int64" in here else "not measured", "", ""]
    if row.failure:
        return ["FAILED", "", ""]
    each = (f"{row.speedup[n]:.2f}" if n in row.speedup else "–" for n in ("eager", "library"))
    return [ms(row.times_s["ours"]["median"]), *each]


def _models(devices: Sequence[Device]) -> str:
    """The newest table of models."""
    found = [file for device in devices for file in device.files if file.path.stem == "models"]
    if not found:
        return "Not measured."
    newest = max(found, key=lambda file: file.run.date)
    return f"{circumstances(newest.run)}\n\n{newest.table}"


def main() -> int:
    for path, text in pages().items():
        path.write_text(text)
        print(path.relative_to(ROOT))
    for device in stored.devices(RESULTS):
        for name, draw in plots.of(device).items():
            path = RESULTS / device.name / f"{name}.svg"
            plots.write(draw, path)
            print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
