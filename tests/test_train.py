# SPDX-License-Identifier: Apache-2.0
"""Data, stages and checkpoints: answers are right, only what should learn learns, no broken file loads."""

import json
import os
import random
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config

from mmkernels.models import MMLLM, Features, from_parts
from mmkernels.models.config import LinearConfig
from mmkernels.train import checkpoint, digits, evaluate, mixture, pipeline, questions, stages
from mmkernels.train.checkpoint import CheckpointError
from mmkernels.train.pool import Pool, seen_once, train_together
from mmkernels.train.questions import Scene
from mmkernels.train.recipes import IMAGE
from mmkernels.train.sample import Ask, Sample, encoded, features_of

TINY = tiny_config(64, queries=4, qformer_layers=1, decoder_layers=2)


@pytest.fixture(scope="module")
def scans() -> digits.Scans:
    return digits.load_scans("train")


@pytest.fixture
def model() -> MMLLM:
    torch.manual_seed(0)
    return MMLLM(TINY)


def test_splits_share_no_scan(scans: digits.Scans) -> None:
    heldout = digits.load_scans("heldout")
    assert (len(scans.labels), len(heldout.labels)) == (1437, 360)
    rows = {image.numpy().tobytes() for image in scans.images}
    assert not any(image.numpy().tobytes() in rows for image in heldout.images)


def test_pictures_are_repeatable_and_tell_the_truth(scans: digits.Scans) -> None:
    a, b = (digits.draw(scans, 64, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a.pixel_values, b.pixel_values) and a.pixel_values.dtype == torch.uint8
    assert a.pixel_values.shape == (64, 3, 112, 112)
    there = a.digits != digits.BACKGROUND
    assert set(there.sum(1).tolist()) == {1, 2, 3}
    x = torch.where(there, a.centres[..., 0], torch.inf)
    assert (x[:, 1:] - x[:, :-1])[there[:, 1:]].min() >= digits.GAP_PX
    half = a.sizes[..., None] / 2
    assert ((a.centres - half)[there] >= 0).all() and ((a.centres + half)[there] <= 112).all()
    labels = digits.patch_labels(a, 14).view(64, 8, 8)
    for n, slot in there.nonzero().tolist():
        column, row = (a.centres[n, slot] // 14).long().tolist()
        nearby = labels[n, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
        assert (nearby == a.digits[n, slot]).any()


def test_ink_is_where_the_digit_is(scans: digits.Scans) -> None:
    pictures = digits.draw(scans, 64, torch.Generator().manual_seed(2))
    for n in (pictures.digits[:, 1] == digits.BACKGROUND).nonzero()[:, 0].tolist():
        image = pictures.pixel_values[n].float().mean(0)
        x, y = pictures.centres[n, 0].long().tolist()
        inside = image[max(0, y - 18) : y + 18, max(0, x - 18) : x + 18]
        assert (inside - image.median()).abs().max() > 60


def test_captions_and_sketches() -> None:
    assert questions.caption(Scene((3,), (2,))) == "the digit is 3"
    assert questions.caption(Scene((3, 7, 0), (1, 3, 5))) == "the digits are 3 7 0"
    assert questions.sketch(Scene((3, 7), (1, 6))) == ".3....7."


def test_every_answer_is_right() -> None:
    rng = random.Random(0)
    seen = set()
    for _ in range(4000):
        scene = questions.random_scene(rng)
        assert list(scene.columns) == sorted(set(scene.columns))
        q = questions.ask(scene, rng)
        seen.add(q.kind)
        assert q.answer == _work_out(q, scene), (q, scene)
    assert seen == set(questions.KINDS)


def _work_out(question: questions.Question, scene: Scene) -> str:
    """The answer from the wording alone."""
    text, shown = question.text, scene.digits
    side = shown[0] if "left" in text or "first" in text else shown[-1]
    if "odd" in text:
        return "even" if side in (0, 2, 4, 6, 8) else "odd"
    if "five" in text or "above 5" in text:
        return "yes" if side in (6, 7, 8, 9) else "no"
    if "how many" in text or "count" in text or "number of" in text:
        return str(len(shown))
    if "from left to right" in text or "shown" in text or "written" in text:
        return " ".join(str(d) for d in shown)
    return str(side)


@pytest.mark.parametrize(
    ("stage", "learning"),
    [
        ("vision", {"encoders"}),
        ("language", {"language_model"}),
        ("pt", {"projectors"}),
        ("it", {"projectors", "language_model"}),
    ],
)
def test_each_stage_changes_only_its_parts(
    stage: str, learning: set[str], model: MMLLM, scans: digits.Scans
) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if stage == "vision":
        stages.train_vision(model, scans, 2, batch=2)
    elif stage == "language":
        stages.train_language(model, IMAGE.row, 2, batch=2)
    else:
        tasks, parts, lr = IMAGE.together[stage]
        pool = Pool(seen_once(model, IMAGE.media, 4), tasks, 2, 0)
        train_together(stage, model, pool, parts, 2, lr)
    changed = {
        n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])
    }
    assert changed == learning
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None} == learning


