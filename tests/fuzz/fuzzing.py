# SPDX-License-Identifier: Apache-2.0
"""Random calls of an op against its reference, by the bound of TOLERANCES.md, and spoiled calls that must raise.

An op adds ``fuzz_<op>.py`` next to this file, with ``OP``, ``CASES`` (its ``cases.py``), ``KINDS``, and
``draw(random, kind) -> letters``; ``build(letters) -> (inputs, the same inputs spelled out for the reference)``;
``spoil(random, inputs, letters) -> (what was done, inputs)``; ``SIMPLEST``, the letters a failure shrinks to;
``KNOWN``, bugs that are known.

``python tests/fuzz/fuzzing.py --cases 10000`` (``make fuzz``) runs them in processes of their own: a crash is a
failure like any other. A failure prints its seed, ``--op … --kind … --seed …``, and the smallest call like it.
"""

import argparse
import contextlib
import importlib
import itertools
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from layouts import laid_out

from mmkernels import backends
from mmkernels.testing import gradients, yardstick
from mmkernels.testing.case import Inputs, map_tensors

OPS = tuple(sorted(p.stem.removeprefix("fuzz_") for p in Path(__file__).parent.glob("fuzz_*.py")))
Letters = dict[str, Any]


def module_of(op: str) -> ModuleType:
    return importlib.import_module(f"fuzz_{op}")


def poison() -> None:
    """As tests/conftest.py: what ``torch.empty`` returns is NaN or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def failure(op: ModuleType, letters: Letters) -> str:
    """What is wrong with this call, "" if nothing: its class up to the colon, then details."""
    try:
        inputs, spelled = op.build(letters)
    except Exception as error:
        return f"build {type(error).__name__}: {error}"
    try:
        return _wrong(op, letters, inputs, spelled)
    except Exception as error:
        return f"raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _wrong(op: ModuleType, letters: Letters, inputs: Inputs, spelled: Inputs) -> str:
    before = map_tensors(inputs, torch.clone)
    torch.set_num_threads(letters["threads"])
    grad = yardstick.upstream(op.CASES.run(inputs))
    for name, layout, seed in letters["layouts"]:
        grad = laid_out(grad, layout, seed) if name == "grad" else grad
    got = gradients(op.CASES.run, inputs, grad=grad)
    if not same(inputs, before):
        return "inputs changed"
    torch.set_num_threads(1 + letters["threads"] % 3)
    again = gradients(op.CASES.run, inputs, grad=grad)
    for name in got:
        if not torch.equal(got[name], again[name]):
            return f"bits {name}: differ with another number of threads"
    failed = [c for c in compared(op.CASES, spelled, got, grad) if not c.ratio <= 1]
    return f"bound {failed[0].name}: " + "; ".join(map(str, failed)) if failed else ""


def compared(
    cases: ModuleType,
    inputs: Inputs,
    got: dict[str, torch.Tensor],
    grad: torch.Tensor,
) -> list[yardstick.Comparison]:
    """``yardstick.check``, also where an input (pixels) has another dtype than the output.

    Beside an fp64 output a narrower gradient rounds once; beside a narrower output an fp64 gradient holds
    fp32 sums (it is compared as what it is: fp32).
    """
    wide = torch.float64
    if got["out"].dtype != wide:
        rounded = {n: t.float() if t.dtype == wide else t for n, t in got.items()}
        return yardstick.check(cases, inputs, rounded, grad)
    own = {n: t for n, t in got.items() if t.dtype == wide}
    found = yardstick.check(cases, inputs, own, grad)
    if len(own) < len(got):
        reference = gradients(cases.plain, yardstick.in_fp64(inputs), grad=grad)
        for n in got.keys() - own.keys():
            bound = 0.505 * yardstick.ulp(reference[n], got[n].dtype)
            bound += 1e-9 * yardstick.largest(reference[n]).clamp(min=1e-3)
            found.append(yardstick.compare(n, got[n], reference[n], bound))
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor) and a.device.type != "meta":
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    return isinstance(a, torch.Tensor) or a is b or a == b or a != a


@contextlib.contextmanager
def little_memory(more: int = 4 * 2**30) -> Iterator[None]:
    """A call that must raise does not take the machine's memory instead: MemoryError. Not under ASan."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if "asan" not in os.environ.get("LD_PRELOAD", ""):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more
        if before[1] == resource.RLIM_INFINITY or limit < before[1]:
            resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def failure_of_spoiled(op: ModuleType, letters: Letters, seed: int) -> str:
    """A spoiled call must raise, name the op, say it in a line and leave its inputs as they were."""
    what, inputs = op.spoil(random.Random(seed), op.build(letters)[0], letters)
    before = map_tensors(inputs, torch.clone)
    try:
        with little_memory():
            out = op.CASES.run(inputs)
    except (ValueError, TypeError) as error:
        text = str(error)
        if not text.startswith(f"{op.OP}: ") or "\n" in text:
            return f"message of {what}: {type(error).__name__}: {text!r}"
        return "" if same(inputs, before) else f"inputs changed by {what}: {text}"
    except Exception as error:
        return f"wrong error of {what}: {type(error).__name__}: {error}"
    return f"accepted {what}: gave {list(out.shape)}"


