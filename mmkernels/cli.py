# SPDX-License-Identifier: Apache-2.0
"""Command line: ``mmkernels demo | train | generate | info | doctor``."""

import argparse
import io
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

DEMO_DIR = Path("runs/demo")
MAX_PIXELS = 64_000_000
SAMPLES = 4
EXAM_SIZE = 1200


class InputError(Exception):
    """One line for stderr that names argument and value."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; 0 = done, 2 = the input was at fault and stderr says how."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.handler(args)
        return code
    except (InputError, OSError, ValueError) as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        print(f"mmkernels {args.command}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mmkernels {args.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmkernels", description="Kernels for MM-LLMs.")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="train the reference MM-LLM and test it (minutes)")
    demo.add_argument("--out", type=Path, default=DEMO_DIR, metavar="DIR")
    demo.add_argument("--steps-scale", type=_positive, default=1.0, metavar="X")
    demo.set_defaults(handler=_demo)

    train = commands.add_parser("train", help="train stages of the reference MM-LLM")
    train.add_argument("--stage", choices=("all", "pt", "it"), required=True,
                       help="all and pt start anew; it continues the checkpoint in --out")  # fmt: skip
    train.add_argument("--out", type=Path, required=True, metavar="DIR")
    train.add_argument("--steps-scale", type=_positive, default=1.0, metavar="X",
                       help="multiplies the steps of every stage")  # fmt: skip
    train.set_defaults(handler=_train)

    generate = commands.add_parser("generate", help="answer a question about a picture")
    generate.add_argument("--image", type=Path, required=True, metavar="FILE")
    generate.add_argument("--prompt", required=True, metavar="TEXT",
                          help="<image> in it places the image; else the image comes first")  # fmt: skip
    generate.add_argument("--checkpoint", type=Path, default=DEMO_DIR, metavar="DIR")
    generate.set_defaults(handler=_generate)

    info = commands.add_parser("info", help="versions, devices and which kernel runs")
    info.add_argument("--json", action="store_true")
    info.set_defaults(handler=_info)
    doctor = commands.add_parser("doctor", help="check this installation")
    doctor.set_defaults(handler=_doctor)
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


def _demo(args: argparse.Namespace) -> int:
    from mmkernels.train import checkpoint, digits, evaluate, figure, pipeline

    began = time.perf_counter()
    run = pipeline.start()
    pipeline.train(run, ("vision", "language", "pt", "it"), args.out, args.steps_scale)
    exam = evaluate.draw_exam(digits.load_scans("heldout"), EXAM_SIZE)
    scores = evaluate.run_all(run.model, exam)
    print(evaluate.table(scores, exam))
    picture = figure.draw_figure(exam, scores[0], run.losses)
    checkpoint.write_file(args.out / "demo.png", picture)
    for i in range(SAMPLES):
        checkpoint.write_file(args.out / f"sample_{i}.png", _png(exam.pixel_values[i]))
    print(f"{time.perf_counter() - began:.0f} s; {args.out}/demo.png shows the answers. Try:")
    print(
        f'  mmkernels generate --image {args.out}/sample_0.png --prompt "which digits are shown?"'
    )
    return 0


def _train(args: argparse.Namespace) -> int:
    from mmkernels.train import pipeline
    from mmkernels.train.checkpoint import CheckpointError

    try:
        run = pipeline.resume(args.out, "it") if args.stage == "it" else pipeline.start()
    except CheckpointError as error:
        raise InputError(f"--out {error}") from None
    names = {
        "all": ("vision", "language", "pt", "it"),
        "pt": ("vision", "language", "pt"),
        "it": ("it",),
    }[args.stage]
    pipeline.train(run, names, args.out, args.steps_scale)
    print(f"{args.out}: stages {', '.join(run.stages)}")
    return 0


def _generate(args: argparse.Namespace) -> int:
    from mmkernels.train import checkpoint, evaluate

    if not args.prompt.strip():
        raise InputError("--prompt must not be empty")
    try:
        model = checkpoint.load(args.checkpoint).model
    except checkpoint.CheckpointError as error:
        raise InputError(f"--checkpoint {error}") from None
    pixel_values = read_image(args.image, model.image_size)
    try:
        (text,) = evaluate.answer(model, pixel_values, [args.prompt])
    except ValueError as error:
        raise InputError(f"--prompt {args.prompt!r}: {error}") from None
    print(text)
    return 0


def read_image(path: Path, side: int) -> torch.Tensor:
    """Any PNG or JPEG as ``[1, 3, side, side]`` uint8; the size is checked before pixels are decoded.

    Raises:
        InputError: Missing, unreadable, too large, truncated or corrupt; names the file.
    """
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings(), Image.open(path, formats=("PNG", "JPEG")) as image:
            warnings.simplefilter("ignore")
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InputError(
                    f"--image {path}: {width}×{height} pixels, at most {MAX_PIXELS} are read"
                )
            image.load()
            pixels = np.asarray(
                image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
            )
    except UnidentifiedImageError:
        raise InputError(f"--image {path}: not a PNG or JPEG, or its header is corrupt") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"--image {path}: {error}") from None
    except OSError as error:
        raise InputError(f"--image {path}: {error.strerror or error}") from None
    except (SyntaxError, ValueError) as error:  # Pillow's words for a broken PNG
        raise InputError(f"--image {path}: corrupt: {error}") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]


def _png(pixels: torch.Tensor) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
    return buffer.getvalue()
