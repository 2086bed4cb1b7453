# SPDX-License-Identifier: Apache-2.0
"""Command line: ``mmkernels demo | train | generate | info | doctor | bench``."""

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

DEMO_DIR = Path("runs/demo")
SAMPLES = 4
EXAM_SIZE = 1200


class InputError(Exception):
    """One line for stderr that names argument and value."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; 0 = done, 2 = the input or the installation was at fault and stderr says how."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.handler(args)
        return code
    except (InputError, OSError, ValueError) as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        print(f"mmkernels {args.command}: {message}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing in ("None", "mmkernels"):
            raise
        extra = {"generate": "serve"}.get(args.command, "train")
        extra = "hf" if missing == "transformers" else extra
        remedy = f"pip install 'mmkernels[{extra}]'"
        print(f"mmkernels {args.command}: needs {missing}: {remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mmkernels {args.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmkernels", description="Kernels for MM-LLMs.")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="train the reference MM-LLM and test it (minutes)")
    demo.add_argument("--out", type=Path, default=DEMO_DIR, metavar="DIR")
    demo.add_argument(
        "--full", action="store_true", help="pictures, clips, speech, text and drawing"
    )
    demo.add_argument("--steps-scale", type=_positive, default=1.0, metavar="X")
    demo.set_defaults(handler=_demo)

    train = commands.add_parser("train", help="train the reference MM-LLM")
    what = train.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, metavar="FILE",
                      help="one stage by a YAML file, see train/run.py; goes on where --out stopped")  # fmt: skip
    what.add_argument("--stage", choices=("all", "pt", "it"),
                      help="of the image demo: all and pt start anew, it continues --out")  # fmt: skip
    train.add_argument("--out", type=Path, required=True, metavar="DIR")
    train.add_argument("--steps-scale", type=_positive, default=1.0, metavar="X",
                       help="multiplies the steps of the demo's stages")  # fmt: skip
    train.set_defaults(handler=_train)

    generate = commands.add_parser(
        "generate", help="answer a question about media, or a file of them"
    )
    what = generate.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT",
                      help="<image> in it places the image; else media come first")  # fmt: skip
    what.add_argument("--requests", type=Path, metavar="FILE",
                      help="JSON lines of id, prompt, image, video, audio, max_new_tokens; "
                           "exit code 1 if one of them failed")  # fmt: skip
    generate.add_argument("--image", type=Path, metavar="FILE", action="append", default=[])
    generate.add_argument("--video", type=Path, metavar="FRAME", nargs="+", default=[])
    generate.add_argument("--audio", type=Path, metavar="FILE")
    generate.add_argument("--checkpoint", type=Path, default=DEMO_DIR, metavar="DIR")
    generate.set_defaults(handler=_generate)

    info = commands.add_parser("info", help="versions, devices and which kernel runs")
    info.add_argument("--json", action="store_true")
    info.set_defaults(handler=_info)
    doctor = commands.add_parser("doctor", help="check this installation")
    doctor.set_defaults(handler=_doctor)
    bench = commands.add_parser("bench", help="every op beside eager on this machine (a minute)")
    bench.set_defaults(handler=_bench)
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


def _info(args: argparse.Namespace) -> int:
    from mmkernels import info

    return info.main(args)


def _doctor(args: argparse.Namespace) -> int:
    from mmkernels import doctor

    return doctor.main(args)


def _bench(args: argparse.Namespace) -> int:
    from mmkernels import bench

    return bench.main(args)


def _demo_full(out: Path, scale: float) -> int:
    from mmkernels.train import checkpoint, digits, evaluate, figure, pipeline, recipes, recognise

    began = time.perf_counter()
    run = pipeline.start(recipes.FULL)
    pipeline.train(run, tuple(recipes.FULL.steps), out, scale)
    found = evaluate.examine(run.model, max(8, round(evaluate.EXAM * min(1.0, scale))))
    assert run.text_before is not None  # the recipe has text
    found["before it"] = {"text": run.text_before}
    print(evaluate.table(found))
    pictures, asked = evaluate.draw_digits(run.model, max(2, round(20 * min(1.0, scale))))
    verdict = recognise.evaluate(
        pictures, asked, digits.load_scans("train"), digits.load_scans("heldout")
    )
    print(verdict)
    speed = figure.throughput(out / "end_to_end.json")
    told = f"{evaluate.table(found)}\n\n{verdict}\n\n{speed}"
    page = figure.draw_page(evaluate.some_of_each(run.model), pictures, run.losses, told)
    checkpoint.write_file(out / "demo-full.png", page)
    seconds = time.perf_counter() - began
    numbers = {"exact_match": found, "drawings": asdict(verdict), "seconds": seconds}
    checkpoint.write_file(out / "demo-full.json", json.dumps(numbers, indent=1).encode())
    print(f"{seconds:.0f} s; {out}/demo-full.png shows it, demo-full.json has the numbers")
    return 0


def _demo(args: argparse.Namespace) -> int:
    if args.full:
        return _demo_full(args.out, args.steps_scale)
    from mmkernels.train import checkpoint, evaluate, figure, mixture, pipeline

    began = time.perf_counter()
    run = pipeline.start()
    pipeline.train(run, tuple(run.recipe.steps), args.out, args.steps_scale)
    exam = mixture.exam(["image"], EXAM_SIZE)
    found = evaluate.answer_pictures(run.model, exam)
    scores, ours, reference = evaluate.by_kind(found), found["kernels"], found["reference"]
    print(evaluate.table(scores))
    print(f"commonest answer to each wording: {evaluate.majority(exam):.1%}")
    same = "identical" if ours.said == reference.said else "DIFFERENT"
    times = f"{ours.seconds:.1f} s and {reference.seconds:.1f} s"
    print(f"kernels and reference answers: {same}, in {times}")
    exact = sum(ours.right) / len(exam)
    title = f"held-out digits, exact match {exact:.1%}"
    picture = figure.draw_figure(ours, run.losses, title)
    checkpoint.write_file(args.out / "demo.png", picture)
    for i, sample in enumerate(exam[:SAMPLES]):
        pixels = sample.media[0][1]
        assert isinstance(pixels, torch.Tensor)
        checkpoint.write_file(args.out / f"sample_{i}.png", _png(pixels))
    print(f"{time.perf_counter() - began:.0f} s; {args.out}/demo.png shows the answers. Try:")
    print(
        f'  mmkernels generate --image {args.out}/sample_0.png --prompt "which digits are shown?"'
    )
    return 0


def _train(args: argparse.Namespace) -> int:
    from mmkernels.train import pipeline
    from mmkernels.train.checkpoint import CheckpointError

    if args.config is not None:
        return _train_by(args.config, args.out)
    try:
        run = pipeline.resume(args.out, "it") if args.stage == "it" else pipeline.start()
    except CheckpointError as error:
        raise InputError(f"--out {error}") from None
    every = tuple(run.recipe.steps)
    names = {"all": every, "pt": every[:-1], "it": every[-1:]}[args.stage]
    pipeline.train(run, names, args.out, args.steps_scale)
    print(f"{args.out}: stages {', '.join(run.stages)}")
    return 0


def _train_by(path: Path, out: Path) -> int:
    from mmkernels.train import distributed, mixture, run, torchrun
    from mmkernels.train.checkpoint import CheckpointError

    try:
        config = run.read_config(path)
        made = lambda c: mixture.Mixture(c.batch, c.tasks, c.seed)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            torchrun.train(config, out, made)
            distributed.leave()
        asked = (
            mixture.exam(list(config.tasks or mixture.TASKS), config.exam) if config.exam else []
        )
        trainer = run.train(config, out, made, [s for s in asked if s.draw is None])
    except CheckpointError as error:
        raise InputError(f"--out {error}") from None
    except ValueError as error:
        raise InputError(f"--config {error}") from None
    print(
        f"{out}: stage {config.stage}, {len(trainer.losses)} steps, loss {trainer.losses[-1]:.3f}"
    )
    return 0


def _generate(args: argparse.Namespace) -> int:
    from mmkernels.serve import Engine, RequestError, media_of, serve_lines
    from mmkernels.train import checkpoint

    media = {"image": args.image, "video": args.video, "audio": args.audio}
    given = [name for name, value in media.items() if value]
    if args.requests is not None and given:
        raise InputError(f"--{given[0]}: goes with --prompt; a line of --requests names its own")
    try:
        model = checkpoint.load(args.checkpoint).model
    except checkpoint.CheckpointError as error:
        raise InputError(f"--checkpoint {error}") from None
    engine = Engine(model)
    if args.requests is not None:  # bytes that are not UTF-8 are their line's fault alone
        with open(args.requests, encoding="utf-8", errors="surrogateescape") as lines:
            return int(serve_lines(model, lines, sys.stdout, engine) > 0)
    try:
        request = engine.submit(args.prompt, media_of(model, media))
        for piece in engine.stream(request):
            print(piece, end="", flush=True)
    except RequestError as error:
        raise InputError(_flagged(str(error))) from None
    if request.error:
        raise InputError(_flagged(request.error))
    print()
    return 0


def _flagged(problem: str) -> str:
    """``field: …`` as its flag, where the field has one."""
    field = problem.partition(":")[0]
    return f"--{problem}" if field in ("prompt", "image", "video", "audio") else problem


def _png(pixels: torch.Tensor) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
    return buffer.getvalue()
