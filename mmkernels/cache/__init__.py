# SPDX-License-Identifier: Apache-2.0
"""Keys and values in pages: a pool of them, the tables of sequences, keys of images."""

from mmkernels.cache.pool import OutOfPages, PagePool
from mmkernels.cache.prefix import prefix_key
from mmkernels.cache.sequences import Appended, PagedKVCache, Tables

__all__ = ["Appended", "OutOfPages", "PagePool", "PagedKVCache", "Tables", "prefix_key"]