def run_one(op: ModuleType, kind: str, seed: int) -> str:
    """A valid call and, of every fourth seed, a spoiled one."""
    letters = op.draw(random.Random(f"{op.OP} {kind} {seed}"), kind)
    if seed % 4 == 3:
        return failure_of_spoiled(op, letters, seed)
    why = failure(op, letters)
    return "" if why and any(known(letters, why) for known in op.KNOWN.values()) else why


def details(op: ModuleType, kind: str, seed: int, message: str) -> str:
    """The failure, how to run it again, and the smallest call like it."""
    letters = op.draw(random.Random(f"{op.OP} {kind} {seed}"), kind)
    check = lambda x: failure_of_spoiled(op, x, seed) if seed % 4 == 3 else failure(op, x)
    small, why = shrunk(op, letters, message, check)
    told = {k: v for k, v in small.items() if v != op.SIMPLEST.get(k)}
    again = f"python tests/fuzz/fuzzing.py --op {op.OP} --kind {kind} --seed {seed}"
    done = ""
    if seed % 4 == 3:
        what, inputs = op.spoil(random.Random(seed), op.build(small)[0], small)
        done = f"\n  inputs: {summary(inputs)}"
    return f"{message}\n  again: {again}\n  shrunk: {told}\n  fails: {why}{done}"


def summary(inputs: Inputs) -> str:
    def of(v: Any) -> str:
        if isinstance(v, torch.Tensor):
            small = v.tolist() if v.dtype in (torch.int64, torch.int32) and v.numel() < 20 else ""
            return f"{str(v.dtype).removeprefix('torch.')}{list(v.shape)}{small}"
        if isinstance(v, list) and v and isinstance(v[0], torch.Tensor):
            return f"[{', '.join(map(of, v))}]"
        return repr(v)

    return ", ".join(f"{k}={of(v)}" for k, v in inputs.items())


def shrunk(
    op: ModuleType, letters: Letters, message: str, check: Any, seconds: float = 60
) -> tuple[Letters, str]:
    """Greedy: takes any simpler letter with which the call still fails in the same class."""
    kind, best = message.split(":")[0], message
    progress, end = True, time.monotonic() + seconds
    while progress:
        progress = False
        for letter, value in itertools.chain.from_iterable(
            [(k, v) for v in simpler(letters[k], op.SIMPLEST[k])]
            for k in op.SIMPLEST
            if k in letters
        ):
            if letters[letter] == value:
                continue
            if time.monotonic() > end:
                return letters, best
            try:
                now = check({**letters, letter: value})
            except Exception:
                continue
            if now.split(":")[0] == kind:
                letters, best, progress = {**letters, letter: value}, now, True
                break
    return letters, best


