# SPDX-License-Identifier: Apache-2.0
"""Small faults put into the sources by rule, one at a time: the ordinary suite must notice 9 of 10.

``python tests/mutants.py [--count 50] [--seed 0] [--only I …] [--out FILE]``. A mutant is one line changed by a rule
below, drawn with a fixed seed from files drawn by ``SHARES``. The tests nearest to the file run first and the rest of
``make test`` only if they pass. Two copies of the tree work side by side, a thread each. The report names every mutant
with what noticed it, survivors with their diff. A test that fails on the whole sources too has noticed nothing: that, a
mutant without a verdict, or more than a tenth of survivors is exit code 1.
"""

import argparse
import io
import os
import queue
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LIMIT_S = 1800  # a mutant that hangs is noticed, too
SURVIVED, STILLBORN, BROKEN = "SURVIVED", "does not compile", "FAILS WITHOUT IT, TOO"
SHARES = {  # of the mutants, by files
    "csrc/*/*.[ch]*": 0.44,
    "mmkernels/ops/*/triton*.py": 0.16,
    "mmkernels/ops/*/*.py": 0.16,
    "mmkernels/[cn]*/*.py": 0.08,  # cache, nn
    "mmkernels/[mst]*/*.py": 0.1,  # models, serve, train
    "mmkernels/hf/*.py": 0.06,
}
# What is no part of a result: sizes of blocks, messages, data, the suite itself, what answers mypy's questions; and
# CUDA C++, which nothing runs here.
NOT_FILES = re.compile(
    r"cuda|\.cu$|testing/|cases\.py|baselines|invalid|families|presets|flops|cost\.py|figure|__"
)
NOT_LINES = re.compile(
    r"grain|prefetch|thread|SPLITS|BLOCK|kBlock|warps|stages|reserve|static|constexpr|template|tqdm|print|fail\(|raise"
    r"|import|assert|lambda|def |#|//|\"\"\"|->|is not None|isinstance"
)
RULES = {
    "off by one": [
        (r"(for \([^;]*;[^;]*<) ([^;]+);", r"\1 \2 - 1;"),
        (r"(for \([^;=]*= )0;", r"\g<1>1;"),
        (r"range\(((?:[^(),]|\([^()]*\))+)\)", r"range(\1 - 1)"),
        (r"range\(0, ((?:[^(),]|\([^()]*\))+)\)", r"range(0, \1 - 1)"),
    ],
    "dropped tail": [
        (r"(?:std::min(?:<\w+>)?|min64)\(([^(),]+), [^()]+\)", r"(\1)"),
        (r"\bceil_div\(([^(),]+), ([^(),]+)\)", r"(\1) / (\2)"),
        (r"tl\.cdiv\(([^(),]+), ([^(),]+)\)", r"((\1) // (\2))"),
    ],
    "swapped index": [
        (r"\b(\w+) \* (\w+) \+ (\w+)\b(?! \*)", r"\1 * \3 + \2"),
        (r"\[(\w+)\]\[(\w+)\]", r"[\2][\1]"),
    ],
    "scale": [
        (r"\b(const )?(float|double|F) (\w+) = ([^;,]+);", r"\1\2 \3 = 1.01f * (\4);"),
        (r"\* (\w*[Ss]cale\w*)\b(?!\()", r"* 1.01 * \1"),
        (r"^(\s+\w+) \*= (.+?);?$", r"\1 *= 1.01 * (\2)"),
    ],
    "missing mask": [
        (r"\bif \((?!.*\bconstexpr)(.+)\) (continue|return;)", r"if (false) \2"),
        (r"\bif \(([^()]+)\) (?!fail|throw)(.+)$", r"if (true) \2"),
        (r" & \([^()]+\)", ""),
        (r" && [^()&|]+\)", ")"),
        (r" and [^()]+:$", ":"),
        (r"tl\.where\([^,()]+, ([^,()]+), [^,()]+\)", r"\1"),
    ],
    "comparison": [
        (r"(if|while|return|=|\() ?(.*) < (\w)", r"\1 \2 <= \3"),
        (r" >= (\w)", r" > \1"),
        (r" == (\w)", r" != \1"),
    ],
    "sign": [(r"(\w|\)) \+ (\w|\()", r"\1 - \2"), (r"(\w|\)) - (\w|\()", r"\1 + \2")],
}  # fmt: skip

