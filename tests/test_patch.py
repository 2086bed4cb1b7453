# SPDX-License-Identifier: Apache-2.0
"""``mmkernels.patch``: how it replaces, gives back, refuses and reports. The classes are in ``test_patch_classes``."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
import transformers as tf
from packed_models import MODELS, samples
from test_packed_models import padded

import mmkernels
from mmkernels.hf.merge import scatter_rows
from mmkernels.hf.row import class_of, is_replaced

LLAVA, QWEN = MODELS[0], MODELS[4]
OLD = tuple(map(int, tf.__version__.split(".")[:2])) < (
    5,
    23,
)  # other structures, films numbered otherwise
CLIP = {"hidden_size": 24, "image_size": 16, "patch_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32}  # fmt: skip


def clip() -> Any:
    torch.manual_seed(0)
    return tf.CLIPVisionModel(tf.CLIPVisionConfig(**CLIP)).eval()


EMBEDDINGS = next(n for n, _ in clip().named_modules() if n.endswith("embeddings"))
CONV = f"{EMBEDDINGS}.patch_embedding"


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def out(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


@pytest.mark.skipif(OLD, reason="is of another rule itself")
def test_positions_of_another_rule_are_left_alone() -> None:
    """A film is in the trial call: transformers 5.3 numbers films otherwise, pictures alike."""
    model = QWEN.build().eval()

    class Older(type(model.model)):  # type: ignore[misc]
        pass

    def get_rope_index(self: Any, *args: Any, **kwargs: Any) -> Any:
        positions, deltas = super(Older, self).get_rope_index(*args, **kwargs)
        return (positions + (kwargs.get("video_grid_thw", args[3]) is not None), deltas)

    def told() -> str:
        lines = mmkernels.patch(model).lines
        return next(line.why_not for line in lines if line.part == "positions")

    get_rope_index.__module__ = type(model.model).__module__
    model.model.__class__ = Older
    Older.get_rope_index = type(model.model).__mro__[1].get_rope_index
    with mmkernels.patch(model) as patched:
        assert "positions" in {line.part for line in patched.lines if not line.why_not}
    Older.get_rope_index = get_rope_index
    get_rope_index.__wrapped__ = Older.__mro__[1].get_rope_index  # its signature
    assert "a trial call differs" in told()


def any_replaced(model: nn.Module) -> bool:
    """Whether a module is of a class that ``patch`` made."""
    return any(class_of(m) is not type(m) for m in model.modules())


def replaced(patched: mmkernels.Patched) -> dict[str, str]:
    return {line.module: line.op for line in patched.lines if not line.why_not}


@pytest.mark.parametrize("entry", [LLAVA, QWEN], ids=lambda e: e.kind)
def test_parts_go_through_the_ops_and_come_back(entry: Any, monkeypatch: Any) -> None:
    """Same numbers; every op named in the report is called; ``remove`` gives the same bits."""
    model, inputs = entry.build().eval(), padded(samples(entry))
    before, keys = out(model, inputs), list(model.state_dict())
    patched = mmkernels.patch(model)
    assert list(model.state_dict()) == keys
    with torch.profiler.profile() as trace:
        after = out(model, inputs)
    ran = {e.name for e in trace.events()}
    assert {"mmkernels::patch_embed", "mmkernels::merge_embeddings"} <= ran
    assert ("mmkernels::mrope_positions" in ran) == (
        "mrope_positions" in replaced(patched).values()
    )
    assert not any("masked_scatter" in name for name in ran)
    assert 0 < (after - before).abs().max() <= 1e-5 * before.abs().max()
    patched.remove()
    assert torch.equal(out(model, inputs), before)
    assert not any_replaced(model)


def test_twice_is_once() -> None:
    model = LLAVA.build().eval()
    first, second = mmkernels.patch(model, cache=True), mmkernels.patch(model, cache=True)
    assert first.lines == second.lines
    modules = [m for m in model.modules() if is_replaced(m, "forward")]
    assert modules and all(type(m).__base__ is class_of(m) for m in modules)
    second.remove()
    assert not any_replaced(model)
    first.remove()


def test_as_a_context() -> None:
    model = clip()
    with mmkernels.patch(model) as patched:
        assert replaced(patched)
    assert not any_replaced(model)


def test_report(capsys: Any) -> None:
    mmkernels.patch(clip()).report()
    lines = capsys.readouterr().out.splitlines()
    assert any("embeddings" in n and "→ patch_embed + positions + prefix" in n for n in lines)


def test_a_copy_is_patched_and_its_own() -> None:
    model = clip()
    mmkernels.patch(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert other(pixels()).last_hidden_state.abs().max() == 0
    assert model(pixels()).last_hidden_state.abs().max() > 0


def test_nothing_to_replace_is_an_error() -> None:
    with pytest.raises(mmkernels.NothingToPatch, match="Linear has nothing to replace"):
        mmkernels.patch(nn.Linear(2, 2))
    with pytest.raises(mmkernels.NothingToPatch, match="for \\['merge'\\]"):
        mmkernels.patch(clip(), patch_embed=False, projector=False, positions=False)


def test_hooks_of_the_module_still_run() -> None:
    model, seen = clip(), []
    conv, embeddings = model.get_submodule(CONV), model.get_submodule(EMBEDDINGS)
    embeddings.register_forward_hook(lambda *_: seen.append("embeddings"))
    mmkernels.patch(model)
    model(pixels())
    assert seen == ["embeddings"]
    # Hung up later: from then on its layer must be called.
    conv.register_forward_hook(lambda *_: seen.append("conv"))
    model(pixels())
    assert seen == ["embeddings", "conv", "embeddings"]


def test_an_adapter_put_around_the_positions_later_counts() -> None:
    """The embedding reads them itself, until they are more than their parameters."""
    model = clip()
    patched = mmkernels.patch(model)
    before = model(pixels()).last_hidden_state
    embeddings = model.get_submodule(EMBEDDINGS)

    class Shifted(nn.Module):
        def __init__(self, base: nn.Embedding) -> None:
            super().__init__()
            self.base, self.weight = base, base.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return 3 * self.base(ids)

    embeddings.position_embedding = Shifted(embeddings.position_embedding)
    with torch.no_grad():
        ours = model(pixels()).last_hidden_state
        patched.remove()
        theirs = model(pixels()).last_hidden_state
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert (ours - before).abs().max() > 1e-3


def test_remove_reaches_below_what_was_wrapped_since() -> None:
    model = clip()
    before = model(pixels()).last_hidden_state
    patched = mmkernels.patch(model)
    conv, called = model.get_submodule(CONV), []
    ours = conv.forward
    conv.forward = lambda x: called.append(1) or ours(x)
    patched.remove()
    assert torch.equal(model(pixels()).last_hidden_state, before) and called == [1]
    assert not any_replaced(model)


def why_not(model: nn.Module, module: str, **options: Any) -> str:
    """The reason in the report; the parts left over keep their numbers."""
    x = pixels()
    with torch.no_grad():
        before = model(x).last_hidden_state
        try:
            lines = mmkernels.patch(model, **options).lines
        except mmkernels.NothingToPatch as error:
            return str(error)
        assert (model(x).last_hidden_state - before).abs().max() <= 1e-5 * before.abs().max()
    return " ".join(line.why_not for line in lines if line.module == module)


def test_a_forward_that_computes_something_else_is_left_alone() -> None:
    model = clip()

    class Louder(type(model.get_submodule(EMBEDDINGS))):  # type: ignore[misc]
        def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
            return 2 * super().forward(pixel_values, **kwargs)

    model.get_submodule(EMBEDDINGS).__class__ = Louder
    assert "a trial call differs by" in why_not(model, EMBEDDINGS)


def test_a_renamed_attribute_is_no_obstacle_where_the_structure_stays() -> None:
    """Names are not what is looked at."""
    model = clip()
    embeddings = model.get_submodule(EMBEDDINGS)

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(embeddings.class_embedding.detach())
            self.cut = embeddings.patch_embedding
            self.where = embeddings.position_embedding

        def forward(
            self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False
        ) -> torch.Tensor:
            rows = self.cut(pixel_values).flatten(2).transpose(1, 2)
            return torch.cat([self.first.expand(len(rows), 1, -1), rows], 1) + self.where.weight

    where = model.get_submodule(EMBEDDINGS.rpartition(".")[0])
    where.embeddings = Renamed()
    assert why_not(model, EMBEDDINGS) == ""


def test_layers_that_are_more_than_their_parameters_are_left_alone() -> None:
    model = clip()

    class Quantised(nn.Conv2d):
        pass

    model.get_submodule(CONV).__class__ = Quantised
    assert "is a Quantised" in why_not(model, CONV)
    model = clip()
    model.get_submodule(CONV).forward = model.get_submodule(CONV).forward
    assert "has a forward of its own" in why_not(model, CONV)
    model = clip()
    model.twin = nn.Conv2d(3, 24, 4, 4, bias=False)
    model.twin.weight = model.get_submodule(CONV).weight
    assert "shares a parameter" in why_not(model, CONV)


def test_quantised_layers_are_left_alone() -> None:
    from torch.ao.quantization import quantize_dynamic
    from vlm_zoo import ZOO

    blip2 = next(e for e in ZOO if e.name == "Blip2")
    model = quantize_dynamic(blip2.build(), {nn.Linear})
    inputs = blip2.batch("image", torch.Generator().manual_seed(0))
    assert inputs is not None
    before = out(model, inputs)
    told = {line.part: line.why_not for line in mmkernels.patch(model).lines}
    assert "key is a torch.ao.nn.quantized.dynamic" in told.get("projector", "") or OLD
    assert (out(model, inputs) - before).abs().max() <= 0.05 * before.abs().max()


def test_strict_raises_and_replaces_nothing() -> None:
    model = clip()
    model.get_submodule(CONV).forward = model.get_submodule(CONV).forward
    with pytest.raises(ValueError, match="left alone under strict"):
        mmkernels.patch(model, strict=True)
    assert not any_replaced(model)
    mmkernels.patch(clip(), strict=True)


def test_a_model_without_weights_is_left_alone() -> None:
    with torch.device("meta"):
        model = tf.CLIPVisionModel(tf.CLIPVisionConfig(**CLIP))
    with pytest.raises(mmkernels.NothingToPatch, match="on the meta device: patch after loading"):
        mmkernels.patch(model)


@pytest.mark.parametrize("shape", [(2, 5, 4), (7, 4)])
def test_scatter_rows_is_masked_scatter(shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    x, places = torch.randn(shape, generator=g), torch.rand(shape[:-1], generator=g) < 0.5
    source = torch.randn(int(places.sum()), shape[-1], generator=g)
    for mask in (
        places[..., None],
        places[..., None].expand(shape),
        places[..., None].expand(shape).contiguous(),
    ):
        given = [t.clone().requires_grad_() for t in (x, source)]
        expected = given[0].masked_scatter(mask, given[1])
        grads = torch.autograd.grad(expected.square().sum(), given)
        got = scatter_rows(given[0], mask, given[1])
        assert torch.equal(got, expected)
        assert all(map(torch.equal, torch.autograd.grad(got.square().sum(), given), grads))
    told = f"input_ids hold {len(source)} placeholders, got {2 * len(source)} rows of features"
    with pytest.raises(ValueError, match=told):
        scatter_rows(x, places[..., None], torch.cat([source, source]))


def test_surplus_features_name_the_models_own_token_ids(monkeypatch: Any) -> None:
    """transformers checks the numbers itself, unless a caller switches its checks off."""
    from transformers.models.llava import modeling_llava

    model, inputs = LLAVA.build().eval(), padded(samples(LLAVA))
    monkeypatch.setattr(modeling_llava, "torch_compilable_check", lambda *_: None)
    inputs["pixel_values"] = torch.cat([inputs["pixel_values"], inputs["pixel_values"][:1]])
    assert out(model, inputs).isfinite().all()
    mmkernels.patch(model)
    with pytest.raises(ValueError, match=r"merge: input_ids hold 16 placeholders \(image_token_i"):
        out(model, inputs)


def test_the_interpolated_call_goes_to_the_model() -> None:
    model = clip()
    big = torch.randn(1, 3, 24, 32)
    with torch.no_grad():
        before = model(big, interpolate_pos_encoding=True).last_hidden_state
        mmkernels.patch(model)
        after = model(big, interpolate_pos_encoding=True).last_hidden_state
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    with pytest.raises(ValueError, match="doesn't match"):
        model(big)