def simpler(value: Any, simplest: Any) -> Iterator[Any]:
    """Simpler values, the simplest first."""
    if value == simplest:
        return
    yield simplest
    if isinstance(value, bool) or isinstance(value, str) or value is None:
        return
    if isinstance(value, int):
        low = simplest if isinstance(simplest, int) else 0
        yield from (low + (value - low) // 2, value - 1) if value > low + 1 else ()
    if isinstance(value, tuple):
        for i in range(len(value)):
            if len(value) > 1:
                yield (*value[:i], *value[i + 1 :])
            small = [v for v in simpler(value[i], 1) if isinstance(v, int | tuple)]
            yield from (
                (*value[:i], v, *value[i + 1 :]) for v in small if not isinstance(value[i], str)
            )


def _work(
    op: str, kind: str, seeds: range, step: int, at: Any, found: Any, details_too: bool
) -> None:
    torch.manual_seed(0)
    poison()
    module = module_of(op)
    for seed in seeds[::step]:
        at.value = seed
        message = run_one(module, kind, seed)
        if message:
            found.put((seed, details(module, kind, seed, message) if details_too else message))
    at.value = seeds.stop


class Worker:
    """A process of its own; if it dies, the seed it died of is a failure and the next one takes its place."""

    def __init__(self, op: str, kind: str, seeds: range) -> None:
        self.op, self.kind, self.seeds = op, kind, seeds
        self.context = multiprocessing.get_context("spawn")
        self.found = self.context.Queue()
        self.start(seeds)

    def start(self, seeds: range) -> None:
        self.rest = seeds
        self.at = self.context.Value("q", seeds.start, lock=False)
        args = (self.op, self.kind, seeds, 1, self.at, self.found, True)
        self.process = self.context.Process(target=_work, args=args, daemon=True)
        self.process.start()

    def poll(self) -> tuple[int, list[tuple[int, str]]]:
        """How many calls are done, and new failures."""
        failures = []
        alive = self.process.is_alive()
        while not self.found.empty():
            failures.append(self.found.get())
        if not alive and self.process.exitcode != 0:
            seed = self.at.value
            again = f"python tests/fuzz/fuzzing.py --op {self.op} --kind {self.kind} --seed {seed}"
            code = self.process.exitcode
            failures.append((seed, f"the process died with {code}\n  again: {again}"))
            self.start(self.seeds[(seed - self.seeds.start) // self.seeds.step + 1 :])
        elif not alive:
            return len(self.seeds), failures
        return max(0, (self.at.value - self.seeds.start) // self.seeds.step), failures


def fuzz(op: str, kind: str, first: int, count: int, jobs: int, most_failures: int = 20) -> int:
    """Runs ``count`` seeds in ``jobs`` processes; prints progress and failures; returns how many failed."""
    workers = [Worker(op, kind, range(first + j, first + count, jobs)) for j in range(jobs)]
    start, failures, shown = time.monotonic(), 0, 0.0
    while True:
        alive = any(w.process.is_alive() for w in workers)
        done = 0
        for worker in workers:
            some, found = worker.poll()
            done += some
            failures += len(found)
            for seed, message in found:
                print(f"FAILED {op} {kind} seed {seed}: {message}", flush=True)
        elapsed = time.monotonic() - start
        finished = not alive and all(w.process.exitcode == 0 and w.found.empty() for w in workers)
        if elapsed - shown > 10 or finished or failures >= most_failures:
            shown = elapsed
            print(
                f"fuzz {op} {kind}: {done}/{count} calls, {failures} failed, {elapsed:.0f} s",
                flush=True,
            )
        if finished or failures >= most_failures:
            for worker in workers:
                worker.process.terminate()
            return failures
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OPS)
    parser.add_argument("--kind")
    parser.add_argument("--cases", type=int, default=int(os.environ.get("FUZZ_CASES", "10000")))
    parser.add_argument("--first", type=int, default=int(os.environ.get("FUZZ_SEED", "0")))
    parser.add_argument("--seed", type=int, help="one call, in this process")
    parser.add_argument(
        "--jobs", type=int, default=int(os.environ.get("FUZZ_JOBS", os.cpu_count() or 1))
    )
    parser.add_argument("--out", type=Path, help="keeps how many calls of each kind held")
    args = parser.parse_args()
    failures, told = 0, list[str]()
    for op in [args.op] if args.op else OPS:
        module = module_of(op)
        kernel, reason = backends.chosen_kernel(op, "cpu")
        if kernel != "c++":
            raise SystemExit(f"fuzz: {op} would run {kernel}: {reason}")
        for kind in [args.kind] if args.kind else module.KINDS:
            if args.seed is None:
                failed = fuzz(op, kind, args.first, args.cases, args.jobs)
                failures += failed
                last = args.first + args.cases - 1
                told.append(f"{op} {kind}: seeds {args.first} to {last}, {failed} failed")
                continue
            poison()
            letters = module.draw(random.Random(f"{op} {kind} {args.seed}"), kind)
            print(letters, summary(module.build(letters)[0]), sep="\n")
            message = run_one(module, kind, args.seed)
            print(details(module, kind, args.seed, message) if message else "holds")
            failures += bool(message)
    if args.out is not None:
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
        calls = args.cases * len(told)
        head = (
            f"{calls} random calls, {failures} failed, commit {commit}, torch {torch.__version__}"
        )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join((head, "", *told, "")))
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
