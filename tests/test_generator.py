# SPDX-License-Identifier: Apache-2.0
"""Output projector and generator: GILL's numbers, exact sampling, gradients where they belong, drawings as asked."""

import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmkernels.models.config import GeneratorConfig, OutputProjectorConfig
from mmkernels.models.diffusers_adapter import DiffusersGenerator
from mmkernels.models.generator import ImageGenerator, integrate
from mmkernels.models.output_projector import OutputProjector
from mmkernels.train import digits, drawing, recognise
from mmkernels.train.drawing import image_loss
from mmkernels.train.trainer import fit

TINY = GeneratorConfig(
    image_size=12, patch_size=4, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64,
    num_condition_tokens=3, condition_size=16,
)  # fmt: skip
SMALL = OutputProjectorConfig(
    hidden_size=32, num_encoder_layers=1, num_decoder_layers=1, num_heads=2, intermediate_size=64,
    num_condition_tokens=3, condition_size=16,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _woken(config: GeneratorConfig = TINY) -> ImageGenerator:
    """A generator whose zero-initialised layers and constants are random, so that all of it shows."""
    model = ImageGenerator(config)
    for parameter in model.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.1)
    return model


# Output projector


class GillMapper(nn.Module):
    """gill/layers.py, TextFcLayer with mode 'gill_mapper', written down plainly."""

    def __init__(self, in_dim: int, out_dim: int, tokens: int) -> None:
        super().__init__()
        self.fc = nn.Linear(in_dim, 512)
        self.tfm = nn.Transformer(
            d_model=512, nhead=4, num_encoder_layers=4, num_decoder_layers=4, dim_feedforward=2048,
            dropout=0.0, batch_first=True, norm_first=True,
        )  # fmt: skip
        self.model = nn.Linear(512, out_dim)
        self.query_embs = nn.Parameter(torch.randn(1, tokens, 512))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(self.tfm(self.fc(x), self.query_embs.repeat(x.shape[0], 1, 1)))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_output_projector_is_gills() -> None:
    theirs = GillMapper(40, 48, 7).double()
    ours = OutputProjector(
        OutputProjectorConfig(num_condition_tokens=7, condition_size=48), 40
    ).double()
    for parameter in theirs.parameters():  # norms and biases too
        parameter.data += 0.05 * torch.randn_like(parameter)
    ours.load_state_dict(theirs.state_dict())
    hidden_states = torch.randn(3, 4, 40, dtype=torch.double)
    results = []
    for model in (theirs, ours):
        x = hidden_states.clone().requires_grad_()
        out = model(x)
        out.sin().sum().backward()
        results.append((out, x.grad, *(p.grad for p in model.parameters())))
    assert results[0][0].shape == (3, 7, 48)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


def test_default_sizes_are_nextgpts() -> None:
    with torch.device("meta"):
        model = OutputProjector(OutputProjectorConfig(), 4096)
        assert model(torch.empty(2, 4, 4096)).shape == (2, 77, 768)
        theirs = GillMapper(4096, 768, 77)
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in theirs.named_parameters()
    }


def test_output_projector_names_a_wrong_shape() -> None:
    model = OutputProjector(SMALL, 24)
    for shape in ((2, 4, 23), (4, 24)):
        with pytest.raises(ValueError, match=r"hidden_states must be \[n, r, 24\], got \["):
            model(torch.zeros(shape))


# Generator


@pytest.mark.parametrize(("side", "patch", "channels"), [(12, 4, 1), (12, 3, 3), (8, 8, 2)])
def test_velocity_has_the_pictures_shape_and_its_patches_places(
    side: int, patch: int, channels: int
) -> None:
    config = GeneratorConfig(
        image_size=side, patch_size=patch, num_channels=channels, hidden_size=16, num_layers=1,
        num_heads=2, intermediate_size=16, num_condition_tokens=2, condition_size=8,
    )  # fmt: skip
    model = _woken(config)
    images = torch.randn(2, channels, side, side)
    condition = model.conditions(torch.tensor([1, 2]))
    seen = []
    model.proj.register_forward_hook(lambda _, __, rows: seen.append(rows))
    velocity = model(images, torch.tensor([0.1, 0.9]), condition)
    assert velocity.shape == images.shape
    columns = side // patch
    for at in range(columns**2):
        y, x = at // columns * patch, at % columns * patch
        tile = velocity[:, :, y : y + patch, x : x + patch]
        assert torch.equal(tile.flatten(1), seen[0][:, at])  # in the order of a Conv2d's weight


