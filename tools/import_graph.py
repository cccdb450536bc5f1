"""Check and draw the imports between the package's folders.

    python tools/import_graph.py [--svg docs/images/imports.svg]

Prints each folder with its modules, lines and imports, and exits with 1 if modules import each other
in a circle (imports inside functions count, imports for type checking only do not) or a folder has more than 16
modules. With --svg, draws the folders in layers: every arrow points down, and an arrow that follows from others is left
out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
PACKAGE = "specrl"
MAX_MODULES = 16  # of one folder, its __init__ not counted
NESTED = ("specrl.agents", "specrl.sglang")  # folders whose subfolders are drawn
Graph = Mapping[str, Set[str]]


def module_graph() -> dict[str, set[str]]:
    """Every module of the package, and the modules that it imports."""
    graph = grimp.build_graph(PACKAGE, exclude_type_checking_imports=True, cache_dir=None)
    return {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}


def folder_of(module: str) -> str:
    """The folder that a module belongs to; a module of the package itself is its own folder."""
    parts = module.split(".")
    depth = 3 if ".".join(parts[:2]) in NESTED else 2
    return ".".join(parts[:depth])


def folder_graph(modules: Graph) -> dict[str, set[str]]:
    """Every folder, and the folders that its modules import; the package's own __init__ is left out."""
    folders: dict[str, set[str]] = {}
    for module, imported in modules.items():
        if module in (PACKAGE, *NESTED):
            continue
        known = folders.setdefault(folder_of(module), set())
        known |= {folder_of(name) for name in imported if name not in (PACKAGE, *NESTED)} - {folder_of(module)}
    return folders


def circle(graph: Graph) -> list[str]:
    """Nodes that import each other in a circle; empty if there are none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def modules_by_folder() -> dict[str, list[Path]]:
    """The modules of every folder with code, by its path from the repository's root; __init__ is not counted."""
    files = [path for top in ("specrl", "envs", "agents") for path in sorted((ROOT / top).rglob("*.py"))]
    folders: dict[str, list[Path]] = {}
    for path in files:
        folder = str(path.parent.relative_to(ROOT))
        if not folder.startswith(("specrl/envs", "specrl/agents")):  # links to envs/ and agents/
            folders.setdefault(folder, []).extend([path] if path.name != "__init__.py" else [])
    return folders


def lines(path: Path) -> int:
    """Number of lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def reduced(graph: Graph) -> dict[str, set[str]]:
    """The graph, which has no circles, less the arrows that follow from others."""
    reach: dict[str, set[str]] = {}
    for node in TopologicalSorter(graph).static_order():
        reach[node] = set(graph[node]).union(*(reach[other] for other in graph[node]))
    return {node: {o for o in graph[node] if not any(o in reach[p] for p in graph[node])} for node in graph}


def draw(graph: Graph, sizes: Mapping[str, int]) -> str:
    """An SVG of the folders in layers; the graph has no circles."""
    level: dict[str, int] = {}
    for node in TopologicalSorter(graph).static_order():
        level[node] = 1 + max((level[other] for other in graph[node]), default=-1)
    top = max(level.values())
    width, height, gap = 132, 38, 28
    rows = [sorted((node for node in graph if level[node] == at), key=str) for at in range(top, -1, -1)]
    full = max(len(row) for row in rows) * (width + 18) + 20
    place: dict[str, tuple[float, float]] = {}
    for number, row in enumerate(rows):
        step = full / (len(row) + 1) if len(row) < 4 else full / len(row)
        first = step if len(row) < 4 else step / 2
        for column, node in enumerate(row):
            place[node] = first + column * step, 10 + number * (height + gap)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {full:.0f} {len(rows) * (height + gap)}" '
        'font-family="sans-serif" font-size="12" role="img" aria-label="Imports between folders">',
        "<style>rect{fill:#eef3fb;stroke:#4a6fa5}text{fill:#1b2a41;text-anchor:middle}"
        "path{fill:none;stroke:#4a6fa5;stroke-opacity:.55}</style>",
    ]
    for node, imported in sorted(reduced(graph).items()):
        for other in sorted(imported):
            (x1, y1), (x2, y2) = place[node], place[other]
            y1, bend = y1 + height, (y2 - y1) / 2
            out.append(
                f'<path d="M{x1:.0f} {y1:.0f}C{x1:.0f} {y1 + bend:.0f} {x2:.0f} {y2 - bend:.0f} {x2:.0f} {y2:.0f}"/>'
            )
    for node, (x, y) in sorted(place.items()):
        name = node.removeprefix(f"{PACKAGE}.")
        out.append(f'<rect x="{x - width / 2:.0f}" y="{y:.0f}" width="{width}" height="{height}" rx="5"/>')
        out.append(f'<text x="{x:.0f}" y="{y + 16:.0f}" font-weight="bold">{name}</text>')
        out.append(f'<text x="{x:.0f}" y="{y + 31:.0f}">{sizes.get(node, 0):,} lines</text>')
    return "\n".join([*out, "</svg>", ""])


def main() -> int:
    """Print the graph, draw it if asked to, and say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--svg", type=Path, help="file to draw the folders to")
    args = parser.parse_args()
    modules = module_graph()
    folders = folder_graph(modules)
    sizes: dict[str, int] = {}
    counts: dict[str, int] = {}
    for folder, paths in modules_by_folder().items():
        for path in [*paths, ROOT / folder / "__init__.py"]:
            top = folder.replace("/", ".") if folder.startswith("specrl") else f"specrl.{folder.replace('/', '.')}"
            name = top if path.name == "__init__.py" else f"{top}.{path.stem}"
            owner = folder_of(name)
            sizes[owner] = sizes.get(owner, 0) + lines(path)
            counts[owner] = counts.get(owner, 0) + (path.name != "__init__.py")
    for folder in sorted(folders):
        names = ", ".join(sorted(other.removeprefix(f"{PACKAGE}.") for other in folders[folder])) or "-"
        short = folder.removeprefix(f"{PACKAGE}.")
        print(f"{short:18} {counts.get(folder, 0):3} modules {sizes.get(folder, 0):6,} lines  imports {names}")
    print(f"{'all':18} {sum(counts.values()):3} modules {sum(sizes.values()):6,} lines")
    found = circle(modules) or circle(folders)
    wrong = [f"imports in a circle: {' -> '.join(found)}"] if found else []
    for folder, paths in modules_by_folder().items():
        if len(paths) > MAX_MODULES:
            wrong.append(f"{folder} has {len(paths)} modules, more than {MAX_MODULES}; split it")
    for message in wrong:
        print(message, file=sys.stderr)
    if args.svg is not None and not found:
        args.svg.write_text(draw(folders, sizes), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