NEAR = {  # tests of what is no op
    "cache": ("cache", "chunked", "transformers_cache"), "nn": ("nn_", "transformers_p"),
    "models": ("blocks", "models", "parts", "presets", "generator", "drawing", "lora"),
    "train": ("data", "train", "distributed", "torchrun", "cli"), "serve": ("serve", "cli"),
    "hf": ("patch.", "patch_c"),
}  # fmt: skip


class Mutant(NamedTuple):
    file: str
    line: int  # from 0
    rule: str
    new: str

    def diff(self) -> str:
        old = (ROOT / self.file).read_text().splitlines()[self.line]
        return f"-{old}\n+{self.new}"

    def source(self) -> str:
        lines = (ROOT / self.file).read_text().splitlines()
        lines[self.line] = self.new
        return "\n".join(lines) + "\n"


def code_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that compute something."""
    text = path.read_text()
    skipped: set[int] = set()
    if path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.STRING:
                skipped.update(range(token.start[0] - 1, token.end[0]))
    for i, line in enumerate(text.splitlines()):
        if (
            i not in skipped
            and line.strip()
            and not line.startswith("#")
            and not NOT_LINES.search(line)
        ):
            yield i, line


def mutants_of(path: Path) -> dict[str, list[Mutant]]:
    """All that the rules make of a file, by rule."""
    found: dict[str, list[Mutant]] = {}
    for i, line in code_lines(path):
        for rule, pairs in RULES.items():
            for pattern, to in pairs:
                new = re.sub(pattern, to, line, count=1)
                mutant = Mutant(str(path.relative_to(ROOT)), i, rule, new)
                if new != line and (path.suffix != ".py" or _compiles(mutant)):
                    found.setdefault(rule, []).append(mutant)
    return found


def _compiles(mutant: Mutant) -> bool:
    try:
        compile(mutant.source(), mutant.file, "exec")
    except SyntaxError:
        return False
    return True


def draw(count: int, seed: int) -> list[Mutant]:
    """A file by its share, a rule, a place: as often as wanted, never a line twice."""
    rng, found, taken = random.Random(seed), list[Mutant](), set[tuple[str, int]]()
    for pattern, share in SHARES.items():
        files = sorted(
            p for p in ROOT.glob(pattern) if not NOT_FILES.search(str(p.relative_to(ROOT)))
        )
        if pattern.endswith("/*.py"):
            files = [p for p in files if "triton" not in p.name]
        wanted = len(found) + round(count * share)
        while len(found) < wanted:
            by_rule = mutants_of(rng.choice(files)) or {"": []}
            made = by_rule[rng.choice(sorted(by_rule))]
            fresh = [m for m in made if m[:2] not in taken]
            if fresh:
                found.append(rng.choice(fresh))
                taken.add(found[-1][:2])
    return found


def suites(mutant: Mutant) -> list[list[str]]:
    """pytest's arguments: the nearest tests, then everything."""
    path = Path(mutant.file)
    op = path.parts[2] if path.parts[1] == "ops" else path.parent.name
    ops = "mrope or rope_write_kv" if op == "rope" else "" if op == "common" else op
    if path.name.startswith("triton"):
        return [["tests/interpreted", "-k", ops], ["tests/interpreted"]]
    everything = ["tests", "benchmarks/test_harness.py"]
    if path.parts[0] == "csrc" or path.parts[1] == "ops":
        own = [
            f"tests/test_{o}.py"
            for o in ops.split(" or ")
            if (ROOT / f"tests/test_{o}.py").exists()
        ]
        header = ["tests/test_headers.py"] if path.suffix == ".h" else []
        near = ["tests/test_ops.py", "tests/fuzz", *own]
        return [[*header, *near, *(["-k", f"{ops} or headers"] if ops else [])], everything]
    near = [
        str(p.relative_to(ROOT))
        for n in NEAR[path.parts[1]]
        for p in sorted((ROOT / "tests").glob(f"test_{n}*"))
    ]
    return [near, everything]


