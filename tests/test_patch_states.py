# SPDX-License-Identifier: Apache-2.0
"""``patch`` in every state that a model can be in: it replaces correctly or leaves alone with a reason.

Each state is made the way its users make it. The numbers are those of the same model in the same state, unpatched.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from packed_models import MODELS, Model, samples
from test_packed_models import padded
from vlm_zoo import ZOO

import mmkernels

LLAVA, QWEN2, QWEN3 = (MODELS[i] for i in (0, 4, 6))
OTHERS = [m for m in MODELS if m not in (LLAVA, QWEN2)]
FULL = [pytest.param(m, marks=pytest.mark.full, id=m.kind) for m in OTHERS]
SOME = [pytest.param(m, id=m.kind) for m in (LLAVA, QWEN2)]
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


class Linear8(nn.Module):
    """int8 weights and a scale a row, as bitsandbytes' and torchao's layers keep them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        weight = (linear.weight / scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.scale, torch.Tensor)
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)


def quantised(model: Any) -> Any:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and "lm_head" not in name:
                setattr(module, name, Linear8(child))
    return model


def offloaded(model: Any) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def dispatched(model: Any) -> Any:
    """``device_map`` with room for a part of the model."""
    accelerate = pytest.importorskip("accelerate")
    devices = {name: "cpu" for name, _ in model.named_children()}
    return accelerate.dispatch_model(model, devices, main_device="cpu", force_hooks=True)