def test_picture_time_and_condition_all_matter() -> None:
    model = _woken()
    images, time = torch.randn(1, 1, 12, 12), torch.tensor([0.3])
    condition = model.conditions(torch.tensor([4]))
    base = model(images, time, condition)
    others = (
        model(images + 0.1, time, condition),
        model(images, time + 0.1, condition),
        model(images, time, model.conditions(torch.tensor([5]))),
    )
    for other in others:
        assert (other - base).abs().max() > 1e-4


def test_a_new_generator_is_still() -> None:
    """Every gate and the output start at zero."""
    model = ImageGenerator(TINY)
    condition = model.conditions(torch.tensor([0]))
    assert not model(torch.randn(1, 1, 12, 12), torch.tensor([0.5]), condition).any()


def test_flow_loss_is_the_error_of_the_velocity() -> None:
    model = _woken()
    pixels = torch.randint(0, 256, (5, 1, 12, 12), dtype=torch.uint8)
    condition = model.conditions(torch.arange(5))
    loss = model.flow_loss(pixels, condition, _seeded(3), condition_dropout=0.5)
    g = _seeded(3)
    noise, (time, lot) = torch.randn(5, 1, 12, 12, generator=g), torch.rand(2, 5, generator=g)
    assert 0 < (lot < 0.5).sum() < 5
    errors = []
    for i in range(5):
        x1 = pixels[i].float() / 127.5 - 1
        told = model.null_condition if lot[i] < 0.5 else condition[i]
        mixed = (1 - time[i]) * noise[i] + time[i] * x1
        velocity = model(mixed[None], time[i : i + 1], told[None])[0]
        errors.append((velocity - (x1 - noise[i])).square().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean())


def test_gradients_reach_every_parameter() -> None:
    model = _woken()
    pixels = torch.randint(0, 256, (20, 1, 12, 12), dtype=torch.uint8)
    subjects = torch.arange(20) % 10
    model.flow_loss(pixels, model.conditions(subjects), _seeded(), 0.3).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert name.endswith("key.bias") or parameter.grad.any(), name  # softmax cancels it
    assert model.conditions.weight.grad.flatten(1).any(1).all()


def test_training_lowers_the_loss() -> None:
    model = ImageGenerator(TINY)
    losses = drawing.train_generator(model, digits.load_scans("train"), steps=30, batch=32)
    assert max(losses[-10:]) < min(losses[:5])


def test_sampler_is_exact_for_velocities_linear_in_time() -> None:
    start, v = torch.randn(2, 4, dtype=torch.double)
    for steps in (1, 3, 10):
        torch.testing.assert_close(integrate(lambda x, t: v, start, steps), start + v)
        linear = integrate(lambda x, t: 2 * t * v, start, steps)
        torch.testing.assert_close(linear, start + v)


def test_sampler_is_of_second_order() -> None:
    start = torch.ones(1, dtype=torch.double)
    exact = torch.e
    errors = [(integrate(lambda x, t: x, start, n) - exact).abs().item() for n in (8, 16, 32)]
    assert 3.5 < errors[0] / errors[1] < 4.5 and 3.5 < errors[1] / errors[2] < 4.5


def test_drawings_follow_the_seed() -> None:
    model = _woken()
    condition = model.conditions(torch.arange(3)).detach()
    a, b, c = (
        model.generate(condition, num_inference_steps=2, generator=_seeded(s)) for s in (1, 1, 2)
    )
    assert a.dtype == torch.uint8 and a.shape == (3, 1, 12, 12)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert model.generate(condition[:0], num_inference_steps=1).shape == (0, 1, 12, 12)


def test_guidance() -> None:
    model = _woken()
    images, condition = torch.randn(2, 1, 12, 12), model.conditions(torch.tensor([1, 2]))
    time = torch.full((2,), 0.4)
    told = model(images, time, condition)
    null = model(images, time, model.null_condition.expand_as(condition))
    for w in (0.0, 1.0, 3.0):
        guided = model._guided(images, 0.4, condition, w)
        torch.testing.assert_close(guided, null + w * (told - null), rtol=1e-4, atol=1e-5)
    assert torch.equal(model._guided(images, 0.4, condition, 1.0), told)
    plain = model.generate(condition, guidance_scale=1.0, generator=_seeded())
    nn.init.normal_(model.null_condition)
    assert torch.equal(model.generate(condition, guidance_scale=1.0, generator=_seeded()), plain)
    assert not torch.equal(model.generate(condition, generator=_seeded()), plain)


