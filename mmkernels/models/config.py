# SPDX-License-Identifier: Apache-2.0
"""Sizes of the reference MM-LLM as dataclasses, JSON in and out: a preset is data.

An input projector is a tuple of blocks, one behind the other (``projector.py``); a block's input width is the output
width of the one before. ``kind`` in the JSON names the class.
"""

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any


def _divides(config: Any, part: str, whole: str) -> None:
    a, b = getattr(config, part), getattr(config, whole)
    if a < 1 or b < 1 or b % a:
        raise ValueError(f"{type(config).__name__}: {part} must divide {whole} {b}, got {a}")


def _positive(config: Any, name: str) -> None:
    if getattr(config, name) < 1:
        got = getattr(config, name)
        raise ValueError(f"{type(config).__name__}: {name} must be at least 1, got {got}")


@dataclass(frozen=True)
class VisionConfig:
    """ViT for images and clips of uint8 pixels; sides in pixels, ``temporal_patch_size`` in frames.

    ``offset_bias`` gives attention a bias for each offset between patches; all images then have ``image_size``.
    """

    image_size: int = 112
    patch_size: int = 14
    temporal_patch_size: int = 1
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 8
    intermediate_size: int = 512
    class_token: bool = True
    offset_bias: bool = True

    def __post_init__(self) -> None:
        _divides(self, "num_heads", "hidden_size")
        _positive(self, "patch_size")


@dataclass(frozen=True)
class AudioConfig:
    """ViT over a log-mel spectrogram; ``hop`` and ``window`` in samples, patches in bins × frames."""

    sampling_rate: int = 8000
    hop: int = 80
    window: int = 200
    mel_bins: int = 64
    patch_size: int = 16
    stride: int = 16
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 8
    intermediate_size: int = 512

    def __post_init__(self) -> None:
        _divides(self, "num_heads", "hidden_size")
        _positive(self, "patch_size")
        _positive(self, "stride")


@dataclass(frozen=True)
class TransformersVisionConfig:
    """A vision tower of transformers, ``config`` its JSON; features are the hidden states of ``layer``."""

    config: str
    layer: int = field(default=-2, metadata={"signed": True})
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class PlaceConfig:
    """Adds learned positions of a ``side × side`` grid (they start as sines) to every frame, prefix tokens excepted;
    with ``side`` 0 the sines themselves, of any grid."""

    side: int


@dataclass(frozen=True)
class FramePlaceConfig:
    """Adds one learned vector to all tokens of a frame, for up to ``frames`` frames (Video-LLaMA)."""

    frames: int


@dataclass(frozen=True)
class DropPrefixConfig:
    """Drops the tokens before each frame's grid (LLaVA's class token)."""


@dataclass(frozen=True)
class NormConfig:
    """``act(norm(x))``, ``"layer"`` or ``"rms"`` over the width; ``act`` as in ``LinearConfig``."""

    norm: str = "layer"
    eps: float = 1e-6
    act: str = ""


@dataclass(frozen=True)
class LinearConfig:
    """``act(x · W + b)``; ``act`` empty, ``"gelu"``, ``"relu"`` or ``"silu"``. Two of them are LLaVA-1.5's MLP."""

    width: int
    bias: bool = True
    act: str = ""


@dataclass(frozen=True)
class SwiGLUConfig:
    """``down(silu(gate(x)) · up(x))``."""

    width: int
    intermediate_size: int


@dataclass(frozen=True)
class MergeConfig:
    """``rows × columns`` neighbours side by side, in raster order (``1 × 4`` in MiniGPT-v2); ``order`` and ``pad`` as
    in ``mmkernels.patch_merge``."""

    rows: int = 2
    columns: int = 2
    order: str = "kkc"
    pad: bool = False


@dataclass(frozen=True)
class PoolConfig:
    """Means: over ``"item"`` (one token), each ``"frame"``, or ``"time_and_space"`` (a token a frame, then one a place,
    Video-ChatGPT). Prefix tokens are dropped; ``"prefix"`` keeps a frame's first token alone (a pooled class token)."""

    over: str = "item"


