# SPDX-License-Identifier: Apache-2.0
"""The rows of the table: ops × cases × dtypes × directions × devices, checked first, then timed."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import torch

from benchmarks.record import Row
from mmkernels import OPS
from mmkernels.testing import (
    Case,
    Comparison,
    Inputs,
    gradients,
    in_fp64,
    timing,
    which_kernel_ran,
    yardstick,
)
from mmkernels.testing.case import (
    CHECK_AT_MOST,
    CHECK_QUICKLY,
    Function,
    leaves,
    map_tensors,
    smaller,
    timed,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int64": torch.int64}
DIRECTIONS = ("fwd", "fwdbwd")
FROZEN = {("cross_attention", "blip2_layer"): "context"}  # stage 1 of BLIP-2: the encoder is frozen
QUICK = (  # case and direction: an op each in both, and the widest gap
    ("vit_b16_224", "fwd"),
    ("vit_b16_224", "fwdbwd"),
    ("siglip_map_head", "fwd"),
    ("blip2_layer", "fwdbwd"),
    ("qwen2vl_2b", "fwd"),
    ("qwen2vl_2b", "fwdbwd"),
)
# Cases whose Conv3d takes over 25 s a backward in bf16 on CPU (oneDNN, torch 2.13, wide grids): no baseline.
TOO_SLOW = ("qwen2_vl_still", "qwen3_vl_still")
Step = Callable[[Inputs], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Job:
    """One row to measure; ``frozen`` names the input that needs no gradient."""

    op: str
    case: Case
    dtype: str
    direction: str
    device: str
    frozen: str = ""

    @property
    def name(self) -> str:
        case = f"{self.case.name} ({self.frozen} frozen)" if self.frozen else self.case.name
        return f"{self.op} {case} {self.dtype} {self.direction} {self.device}"


@dataclass(frozen=True)
class Options:
    """How carefully: rounds, fewer sizes under check, torch.compile as a baseline, cold L2 on GPUs."""

    rounds: int = 9
    quick_check: bool = False
    compile: bool = True
    cold: bool = True


def cases_of(op: str) -> ModuleType:
    return importlib.import_module(f"mmkernels.ops.{op}.cases")


def too_slow(job: Job) -> list[str]:
    """Baselines that are not run: their backward would take minutes."""
    hangs = job.case.name in TOO_SLOW and (job.dtype, job.device) == ("bf16", "cpu")
    return ["eager", "compile"] if hangs and job.direction == "fwdbwd" else []


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def jobs() -> list[Job]:
    """Every row."""
    return [
        Job(op, case, dtype, direction, device, frozen)
        for device in devices()
        for op in OPS
        for case in cases_of(op).CASES
        if "bench" in case.tags
        for dtype in getattr(cases_of(op), "DTYPES", ("fp32", "bf16"))
        for direction, frozen in _directions(op, case)
    ]


def _directions(op: str, case: Case) -> list[tuple[str, str]]:
    if getattr(cases_of(op).run, "inference_only", False):
        return [("fwd", "")]
    found = [(direction, "") for direction in DIRECTIONS]
    if hasattr(cases_of(op), "compared"):  # no gradient
        return found[:1]
    frozen = FROZEN.get((op, case.name))
    return [*found, ("fwdbwd", frozen)] if frozen else found


def make_inputs(job: Job, case: Case) -> Inputs:
    """The case's inputs, with the public default where the case pins an algorithm."""
    inputs: Inputs = cases_of(job.op).make_inputs(case, DTYPES[job.dtype], job.device)
    return {**inputs, "algorithm": "auto"} if "algorithm" in inputs else inputs


@dataclass(frozen=True)
class Checked:
    """Errors beside their bound and beside eager's; what set the bound; on which sizes."""

    comparisons: list[Comparison]
    eager_errors: dict[str, float]
    bound: str
    sizes: str

    def worst(self, direction: str) -> Comparison:
        """The tensor nearest to its bound; a forward row answers for the output only."""
        return yardstick.worst(
            [c for c in self.comparisons if c.name == "out" or direction == "fwdbwd"]
        )


