# SPDX-License-Identifier: Apache-2.0
"""Fast, and shown to be: ``python -m benchmarks.run`` measures, ``python -m benchmarks.report`` makes the pages."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler would print between the rows
