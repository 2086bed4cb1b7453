# SPDX-License-Identifier: Apache-2.0
"""Writes docs/support.md: what ``mmkernels.patch`` replaces in which class of transformers.

``python tests/support_table.py`` builds every class of ``vlm_zoo`` tiny, patches it, and reads the report.
"""

import sys
from pathlib import Path

import transformers as tf
from vlm_zoo import Entry
from vlm_zoo_more import ZOO as EVERY

import mmkernels
from mmkernels.train.packable import why_not_packed

PATH = Path(__file__).parents[1] / "docs" / "support.md"
PARTS = ("patch_embed", "projector", "merge", "positions")
ZOO = [e for e in EVERY if e.name != "Kosmos2_5"]  # nothing to replace
HEAD = f"""# What `mmkernels.patch(model)` replaces

Made by `python tests/support_table.py` from tiny random models of transformers {tf.__version__}; every class here is
compared patched and not, logits, gradients and generated tokens (`tests/test_patch_classes.py`; Kosmos-2 and Gemma 4,
which have no fp64, by their logits in fp32). A class that is not
here is patched all the same if its parts have a structure that the table knows: `mmkernels.patch(model).report()` says.

- **patch_embed**: the convolution that cuts patches; *with positions* also class token and positions in the same op.
- **projector**: attention of few queries to features, pixel shuffles, mergers. Linear layers and MLPs are torch's.
- **merge**: features placed among the tokens by `masked_scatter`.
- **positions**: `get_rope_index` of an M-RoPE family.
- **packed**: `PackingCollator` takes it. Its samples were compared packed and alone, by SDPA, eager attention and the
  interface of flash-attn (`tests/test_packable.py`). *no*: it is refused, for the reason at the end of the page.
- **–**: the class has no such part; *not yet*: it has one, and it is left alone, for the reason below the table.
"""


def cell(patched: mmkernels.Patched, part: str) -> str:
    """One part of a class."""
    mine = [line for line in patched.lines if line.part == part]
    ops = {line.op for line in mine if not line.why_not}
    if part == "patch_embed" and any("positions" in op for op in ops):
        return "replaced, with positions"
    if ops:
        return "replaced"
    return "not yet" if mine else "–"


def row(entry: Entry) -> tuple[str, list[str]]:
    """Its line of the table, and why parts were left alone."""
    patched = mmkernels.patch(entry.build())
    cells = [cell(patched, part) for part in PARTS]
    if entry.generates and cells[2] == "–" and entry.placed:
        cells[2] = "not yet"
    reasons = [
        f"`{entry.kind}` {line.module}: {line.why_not}" for line in patched.lines if line.why_not
    ]
    if entry.generates and entry.placed:
        why = why_not_packed(patched.model.config)
        cells.append("no" if why else "yes")
        reasons += [f"`{entry.kind}` packed: {why}"] if why else []
    else:
        cells.append("–")
    kind = entry.kind + (f" ({entry.note})" if entry.note == "Pixtral's tower" else "")
    return f"| {kind} | {' | '.join(cells)} |", reasons


def table() -> str:
    """The page."""
    rows = [row(entry) for entry in ZOO]
    lines = [
        HEAD,
        f"| class | {' | '.join(PARTS)} | packed |",
        "|---" * (2 + len(PARTS)) + "|",
        *(line for line, _ in rows),
    ]
    told = [f"- {reason}" for _, reasons in rows for reason in reasons]
    packed = [line for line in told if "` packed: " in line]
    alone = [line for line in told if line not in packed]
    lines += ["", "## Left alone", "", *alone, "", "## Not packed", "", *packed]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    tf.logging.set_verbosity_error()
    PATH.write_text(table())
    print(f"{PATH}: {len(ZOO)} classes", file=sys.stderr)