def check(job: Job, options: Options) -> Checked:
    """Output and gradients of the job's case against the reference in fp64."""
    cases = cases_of(job.op)
    limits = CHECK_QUICKLY if options.quick_check else CHECK_AT_MOST
    case = smaller(job.case, make_inputs(job, job.case), limits)
    inputs = make_inputs(job, case)
    changed = {k: v for k, v in case.sizes.items() if v != job.case.sizes[k]}
    sizes = ", ".join(f"{k}={v}" for k, v in changed.items())
    if hasattr(cases, "compared"):
        return _check_forward(cases, inputs, sizes)
    grad = yardstick.upstream(cases.run(inputs))
    got = gradients(cases.run, inputs, grad=grad)
    comparisons = yardstick.check(cases, inputs, got, grad)
    reference = gradients(cases.plain, in_fp64(inputs), grad=grad.double())
    baseline = cases.library if too_slow(replace(job, direction="fwdbwd")) else cases.eager
    theirs = gradients(baseline, inputs, grad=grad)
    errors = {n: _largest_error(theirs[n], reference[n]) for n in got}
    bound = "TOLERANCES.md"
    if _algorithm(job, inputs) == "projected":  # torch's own path: it rounds K and V, as eager does
        bound = "1.25× eager's error"
        comparisons = [_against_eager(c, errors[c.name]) for c in comparisons]
    return Checked(comparisons, errors, bound, sizes)


def _check_forward(cases: ModuleType, inputs: Inputs, sizes: str) -> Checked:
    """Of an op without a gradient: the worst of what it returns and writes answers for its output."""
    worst = yardstick.worst(cases.compared(inputs, cases.results(inputs)))
    theirs = cases.results(inputs, cases.APART["eager"])[worst.name]
    error = _largest_error(theirs, cases.reference_results(inputs)[worst.name])
    return Checked([replace(worst, name="out")], {"out": error}, "TOLERANCES.md", sizes)


def _largest_error(got: torch.Tensor, reference: torch.Tensor) -> float:
    return yardstick.largest((got.double() - reference).nan_to_num(0.0)).item()


def _against_eager(comparison: Comparison, eager_error: float) -> Comparison:
    ratio = comparison.error / (1.25 * eager_error) if eager_error else float(comparison.error > 0)
    return Comparison(comparison.name, ratio, comparison.error)


def _algorithm(job: Job, inputs: Inputs) -> str:
    """What ``algorithm="auto"`` chose: the absorbed one is the only one that calls our op."""
    if "algorithm" not in inputs:
        return ""
    with which_kernel_ran() as ran:
        cases_of(job.op).run(inputs)
    return "absorbed" if job.op in ran else "projected"


def _kernel(step: Step, inputs: Inputs) -> str:
    with which_kernel_ran() as ran:
        step(inputs)
    return "+".join(sorted(set(ran.values()))) or "torch"


