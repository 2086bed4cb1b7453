# SPDX-License-Identifier: Apache-2.0
"""Calls of patch embedding that must raise; each changes a valid call of the case ``small``."""

from typing import Any

import torch

from mmkernels.testing.case import Inputs, Invalid

U8 = torch.uint8


def _set(**changes: Any) -> Any:
    return lambda inputs: {**inputs, **changes}


def _packed(**changes: Any) -> Any:
    """A packed call of two images and a 3×3 table."""

    def change(inputs: Inputs) -> Inputs:
        kept = {
            k: inputs[k] for k in ("weight", "bias", "image_mean", "image_std", "rescale_factor")
        }
        images = [torch.zeros(3, 8, 12), torch.zeros(3, 4, 8)]
        return {"images": images, "position_table": torch.zeros(3, 3, 8), **kept, **changes}

    return change


def _rows(**changes: Any) -> Any:
    """A packed call of ten rows of two images."""
    grids = torch.tensor([[1, 2, 3], [2, 1, 2]])
    plain = {"image_mean": None, "image_std": None, "rescale_factor": None}
    return _packed(**{"images": torch.zeros(10, 48), "grid_thw": grids, **plain, **changes})


def _image(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


INVALID = [
    Invalid("pixels_1d", _set(pixel_values=_image(8)), r"pixel_values must be \[B, C, H, W\].*got \[8\]"),
    Invalid("pixels_6d", _set(pixel_values=_image(1, 1, 3, 2, 8, 8)), r"pixel_values must be .*got \[1, 1, 3, 2, 8, 8\]"),
    Invalid("pixels_int32", _set(pixel_values=_image(1, 3, 8, 12, dtype=torch.int32)), "pixel_values .*int32", TypeError),
    Invalid("height", _set(pixel_values=_image(1, 3, 9, 12)), r"pixel_values must be a multiple of 4 × a multiple of 4 pixels.*9×12 pixels"),
    Invalid("width", _set(pixel_values=_image(1, 3, 8, 13)), r"8×13 pixels"),
    Invalid("smaller_than_patch", _set(pixel_values=_image(1, 3, 3, 12)), r"3×12 pixels"),
    Invalid("frames", _set(pixel_values=_image(1, 3, 3, 8, 12), weight=_image(8, 3, 2, 4, 4)), r"a multiple of 2 frames .*got 3 frames"),
    Invalid("stride_rest", _set(stride=3), r"4 and a multiple of 3 × 4 and a multiple of 3 pixels.*8×12"),
    Invalid("channels", _set(weight=_image(8, 4, 4, 4)), r"weight must be \[D, 3, P_h, P_w\].*got \[8, 4, 4, 4\]"),
    Invalid("weight_3d", _set(weight=_image(8, 3, 16)), r"weight must be .*got \[8, 3, 16\]"),
    Invalid("weight_linear", _set(weight=_image(8, 47)), r"weight must be .*got \[8, 47\]"),
    Invalid("weight_not_square", _set(weight=_image(8, 24)), r"weight must be .*got \[8, 24\]"),
    Invalid("weight_int", _set(weight=_image(8, 3, 4, 4, dtype=torch.int64)), "weight must be float64", TypeError),
    Invalid("patch_0", _set(weight=_image(8, 3, 0, 4)), "at least 1×1"),
    Invalid("stride_0", _set(stride=0), "stride must be .*got 0"),
    Invalid("stride_4", _set(stride=(1, 1, 1, 1)), "stride must be one, two"),
    Invalid("pad_and_crop", _set(pad=True, crop=True), "pad and crop must be"),
    Invalid("prefix_side", _set(prefix="middle"), "prefix must be .*'middle'"),
    Invalid("patch_order", _set(patch_order="hwc"), "patch_order must be .*'hwc'"),
    Invalid("order_of_conv", _set(patch_order="ppc"), 'patch_order must be "cpp" with the weight of a convolution'),
    Invalid("merge_0", _set(merge_size=0), "merge_size must be at least 1, got 0"),
    Invalid("merge_rest", _set(merge_size=2), r"a multiple of merge_size 2 patches a side, got 2×3 patches"),
    Invalid("grid_of_images", _set(grid_thw=torch.tensor([[1, 2, 3]])), "grid_thw must be None unless"),
    Invalid("bias", _set(bias=_image(9)), r"bias must be \[D\] = \[8\], got \[9\]"),
    Invalid("bias_dtype", _set(bias=_image(8).half()), "bias must be of the dtype of weight"),
    Invalid("prefix", _set(prefix_tokens=_image(1, 9)), r"prefix_tokens must be \[R, D\]"),
    Invalid("positions", _set(position_embed=_image(99, 8)), "position_embed must be .*got 99 rows"),
    Invalid("position_width", _set(position_embed=_image(6, 7)), r"position_embed must be \[rows, D\]"),
    Invalid("mean", _set(image_mean=[0.5]), "image_mean must be one number for each of 3 channels"),
    Invalid("mean_nan", _set(image_mean=[0.5, float("nan"), 0.5]), "image_mean must be finite"),
    Invalid("std_inf", _set(image_std=[0.5, float("inf"), 0.5]), "image_std must be finite"),
    Invalid("std_0", _set(image_std=[0.5, 0.0, 0.5]), "image_std must be non-zero"),
    Invalid("rescale_nan", _set(rescale_factor=float("nan")), "rescale_factor must be finite"),
    Invalid("device", _set(pixel_values=torch.zeros(1, 3, 8, 12, device="meta")), "pixel_values must be on the device of weight"),
    Invalid("rows_width", _set(pixel_values=_image(2, 6, 47), weight=_image(8, 48)), r"weight must be .*\[D, 47\]"),
    Invalid("no_batch", _set(pixel_values=_image(3, 8, 12)), r"pixel_values must be \[B, C, H, W\] \(image\[None\].*got \[3, 8, 12\]"),
    Invalid("no_batch_of_width_K", _set(pixel_values=_image(3, 8, 48)), r"pixel_values must be \[B, C, H, W\].*got \[3, 8, 48\]"),
    Invalid("no_batch_conv3d", _set(pixel_values=_image(3, 8, 96), weight=_image(8, 3, 2, 4, 4)), r"pixel_values must be \[B, C, H, W\]"),
    Invalid("channels_last", _set(pixel_values=_image(2, 8, 12, 3, dtype=U8)), r"pixel_values must be \[B, C, H, W\] with C = 3 \(permute\(0, 3, 1, 2\).*got \[2, 8, 12, 3\]"),
    Invalid("channels_last_linear", _set(pixel_values=_image(2, 8, 12, 3), weight=_image(8, 75)), r"pixel_values must be .*with C = 3.*got \[2, 8, 12, 3\]"),
    Invalid("list_channels_last", _packed(images=[_image(8, 12, 3)]), r"images\[0\] must be \[C, H, W\] with C = 3 \(permute\(2, 0, 1\)"),
    Invalid("list_of_lists", _packed(images=[[_image(3, 8, 12)]]), r"images\[0\] must be a tensor, got list", TypeError),
    Invalid("grid_ragged", _rows(grid_thw=[[1, 2, 3], [2, 1]]), r"grid_thw must be a tensor, or as many numbers"),
    Invalid("grid_of_two", _rows(grid_thw=[[2, 3]]), r"grid_thw must be \[images, 3\], got \[1, 2\]"),
    Invalid("rows_channels", _set(pixel_values=_image(2, 6, 32), weight=_image(8, 32)), "image_mean must be 3 numbers|channels that divide K"),
    Invalid("rows_merge", _set(pixel_values=_image(2, 6, 48), weight=_image(8, 48), merge_size=2, position_embed=None), "merge_size must be 1 for rows without grid_thw"),
    Invalid("rows_grid_3d", _set(pixel_values=_image(2, 6, 48), weight=_image(8, 48), grid_thw=torch.tensor([[1, 2, 3]])), "grid_thw must be None unless"),
    Invalid("list_of_2d", _packed(images=[_image(8, 12)]), r"images\[0\] must be \[C, H, W\] or"),
    Invalid("list_channels", _packed(images=[_image(3, 8, 12), _image(4, 8, 8)]), r"images\[1\] must be of the 3 channels.*got \[4, 8, 8\]"),
    Invalid("list_dtypes", _packed(images=[_image(3, 8, 12), _image(3, 8, 8, dtype=U8)]), r"images\[1\] must be of the dtype of images\[0\]"),
    Invalid("list_int", _packed(images=[_image(3, 8, 12, dtype=torch.int16)]), r"images\[0\] .*int16", TypeError),
    Invalid("list_device", _packed(images=[torch.zeros(3, 8, 12, device="meta")]), r"images\[0\] must be on the device of weight"),
    Invalid("list_empty_image", _packed(images=[_image(3, 8, 12), _image(3, 0, 8)]), r"images\[1\] must be of at least one patch, got \[3, 0, 8\]"),
    Invalid("list_no_frames", _packed(images=[_image(3, 0, 8, 12)]), r"images\[0\] must be of at least one patch"),
    Invalid("list_rest", _packed(images=[_image(3, 8, 12), _image(3, 8, 9)]), r"images\[1\] must be .*8×9 pixels"),
    Invalid("list_crop_to_nothing", _packed(images=[_image(3, 3, 8)], crop=True), r"images\[0\] must be of at least one patch"),
    Invalid("list_merge", _packed(merge_size=2), r"images\[0\] must be a multiple of merge_size 2 .*got 2×3 patches"),
    Invalid("tensor_of_images", _packed(images=_image(2, 3, 8, 12)), r"images must be a list of images"),
    Invalid("sizes_of_list", _packed(image_sizes=[(8, 12)]), "image_sizes must be given with a flat buffer"),
    Invalid("flat_without_sizes", _packed(images=_image(288)), "image_sizes must be given with a flat buffer"),
    Invalid("flat_short", _packed(images=_image(287), image_sizes=[(8, 12)]), r"image_sizes(\[0\])? must be"),
    Invalid("flat_long", _packed(images=_image(289), image_sizes=[(8, 12)]), "image_sizes must be"),
    Invalid("flat_negative", _packed(images=_image(288), image_sizes=[(-8, -12)]), r"image_sizes(\[0\])? must be"),
    Invalid("flat_overflow", _packed(images=_image(288), image_sizes=[(2**32, 2**32), (8, 12)]), r"image_sizes\[0\] must be"),
    Invalid("grid_sum", _rows(grid_thw=torch.tensor([[1, 2, 3]])), "grid_thw must be grids of the 10 rows of patches given, got 6 patches"),
    Invalid("grid_zero", _rows(grid_thw=torch.tensor([[1, 2, 3], [0, 1, 2]])), r"grid_thw must be at least 1 everywhere.*\[0, 1, 2\] in row 1"),
    Invalid("grid_negative", _rows(grid_thw=torch.tensor([[-1, -2, 5], [1, 1, 1]])), "grid_thw must be at least 1 everywhere"),
    Invalid("grid_merge", _rows(merge_size=2), r"multiples of merge_size 2, got \[1, 2, 3\] in row 0"),
    Invalid("grid_overflow", _rows(grid_thw=torch.tensor([[2**31, 2**31, 2**31]])), "grid_thw must be grids of the 10 rows"),
    Invalid("grid_float", _rows(grid_thw=torch.zeros(2, 3)), "grid_thw must be int64", TypeError),
    Invalid("grid_shape", _rows(grid_thw=torch.tensor([[2, 3]])), r"grid_thw must be \[images, 3\], got \[1, 2\]"),
    Invalid("grid_device", _rows(grid_thw=torch.zeros(2, 3, dtype=torch.int64, device="meta")), "grid_thw must be on the device of the rows"),
    Invalid("sizes_of_four", _packed(images=_image(288), image_sizes=[(1, 1, 8, 12)]), r"image_sizes\[0\] must be \(H, W\) or"),
    Invalid("grid_of_list", _packed(grid_thw=torch.tensor([[1, 2, 3]])), "grid_thw must be None unless images are rows"),
    Invalid("table_2d", _packed(position_table=_image(9, 8)), r"position_table must be \[rows, columns, D\]"),
    Invalid("table_empty", _packed(position_table=_image(0, 3, 8)), "position_table must be"),
    Invalid("table_dtype", _packed(position_table=_image(3, 3, 8).half()), "position_table must be of the dtype"),
    Invalid("table_fixed", _packed(position_table=_image(6, 8), position_mode="fixed"), "position_embed must be 2 .*got 6 rows"),
    Invalid("table_short", _packed(position_table=_image(2, 2, 8), position_mode="factorised"), "position_table must be at least 2 and 3"),
    Invalid("mode", _packed(position_mode="cubic"), "position_mode must be one of .*'cubic'"),
    Invalid("antialias", _packed(antialias=True, position_mode="nearest"), "antialias must be False but for"),
]  # fmt: skip