def test_only_the_answer_is_scored(model: MMLLM) -> None:
    features = {"image": model.project("image", Features(torch.randn(65, 64), ((1, 8, 8),), 1))}
    given, said = torch.tensor([257, 259, 65, 66]), [67, 258]
    loss = stages.answer_loss(model, [(given, said)], features)
    ids = torch.cat((given, torch.tensor(said)))
    logits = model.logits(model(model.plan([ids], features), features))
    expected = -(logits[6].log_softmax(-1)[67] + logits[7].log_softmax(-1)[258]) / 2
    torch.testing.assert_close(loss, expected)


def test_memorises_a_tiny_set_and_needs_the_picture(model: MMLLM) -> None:
    made = mixture.exam(["caption"], 6)
    asked = [replace(s, prompt="<image>?", again={"caption": _always(s.answer)}) for s in made]
    assert len({s.answer for s in asked}) == 6
    pool = Pool(encoded(model, asked), {"caption": 1.0}, 12, 0)
    losses = train_together("tiny", model, pool, ("projectors", "language_model"), 150, 3e-3)
    assert losses[-1] < 0.05 < 1 < losses[0]
    assert evaluate.answer(model, asked) == [s.answer for s in asked]
    assert len(set(evaluate.answer(model, evaluate.blind(asked)))) == 1  # the text is the same
    others = [s.answer for s in (*asked[1:], asked[0])]
    assert evaluate.answer(model, evaluate.shuffled(asked)) == others


def test_scores_are_of_each_kind() -> None:
    asked = [Sample(kind, "?", "yes") for kind in ("few", "many", "many", "many")]
    found = {"kernels": evaluate.Answered(asked, ["no", "yes", "no", "yes"], 1.0)}
    told = {"many (3)": 2 / 3, "few (1)": 0.0, "all 4 questions": 0.5}
    assert evaluate.by_kind(found) == {"kernels": told}
    assert list(evaluate.by_kind(found)["kernels"]) == list(told)  # the commonest first


def test_what_is_seen_and_what_is_not_keep_their_order(model: MMLLM) -> None:
    a, b, c, text = mixture.exam(["image"], 3) + mixture.exam(["text"], 1)
    samples = [a, text, b, c]
    expected = features_of(model, samples)["image"]
    mixed = [samples[0], *encoded(model, samples[1:3]), samples[3]]
    found = features_of(model, mixed)["image"]
    assert found.grids == expected.grids
    torch.testing.assert_close(found.tokens, expected.tokens, atol=0.05, rtol=0.05)  # bf16
    assert (found.tokens - expected.tokens.roll(len(found.tokens) // 3, 0)).abs().max() > 0.2


def _always(answer: str) -> Ask:
    return lambda rng: ("caption", "<image>?", answer)


def test_pipeline_saves_after_each_stage_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "start", lambda: pipeline.Run(MMLLM(TINY)))
    run = pipeline.start()
    pipeline.train(run, ("language",), tmp_path, scale=0.001)
    assert checkpoint.load(tmp_path).stages == ("language",)
    with pytest.raises(CheckpointError, match="stage it needs a checkpoint with stage pt"):
        pipeline.resume(tmp_path, "it")
    pipeline.train(run, ("pt",), tmp_path, scale=0.001)
    again = pipeline.resume(tmp_path, "it")
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


# Checkpoints


@pytest.fixture
def saved(tmp_path: Path, model: MMLLM) -> Path:
    checkpoint.save(tmp_path, model, ("vision",))
    return tmp_path


def _weights(directory: Path) -> Path:
    (path,) = directory.glob("model-*.safetensors")
    return path


def test_round_trip(saved: Path, model: MMLLM) -> None:
    loaded = checkpoint.load(saved)
    assert loaded.stages == ("vision",) and loaded.model.config == TINY
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name])
    assert sorted(p.name for p in saved.iterdir()) == ["manifest.json", _weights(saved).name]


