"""Repairs what current Python, torch and numpy refuse in scripts of 2017 to 2020.

Only the sources of the script and of modules beside it are rewritten, in memory, before they are
compiled; nothing in torch or numpy is patched. Line numbers stay as they are.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import torch

_HELPERS = "_pdarts_fast_repairs"
# `async` became a keyword; it was an argument of Tensor.cuda.
_ASYNC = re.compile(r"(?<=[(,])(\s*)async(\s*)=")
# Aliases that numpy removed.
_NUMPY = {"int": "int", "float": "float", "object": "object", "str": "str", "complex": "complex"}
_NUMPY_NAMES = ("np", "numpy")


def view(x: Any, *shape: Any) -> Any:
    """``x.view(*shape)``, with a copy where the memory of a tensor does not allow a view."""
    if not isinstance(x, torch.Tensor) or any(isinstance(one, torch.dtype) for one in shape):
        return x.view(*shape)
    try:
        return x.view(*shape)
    except RuntimeError:
        return x.reshape(*shape)


def first(x: Any) -> Any:
    """``x[0]``; the number itself for a tensor without dimensions."""
    return x.item() if isinstance(x, torch.Tensor) and x.dim() == 0 else x[0]


def _is_numpy(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in _NUMPY_NAMES


class _Repair(ast.NodeTransformer):
    """Rewrites calls; ``done`` collects (line, what) for the log."""

    def __init__(self) -> None:
        self.done: list[tuple[int, str]] = []

    def _helper(self, name: str) -> ast.expr:
        return ast.Attribute(ast.Name(_HELPERS, ast.Load()), name, ast.Load())

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        function = node.func
        if not isinstance(function, ast.Attribute):
            return self._without_volatile(node)
        if function.attr == "view" and not node.keywords and node.args:
            node.func = self._helper("view")
            node.args.insert(0, function.value)
            return node
        if function.attr == "sum" and _is_numpy(function.value) and len(node.args) == 1:
            if isinstance(node.args[0], ast.GeneratorExp) and not node.keywords:
                node.func = ast.Name("sum", ast.Load())
                self.done.append((node.lineno, "np.sum of a generator"))
            return node
        return self._without_volatile(node)

    def _without_volatile(self, node: ast.Call) -> ast.Call:
        kept = [keyword for keyword in node.keywords if keyword.arg != "volatile"]
        if len(kept) < len(node.keywords):
            node.keywords = kept
            self.done.append((node.lineno, "volatile="))
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        is_data = isinstance(node.value, ast.Attribute) and node.value.attr == "data"
        is_zero = isinstance(node.slice, ast.Constant) and node.slice.value == 0
        if is_data and is_zero and isinstance(node.ctx, ast.Load):
            self.done.append((node.lineno, ".data[0]"))
            return ast.Call(self._helper("first"), [node.value], [])
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if _is_numpy(node.value) and node.attr in _NUMPY and isinstance(node.ctx, ast.Load):
            self.done.append((node.lineno, f"np.{node.attr}"))
            return ast.Name(_NUMPY[node.attr], ast.Load())
        return node


def _body_start(tree: ast.Module) -> int:
    """Where a statement may go: behind the docstring and imports from ``__future__``."""
    for index, node in enumerate(tree.body):
        docstring = (
            index == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        )
        future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        if not docstring and not future:
            return index
    return len(tree.body)


def repair(source: str, filename: str) -> tuple[ast.Module, list[tuple[int, str]]]:
    """The syntax tree of a source with its known breakages repaired.

    Args:
        source: Text of a Python file.
        filename: For messages.

    Returns:
        The tree, and (line, what) of every repair that is worth a word.

    Raises:
        SyntaxError: It is no Python of today even so.
    """
    notes: list[tuple[int, str]] = []
    try:
        tree = ast.parse(source, filename)
    except SyntaxError:
        renamed = _ASYNC.sub(r"\1non_blocking\2=", source)
        if renamed == source:
            raise
        tree = ast.parse(renamed, filename)
        for match in _ASYNC.finditer(source):
            notes.append((source.count("\n", 0, match.start()) + 1, "async="))
    transformer = _Repair()
    tree = transformer.visit(tree)
    importer = ast.ImportFrom("pdarts_fast.dropin", [ast.alias("repairs", _HELPERS)], 0)
    tree.body.insert(_body_start(tree), importer)
    return ast.fix_missing_locations(tree), notes + transformer.done
