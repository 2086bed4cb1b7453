# SPDX-License-Identifier: Apache-2.0
"""Pictures with one to three real handwritten digits: scikit-learn's 1,797 scans on coloured canvases.

Training and held-out pictures are made of different scans, so a held-out score is about unseen writing.

Dimensions: N pictures, S=3 digit slots (from left to right), W canvas side and V window side in pixels.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

SLOTS = 3
SIDE = 112
BACKGROUND = 10  # the "digit" of an empty slot or patch
Bands = tuple[tuple[float, float], ...]
# Sides of digits, from the least to the most of each band: what any stage sees, and what none does.
SIZES: Bands = ((26.0, 33.0), (39.0, 46.0))
OTHER_SIZES: Bands = ((34.0, 38.0), (23.0, 25.0), (47.0, 50.0))  # between, beyond
_TRIES = 16
GAP_PX = 14.0  # at least this far apart from left to right, so that the order is never in doubt


@dataclass(frozen=True)
class Scans:
    """Handwritten digits: ``images`` ``[n, 8, 8]`` in 0…1, ``labels`` ``[n]``."""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Pictures:
    """``pixel_values`` ``[N, 3, W, W]`` uint8; per slot ``[N, S]`` the digit (or BACKGROUND), its side and centre."""

    pixel_values: torch.Tensor
    digits: torch.Tensor
    sizes: torch.Tensor
    centres: torch.Tensor


def load_scans(split: str) -> Scans:
    """The ``"train"`` (four fifths) or ``"heldout"`` scans of scikit-learn's digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float() / 16
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    cut = len(order) * 4 // 5
    chosen = {"train": order[:cut], "heldout": order[cut:]}[split]
    return Scans(images[chosen], labels[chosen])


def draw(scans: Scans, N: int, generator: torch.Generator) -> Pictures:
    """Draws ``N`` random pictures; the same generator state gives the same pictures."""
    count = torch.randint(1, SLOTS + 1, (N,), generator=generator)
    return draw_counts(scans, count, generator)


def draw_counts(
    scans: Scans,
    count: torch.Tensor,
    generator: torch.Generator,
    sizes: Bands = SIZES,
) -> Pictures:
    """Pictures of ``count[i]`` digits, 0 to SLOTS, of sides in ``sizes``."""
    present = torch.arange(SLOTS) < count[:, None]
    return _render(scans, present, *_place(present, generator, sizes), generator)


