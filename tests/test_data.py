# SPDX-License-Identifier: Apache-2.0
"""The mixture: samples tell the truth, splits share nothing, a stream goes on anywhere, a damaged asset is refused."""

import json
from pathlib import Path

import pytest
import torch

from mmkernels import cli
from mmkernels.models import tokenizer
from mmkernels.train import checkpoint, digits, mixture, speech
from mmkernels.train.sample import Sample


def _same(a: Sample, b: Sample) -> bool:
    words = (a.kind, a.prompt, a.answer, a.draw) == (b.kind, b.prompt, b.answer, b.draw)
    media = zip(a.media, b.media, strict=True)
    return words and all(m == n and torch.equal(x, y) for (m, x), (n, y) in media)


@pytest.fixture(scope="module")
def source() -> mixture.Source:
    return mixture.source("heldout")


@pytest.mark.parametrize("task", mixture.TASKS)
def test_samples_are_repeatable_and_media_match_placeholders(
    source: mixture.Source, task: str
) -> None:
    made = [mixture.sample(source, 3, i, task) for i in range(30)]
    assert all(_same(s, mixture.sample(source, 3, i, task)) for i, s in enumerate(made))
    assert len({s.prompt for s in made}) > 1 and len({s.answer for s in made}) > 1
    shapes = {"image": ((3, 112, 112), torch.uint8), "video": ((4, 3, 112, 112), torch.uint8)}
    for s in made:
        assert tokenizer.placeholders(s.prompt) == [m for m, _ in s.media]
        for modality, tensor in s.media:
            if modality == "audio":
                assert (
                    tensor.dtype == torch.float32 and tensor.dim() == 1 and tensor.abs().max() <= 1
                )
                assert 1500 < len(tensor) < 5 * speech.SAMPLING_RATE
            else:
                assert (tuple(tensor.shape), tensor.dtype) == shapes[modality]
        assert (s.draw is not None) == (task == "draw")


