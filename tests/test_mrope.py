# SPDX-License-Identifier: Apache-2.0
"""What ``tests/test_ops.py`` does not ask of ``mrope``: angles near and far, positions and views of every shape."""

import pytest
import torch

from mmkernels import mrope
from mmkernels.ops.mrope import cases
from mmkernels.testing import which_kernel_ran, yardstick

FREQ = torch.tensor([1.0, 1.0])


def cos_and_sin(positions: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the kernel takes for them, in fp32: the pair (1, 0) turned."""
    unit = torch.tensor([1.0, 0.0]).expand(len(positions), 1, 2)
    with which_kernel_ran() as ran:
        out, _ = mrope(unit, unit, positions, inv_freq)
    assert ran == {"mrope": "native"}
    return out[:, 0, 0], out[:, 0, 1]


@pytest.mark.parametrize("reach", [10, 10**4, 2**24, 2**31, 2**60])
@pytest.mark.parametrize("freq", [1.0, 0.7498942, 1.7e-7])
def test_cos_and_sin_round_once(reach: int, freq: float) -> None:
    g = torch.Generator().manual_seed(0)
    positions = torch.randint(-reach, reach, (50_000,), generator=g)
    inv_freq = FREQ * freq
    angle = (positions.float() * inv_freq[0]).double()
    for got, truth in zip(
        cos_and_sin(positions, inv_freq), (angle.cos(), angle.sin()), strict=True
    ):
        bound = 0.501 * yardstick.ulp(truth, torch.float32)
        found = yardstick.compare("cos, sin", got, truth, bound)
        assert found.ratio <= 1, str(found)


def test_angles_beside_multiples_of_a_quarter_turn() -> None:
    quarter = torch.arange(1, 200_000, dtype=torch.float64) * (torch.pi / 2)
    for freq in (1.0, 1 / 3, 1 / 1024):  # fp32 angles nearest to k·π/2 among whole positions
        inv_freq = FREQ * freq
        positions = (quarter / inv_freq[0].double()).round().long()
        angle = (positions.float() * inv_freq[0]).double()
        for got, truth in zip(
            cos_and_sin(positions, inv_freq), (angle.cos(), angle.sin()), strict=True
        ):
            bound = 0.501 * yardstick.ulp(truth, torch.float32)
            assert yardstick.compare("cos, sin", got, truth, bound).ratio <= 1


def test_no_number_is_read_outside_a_view_of_a_fused_projection() -> None:
    B, L, Hq, Hk, d = 2, 19, 4, 2, 24
    fused = torch.randn(B, L, (Hq + 2 * Hk) * d + 5)
    fused[..., -5:] = torch.nan
    query, key, value = fused[..., :-5].split([Hq * d, Hk * d, Hk * d], -1)
    value.fill_(torch.nan)
    query, key = query.unflatten(-1, (Hq, d)), key.unflatten(-1, (Hk, d))
    inv_freq, positions = torch.rand(d), torch.randint(0, 99, (B, L))
    expected = mrope(query.contiguous(), key.contiguous(), positions, inv_freq)
    for got, wanted in zip(mrope(query, key, positions, inv_freq), expected, strict=True):
        assert torch.equal(got, wanted) and got.is_contiguous()


def test_heads_first_is_a_view() -> None:
    query, key = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16)
    positions, inv_freq = torch.randint(0, 99, (2, 9)), torch.rand(16)
    first = mrope(query.transpose(1, 2), key.transpose(1, 2), positions, inv_freq)
    last = mrope(
        query.transpose(1, 2).contiguous(), key.transpose(1, 2).contiguous(), positions, inv_freq
    )
    assert all(map(torch.equal, first, last))


def test_positions_of_every_shape_are_the_same() -> None:
    inputs = cases.arguments(cases.make_inputs(cases.CASES[0], torch.float32))
    _, B, L = inputs["position_ids"].shape
    row = torch.randint(0, 50, (L,))
    expected = mrope(**{**inputs, "position_ids": row.expand(3, B, L).contiguous()})
    shapes = [row, row[None], row.expand(B, L), row.expand(3, B, L), row.expand(3, 1, L), row.int()]
    for positions in shapes:
        got = mrope(**{**inputs, "position_ids": positions})
        assert all(map(torch.equal, got, expected)), positions.shape


def test_a_token_alone_is_the_token_in_a_batch() -> None:
    case = next(c for c in cases.CASES if c.name == "interleaved")
    inputs = cases.arguments(cases.make_inputs(case, torch.bfloat16))
    query, _ = mrope(**inputs)
    for b, t in ((0, 0), (1, 7), (1, case.L - 1)):
        one = {n: inputs[n][b : b + 1, t : t + 1] for n in ("query", "key")}
        at = inputs["position_ids"][:, b : b + 1, t : t + 1]
        alone, _ = mrope(**{**inputs, **one, "position_ids": at})
        assert torch.equal(alone[0, 0], query[b, t])


def test_inv_freq_in_16_bits_is_multiplied_in_fp32() -> None:
    """A model cast to bf16 casts its buffers, too."""
    x, positions = torch.randn(1, 6, 2, 8), torch.arange(6)[None] * 77
    inv_freq = torch.rand(8).bfloat16()
    got = mrope(x, x, positions, inv_freq)
    assert all(map(torch.equal, got, mrope(x, x, positions, inv_freq.float())))


def test_the_op_itself_refuses_what_would_leave_its_memory() -> None:
    x, at = torch.zeros(1, 3, 2, 8), torch.zeros(2, 1, 3, dtype=torch.int64)
    freq, axis = torch.zeros(8), torch.zeros(8, dtype=torch.int64)
    wrong = [
        (x, x[:, :2], at, freq, axis), (x, x[..., :6], at, freq, axis), (x, x.double(), at, freq, axis),
        (x[0], x[0], at, freq, axis), (x, x, at[..., :2], freq, axis), (x, x, at[:0], freq, axis),
        (x, x, at.int(), freq, axis), (x, x, at, freq[:5], axis), (x, x, at, torch.zeros(10), axis),
        (x, x, at, freq.double(), axis), (x, x, at, freq, axis[:6]), (x, x, at, freq, axis + 2),
        (x, x, at, freq, axis - 1), (x, x, at, freq, axis.int()),
    ]  # fmt: skip
    for op in (torch.ops.mmkernels.mrope, torch.ops.mmkernels.mrope_backward):
        op(x, x, at, freq, axis, "half", 1.0)
        for arguments in wrong:
            with pytest.raises(RuntimeError, match="mrope"):
                op(*arguments, "half", 1.0)
        with pytest.raises(RuntimeError, match="pairing must be half or adjacent"):
            op(x, x, at, freq, axis, "neox", 1.0)


def test_the_table_of_pairs_is_told_from_the_table_of_channels() -> None:
    """transformers' table, made as the error says, is its rotation; equal entries are a table of channels."""
    query = torch.randn(1, 5, 2, 32)
    pairs = 1e4 ** -(torch.arange(16) / 16)
    positions = torch.arange(5)[None]
    for pairing, table in (
        ("half", torch.cat([pairs, pairs])), ("adjacent", pairs.repeat_interleave(2)),
    ):  # fmt: skip
        mrope(query, query, positions, table, pairing=pairing)
        with pytest.raises(ValueError, match="mrope: inv_freq must be of an entry a channel"):
            mrope(query, query, positions, pairs, pairing=pairing)
    for table in (torch.ones(8), torch.zeros(16), pairs.flip(0), pairs.repeat(2)[:24]):
        mrope(query, query, positions, table)
    compiled = torch.compile(
        lambda t: mrope(query, query, positions, t), fullgraph=True, backend="eager"
    )
    compiled(torch.cat([pairs, pairs]))  # values are not read there
