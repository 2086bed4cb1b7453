# SPDX-License-Identifier: Apache-2.0
"""``pytest benchmarks`` leaves torch.compile out, as ``make full`` asks for it by name."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "full" in config.getoption("markexpr"):
        return
    skip = pytest.mark.skip(reason="torch.compile takes long: -m full")
    for item in items:
        if "full" in item.keywords:
            item.add_marker(skip)