class Told:
    """Pictures and speech that say what they were made of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shown: list[list[int]] = []
        self.said: list[list[int]] = []
        draw, say = digits.draw_counts, speech.say

        def drawn(*args: object) -> digits.Pictures:
            pictures = draw(*args)  # type: ignore[arg-type]
            self.shown += [
                [d for d in row if d != digits.BACKGROUND] for row in pictures.digits.tolist()
            ]
            return pictures

        monkeypatch.setattr(digits, "draw_counts", drawn)
        monkeypatch.setattr(
            speech, "say", lambda s, d, r: self.said.append(list(d)) or say(s, d, r)
        )


def test_answers_are_right(source: mixture.Source, monkeypatch: pytest.MonkeyPatch) -> None:
    told, kinds = Told(monkeypatch), set()
    for i in range(400):
        for task in ("two_images", "video", "audio", "image_audio", "text", "draw"):
            told.shown, told.said = [], []
            s = mixture.sample(source, 5, i, task)
            kinds.add(s.kind)
            assert _worked_out(s, told.shown, told.said), (
                s.prompt,
                s.answer,
                told.shown,
                told.said,
            )
    assert kinds >= {
        f"{m} {k}" for m in ("video", "audio") for k in ("list", "first", "last", "count", "after")
    }


def _worked_out(s: Sample, shown: list[list[int]], said: list[list[int]]) -> bool:
    numbers = [int(x) for x in s.prompt.replace("?", " ").replace(".", " ").split() if x.isdigit()]
    if s.kind == "draw":
        named = [n for n in mixture.NAMES if f" {n}" in s.prompt.rstrip(".!")]
        return s.draw == (
            mixture.NAMES.index(named[0]) if named else int(s.prompt.rstrip(".!")[-1])
        )
    if s.kind == "text":
        if "plus" in s.prompt or "+" in s.prompt:
            return int(s.answer) == sum(numbers)
        if "after" in s.prompt:
            return int(s.answer) == numbers[0] + 1
        if "sort" in s.prompt:
            return s.answer.split() == [str(x) for x in sorted(numbers)]
        return mixture.NAMES[int(s.answer)] in s.prompt
    if s.kind == "two images":
        (a,), (b,) = shown
        return s.answer == ("same" if a == b else "first" if a > b else "second")
    if s.kind == "image and audio":
        return (s.answer == "yes") == (said[0][0] in shown[0])
    told = [d for frame in shown for d in frame] or said[0]
    return s.answer == {
        "list": " ".join(map(str, told)), "first": str(told[0]), "last": str(told[-1]), "count": str(len(told)),
        "after": str(told[told.index(numbers[0]) + 1]) if "after" in s.kind else "",
    }[s.kind.split()[1]]  # fmt: skip


def test_a_frame_without_a_digit_is_blank(source: mixture.Source) -> None:
    made = [mixture.sample(source, 1, i, "video") for i in range(40)]
    counts = {s.answer for s in made if s.kind == "video count"}
    assert counts == {"1", "2", "3"}


def test_splits_share_no_speaker_and_no_recording() -> None:
    train, heldout = speech.load_spoken("train"), speech.load_spoken("heldout")
    assert (len(train.waveforms), len(heldout.waveforms)) == (300, 60)
    speakers = [{v.partition("+")[2] for v in s.voices} for s in (train, heldout)]
    assert not speakers[0] & speakers[1]
    assert all(len(s.of(d)) == len(s.labels) // 10 for s in (train, heldout) for d in range(10))
    known = {w.numpy().tobytes() for w in train.waveforms}
    assert not any(w.numpy().tobytes() in known for w in heldout.waveforms)


def test_held_out_speakers_can_be_told_apart() -> None:
    """A straight line through log-mel features of the training speakers reads the others."""
    from sklearn.linear_model import LogisticRegression

    from mmkernels.models import AudioConfig
    from mmkernels.models.audio import log_mel, mel_filters

    def features(spoken: speech.Spoken) -> torch.Tensor:
        config = AudioConfig()
        bands = [log_mel(w, mel_filters(config), config).T[None] for w in spoken.waveforms]
        return torch.cat(
            [torch.nn.functional.interpolate(b, 16, mode="linear") for b in bands]
        ).flatten(1)

    train, heldout = speech.load_spoken("train"), speech.load_spoken("heldout")
    model = LogisticRegression(max_iter=300, C=0.1).fit(features(train), train.labels)
    assert model.score(features(heldout), heldout.labels) > 0.97


def test_a_damaged_asset_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(speech.ASSET.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "x.safetensors").write_bytes(content)
    monkeypatch.setattr(speech, "ASSET", tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x.safetensors: missing or altered"):
        speech.load_spoken("train")


def test_a_stream_goes_on_anywhere() -> None:
    shares = {"text": 2.0, "audio": 1.0, "image": 0.0}
    whole, part = (mixture.Mixture(5, shares, seed=9) for _ in range(2))
    batches = [next(whole) for _ in range(4)]
    next(part), next(part)
    other = mixture.Mixture(5, shares)
    other.load_state_dict(json.loads(json.dumps(part.state_dict())))
    assert all(_same(a, b) for a, b in zip(next(other), batches[2], strict=True))
    kinds = {s.kind.split()[0] for b in batches for s in b}
    assert kinds == {"text", "audio"}
    for wrong in ({"smell": 1.0}, {"image": 0.0}):
        with pytest.raises(ValueError, match="tasks must be among"):
            mixture.Mixture(5, wrong)


def test_held_out_scales_are_other_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[torch.Tensor] = []
    real = digits._render
    monkeypatch.setattr(digits, "_render", lambda *a: sizes.append(a[3][a[1]]) or real(*a))
    for low, high in digits.OTHER_SIZES:
        sizes.clear()
        mixture.exam(["image"], 20, sizes=((low, high),))
        assert low <= torch.cat(sizes).min() and torch.cat(sizes).max() <= high
        assert all(high < seen[0] or low > seen[1] for seen in digits.SIZES)


@pytest.mark.parametrize("size_px", [*digits.OTHER_SIZES, *digits.SIZES])
def test_no_window_cuts_ink(size_px: tuple[float, float]) -> None:
    """A scan that is ink all over leaves the border of its window empty, however it is turned."""
    generator = torch.Generator().manual_seed(0)
    sizes, centres = torch.full((300, 1), size_px[1]), torch.full((300, 1, 2), 56.4)
    windows = digits._windows(torch.ones(300, 1, 8, 8), sizes, centres, generator)
    border = windows.clone()
    border[..., 1:-1, 1:-1] = 0
    assert windows.amax() > 0.99 and not border.any()


def test_train_by_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tiny_models import tiny_config

    start, config = tmp_path / "start.json", tmp_path / "run.yaml"
    start.write_text(tiny_config(32, queries=3, qformer_layers=1, decoder_layers=1).to_json())
    config.write_text(
        f"start: {start}\nstage: pt\nsteps: 3\nlr: 0.001\nbatch: 4\ntasks: {{image: 1, text: 1}}\n"
        "evaluate_every: 2\nexam: 3\n"
    )
    assert cli.main(["train", "--config", str(config), "--out", str(tmp_path / "out")]) == 0
    assert "stage pt, 3 steps, loss" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "out").stages == ("pt",)
    lines = [json.loads(x) for x in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [("exact_match" in x) for x in lines] == [False, True, False]
    config.write_text(config.read_text().replace("text: 1", "smell: 1"))
    assert cli.main(["train", "--config", str(config), "--out", str(tmp_path / "new")]) == 2
    assert "--config" in capsys.readouterr().err
