# SPDX-License-Identifier: Apache-2.0
"""``masked_scatter`` of whole rows, in the methods of a model that place features among its tokens.

A method's own source is compiled again with ``x.masked_scatter(mask, source)`` as ``scatter_rows(x, mask, source)``,
which is the same function of the same arguments: no model is described here, and nothing else of the method changes.
"""

import ast
import functools
import inspect
import textwrap
from typing import Any

import torch
from torch import nn

from mmkernels import merge_embeddings
from mmkernels.hf.row import Found

NAME = "masked_scatter"
MEDIA = ("image", "video", "audio")


def scatter_rows(
    inputs: torch.Tensor, mask: torch.Tensor, source: torch.Tensor, model: Any = None
) -> torch.Tensor:
    """``inputs.masked_scatter(mask, source)`` by rows where the mask is one: ``[..., 1]``, or that expanded.

    ``model``: whose config names the placeholders, for the error.

    Raises:
        ValueError: More rows in ``source`` than places (``masked_scatter`` leaves them out), or fewer.
    """
    D = inputs.shape[-1] if inputs.dim() else 0
    by_row = mask.dim() > 0 and (mask.shape[-1] == 1 or mask.stride(-1) == 0)
    same = source.dtype == inputs.dtype and inputs.is_floating_point() and mask.dtype == torch.bool
    if not by_row or not same or D == 0 or source.numel() % D or inputs.dim() < 2:
        return inputs.masked_scatter(mask, source)
    places = mask[..., 0].expand(inputs.shape[:-1]).long()
    rows = source.reshape(-1, D)
    with torch.autocast(inputs.device.type, enabled=False):  # which leaves masked_scatter alone
        try:
            return merge_embeddings(
                places, None, [rows], feature_token_ids=[1], inputs_embeds=inputs
            )
        except ValueError:
            raise ValueError(_mismatch(int(places.sum()), len(rows), model)) from None


def _mismatch(places: int, rows: int, model: Any) -> str:
    ids = {
        name: value
        for name, value in sorted(getattr(getattr(model, "config", None), "__dict__", {}).items())
        if name.endswith(("token_id", "token_index")) and name.split("_")[0] in MEDIA
    }
    told = ", ".join(f"{name} {value}" for name, value in ids.items())
    return (
        f"merge: input_ids hold {places} placeholders{f' ({told})' if told else ''}, "
        f"got {rows} rows of features"
    )


@functools.cache
def scattering(cls: Any) -> tuple[Found | str, ...]:
    """One for every method of the class that scatters."""
    found: list[Found | str] = []
    for name in dir(cls):
        method = inspect.getattr_static(cls, name)
        function = inspect.unwrap(method) if inspect.isfunction(method) else None
        code = getattr(function, "__code__", None)
        if code is None or NAME not in code.co_names:
            continue
        try:
            run = functools.partial(_call, rewritten(function))
            found.append(Found("merge_embeddings", run, None, method=name, pure=True))
        except (OSError, SyntaxError, ValueError) as error:
            found.append(f"{name}: its source cannot be compiled again: {error}")
    return tuple(found)


def _call(run: Any, module: nn.Module, original: Any, *args: Any, **kwargs: Any) -> Any:
    return run(module, *args, **kwargs)


class _Scatter(ast.NodeTransformer):
    def __init__(self, model: str) -> None:
        self.model = model  # the method's first argument

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        scatters = isinstance(node.func, ast.Attribute) and node.func.attr == NAME
        if not scatters or len(node.args) != 2 or node.keywords:
            return node
        assert isinstance(node.func, ast.Attribute)
        name, model = ast.Name("_scatter_rows", ast.Load()), ast.Name(self.model, ast.Load())
        return ast.copy_location(ast.Call(name, [node.func.value, *node.args, model], []), node)


def rewritten(function: Any) -> Any:
    """The function with its decorators, compiled from its source in its own globals, ``auto_docstring`` left out."""
    lines, first = inspect.getsourcelines(function)
    (definition,) = ast.parse(textwrap.dedent("".join(lines))).body
    if not isinstance(definition, ast.FunctionDef) or not definition.args.args:
        raise ValueError("not a method")
    definition.decorator_list = [
        d for d in definition.decorator_list if "auto_docstring" not in ast.dump(d)
    ]
    free = function.__code__.co_freevars
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    factory = f"def make(_scatter_rows, {', '.join(free)}): return {definition.name}"
    (make,) = ast.parse(factory).body
    assert isinstance(make, ast.FunctionDef)
    make.body.insert(0, _Scatter(definition.args.args[0].arg).visit(definition))
    tree = ast.fix_missing_locations(ast.Module([make], []))
    ast.increment_lineno(tree, first - 1)  # tracebacks show the model's own file
    made: dict[str, Any] = {}
    exec(compile(tree, inspect.getfile(function), "exec"), function.__globals__, made)
    return made["make"](scatter_rows, *cells)