def step_of(run: Function, job: Job) -> Step:
    """One forward, or one forward and backward, as a function of the inputs; returns what it made."""
    if job.direction == "fwd":
        return lambda inputs: _without_grad(run, inputs)
    grads: list[torch.Tensor] = []

    def step(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        outs = _outputs(run(inputs))
        if not grads:
            grads.extend(map(yardstick.upstream, outs))
        wanted = [t for t in leaves(inputs).values() if t.requires_grad]
        found = torch.autograd.grad(outs, wanted, grads, allow_unused=True)
        return (*(out.detach() for out in outs), *(g for g in found if g is not None))

    return step


def _outputs(out: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _without_grad(run: Function, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return _outputs(run(inputs))


def trainable(inputs: Inputs, frozen: str) -> Inputs:
    """Every float tensor a leaf that wants its gradient, but the frozen one."""
    wanted = {id(t) for name, t in leaves(inputs).items() if name != frozen}
    return map_tensors(inputs, lambda t: t.detach().requires_grad_(id(t) in wanted))


def variants(job: Job, inputs: Inputs, algorithm: str, compiled: bool) -> dict[str, Step]:
    """Ours and the baselines; for an op with algorithms, also the one ``auto`` did not choose."""
    cases = cases_of(job.op)
    functions = timed(cases)
    if algorithm:
        other = "projected" if algorithm == "absorbed" else "absorbed"
        functions[other] = lambda inputs: cases.run({**inputs, "algorithm": other})
    if compiled and not getattr(cases, "EXACT", False):  # a loop over lists is nothing to compile
        torch.compiler.reset()
        mode = "max-autotune-no-cudagraphs" if job.device == "cuda" else "default"
        functions["compile"] = torch.compile(functions["eager"], dynamic=False, mode=mode)
    if job.direction == "fwd" and hasattr(cases, "ceiling"):
        prepared = dict(inputs)
        cases.prepare_ceiling(prepared)
        functions["ceiling"] = lambda _: cases.ceiling(prepared)
    return {
        n: step_of(function, job) for n, function in functions.items() if n not in too_slow(job)
    }


def least_work(job: Job, inputs: Inputs) -> tuple[int, int]:
    """Bytes and FLOPs of the case; the cheaper algorithm where there are two."""
    moved, flops = cases_of(job.op).traffic(inputs)
    if job.op == "cross_attention":
        width, X = inputs["key_weight"].shape
        B, n, _ = inputs["context"].shape
        projected = 4 * B * n * width * X + 4 * B * inputs["query"].shape[-2] * n * width
        flops = min(flops, projected)
    return moved, flops


def checked(job: Job, options: Options, known: dict[Job, Checked]) -> Checked:
    """``check``, once for the rows of a case and dtype."""
    key = replace(job, direction="", frozen="")
    if key not in known:
        known[key] = check(job, options)
    return known[key]


def measure(job: Job, options: Options, known: dict[Job, Checked]) -> Row:
    """Checks, then times. A row out of its bound, or one that raises, has no times."""
    row = Row(job.op, job.case.name, job.dtype, job.direction, job.device, job.frozen)
    try:
        found = checked(job, options, known)
    except Exception as error:  # whatever a kernel does, the other rows are still measured
        row.failure = " ".join(f"{type(error).__name__}: {error}".split())
        return row
    worst = found.worst(job.direction)
    row.checked_on, row.bound = found.sizes, found.bound
    if not worst.ratio <= 1:
        row.failure = str(worst)
        return row
    row.worst, row.worst_ratio, row.error = worst.name, worst.ratio, worst.error
    row.eager_error = found.eager_errors[worst.name]
    _time(job, options, row)
    return row


def timed_inputs(job: Job) -> Inputs:
    """The full case, its leaves ready for a backward if the row has one."""
    inputs = make_inputs(job, job.case)
    return trainable(inputs, job.frozen) if job.direction == "fwdbwd" else inputs


def _time(job: Job, options: Options, row: Row) -> None:
    inputs = timed_inputs(job)
    row.algorithm = _algorithm(job, inputs)
    steps = variants(job, inputs, row.algorithm, options.compile)
    row.missing = dict.fromkeys(too_slow(job), "over 25 s") | _drop_broken(steps, inputs)
    row.kernel = _kernel(steps["ours"], inputs)
    for name in {"ours", "eager"} & steps.keys():
        call = functools.partial(steps[name], inputs)
        row.extra_bytes[name] = timing.peak_extra_bytes(call, job.device)
    copies = timing.cold_copies(inputs, _cache_bytes(job.device) if options.cold else 0)
    calls = {name: timing.rotating(step, copies) for name, step in steps.items()}
    dtype = DTYPES[job.dtype]  # beside integers: a GEMM in fp32
    limits = timing.ceilings(dtype if dtype.is_floating_point else torch.float32, job.device)
    times = timing.measure({**calls, **limits}, job.device, options.rounds)
    _fill(row, job, inputs, times)


def _drop_broken(steps: dict[str, Step], inputs: Inputs) -> dict[str, str]:
    """Runs each baseline once; those that raise leave ``steps`` and are named in the row."""
    broken: dict[str, str] = {}
    for name in [n for n in steps if n != "ours"]:
        try:
            steps[name](inputs)
        except Exception as error:  # a baseline's defect is not ours
            broken[name] = type(error).__name__
            del steps[name]
    return broken


def _cache_bytes(device: str) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else 0


def _fill(row: Row, job: Job, inputs: Inputs, times: dict[str, timing.Timing]) -> None:
    ours = times["ours"]
    row.machine = {
        "copy_bytes_per_s": timing.copy_bytes_per_s(times["copy"], job.device),
        "gemm_flops_per_s": timing.gemm_flops_per_s(times["gemm"], job.device),
    }
    kept = {name: t for name, t in times.items() if name not in ("copy", "gemm")}
    row.times_s = {n: {"median": t.median, "p20": t.p20, "p80": t.p80} for n, t in kept.items()}
    row.speedup = {
        n: timing.ratio(t, ours) for n, t in kept.items() if n not in ("ours", "ceiling")
    }
    if job.direction != "fwd":
        return
    moved, flops = least_work(job, inputs)
    row.bytes_per_s, row.flops_per_s = moved / ours.median, flops / ours.median
    floors = {
        "copy": moved / row.machine["copy_bytes_per_s"],
        "gemm": flops / row.machine["gemm_flops_per_s"],
    }
    row.ceiling = max(floors, key=lambda name: floors[name])
    row.fraction = floors[row.ceiling] / ours.median
    if "ceiling" in times:
        row.ceiling, row.fraction = "bare gemm", timing.ratio(times["ceiling"], ours)
