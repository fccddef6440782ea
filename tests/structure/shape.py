"""The tree's shape in figures: `python -m tests.structure.shape [FOLDER]`, of this checkout or of another.

Rooms are the packages directly in `server/`. An arrow is an import between two rooms, a cycle a ring of modules that
import each other, imports under TYPE_CHECKING and inside functions included.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"server": "server", "prompts_store": "prompts_store", "lensrack": "client/lensrack"}


@dataclass(frozen=True)
class Module:
    """One file: its dotted name, its source as a tree, and how many lines it has."""

    name: str
    path: Path

    @cached_property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def lines(self) -> int:
        return self.source.count("\n")

    @property
    def package(self) -> str:
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    @property
    def functions(self) -> Iterator[tuple[int, str]]:
        """Lines and name of each function, nested ones included."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                yield node.end_lineno - node.lineno + 1, f"{self.name}.{node.name}"


class Shape:
    """The files of a checkout and the imports between them."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.modules = {module.name: module for module in _modules(root)}

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """The modules that each module imports. A name taken from a package is its submodule where there is one."""
        return {name: set(self._imports(module)) for name, module in self.modules.items()}

    @property
    def loose(self) -> list[str]:
        """Files directly in `server/`."""
        return sorted(path.name for path in (self.root / "server").glob("*.py"))

    @property
    def rooms(self) -> list[str]:
        return sorted(path.parent.name for path in (self.root / "server").glob("*/__init__.py"))

    @property
    def arrows(self) -> set[tuple[str, str]]:
        """Imports between the rooms and loose files of `server/`."""
        pairs = {(_room(name), _room(other)) for name, others in self.imports.items() for other in others}
        return {pair for pair in pairs if len(set(pair)) == 2 and all(room.startswith("server.") for room in pair)}

    @property
    def unexplained(self) -> list[str]:
        """Packages whose `__init__` has no docstring."""
        packages = [module for module in self.modules.values() if module.path.name == "__init__.py"]
        return sorted(module.name for module in packages if not ast.get_docstring(module.tree))

    @property
    def cycles(self) -> list[list[str]]:
        """Rings of modules, each as its sorted members (Tarjan, 1972: strongly connected components)."""
        index: dict[str, int] = {}
        low: dict[str, int] = {}
        stack: list[str] = []
        rings: list[list[str]] = []

        def visit(name: str) -> None:
            index[name] = low[name] = len(index)
            stack.append(name)
            for other in self.imports[name]:
                if other not in index:
                    visit(other)
                if other in stack:
                    low[name] = min(low[name], low[other])
            if low[name] == index[name]:
                ring = stack[stack.index(name) :]
                del stack[stack.index(name) :]
                if len(ring) > 1:
                    rings.append(sorted(ring))

        for name in self.modules:
            if name not in index:
                visit(name)
        return rings

    def _imports(self, module: Module) -> Iterator[str]:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names if alias.name in self.modules)
            elif isinstance(node, ast.ImportFrom):
                base = _absolute(module, node)
                named = [f"{base}.{alias.name}" for alias in node.names]
                yield from (name for name in named if name in self.modules)
                if base in self.modules and not all(name in self.modules for name in named):
                    yield base


def _modules(root: Path) -> Iterator[Module]:
    for package, folder in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = [package, *path.relative_to(root / folder).with_suffix("").parts]
            yield Module(".".join(parts[:-1] if parts[-1] == "__init__" else parts), path)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.package.split(".")
    return ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])


def _room(name: str) -> str:
    return ".".join(name.split(".")[:2])


def main(root: Path) -> None:
    """Print the figures."""
    shape = Shape(root)
    files = [module for module in shape.modules.values() if module.lines]
    functions = [function for module in files for function in module.functions]
    longest_file, longest = max(files, key=lambda module: module.lines), max(functions)
    tests = max((path.read_text().count("\n"), path) for path in (root / "tests").rglob("*.py"))
    sizes, lengths = [module.lines for module in files], [lines for lines, _ in functions]
    for name, figure in {
        "files": f"{len(files)}, {sum(sizes):,} lines",
        "loose in server/": f"{len(shape.loose)}: {', '.join(shape.loose)}",
        "rooms": f"{len(shape.rooms)}, {len(shape.arrows)} arrows between them and the loose files",
        "import cycles": "; ".join(" ⇄ ".join(ring) for ring in shape.cycles) or "none",
        "file": f"median {statistics.median(sizes):.0f} lines, longest {longest_file.lines} ({longest_file.name})",
        "function": f"median {statistics.median(lengths):.0f} lines, longest {longest[0]} ({longest[1]})",
        "test file": f"longest {tests[0]} ({tests[1].relative_to(root)})",
    }.items():
        print(f"{name:18}{figure}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
