# SPDX-License-Identifier: Apache-2.0
"""The engine: answers are those of one request at a time, whoever else is in flight, and every page comes back."""

import gc
import io
import json
import random
import re
import subprocess
import sys
import wave
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config

from mmkernels.cache import PagedKVCache
from mmkernels.models import MMLLM, AudioConfig, VisionConfig, answer
from mmkernels.models.config import FramePlaceConfig, LinearConfig, QFormerConfig
from mmkernels.serve import Engine, Request, RequestError, read_audio, serve_lines
from mmkernels.serve.prefixes import Prefixes
from mmkernels.serve.request import Medium
from mmkernels.train.sample import AnswerLoss, Sample, encoded


@pytest.fixture(scope="module", params=["rope", "mrope"])
def model(request: pytest.FixtureRequest) -> MMLLM:
    torch.manual_seed(0)
    tiny = tiny_config(32, queries=5, qformer_layers=1, decoder_layers=2)
    read = QFormerConfig(num_query_tokens=3, hidden_size=32, num_layers=1, intermediate_size=32)
    audio = AudioConfig(hidden_size=32, num_layers=1, intermediate_size=32)
    section = (2, 1, 1) if request.param == "mrope" else ()
    config = replace(
        tiny,
        encoders={**tiny.encoders, "video": "image", "audio": audio},
        projectors={
            **tiny.projectors,
            "video": (FramePlaceConfig(4), replace(read, per="frame"), LinearConfig(32)),
            "audio": (read, LinearConfig(32)),
        },
        decoder=replace(tiny.decoder, mrope_section=section),
    )
    return MMLLM(config).double()


def _medium(kind: str, seed: int) -> Medium:
    g = torch.Generator().manual_seed(seed)
    if kind == "audio":
        return kind, torch.rand(2000 + 100 * seed, generator=g) - 0.5
    shape = (3, 112, 112) if kind == "image" else (2, 3, 112, 112)
    return kind, torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)


def _ask(rng: random.Random) -> tuple[str, list[Medium], int]:
    kinds = rng.choice(
        ([], ["image"], ["image"], ["image", "image"], ["video"], ["audio"], ["image", "audio"])
    )
    media = [_medium(kind, rng.randrange(3)) for kind in kinds]
    words = "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(1, 30)))
    return "".join(f"<{k}>" for k in kinds) + f"q{words}", media, rng.randint(1, 9)


def _alone(model: MMLLM, prompt: str, media: list[Medium], new: int) -> str:
    features = {}
    for kind in dict.fromkeys(k for k, _ in media):
        items = [t for k, t in media if k == kind]
        features[kind] = model.project(kind, model.encode(kind, items))
    return answer(model, [prompt], features, new)[0]


def test_answers_in_flight_are_those_alone(model: MMLLM) -> None:
    rng = random.Random(0)
    engine = Engine(model, num_pages=70, page_size=4, max_running=7, chunk=23)
    asked, requests = [_ask(rng) for _ in range(60)], []
    cancelled: set[int] = set()
    for ask in asked:
        requests.append(engine.submit(*ask))
        for _ in range(rng.randrange(3)):
            engine.step()
        if rng.random() < 0.1:
            i = rng.randrange(len(requests))
            cancelled |= {i} if requests[i].finished is None else set()
            engine.cancel(requests[i])
    engine.run()
    for i, (request, ask) in enumerate(zip(requests, asked, strict=True)):
        expected = _alone(model, *ask)
        if i in cancelled:
            assert request.finished == "cancelled"
        else:
            assert request.finished in ("end", "length") and request.error is None
            assert request.text == expected, ask[0]
    counters = engine.counters
    assert cancelled and counters.cancelled == len(cancelled)
    assert counters.finished == 60 - len(cancelled) and counters.failed == 0
    assert counters.prefix_hits > 5 and counters.prefixes_evicted > 0
    engine.drop_prefixes()
    assert engine.pages_in_use == 0 and len(engine.cache) == 0


