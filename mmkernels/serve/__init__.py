# SPDX-License-Identifier: Apache-2.0
"""Serving on one machine: many requests in flight over one pool of pages. A reference for the ops, without HTTP."""

from mmkernels.serve.engine import Counters, Engine
from mmkernels.serve.files import media_of, read_audio, read_image, serve_lines
from mmkernels.serve.request import Request, RequestError

__all__ = [
    "Counters", "Engine", "Request", "RequestError", "media_of", "read_audio", "read_image", "serve_lines",
]  # fmt: skip