def test_a_generator_of_16_bits_draws() -> None:
    model = _woken()
    condition = model.conditions(torch.arange(2)).detach()
    exact = model.generate(condition, num_inference_steps=2, generator=_seeded())
    half = model.bfloat16()
    drawn = half.generate(condition.bfloat16(), num_inference_steps=2, generator=_seeded())
    assert drawn.dtype == torch.uint8
    drawn, exact = drawn.float(), exact.float()
    own, other = ((drawn - x).abs().mean((1, 2, 3)) for x in (exact, exact.roll(1, 0)))
    assert (own < other).all()


def test_generator_names_what_is_wrong() -> None:
    model = ImageGenerator(TINY)
    good = model.conditions(torch.tensor([1]))
    for wrong in (torch.zeros(1, 3, 15), torch.zeros(1, 4, 16), torch.zeros(3, 16)):
        with pytest.raises(ValueError, match=r"condition must be \[n, 3, 16\], got"):
            model.generate(wrong)
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1, got 0"):
        model.generate(good, num_inference_steps=0)
    for subject in (-1, 10):
        with pytest.raises(ValueError, match=rf"subjects must be 0 to 9, got \[3, {subject}\]"):
            model.conditions(torch.tensor([3, subject]))
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size, got 12, 5"):
        ImageGenerator(GeneratorConfig(image_size=12, patch_size=5))


# Output projector and generator


def _phrasings(subjects: torch.Tensor, table: torch.Tensor, generator: torch.Generator):  # type: ignore[no-untyped-def]
    """Stand-in for a backbone: a state for each subject and phrasing, as a prompt's other words change it."""
    phrasing = torch.randint(table.shape[1], subjects.shape, generator=generator)
    states = table[subjects, phrasing]
    return states + 0.1 * torch.randn(states.shape, generator=generator)


def _teach(projector: OutputProjector, model: ImageGenerator, table: torch.Tensor, steps: int):  # type: ignore[no-untyped-def]
    generator = _seeded(1)

    def loss_at(step: int) -> torch.Tensor:
        subjects = torch.randint(len(table), (32,), generator=generator)
        return image_loss(projector, model, _phrasings(subjects, table, generator), subjects)

    return fit("drawing", loss_at, (projector,), steps=steps, lr=3e-3)


def test_image_loss_trains_the_projector_alone() -> None:
    projector, model = OutputProjector(SMALL, 24), ImageGenerator(TINY)
    hidden_states = torch.randn(2, 4, 24, requires_grad=True)
    loss = image_loss(projector, model, hidden_states, torch.tensor([3, 3]))
    expected = (projector(hidden_states) - model.conditions.weight[3]).square().mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert hidden_states.grad.any()  # the backbone learns too, where it is not frozen
    for name, parameter in projector.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert all(p.grad is None for p in model.parameters())