def test_an_image_is_computed_once_for_all_questions_about_it(
    model: MMLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    real = MMLLM.encode
    monkeypatch.setattr(
        MMLLM, "encode", lambda self, m, items: encoded.append(m) or real(self, m, items)
    )
    engine = Engine(model, page_size=4)
    media = [_medium("image", 1)]
    requests = [engine.submit(f"<image>question {i}", media, 4) for i in range(16)]
    engine.run()
    assert encoded == ["image"] and engine.counters.prefix_hits == 15
    assert all(r.finished for r in requests)


def test_other_media_never_share(model: MMLLM) -> None:
    engine = Engine(model, page_size=4)
    pixels = _medium("image", 1)[1]
    other = pixels.clone()
    other[0, 0, 0] ^= 1
    for media in ([("image", pixels)], [("image", other)], [("video", pixels[None])]):
        engine.submit("what?", media, 2)
        engine.run()
    engine.submit("<image>what?", [("image", pixels)], 2)
    engine.submit("before <image>what?", [("image", pixels)], 2)
    engine.run()
    assert engine.counters.prefix_hits == 1


def test_a_step_computes_a_chunk_of_prompts_at_most(model: MMLLM) -> None:
    engine = Engine(model, chunk=10)
    for _ in range(4):
        engine.submit("x" * 30, (), 3)
    steps, before = [], 0
    while engine.step() or engine.counters.prompt_rows > before:
        steps.append(engine.counters.prompt_rows - before)
        before = engine.counters.prompt_rows
    assert max(steps) == 10 and sum(steps) == 4 * 32


def test_the_smallest_pool_a_request_fits_serves_it_again_and_again(model: MMLLM) -> None:
    media = [_medium("image", 1)]
    for pages in range(3, 20):  # rows: 1 + 5 + 2 of the prompt, 5 new
        engine = Engine(model, num_pages=pages, page_size=3)
        asked = [engine.submit("<image>a", media, 5) for _ in range(3)]
        for _ in range(60):
            engine.step()
        ends = {r.finished for r in asked}
        assert ends == {"error"} if pages < 8 else ends <= {"end", "length"}, pages


@pytest.mark.parametrize("name", ["num_pages", "page_size", "max_running", "chunk"])
@pytest.mark.parametrize("value", [0, -1, 2.0])
def test_sizes_below_one_are_refused_by_name(model: MMLLM, name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"Engine: {name} must be at least 1, got {value}"):
        Engine(model, **{name: value})


def test_a_step_encodes_no_more_than_it_can_compute(
    model: MMLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, real = [], MMLLM.encode
    monkeypatch.setattr(
        MMLLM, "encode", lambda self, m, items: encoded.append(m) or real(self, m, items)
    )
    engine = Engine(model, chunk=12)
    for seed in range(6):  # of 8 rows: bos, image, a, newline
        engine.submit("a", [_medium("image", seed)], 2)
    steps, before = [], 0
    for _ in range(6):
        engine.step()
        steps.append(len(encoded) - before)
        before = len(encoded)
    engine.run()
    assert max(steps) == 2 and sum(steps) == 6 and steps[:3] == [2, 1, 2]
    assert engine.counters.finished == 6 and engine.counters.steps == 5


_ASKED = (
    ("<image>what?", "image", 9), ("heard <audio> there?", "audio", 5), ("text", None, 7),
    ("<image>and?", "image", 6),
)  # fmt: skip


def _asked(engine: Engine) -> list[Request]:
    return [
        engine.submit(prompt, [_medium(kind, 1)] if kind else [], new)
        for prompt, kind, new in _ASKED
    ]


@pytest.mark.parametrize("part", ["before", "behind", "logits", "tables", "keep"])
def test_an_interrupted_step_loses_no_token(
    model: MMLLM, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Whichever step it is, wherever it stops: the next run gives what an undisturbed one gives."""
    calm = Engine(model, page_size=4, chunk=9)
    expected = _asked(calm)
    calm.run()
    owner, name = {
        "before": (model.language_model, "forward"),
        "behind": (model.language_model, "forward"),
        "logits": (MMLLM, "logits"),
        "tables": (PagedKVCache, "tables"),
        "keep": (Prefixes, "keep"),
    }[part]
    real, stopped = getattr(owner, name), 0
    for at in range(calm.counters.steps):
        calls = iter(range(1000))

        def stop(*args: object, at: int = at, calls: Iterator[int] = calls) -> object:
            nonlocal stopped
            here = next(calls) == at
            done = real(*args) if part == "behind" or not here else None
            if here:
                stopped += 1
                raise KeyboardInterrupt
            return done

        engine = Engine(model, page_size=4, chunk=9)
        requests = _asked(engine)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop)
            try:
                engine.run()
            except KeyboardInterrupt:
                engine.run()
        assert [r.tokens for r in requests] == [r.tokens for r in expected], at
        assert [r.text for r in requests] == [r.text for r in expected]
        engine.drop_prefixes()
        assert engine.pages_in_use == 0 and len(engine.cache) == 0
    assert stopped == (2 if part == "keep" else calm.counters.steps)  # an image's and a sound's


def test_a_request_whose_encoder_breaks_ends_with_its_error(
    model: MMLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MMLLM.encode

    def encode(self: MMLLM, modality: str, items: list[torch.Tensor]) -> object:
        if modality == "audio":
            raise RuntimeError("no such kernel\nat line 3")
        return real(self, modality, items)

    monkeypatch.setattr(MMLLM, "encode", encode)
    engine = Engine(model)
    bad, good = engine.submit("x", [_medium("audio", 1)], 3), engine.submit("x", (), 3)
    engine.run()
    assert (bad.finished, bad.error) == ("error", "RuntimeError: no such kernel")
    assert good.finished in ("end", "length") and good.error is None
    monkeypatch.setattr(MMLLM, "encode", lambda *_: _raise(KeyboardInterrupt()))
    waits = engine.submit("x", [_medium("image", 2)], 3)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    assert waits.finished is None and waits.error is None


def _raise(error: BaseException) -> None:
    raise error


def test_streaming_gives_the_text_in_pieces(model: MMLLM) -> None:
    engine = Engine(model)
    other = engine.submit("another", (), 5)
    request = engine.submit("hello", (), 12)
    pieces = list(engine.stream(request))
    assert "".join(pieces) == request.text and request.finished and other.finished


BAD = {
    "prompt: must be text": (" ", (), 3),
    r"prompt: must be text, got 7": (7, (), 3),
    r"prompt: must be Unicode text, got '\\ud800' at 1": ("x\ud800", (), 3),
    "max_new_tokens: must be at least 1, got 0": ("x", (), 0),
    r"media: the prompt names \['image'\], got \[\]": ("<image>x", (), 3),
    r"media: the prompt names \['image'\], got \['audio'\]": ("<image>", [_medium("audio", 1)], 3),
    r"media\[0\]: modality must be one of .*'smell'": ("x", [("smell", torch.zeros(3))], 3),
    r"media\[0\]: image must be uint8 \[3, H, W\], got torch.float32": ("x", [("image", torch.zeros(3, 4, 4))], 3),
    r"media\[0\]: image must be uint8 \[3, H, W\], got torch.uint8 \[4, 4, 4\]":
        ("x", [("image", torch.zeros(4, 4, 4, dtype=torch.uint8))], 3),
    r"media\[0\]: audio must be finite": ("x", [("audio", torch.full((4000,), torch.nan))], 3),
}  # fmt: skip


@pytest.mark.parametrize("problem", BAD)
def test_malformed_requests_are_refused_by_name(model: MMLLM, problem: str) -> None:
    engine = Engine(model)
    with pytest.raises(RequestError, match=problem):
        engine.submit(*BAD[problem])
    assert engine.step() == []


def test_requests_that_cannot_be_computed_fail_alone(model: MMLLM) -> None:
    engine = Engine(model, num_pages=12, page_size=4)
    small = torch.zeros(3, 28, 28, dtype=torch.uint8)
    good: list[Request] = [engine.submit("fine", (), 3)]
    bad = {
        "images must be 8×8 patches, got 2×2": engine.submit("x", [("image", small)], 3),
        "a recording must be": engine.submit("x", [("audio", torch.zeros(5))], 3),
        "need 318 positions, the model has 256": engine.submit("y" * 300, (), 16),
        "pages, the pool has 12": engine.submit("y" * 100, (), 16),
    }
    good.append(engine.submit("also fine", (), 3))
    engine.run()
    for problem, request in bad.items():
        assert request.finished == "error" and problem in (request.error or "")
    assert all(r.finished in ("end", "length") for r in good)
    assert engine.counters.failed == 4 and engine.pages_in_use == 0


def test_a_file_of_requests_answers_line_by_line(model: MMLLM, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (50, 40), (200, 10, 10)).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with wave.open(str(tmp_path / "s.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(8000))
    (tmp_path / "half.wav").write_bytes((tmp_path / "s.wav").read_bytes()[:3000])
    a, cut = str(tmp_path / "a.png"), str(tmp_path / "cut.png")
    good = [
        {"id": "x", "prompt": "what?", "image": a, "max_new_tokens": 3},
        {"prompt": "heard <audio>?", "audio": str(tmp_path / "s.wav"), "max_new_tokens": 2},
        {"id": 7, "prompt": "order?", "video": [a, a], "max_new_tokens": 2},
        {"id": "two", "prompt": "same?", "image": [a, a], "max_new_tokens": 2},
        {"id": "half \ud800", "prompt": "Zürich?", "max_new_tokens": 2},
    ]
    bad = {
        "not JSON: Exp": "{",
        "not JSON: nested too deeply": "[" * 100_000,
        "id: must be text or a number, got list": {"id": [], "prompt": "x"},
        "prompt: must be Unicode text": {"prompt": "x\udcff"},
        "must be an object, got list": "[1]",
        "unknown fields": {"prompt": "x", "imgae": a},
        "prompt: must be text": {"image": a},
        "image: .*No such file": {"prompt": "x", "image": "/nowhere.png"},
        "image: .*null": {"prompt": "x", "image": "a\0"},
        "image: .*surrogates": {"prompt": "x", "image": "\ud800"},
        "audio: .*null": {"prompt": "x", "audio": "a\0"},
        "audio: .*surrogates": {"prompt": "x", "audio": "\ud800"},
        "image: .*cut.png": {"prompt": "x", "image": cut},
        "video: must be a list of paths": {"prompt": "x", "video": a},
        "audio: .*not a WAV file": {"prompt": "x", "audio": a},
        "audio: .*truncated": {"prompt": "x", "audio": str(tmp_path / "half.wav")},
        "max_new_tokens: must be at least 1": {"prompt": "x", "max_new_tokens": -4},
        "media: the prompt names": {"prompt": "<audio>", "image": a},
    }
    lines = [*good, *bad.values()]
    random.Random(0).shuffle(lines)
    out, engine = io.TextIOWrapper(io.BytesIO(), encoding="ascii"), Engine(model)
    spelled = (x if isinstance(x, str) else json.dumps(x) for x in lines)
    assert serve_lines(model, spelled, out, engine) == len(bad)
    out.seek(0)
    answers = [json.loads(line) for line in out]
    assert len(answers) == len(lines)
    said = {x["id"]: x["text"] for x in answers if "text" in x}
    assert {"x", 7, "two", "half \ud800"} <= set(said) and len(said) == len(good)
    errors = [x["error"] for x in answers if "error" in x]
    for problem in bad:
        assert sum(bool(re.match(problem, e)) for e in errors) == 1, (problem, errors)
    assert not any("\n" in e for e in errors)
    engine.drop_prefixes()
    assert engine.pages_in_use == 0


def test_an_error_carries_the_id_of_its_line(model: MMLLM) -> None:
    lines = ['{"id": "a", "prompt": "x", "imgae": 1}', '{"id": "b", "image": 3}', '{"prompt": 3}']
    out = io.StringIO()
    assert serve_lines(model, lines, out, Engine(model)) == 3
    assert [json.loads(line)["id"] for line in out.getvalue().splitlines()] == ["a", "b", 3]


def test_answers_of_a_long_file_come_while_it_is_read(model: MMLLM) -> None:
    out, ahead = io.StringIO(), []

    def lines() -> Iterator[str]:
        for i in range(40):
            ahead.append(i - out.getvalue().count("\n"))
            yield json.dumps({"prompt": f"q{i}", "max_new_tokens": 1 + i % 5}) if i % 7 else "bad"

    assert serve_lines(model, lines(), out, Engine(model, max_running=3)) == 6
    assert max(ahead) == 5 and out.getvalue().count("\n") == 40  # the sixth is read, then it steps


def test_a_wav_with_any_byte_changed_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(200))
    content, refused = path.read_bytes(), 0
    for at in range(44):
        for value in (0, 1, 16, 127, 255):
            path.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
            try:
                read_audio(path, 8000)
            except RequestError as error:
                refused += 1
                assert str(path) in str(error)
    assert refused > 100


def test_the_readers_are_the_package_s_and_need_no_pillow_to_be_imported() -> None:
    code = "import sys; sys.modules['PIL'] = None; from mmkernels.serve import read_audio, read_image, serve_lines"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_thousand_requests_in_flight(model: MMLLM) -> None:
    rng = random.Random(1)
    engine = Engine(model, num_pages=900, page_size=8, max_running=1000, chunk=512)
    asked = [_ask(rng) for _ in range(1000)]
    requests = [engine.submit(*ask) for ask in asked]
    engine.step()
    for i in rng.sample(range(1000), 100):
        engine.cancel(requests[i])
        engine.step()
    engine.run()
    for request, ask in zip(requests, asked, strict=True):
        if request.finished != "cancelled":
            assert request.text == _alone(model, *ask), ask[0]
    assert engine.counters.failed == 0
    assert engine.counters.finished + engine.counters.cancelled == 1000
    engine.drop_prefixes()
    assert engine.pages_in_use == 0 and len(engine.cache) == 0


@pytest.mark.full
def test_memory_stays_flat(model: MMLLM) -> None:
    engine, rng, seen = Engine(model, num_pages=200, page_size=8), random.Random(2), []
    for round_ in range(6):
        for _ in range(100):
            engine.submit(*_ask(rng))
        engine.run()
        gc.collect()
        if round_ >= 2:
            seen.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert max(seen) < 1.02 * seen[0], seen


def test_a_modality_that_shares_another_s_projector_is_served_and_trained() -> None:
    tiny = tiny_config(32, queries=3, qformer_layers=1, decoder_layers=1)
    both = {
        "encoders": {**tiny.encoders, "video": "image"},
        "projectors": {**tiny.projectors, "video": "image"},
    }
    model = MMLLM(replace(tiny, **both))
    engine, clip = Engine(model), _medium("video", 1)
    request = engine.submit("what?", [clip], 3)
    engine.run()
    assert request.error is None and request.finished in ("end", "length")
    assert request.text == _alone(model, "<video>what?", [clip], 3)
    sample = Sample("clip", "<video>what?", "a", (clip,))
    for samples in ([sample], encoded(model, [sample])):
        total, count = AnswerLoss(model)(samples)
        assert count == 2 and torch.isfinite(total)


def _only(modality: str) -> MMLLM:
    torch.manual_seed(0)
    tiny = tiny_config(32, queries=3, qformer_layers=1, decoder_layers=1)
    read = QFormerConfig(num_query_tokens=3, hidden_size=32, num_layers=1, intermediate_size=32)
    vision = VisionConfig(image_size=56, hidden_size=32, num_layers=1, intermediate_size=32)
    audio = AudioConfig(hidden_size=32, num_layers=1, intermediate_size=32)
    encoder = {"video": vision, "audio": audio}[modality]
    projector = (read, LinearConfig(32))
    return MMLLM(replace(tiny, encoders={modality: encoder}, projectors={modality: projector}))


def test_a_model_is_served_what_it_takes_and_the_rest_fails_alone(tmp_path: Path) -> None:
    from PIL import Image

    picture = str(tmp_path / "a.png")
    Image.new("RGB", (50, 40), (200, 10, 10)).save(picture)
    lines = [
        {"id": "video", "prompt": "x", "video": [picture, picture], "max_new_tokens": 2},
        {"id": "image", "prompt": "x", "image": picture},
        {"id": "audio", "prompt": "x", "audio": picture},
        {"id": "text", "prompt": "x", "max_new_tokens": 2},
    ]
    for modality, failed in (("video", {"image", "audio"}), ("audio", {"image", "video", "audio"})):
        model, out = _only(modality), io.StringIO()
        assert serve_lines(model, map(json.dumps, lines), out, Engine(model)) == len(failed)
        found = {x["id"]: x for x in map(json.loads, out.getvalue().splitlines())}
        assert {name for name, said in found.items() if "error" in said} == failed
        assert found["image"]["error"] == f"image: the model takes ['{modality}']"