class Copy:
    """A copy of the tree with a build of its own."""

    def __init__(self, where: Path) -> None:
        self.where = where
        files = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
        ).stdout
        subprocess.run(
            f"xargs -0 cp --parents -t {where}", shell=True, cwd=ROOT, input=files, check=True
        )
        subprocess.run(["git", "init", "-q"], cwd=where, check=True)
        asked = [sys.executable, "-c", "import torch; print(torch.__path__[0])"]
        torch = subprocess.check_output(asked, text=True).strip()
        self._run(
            "cmake", "-S", ".", "-B", "build", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DTORCH_DIR={torch}", "-DMMK_BUILD=cpu",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={where}/mmkernels",
        )  # fmt: skip
        assert self.build() == 0

    def _run(self, *command: str, **more: str) -> int:
        tools = str(Path(sys.executable).parent)
        env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(self.where),
               "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **more}  # fmt: skip
        with open(self.where / "log.txt", "w") as log:
            try:
                done = subprocess.run(
                    command, cwd=self.where, env=env, stdout=log, stderr=log, timeout=LIMIT_S
                )
            except subprocess.TimeoutExpired:
                return 124
        return done.returncode

    def build(self) -> int:
        return self._run("cmake", "--build", "build", "-j", "1")

    def verdict(self, mutant: Mutant) -> str:
        """What noticed it, or one of the other words."""
        file = self.where / mutant.file
        whole, native = file.read_text(), mutant.file.startswith("csrc")
        file.write_text(mutant.source())
        try:
            if native and self.build():
                return STILLBORN
            found = next(filter(None, map(self._noticed, suites(mutant))), SURVIVED)
        finally:
            file.write_text(whole)
            assert not native or self.build() == 0
        test = found.partition("[")[0]  # whole: an id may hold blanks
        if "::" in test and self._noticed([test]):
            return f"{BROKEN}: {found}"
        return found

    def _noticed(self, suite: list[str]) -> str:
        more = {"TRITON_INTERPRET": "1"} if suite[0].startswith("tests/interpreted") else {}
        code = self._run(
            sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *suite, **more
        )
        if code in (0, 5):  # 5: no test was chosen
            return ""
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", (self.where / "log.txt").read_text(), re.M)
        return failed[0] if failed else {124: "it hangs"}.get(code, f"exit code {code}")


def work(
    todo: "queue.Queue[tuple[int, Mutant]]", found: dict[int, str], folder: str, total: int
) -> None:
    copy = Copy(Path(folder))
    while True:
        try:
            i, mutant = todo.get_nowait()
        except queue.Empty:
            return
        start = time.monotonic()
        found[i] = copy.verdict(mutant)
        place = f"{mutant.file}:{mutant.line + 1}"
        print(
            f"{i:>3} of {total} {time.monotonic() - start:5.0f} s  {place} {mutant.rule}: {found[i]}",
            flush=True,
        )


def report(mutants: list[Mutant], found: dict[int, str], seed: int) -> str:
    born = {i: v for i, v in found.items() if v != STILLBORN}
    alive = [i for i, v in born.items() if v == SURVIVED or v.startswith(BROKEN)]
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    lines = [f"{len(born) - len(alive)} of {len(born)} mutants noticed, commit {commit}, seed {seed}; "
             f"{len(found) - len(born)} did not compile.", ""]  # fmt: skip
    for i in alive:
        lines += [
            f"{found[i]}: {mutants[i].file}:{mutants[i].line + 1} ({mutants[i].rule})",
            mutants[i].diff(),
            "",
        ]
    lines += [
        f"{mutants[i].file}:{mutants[i].line + 1} {mutants[i].rule}: {v}"
        for i, v in sorted(born.items())
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    mutants, found = draw(args.count, args.seed), dict[int, str]()
    chosen = sorted(args.only or range(len(mutants)), key=lambda i: mutants[i].file)
    todo: queue.Queue[tuple[int, Mutant]] = queue.Queue()
    for i in chosen:
        todo.put((i, mutants[i]))
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        workers = [
            threading.Thread(target=work, args=(todo, found, f, len(mutants))) for f in (a, b)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    told = report(mutants, found, args.seed)
    print(told)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(told)
    words = list(found.values())
    bad = len(words) < len(chosen) or any(w.startswith(BROKEN) for w in words)
    return int(bad or words.count(SURVIVED) * 10 > len(words) - words.count(STILLBORN))


if __name__ == "__main__":
    sys.exit(main())
