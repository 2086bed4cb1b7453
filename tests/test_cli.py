# SPDX-License-Identifier: Apache-2.0
"""The command line: a miniature demo end to end, and one clear line for every wrong input."""

import importlib
import json
import random
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from tiny_models import tiny_config

from mmkernels import OPS, bench, cli
from mmkernels.models import MMLLM
from mmkernels.ops.merge_embeddings import cases as merge_cases
from mmkernels.serve import RequestError
from mmkernels.serve.files import read_image
from mmkernels.testing import timing
from mmkernels.train import checkpoint, pipeline

TINY = tiny_config(32, queries=3, qformer_layers=1, decoder_layers=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    checkpoint.save(directory, MMLLM(TINY), ("vision", "language", "pt"))
    return directory


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (50, 70), (9, 99, 200)).save(path)
    return path


def _generate(trained: Path, image: Path, prompt: str = "which digits?") -> int:
    return cli.main(
        ["generate", "--image", str(image), "--prompt", prompt, "--checkpoint", str(trained)]
    )


def _one_line(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err, err


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "I;16"])
def test_generate_takes_any_png(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    Image.new(mode, (300, 20)).save(tmp_path / "x.png")
    assert _generate(trained, tmp_path / "x.png") == 0
    assert capsys.readouterr().err == ""


ORIENTATIONS = {  # from the upright picture to what lies in the file, by EXIF's number
    1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}  # fmt: skip


def _upright() -> np.ndarray:
    """A picture of four corners, higher than wide, that no turn or reflection leaves alike."""
    pixels = np.zeros((48, 32, 3), dtype=np.uint8)
    pixels[:24, :16], pixels[:24, 16:], pixels[24:, :16] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    return pixels


def _turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_pictures_are_read_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    upright, path = Image.fromarray(_upright()), tmp_path / f"x.{kind}"
    upright.save(tmp_path / "upright.png")
    lying = Image.fromarray(np.ascontiguousarray(ORIENTATIONS[orientation](_upright())))
    lying.save(path, exif=_turned(orientation), quality=100, subsampling=0)
    turned = np.asarray(ImageOps.exif_transpose(Image.open(path))).astype(int)
    assert np.abs(turned - _upright()).max() <= (0 if kind == "png" else 4)  # the file says so
    pixels, expected = read_image(path, 32), read_image(tmp_path / "upright.png", 32)
    assert (pixels.int() - expected.int()).abs().max() <= (0 if kind == "png" else 4)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "I;16"])
def test_pictures_of_every_mode_are_read_upright(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(_upright()).convert("L")
    if mode == "I;16":
        whole = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256)
    else:
        whole = grey.convert(mode)
    whole.save(tmp_path / "upright.png")
    whole.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "x.png", exif=_turned(6))
    expected = read_image(tmp_path / "upright.png", 32)
    assert torch.equal(read_image(tmp_path / "x.png", 32), expected)
    assert len(expected.unique()) > 1


def test_16_bits_of_grey_are_read_as_8(tmp_path: Path) -> None:
    """Their high bytes, as Pillow takes of colours; all but black was white."""
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 256 + 77).save(tmp_path / "16.png")
    assert torch.equal(read_image(tmp_path / "16.png", 16), read_image(tmp_path / "8.png", 16))


def test_a_damaged_exif_leaves_the_picture_readable(tmp_path: Path) -> None:
    """As viewers do, also where Pillow's ``exif_transpose`` fails to write it anew."""
    rng, path = random.Random(0), tmp_path / "x"
    exif = _turned(6)
    exif[ExifTags.Base.Make], exif[ExifTags.Base.XResolution] = "maker", (72, 1)
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"hello"
    picture, whole = Image.fromarray(_upright()), exif.tobytes()
    for i in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        cut = damaged[: rng.randrange(1, len(damaged))] if i % 5 == 0 else damaged
        picture.save(path, "PNG" if i % 2 else "JPEG", exif=bytes(cut))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing on anybody's terminal
            assert read_image(path, 16).shape == (3, 16, 16)


def test_generate_takes_jpeg_and_unicode(trained: Path, picture: Path) -> None:
    jpeg = picture.with_suffix(".jpg")
    Image.open(picture).save(jpeg)
    assert _generate(trained, jpeg, "Zürich 図 <image> 🙂?") == 0