def test_from_states_to_pictures() -> None:
    """A generator of black (0) and white (1) pictures; two states become two pictures."""
    config = GeneratorConfig(**{**TINY.__dict__, "num_subjects": 2})
    model, g = ImageGenerator(config), _seeded()

    def loss_at(step: int) -> torch.Tensor:
        subjects = torch.randint(2, (32,), generator=g)
        pixels = (255 * subjects).to(torch.uint8)[:, None, None, None].expand(-1, 1, 12, 12)
        return model.flow_loss(pixels, model.conditions(subjects), g)

    fit("generator", loss_at, (model,), steps=150, lr=3e-3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    projector, table = OutputProjector(SMALL, 24), torch.randn(2, 3, 4, 24)
    _teach(projector, model, table, 100)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    asked = torch.tensor([0, 1] * 8)
    with torch.no_grad():
        condition = projector(_phrasings(asked, table, _seeded(5)))
    apart = torch.cdist(condition.flatten(1), model.conditions.weight.flatten(1))
    assert torch.equal(apart.argmin(1), asked)
    drawn = model.generate(condition, num_inference_steps=8, generator=_seeded())
    bright = drawn.float().mean((1, 2, 3))
    assert torch.equal(bright > 127.5, asked == 1), bright


# Training data and judge


def test_render_shows_the_scan_and_varies_only_with_a_generator() -> None:
    scans = digits.load_scans("train")
    few = digits.Scans(scans.images[:50], scans.labels[:50])
    plain = drawing.render(few, 28)
    assert plain.shape == (50, 1, 28, 28) and plain.dtype == torch.uint8
    assert torch.equal(plain, drawing.render(few, 28))
    inner = drawing.render(few, 24)[:, :, 2:-2, 2:-2].float()  # what is left without the margin
    rows = torch.nn.functional.interpolate(inner, (8, 8), mode="area")[:, 0]
    own = few.images
    others = (own.flip(1), own.flip(2), own.mT, own.roll(1, 0), own.roll(1, 1), own.roll(1, 2))
    apart = [(rows / 255 - other).square().sum((1, 2)) for other in (own, *others)]
    assert (torch.stack(apart).argmin(0) == 0).all()
    a, b = drawing.render(few, 28, _seeded(1)), drawing.render(few, 28, _seeded(1))
    c = drawing.render(few, 28, _seeded(2))
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, plain)


def test_recogniser_judges_scans_noise_and_copies() -> None:
    train, heldout = digits.load_scans("train"), digits.load_scans("heldout")
    real = recognise.evaluate(drawing.render(heldout, 20), heldout.labels, train, heldout)
    assert real.heldout_accuracy > 0.97 and real.recognised > 0.97
    copied = recognise.evaluate(drawing.render(train, 20), train.labels, train, heldout)
    assert copied.nearest[0] == 0 < copied.nearest[2] < copied.nearest[1]
    asked = torch.arange(10).repeat(20)
    noise = torch.randint(0, 256, (200, 1, 20, 20), dtype=torch.uint8)
    assert recognise.evaluate(noise, asked, train, heldout).recognised < 0.3
    one = drawing.render(train, 20)[:1].expand(200, -1, -1, -1)
    stuck = recognise.evaluate(one, asked, train, heldout)
    assert stuck.spread == 0 and sorted(stuck.right) == [0.0] * 9 + [1.0]
    assert "10.0% (0:" in str(stuck)
    with pytest.raises(ValueError, match="each of the ten twice"):
        recognise.evaluate(noise[:12], asked[:12], train, heldout)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_digits_are_drawn_as_asked() -> None:
    """The whole way: real scans, 3 phrasings a digit, 400 drawings of states no step has seen."""
    train, heldout = digits.load_scans("train"), digits.load_scans("heldout")
    model = ImageGenerator()
    drawing.train_generator(model, train)
    c = model.config
    projector = OutputProjector(
        OutputProjectorConfig(
            128, 2, 2, 4, 256, c.num_condition_tokens, c.condition_size
        ), 64,
    )  # fmt: skip
    table = torch.randn(10, 3, 4, 64)
    _teach(projector, model, table, 300)
    asked = torch.arange(10).repeat(40)
    with torch.no_grad():
        condition = projector(_phrasings(asked, table, _seeded(5)))
    drawn = model.generate(condition, generator=_seeded(6))
    verdict = recognise.evaluate(drawn, asked, train, heldout)
    print(verdict)
    assert verdict.recognised >= 0.9 and min(verdict.right) > 0.5, verdict
    assert verdict.nearest[0] > verdict.nearest[2] and verdict.spread > 0.5, verdict


# diffusers