@dataclass(frozen=True)
class SpreadConfig:
    """One token becomes ``tokens`` of ``width`` by a linear layer (GILL)."""

    tokens: int
    width: int


@dataclass(frozen=True)
class WrapConfig:
    """A learned vector before and one behind the tokens of each item (CogVLM's boi and eoi)."""


@dataclass(frozen=True)
class TransformerConfig:
    """Self-attention among the tokens of each item: pre-norm layers of the width at hand (X-LLM's speech adapter)."""

    num_layers: int
    num_heads: int
    intermediate_size: int


@dataclass(frozen=True)
class QFormerConfig:
    """Learned queries read an item or, with ``per="frame"``, each of its frames (BLIP-2, Video-LLaMA).

    With ``ordered_side`` queries start at places from left to right of a grid of that side (0: at random) and keys like
    queries, so that each reads its column.
    """

    num_query_tokens: int = 8
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 8
    intermediate_size: int = 256
    cross_attention_frequency: int = 1
    per: str = "item"
    ordered_side: int = 0

    def __post_init__(self) -> None:
        _divides(self, "num_heads", "hidden_size")


@dataclass(frozen=True)
class PerceiverConfig:
    """``nn.PerceiverResampler``; keys and values are the context and the latents (Flamingo, Idefics2). Which of the two
    comes first (mPLUG-Owl: latents) changes nothing: attention without positions has no order.

    ``norm`` ``"rms"`` or ``"layer"``, ``mlp`` ``"swiglu"`` or ``"gelu"``: first Idefics2's, then Flamingo's.
    """

    num_latents: int = 64
    num_layers: int = 3
    num_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = 96
    intermediate_size: int = 1024
    per: str = "item"
    norm: str = "rms"
    mlp: str = "swiglu"


@dataclass(frozen=True)
class ResamplerConfig:
    """``nn.Resampler``: constant queries read one frame (Qwen-VL, MiniCPM-V)."""

    num_queries: int
    width: int
    num_heads: int
    query_grid: bool = False
    post: bool = True


@dataclass(frozen=True)
class DecoderConfig:
    """Llama-style decoder; names are transformers'. ``head_dim`` 0: hidden_size / heads.

    ``mrope_section``: channels of half a head for each position axis, empty for 1-D RoPE. ``gated_layers``: layers that
    read the features beside the text (Flamingo); empty: features lie in the text. They have
    ``gated_num_heads`` of ``gated_head_dim`` and read features of ``gated_feature_size``; 0: the decoder's own.
    ``lora_rank`` > 0: adapters at the layers named (``lora.py``).
    """

    vocab_size: int = 266
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 0
    max_position_embeddings: int = 256
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    attention_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    mrope_section: tuple[int, ...] = ()
    gated_layers: tuple[int, ...] = ()
    gated_num_heads: int = 0
    gated_head_dim: int = 0
    gated_feature_size: int = 0
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.head_dim:
            _divides(self, "num_attention_heads", "hidden_size")
        _divides(self, "num_key_value_heads", "num_attention_heads")
        if beyond := [i for i in self.gated_layers if i >= self.num_hidden_layers]:
            layers = self.num_hidden_layers
            raise ValueError(f"gated_layers must be of the {layers} layers, got {beyond}")

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def feature_width(self) -> int:
        """What projectors end with."""
        return (self.gated_feature_size if self.gated_layers else 0) or self.hidden_size


@dataclass(frozen=True)
class OutputProjectorConfig:
    """Queries that read signal tokens. The sizes of GILL and NExT-GPT are the defaults: 4 + 4 layers of 512, 77 tokens
    of 768 for Stable Diffusion."""

    hidden_size: int = 512
    num_encoder_layers: int = 4
    num_decoder_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 2048
    num_condition_tokens: int = 77
    condition_size: int = 768

    def __post_init__(self) -> None:
        _divides(self, "num_heads", "hidden_size")


@dataclass(frozen=True)
class GeneratorConfig:
    """Flow-matching generator of pictures; sides in pixels; ``num_subjects`` things can be asked for by number."""

    image_size: int = 20
    patch_size: int = 4
    num_channels: int = 1
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 512
    num_condition_tokens: int = 4
    condition_size: int = 64
    num_subjects: int = 10

    def __post_init__(self) -> None:
        _divides(self, "num_heads", "hidden_size")
        _positive(self, "patch_size")