@pytest.mark.parametrize("which", ["weights", "manifest"])
@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_truncation_is_found(saved: Path, which: str, keep: int) -> None:
    path = _weights(saved) if which == "weights" else saved / "manifest.json"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{path.name}.*truncated"):
        checkpoint.load(saved)


@pytest.mark.parametrize("which", ["weights", "manifest"])
def test_every_flipped_bit_is_found(saved: Path, which: str) -> None:
    path = _weights(saved) if which == "weights" else saved / "manifest.json"
    content = path.read_bytes()
    rng = random.Random(0)
    for at in [0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(60))]:
        changed = bytearray(content)
        changed[at] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        if which == "manifest" and _same_json(changed, content):
            continue
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(saved)
        assert path.name in str(caught.value) and "\n" not in str(caught.value)


def _same_json(a: bytes, b: bytes) -> bool:
    try:
        return bool(json.loads(a) == json.loads(b))  # white space
    except ValueError:
        return False


@pytest.mark.parametrize("gone", ["weights", "manifest", "directory"])
def test_missing_files_are_named(saved: Path, gone: str) -> None:
    if gone == "directory":
        saved = saved / "nowhere"
    else:
        (_weights(saved) if gone == "weights" else saved / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoint.load(saved)


def test_files_of_others_stay(saved: Path, model: MMLLM) -> None:
    theirs = {
        "model-00001-of-00002.safetensors", "my-lora.safetensors", ".my.safetensors.backup", ".manifest.json.orig",
    }  # fmt: skip
    ours = {
        "model-0123456789ab.safetensors", "training-0123456789ab.safetensors",
        ".training-0123456789ab.safetensors.x1_y2z3a", ".manifest.json.0123abcd",
    }  # fmt: skip
    for name in theirs | ours:
        (saved / name).touch()
    kept = _weights_of_manifest(saved)
    checkpoint.save(saved, model, ("vision", "pt"))
    assert {p.name for p in saved.iterdir()} == theirs | {"manifest.json", kept}


def _weights_of_manifest(saved: Path) -> str:
    return str(json.loads((saved / "manifest.json").read_text())["files"]["model"]["name"])


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_who_may_read_is_the_umasks_to_say(tmp_path: Path, model: MMLLM, umask: int) -> None:
    before = os.umask(umask)
    try:
        checkpoint.save(tmp_path, model, ())
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o666 & ~umask}