class StubPipeline:
    """Called as StableDiffusionPipeline: keeps what it was given, draws prompts' first value as grey."""

    device = torch.device("cpu")
    unet = SimpleNamespace(config=SimpleNamespace(cross_attention_dim=16))

    def encode_prompt(  # type: ignore[no-untyped-def]
        self, prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt=None,
        prompt_embeds=None, negative_prompt_embeds=None, lora_scale=None, clip_skip=None,
    ):  # fmt: skip
        assert num_images_per_prompt == 1 and do_classifier_free_guidance is False
        states = torch.tensor([float(p) for p in prompt])[:, None, None].expand(-1, 5, 16)
        return states, None

    def __call__(  # type: ignore[no-untyped-def]
        self, prompt=None, height=None, width=None, num_inference_steps=50, timesteps=None, sigmas=None,
        guidance_scale=7.5, negative_prompt=None, num_images_per_prompt=1, eta=0.0, generator=None,
        latents=None, prompt_embeds=None, negative_prompt_embeds=None, ip_adapter_image=None,
        ip_adapter_image_embeds=None, output_type="pil", return_dict=True, cross_attention_kwargs=None,
        guidance_rescale=0.0, clip_skip=None, callback_on_step_end=None,
        callback_on_step_end_tensor_inputs=("latents",), **kwargs,
    ):  # fmt: skip
        assert output_type == "pt" and prompt is None
        self.given = (num_inference_steps, guidance_scale, generator)
        return SimpleNamespace(images=prompt_embeds[:, :1, :1, None].expand(-1, 3, 8, 8))


def test_adapter_calls_a_pipeline() -> None:
    adapter, g = DiffusersGenerator(StubPipeline()), _seeded()
    condition = adapter.conditions(["0", "0.8", "1"])
    assert condition.shape == (3, 5, 16)
    images = adapter.generate(condition, num_inference_steps=3, guidance_scale=2.0, generator=g)
    assert images.shape == (3, 3, 8, 8) and images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [0, 204, 255]
    assert adapter.pipeline.given == (3, 2.0, g)
    with pytest.raises(ValueError, match=r"condition must be \[n, m, 16\].*got \[1, 5, 15\]"):
        adapter.generate(torch.zeros(1, 5, 15))


def test_the_projector_learns_a_pipelines_conditions() -> None:
    projector = OutputProjector(
        OutputProjectorConfig(**{**SMALL.__dict__, "num_condition_tokens": 5}), 24
    )
    adapter = DiffusersGenerator(StubPipeline())
    loss = image_loss(projector, adapter, torch.randn(2, 4, 24), ["0.5", "1"])
    assert loss.requires_grad and loss > 0


def test_without_diffusers_one_line_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"^[^\n]*needs diffusers[^\n]*: pip install diffusers$"):
        DiffusersGenerator.from_folder(tmp_path)
    with pytest.raises(ValueError, match="nowhere must be the folder of a diffusers pipeline"):
        DiffusersGenerator.from_folder(tmp_path / "nowhere")


def test_a_real_pipeline(tmp_path: Path) -> None:
    """A Stable Diffusion of random weights, written by save_pretrained, read from its folder."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    signature = inspect.signature(diffusers.StableDiffusionPipeline.__call__)
    assert set(inspect.signature(StubPipeline.__call__).parameters) == set(signature.parameters)
    words = ["<|startoftext|>", "<|endoftext|>", "a", "a</w>", "b", "b</w>"]
    text = transformers.CLIPTextConfig(
        vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=9, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=transformers.CLIPTokenizer({w: i for i, w in enumerate(words)}, [], model_max_length=9),
        unet=diffusers.UNet2DConditionModel(sample_size=8, block_out_channels=(8, 8), layers_per_block=1,
            norm_num_groups=4, attention_head_dim=2, cross_attention_dim=16,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None,
        feature_extractor=None, image_encoder=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path, safe_serialization=True)
    adapter = DiffusersGenerator.from_folder(tmp_path)
    adapter.pipeline.set_progress_bar_config(disable=True)
    condition = adapter.conditions(["a b", "b"])
    assert condition.shape == (2, 9, 16)
    expected = pipeline.text_encoder(pipeline.tokenizer(["a b", "b"], padding="max_length",
        max_length=9, return_tensors="pt").input_ids)[0]  # fmt: skip
    torch.testing.assert_close(condition, expected)
    m = 5  # fewer condition tokens than the text encoder's
    projector = OutputProjector(
        OutputProjectorConfig(**{**SMALL.__dict__, "num_condition_tokens": m}), 24
    )
    with torch.no_grad():
        condition = projector(torch.randn(2, 4, 24))
    a, b, c = (
        adapter.generate(condition, num_inference_steps=2, generator=_seeded(s)) for s in (0, 0, 1)
    )
    assert a.shape == (2, 3, 16, 16) and a.dtype == torch.uint8
    assert torch.equal(a, b) and not torch.equal(a, c)
