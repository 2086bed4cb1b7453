# SPDX-License-Identifier: Apache-2.0
"""``python -m mmkernels``."""

import sys

from mmkernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