def draw_crowded(scans: Scans, N: int, generator: torch.Generator) -> Pictures:
    """Pictures full of digits in a loose grid, of 3×3 or of 2×2 if they are over 40 px: more writing per pixel to learn
    to see from. Each picture's sides are of one band."""
    low, high = torch.tensor(SIZES)[torch.randint(len(SIZES), (N,), generator=generator)].T
    across = torch.where(high > 40, 2, 3)[:, None]
    slot = torch.arange(9)
    present = (torch.rand(N, 9, generator=generator) < 0.9) & (slot < across**2)
    centres = (torch.stack((slot % across, slot // across), -1) + 0.5) * SIDE / across[..., None]
    centres = (centres + _uniform(-5, 5, (N, 9, 2), generator)).clamp(max=SIDE)
    sides = low[:, None] + (high - low)[:, None] * torch.rand(N, 9, generator=generator)
    return _render(scans, present, centres, sides, generator)


def patch_labels(pictures: Pictures, patch_size: int) -> torch.Tensor:
    """The digit whose box covers the middle of each patch, else BACKGROUND, ``[N, n]``."""
    side = SIDE // patch_size
    middle = (torch.arange(side) + 0.5) * patch_size
    at = torch.stack((middle.repeat(side), middle.repeat_interleave(side)), -1)  # [n, 2] (x, y)
    apart = (at - pictures.centres[:, :, None]).abs()
    reach = pictures.sizes[..., None, None] * torch.tensor(
        [0.4, 0.5]
    )  # writing is narrower than its box
    covered = (apart < reach).all(-1)
    labels = torch.full((len(covered), len(at)), BACKGROUND)
    for slot in range(covered.shape[1]):
        labels = torch.where(covered[:, slot], pictures.digits[:, slot, None], labels)
    return labels


def _render(
    scans: Scans,
    present: torch.Tensor,
    centres: torch.Tensor,
    sizes: torch.Tensor,
    generator: torch.Generator,
) -> Pictures:
    source = torch.randint(len(scans.labels), present.shape, generator=generator)
    images = scans.images[source] * present[..., None, None]
    ink = _paste(_windows(images, sizes, centres, generator), centres)
    digits = torch.where(present, scans.labels[source], BACKGROUND)
    return Pictures(_colour(ink, generator), digits, sizes * present, centres)


def _sides(bands: Bands, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Uniform over the bands together."""
    low, high = torch.tensor(bands).T
    ends = (high - low).cumsum(0)
    at = ends[-1] * torch.rand(shape, generator=generator)
    band = torch.searchsorted(ends, at, right=True).clamp(max=len(bands) - 1)
    return high[band] - (ends[band] - at)


def _uniform(
    low: float, high: float, shape: tuple[int, ...], generator: torch.Generator
) -> torch.Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _place(
    present: torch.Tensor, generator: torch.Generator, sizes: Bands
) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres ``[N, S, 2]`` (x, y) and sides ``[N, S]``: for each picture the first of many tries that fits."""
    N = len(present)
    centres, sides = torch.zeros(N, SLOTS, 2), torch.zeros(N, SLOTS)
    todo = torch.arange(N)
    while len(todo):
        shape = (len(todo), _TRIES, SLOTS)
        s = _sides(sizes, shape, generator)
        c = s[..., None] / 2 + torch.rand(*shape, 2, generator=generator) * (SIDE - s[..., None])
        here = present[todo, None]
        order = torch.where(here, c[..., 0], torch.inf).argsort(-1)
        c, s = c.gather(2, order[..., None].expand_as(c)), s.gather(2, order)
        fits = _fits(c, s, here)
        first = (torch.arange(len(todo)), fits.int().argmax(1))
        centres[todo], sides[todo] = c[first], s[first]
        todo = todo[~fits.any(1)]
    return centres, sides


def _fits(centres: torch.Tensor, sizes: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Whether no two digits touch and their order from left to right is plain."""
    fits = torch.ones(centres.shape[:-2], dtype=torch.bool)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        apart = (centres[..., i, :] - centres[..., j, :]).abs()
        touch = apart.amax(-1) < (sizes[..., i] + sizes[..., j]) / 2
        fits &= ~(touch | (apart[..., 0] < GAP_PX)) | ~present[..., j]
    return fits


def _windows(
    images: torch.Tensor, sizes: torch.Tensor, centres: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Each scan, turned and sheared a little, scaled to its side, in a ``V×V`` window ``[N, S, V, V]``."""
    N, S = sizes.shape
    window = 2 * math.ceil(0.8 * sizes.max()) + 2  # holds a scan that is ink to its corners, turned
    turn = _uniform(-0.2, 0.2, (N, S), generator)
    shear = _uniform(-0.15, 0.15, (N, S), generator)
    stretch = _uniform(0.9, 1.1, (N, S), generator)
    zoom = window / sizes
    rows = torch.stack(
        (
            torch.stack((turn.cos() * zoom * stretch, (shear - turn.sin()) * zoom), -1),
            torch.stack((turn.sin() * zoom, turn.cos() * zoom / stretch), -1),
        ),
        -2,
    )
    # The window sits on whole pixels; the scan keeps the fraction.
    offset = (centres - window / 2).floor() + window / 2 - centres
    shift = rows @ (offset * 2 / window)[..., None]
    theta = torch.cat((rows, shift), -1).flatten(0, 1)
    grid = F.affine_grid(theta, [N * S, 1, window, window], align_corners=False)
    drawn = F.grid_sample(images.view(-1, 1, 8, 8), grid, align_corners=False)
    return drawn.view(N, S, window, window)


def _paste(windows: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Windows at their places on one canvas ``[N, W, W]``; they hang over the edge only where empty."""
    N, window = len(windows), windows.shape[-1]
    wide = SIDE + 2 * window
    start = (centres - window / 2).floor().int() + window
    span = torch.arange(window, dtype=torch.int32)
    x, y = start[..., 0, None] + span, start[..., 1, None] + span
    index = (y[..., :, None] * wide + x[..., None, :]).flatten(1)
    canvas = torch.zeros(N, wide * wide).scatter_add_(1, index.long(), windows.flatten(1))
    inside = slice(window, window + SIDE)
    return canvas.view(N, wide, wide)[:, inside, inside].clamp(max=1)


def _colour(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Dark on light or light on dark, tinted, on a slanted background, with noise; uint8."""
    N = len(ink)
    contrast = _uniform(110, 200, (N, 1), generator)
    low = torch.rand(N, 1, generator=generator) * (245 - contrast) + 5
    flip = torch.rand(N, 1, generator=generator) < 0.3
    tint = _uniform(-20, 20, (2, N, 3), generator)
    paper = torch.where(flip, low + contrast, low) + tint[0]
    pen = torch.where(flip, low, low + contrast) + tint[1]
    slope = _uniform(-15, 15, (N, 2, 1, 1), generator)
    ramp = torch.linspace(-1, 1, SIDE)
    grain = torch.randn(N, SIDE, SIDE, generator=generator) * _uniform(0, 10, (N, 1, 1), generator)
    ground = slope[:, 0] * ramp + slope[:, 1] * ramp[:, None] + grain
    pixels = ink[:, None] * (pen - paper)[..., None, None]
    pixels += paper[..., None, None]
    pixels += ground[:, None]
    return pixels.clamp_(0, 255).to(torch.uint8)