def adapted(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    return peft.get_peft_model(model, config)


def in_mixed_dtypes(model: Any) -> Any:
    """The language model in bf16, the tower in fp32: as ``from_pretrained`` keeps what must not be rounded."""
    model.model.language_model.bfloat16()
    model.lm_head.bfloat16()
    return model


def with_global_hook(model: Any) -> Any:
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    model.handle = handle
    return model


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def with_hooks(model: Any) -> Any:
    for module in model.modules():
        module.register_full_backward_hook(lambda *_: None)
    return model


STATES: dict[str, Callable[[Any], Any]] = {
    "plain": lambda model: model,
    "int8": quantised,
    "offloaded": offloaded,
    "dispatched": dispatched,
    "bf16": lambda model: model.bfloat16(),
    "fp16": lambda model: model.half(),
    "mixed dtypes": in_mixed_dtypes,
    "adapters": adapted,
    "DataParallel": nn.DataParallel,
    "compiled": compiled,
    "frozen": lambda model: model.requires_grad_(False),
    "training": lambda model: model.train(),
    "copied": copy.deepcopy,
    "backward hooks": with_hooks,
    "global hook": with_global_hook,
}
NO_LATER = ("copied", "plain", "training", "frozen", "global hook")  # what changes nothing later


def logits(model: Any, entry: Model) -> torch.Tensor | str:
    """Or what the model raises in this state, patched or not."""
    inputs = padded(samples(entry))
    kept = next((p.dtype for n, p in model.named_parameters() if "vis" in n), torch.float32)
    inputs = {k: v.to(kept) if v.is_floating_point() else v for k, v in inputs.items()}
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            return model(**inputs).logits.float()  # type: ignore[no-any-return]
    except Exception as error:
        return type(error).__name__


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("entry", [*SOME, *FULL])
def test_patched_in_any_state_computes_the_same(entry: Model, state: str, when: str) -> None:
    """``before``: the model is in the state, then patched; ``after``: patched, then put into it."""
    make = STATES[state]
    expected = logits(made := make(entry.build().eval()), entry)
    unhook(made)
    model = entry.build().eval()
    if when == "after":
        mmkernels.patch(model, cache=True)
    model = make(model)
    if when == "before":
        handle = mmkernels.patch(model, cache=True)
        assert handle.lines and all(line.op or line.why_not for line in handle.lines)
    got = logits(model, entry)
    unhook(model)
    if isinstance(expected, str) or isinstance(got, str):
        assert got == expected
        return
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    dtype = torch.bfloat16 if state == "mixed dtypes" else dtype
    assert (got - expected).abs().max() <= CLOSE[dtype] * expected.abs().max()


def unhook(model: Any) -> None:
    if handle := getattr(model, "handle", None):
        handle.remove()


@pytest.mark.parametrize("entry", [*SOME, *FULL])
def test_on_meta_every_part_has_a_reason(entry: Model) -> None:
    """Parts without parameters are proven on the CPU; the others cannot be."""
    with torch.device("meta"):
        model = entry.build()
    lines = mmkernels.patch(model, cache=True).lines
    assert {line.why_not for line in lines} <= {"", "is on the meta device: patch after loading"}
    assert any(line.why_not for line in lines)


def test_a_module_that_raises_when_asked_is_left_alone() -> None:
    class Odd(nn.Module):
        pixel_shuffle = functools.partialmethod(print)

        @property
        def probe(self) -> Any:
            raise RuntimeError("not loaded yet")

        @property
        def config(self) -> Any:
            raise KeyError("config")

    model = LLAVA.build().eval()
    model.odd = Odd()
    told = {line.module: line.why_not for line in mmkernels.patch(model, cache=True).lines}
    assert told["odd"].startswith("could not be looked at: ")


def test_a_class_forward_set_later_is_called() -> None:
    """Liger replaces a class's forward after models exist."""
    model = LLAVA.build().eval()
    mmkernels.patch(model)
    embeddings = next(m for m in model.modules() if type(m).__name__ == "CLIPVisionEmbeddings")
    cls: Any = type(embeddings).__mro__[1]
    before, called = cls.forward, []
    try:
        cls.forward = lambda self, *args, **kwargs: (
            called.append(1) or before(self, *args, **kwargs)
        )
        logits(model, LLAVA)
    finally:
        cls.forward = before
    assert called == [1]


def test_a_layers_class_forward_set_later_is_called(monkeypatch: Any) -> None:
    model, called = LLAVA.build().eval(), []
    mmkernels.patch(model)
    theirs = nn.Embedding.forward

    def forward(self: Any, ids: torch.Tensor) -> torch.Tensor:
        called.append(len(self.weight))
        return theirs(self, ids)

    monkeypatch.setattr(nn.Embedding, "forward", forward)
    logits(model, LLAVA)
    assert 5 in called  # the positions of 2 × 2 patches and the class token


def test_a_replica_computes_with_its_own_parameters() -> None:
    """``nn.DataParallel`` copies modules by ``_replicate_for_data_parallel``; gradients go to the replica."""
    model = LLAVA.build().eval()
    mmkernels.patch(model)
    tower = model.model.vision_tower
    modules = list(tower.modules())
    replicas = {m: m._replicate_for_data_parallel() for m in modules}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for name, parameter in module._parameters.items():
            own = None if parameter is None else parameter.detach().clone().requires_grad_()
            setattr(replica, name, own)
    replica = replicas[tower]
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    replica(pixel_values=pixels).last_hidden_state.sum().backward()
    conv = next(m for m in modules if isinstance(m, nn.Conv2d))
    assert conv.weight.grad is None and replicas[conv].weight.grad.abs().max() > 0


def test_offloading_a_patched_model_and_removing_both() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = LLAVA.build().eval()
    expected = logits(model, LLAVA)
    handle = mmkernels.patch(model)
    offloaded(model)
    handle.remove()
    assert torch.equal(logits(model, LLAVA), expected)  # type: ignore[arg-type]
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    mmkernels.patch(model)


HOOKS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "forward": lambda layer, note: layer.register_forward_hook(note),
    "forward pre": lambda layer, note: layer.register_forward_pre_hook(note),
    "full backward": lambda layer, note: layer.register_full_backward_hook(note),
    "full backward pre": lambda layer, note: layer.register_full_backward_pre_hook(note),
    "all modules": lambda _, note: torch.nn.modules.module.register_module_forward_hook(note),
    "all backward": lambda _, note: torch.nn.modules.module.register_module_full_backward_hook(
        note
    ),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_layers_that_are_read_are_called(kind: str) -> None:
    model = LLAVA.build()
    mmkernels.patch(model)
    tower = model.model.vision_tower
    conv = next(m for m in tower.modules() if isinstance(m, nn.Conv2d))
    called: list[nn.Module] = []
    handle = HOOKS[kind](conv, lambda layer, *_: called.append(layer))
    tower(torch.randn(2, 3, 28, 28)).last_hidden_state.sum().backward()
    handle.remove()
    assert called.count(conv) == 1


@pytest.mark.full
@pytest.mark.parametrize("name", ["LightOnOcr", "Mistral3"])
def test_mergers_that_read_sizes_break_no_more_graphs(name: str) -> None:
    entry = next(e for e in ZOO if e.name == name)
    inputs = entry.batch("images", torch.Generator().manual_seed(3))
    breaks = []
    for patched in (False, True):
        torch._dynamo.reset()
        model = entry.build()
        if patched:
            mmkernels.patch(model)
        with torch.no_grad():
            breaks.append(torch._dynamo.explain(model)(**inputs).graph_break_count)
    assert breaks[1] <= breaks[0]


@pytest.mark.parametrize("entry", [QWEN2, QWEN3], ids=lambda e: e.kind)
def test_an_image_that_the_mask_hides(entry: Model) -> None:
    """get_rope_index leaves the rows of the grid that are of hidden images unused."""
    model, inputs = entry.build().eval(), padded(samples(entry)[1:3])
    hides = inputs["input_ids"][1] == model.config.image_token_id
    inputs["attention_mask"][1][hides] = 0
    with torch.no_grad():
        expected = model(**inputs).logits
        mmkernels.patch(model)
        got = model(**inputs).logits
    seen = inputs["attention_mask"].bool()
    assert (got - expected)[seen].abs().max() <= 2e-5 * expected[seen].abs().max()