def _resealed(saved: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A consistent checkpoint with other tensors, as another version of the model would write."""
    model = MMLLM(TINY)
    model.state_dict = lambda keep_vars=False: tensors  # type: ignore[method-assign, assignment, misc]
    checkpoint.save(saved, model, ())


def test_wrong_tensors_are_named(saved: Path) -> None:
    tensors = load_file(_weights(saved))
    name = "projectors.image.blocks.2.linear.weight"
    faults = {
        f"missing {name}": {k: v for k, v in tensors.items() if k != name},
        "extra encoders.new": {**tensors, "encoders.new": torch.zeros(1)},
        rf"{name} must be \[64, 64\] torch.float32, got \[64, 63\]": {
            **tensors, name: tensors[name][:, :63].contiguous()
        },
        f"{name} must be .* got .* torch.float16": {**tensors, name: tensors[name].half()},
    }  # fmt: skip
    for problem, wrong in faults.items():
        _resealed(saved, wrong)
        with pytest.raises(CheckpointError, match=problem):
            checkpoint.load(saved)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("dtype", "load", "'load'"),
        ("files", {}, "'model'"),
        ("stages", 3, "not iterable"),
        ("format", 3, "format must be 2, got 3"),
        ("config", {"encoders": 1}, "missing or unknown fields"),
    ],
)
def test_a_sealed_manifest_that_lies_is_refused(
    saved: Path, field: str, value: object, problem: str
) -> None:
    path = saved / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    checkpoint.write_manifest(path, {**manifest, field: value})
    with pytest.raises(CheckpointError, match=problem):
        checkpoint.load(saved)


def test_no_file_outside_the_folder_is_read(saved: Path) -> None:
    path = saved / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    outside = saved.parent / "elsewhere.safetensors"
    _weights(saved).rename(outside)
    manifest["files"]["model"]["name"] = f"../{outside.name}"
    checkpoint.write_manifest(path, manifest)
    with pytest.raises(CheckpointError, match=r"elsewhere.safetensors: No such file"):
        checkpoint.load(saved)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)


@pytest.mark.parametrize("name", ["some-org/some-repo", "/models/moved"])
def test_no_tokenizer_is_fetched(
    saved: Path, tmp_path: Path, name: str, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    path = saved / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["config"]["tokenizer"] = name
    checkpoint.write_manifest(path, manifest)
    wanted = tmp_path / name
    with pytest.raises(CheckpointError, match=rf"manifest.json: .*no folder {wanted}; .*link"):
        checkpoint.load(saved)
    if not name.startswith("/"):
        wanted.mkdir(parents=True)
        (wanted / "tokenizer.json").write_text("{")
        with pytest.raises(CheckpointError, match=rf"manifest.json: tokenizer: {wanted}: ."):
            checkpoint.load(saved)


@pytest.fixture
def theirs() -> tuple[Any, Any]:
    """A tower and a language model of transformers."""
    transformers = pytest.importorskip("transformers")
    same = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip
    tower = transformers.CLIPVisionConfig(**same, image_size=28, patch_size=7)
    language = transformers.LlamaConfig(**same, vocab_size=300, num_key_value_heads=2)
    return transformers.CLIPVisionModel(tower), transformers.LlamaForCausalLM(language)


def test_only_safetensors_of_a_folder_are_read(
    tmp_path: Path, theirs: tuple[Any, Any], no_network: None
) -> None:
    tower, language = theirs
    for name, model in (("tower", tower), ("language", language)):
        model.config.save_pretrained(tmp_path / name)
        torch.save(model.state_dict(), tmp_path / name / "pytorch_model.bin")
    projector = (LinearConfig(32),)
    with pytest.raises(ValueError, match=r"vision: .*tower: .*no file named model.safetensors"):
        from_parts(tmp_path / "tower", language, projector)
    with pytest.raises(ValueError, match=r"llm: .*language: .*no file named model.safetensors"):
        from_parts(tower, tmp_path / "language", projector)
    with pytest.raises(ValueError, match=r"llm: must be a folder .*, no folder some-org/some-repo"):
        from_parts(tower, "some-org/some-repo", projector)
    (tmp_path / "language" / "adapter_model.bin").touch()
    with pytest.raises(ValueError, match="language has an adapter; merge it"):
        from_parts(tower, tmp_path / "language", projector)


def test_no_kernel_of_the_hub_is_asked_for(
    tmp_path: Path, theirs: tuple[Any, Any], no_network: None
) -> None:
    theirs[1].save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**said, "attn_implementation": "org/kernel"}))
    made = from_parts(theirs[0], tmp_path, (LinearConfig(32),))
    assert torch.equal(made.language_model.lm_head.weight, theirs[1].lm_head.weight)


def test_a_damaged_file_is_written_again(saved: Path, model: MMLLM) -> None:
    path = _weights(saved)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    checkpoint.save(saved, model, ("vision",))
    assert checkpoint.load(saved).stages == ("vision",)


def test_not_safetensors_is_named(saved: Path) -> None:
    path = saved / "x"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="missing"):
        checkpoint.check_tensors(path, load_file(path), MMLLM(TINY).state_dict())


@pytest.mark.parametrize("fails_at", [1, 2])
def test_interrupted_save_leaves_the_old_checkpoint(
    saved: Path, model: MMLLM, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    old = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        model.projectors["image"].blocks[2].linear.bias.add_(1)
    calls, real = [], os.replace

    def replace(source: str, target: Path) -> None:
        calls.append(target)
        if len(calls) == fails_at:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(saved, model, ("vision", "pt"))
    loaded = checkpoint.load(saved)
    assert loaded.stages == ("vision",)
    for name, tensor in old.items():
        assert torch.equal(tensor, loaded.model.state_dict()[name])
    assert not [p for p in saved.iterdir() if p.name.startswith(".")]  # no temporary file stays
    monkeypatch.undo()
    checkpoint.save(saved, model, ("vision", "pt"))
    assert checkpoint.load(saved).stages == ("vision", "pt")
    assert len(list(saved.glob("model-*"))) == 1