@pytest.mark.parametrize("keep", [0, 4, 20, 60, -30])
def test_truncated_png(
    trained: Path, picture: Path, capsys: pytest.CaptureFixture[str], keep: int
) -> None:
    picture.write_bytes(picture.read_bytes()[:keep])
    assert _generate(trained, picture) == 2
    _one_line(capsys, "--image", str(picture))


def test_flipped_bytes_in_a_png_never_end_in_a_traceback(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.png"
    Image.effect_noise((16, 16), 90).convert("RGB").save(path)
    content = path.read_bytes()
    failed = 0
    for at in range(0, len(content), 17):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        try:
            read_image(path, 112)
        except RequestError as error:
            failed += 1
            assert str(path) in str(error)
    assert failed > 5


def _bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [8001, 30000, 2**31 - 1])
def test_decompression_bomb_is_refused_before_decoding(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, side: int,
) -> None:  # fmt: skip
    def no_decoding(*args: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", no_decoding)
    path = tmp_path / "bomb.png"
    path.write_bytes(_bomb(side, side))
    assert _generate(trained, path) == 2
    _one_line(capsys, "--image", str(path), "pixels")


def test_wrong_files_and_prompts(
    trained: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "notes.png"
    text.write_text("not a picture")
    for code, words in (
        (_generate(trained, tmp_path / "none.png"), ("--image", "none.png", "No such file")),
        (_generate(trained, tmp_path), ("--image", str(tmp_path), "directory")),
        (_generate(trained, text), ("--image", "notes.png", "not a PNG or JPEG")),
        (_generate(trained, picture, " "), ("--prompt", "must be text")),
        (_generate(trained, picture, "<image> and <image>"), (" media: ", "the prompt names")),
        (_generate(trained, picture, "long " * 90), ("max_new_tokens", "256")),
        (_generate(tmp_path / "nowhere", picture), ("--checkpoint", "nowhere", "No such file")),
    ):
        assert code == 2, words
    # one line a call
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 7
    expected = ["none.png: No such file", str(tmp_path), "not a PNG or JPEG", "must be text", "names [",
                "256", "nowhere"]  # fmt: skip
    for line, word in zip(lines, expected, strict=True):
        assert line.startswith("mmkernels generate: ") and word in line
    flags = [line.split()[2] for line in lines]
    assert flags[:4] == ["--image:"] * 3 + ["--prompt:"]
    assert flags[4:] == ["media:", "max_new_tokens:", "--checkpoint"]  # no flags but the last


def test_a_file_of_requests_fails_line_by_line_and_tells(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.jsonl"
    command = ["generate", "--requests", str(file), "--checkpoint", str(trained)]
    fine = b'{"id": "ok", "prompt": "\xc3\xbc?", "max_new_tokens": 2}\n'
    file.write_bytes(fine + b'{"id": "\xff", "prompt": "x\xff"}\n' + b'{"prompt": 1}\n')
    assert cli.main(command) == 1
    out, err = capsys.readouterr()
    found = {x["id"]: x for x in map(json.loads, out.splitlines())}
    assert err == "" and set(found) == {"ok", "\udcff", 3} and "text" in found["ok"]
    assert found["\udcff"]["error"] == r"prompt: must be Unicode text, got '\udcff' at 1"
    file.write_bytes(fine)
    assert cli.main(command) == 0
    capsys.readouterr()
    for flag in ("--image", "--video", "--audio"):
        assert cli.main([*command, flag, "x"]) == 2
        _one_line(capsys, f"{flag}: goes with --prompt")


def test_media_the_model_does_not_take(
    trained: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag in ("--video", "--audio"):
        command = ["generate", flag, str(picture), "--prompt", "x", "--checkpoint", str(trained)]
        assert cli.main(command) == 2
        _one_line(capsys, f"{flag}: the model takes ['image']")


def test_broken_checkpoint(
    trained: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (weights,) = trained.glob("model-*")
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / weights.name).write_bytes(weights.read_bytes()[:-5])
    (copy / "manifest.json").write_bytes((trained / "manifest.json").read_bytes())
    assert _generate(copy, picture) == 2
    _one_line(capsys, "--checkpoint", weights.name, "truncated")


def test_train_it_needs_a_pt_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new"
    assert cli.main(["train", "--stage", "it", "--out", str(out)]) == 2
    _one_line(capsys, "--out", str(out))
    assert not out.exists()


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "many"])
def test_steps_scale_must_be_positive(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--stage", "all", "--out", "x", f"--steps-scale={value}"])
    assert caught.value.code == 2
    assert "--steps-scale" in capsys.readouterr().err


def test_demo_in_miniature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "start", lambda: pipeline.Run(MMLLM(TINY)))
    monkeypatch.setattr(cli, "EXAM_SIZE", 30)
    assert cli.main(["demo", "--out", str(tmp_path), "--steps-scale", "0.002"]) == 0
    out = capsys.readouterr().out
    for word in ("kernels", "reference", "text only", "shuffled", "identical", "all 30 questions"):
        assert word in out
    assert Image.open(tmp_path / "demo.png").size[0] > 800
    assert Image.open(tmp_path / "sample_0.png").size == (112, 112)
    assert _generate(tmp_path, tmp_path / "sample_0.png") == 0


def test_python_m_mmkernels_without_arguments_shows_the_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mmkernels"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "demo" in done.stderr and "Traceback" not in done.stderr


def test_demo_full_in_miniature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--full", "--out", str(tmp_path), "--steps-scale", "0.001"]) == 0
    out = capsys.readouterr().out
    for word in (
        "held out",
        "other scales",
        "blind",
        "shuffled",
        "image_audio",
        "recognised as asked",
    ):
        assert word in out
    assert Image.open(tmp_path / "demo-full.png").size[0] > 1000
    numbers = json.loads((tmp_path / "demo-full.json").read_text())
    assert set(numbers) == {"exact_match", "drawings", "seconds"}
    assert all(0 <= x <= 1 for scores in numbers["exact_match"].values() for x in scores.values())
    stages = checkpoint.load(tmp_path).stages
    assert stages == ("vision", "hearing", "language", "drawing", "pt", "it", "signals")


@pytest.fixture
def small_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op with a gradient, one without, one with outputs apart; small shapes."""
    small = {"merge_embeddings": "small", "mrope_positions": "qwen2_vl", "mrope": "one_axis"}
    monkeypatch.setattr(bench, "OPS", tuple(small))
    monkeypatch.setattr(bench, "REAL", small)
    monkeypatch.setattr(timing, "SAMPLE_S", 1e-5)


def test_bench_tells_times_of_both(small_bench: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cpu = [line.split() for line in lines if " cpu " in line]
    assert [(line[0], line[3]) for line in cpu if line[3] != "bf16"] == [
        ("merge_embeddings", "fp32"),
        ("mrope_positions", "int64"),
        ("mrope", "fp32"),
    ]
    for *_, ours, eager, faster, kernel in cpu:
        assert float(ours) > 0 and float(eager) > 0 and float(faster) > 0
        assert kernel in ("native", "reference")
    assert "doctor" in lines[-1] or "pip install" in lines[-1]


def test_bench_gives_a_wrong_kernel_no_time(
    small_bench: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = merge_cases.run
    monkeypatch.setattr(merge_cases, "run", lambda inputs: right(inputs) * 1.5)
    assert cli.main(["bench"]) == 1
    for line in capsys.readouterr().out.splitlines():
        assert ("WRONG: " in line) == line.startswith("merge_embeddings"), line


def test_bench_has_a_real_shape_of_every_op_and_needs_nothing_outside_the_package() -> None:
    assert set(bench.REAL) == set(OPS)
    for op, name in bench.REAL.items():
        cases = importlib.import_module(f"mmkernels.ops.{op}.cases").CASES
        assert any(c.name == name and "bench" in c.tags for c in cases), op
    code = "import sys, mmkernels.bench; assert 'benchmarks' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("command", "absent", "extra"),
    [
        (["demo"], "sklearn", "train"),
        (["train", "--stage", "pt", "--out", "x"], "sklearn", "train"),
        (["generate", "--prompt", "?", "--checkpoint", "x"], "safetensors", "serve"),
    ],
)
def test_a_command_without_its_extra_names_it(
    command: list[str], absent: str, extra: str, tmp_path: Path
) -> None:
    """In a process where the library cannot be imported."""
    code = f"import sys; sys.modules[{absent!r}] = None\nfrom mmkernels.cli import main; sys.exit(main({command!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    said = f"mmkernels {command[0]}: needs {absent}: pip install 'mmkernels[{extra}]'"
    assert said in done.stderr and "Traceback" not in done.stderr