Encoder = VisionConfig | AudioConfig | TransformersVisionConfig
Block = (
    PlaceConfig | FramePlaceConfig | DropPrefixConfig | NormConfig | LinearConfig | SwiGLUConfig | MergeConfig
    | PoolConfig | SpreadConfig | WrapConfig | TransformerConfig | QFormerConfig | PerceiverConfig | ResamplerConfig
)  # fmt: skip


def _image_projector() -> dict[str, tuple[Block, ...] | str]:
    return {"image": (PlaceConfig(8), QFormerConfig(ordered_side=8), LinearConfig(128))}


@dataclass(frozen=True)
class MMConfig:
    """An encoder and a projector for each modality (``"image"``, ``"video"``, ``"audio"``), and the decoder.

    An encoder or projector may be the name of another modality's, which is then shared. With an output projector and
    a generator the model draws.
    """

    encoders: dict[str, Encoder | str] = field(default_factory=lambda: {"image": VisionConfig()})
    projectors: dict[str, tuple[Block, ...] | str] = field(default_factory=_image_projector)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    output_projector: OutputProjectorConfig | None = None
    generator: GeneratorConfig | None = None
    tokenizer: str = ""  # a folder of transformers' tokenizer; empty: bytes

    def to_json(self) -> str:
        """Indented JSON, every field written out."""
        return json.dumps(_written(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "MMConfig":
        """Reads what ``to_json`` wrote. ValueError names a part or field that does not belong."""
        return typing.cast(MMConfig, _read(cls, json.loads(text), "config"))


KINDS: dict[str, type[Any]] = {
    c.__name__.removesuffix("Config"): c for c in (*typing.get_args(Encoder), *typing.get_args(Block))
}  # fmt: skip


def _written(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        name = type(value).__name__.removesuffix("Config")
        kind = {"kind": name} if name in KINDS else {}
        return kind | {f.name: _written(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: _written(v) for k, v in value.items()}
    return [_written(v) for v in value] if isinstance(value, tuple) else value


def _read(kind: Any, value: Any, where: str, signed: bool = False) -> Any:
    """``value`` as ``kind``: a dataclass, a union of them, dict, tuple or scalar."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _read_one_of(arguments, value, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return read_fields(kind, value, where)
    if origin is dict:
        return {
            k: _read(arguments[1], v, f"{where}.{k}") for k, v in _is(dict, value, where).items()
        }
    if origin is tuple:
        items = enumerate(_is(list, value, where))
        return tuple(_read(arguments[0], v, f"{where}[{i}]") for i, v in items)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind in (int, float) and value < 0 and not signed):
        expected = "a number of at least 0" if kind in (int, float) else f"a {kind.__name__}"
        raise ValueError(f"{where} must be {expected}, got {value!r}")
    return value


def _read_one_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if isinstance(value, str) and str in kinds:
        return value
    if type(None) in kinds or isinstance(value, list):
        return None if value is None else _read(kinds[0], value, where)
    name = _is(dict, value, where).get("kind")
    if name not in KINDS or KINDS[name] not in kinds:
        known = sorted(k.__name__.removesuffix("Config") for k in kinds if k is not str)
        raise ValueError(f"{where}.kind must be one of {known}, got {name!r}")
    return read_fields(KINDS[name], {k: v for k, v in value.items() if k != "kind"}, where)


def read_fields(kind: type[Any], value: Any, where: str) -> Any:
    """A dataclass from a dict with exactly its fields. ValueError names what does not belong."""
    hints = typing.get_type_hints(kind)
    wrong = sorted(set(_is(dict, value, where)) ^ set(hints))
    if wrong:
        raise ValueError(f"{where} has missing or unknown fields: {wrong}")
    signed = {f.name for f in dataclasses.fields(kind) if f.metadata.get("signed")}
    return kind(
        **{n: _read(hint, value[n], f"{where}.{n}", n in signed) for n, hint in hints.items()}
    )


def _is(kind: type[Any], value: Any, where: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{where} must be a {kind.__name__}, got {value!r}")
    return value
