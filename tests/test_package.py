"""The package as it is installed: light to import, complete, small files, no circles."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import vitcop_compile

ROOT = Path(__file__).parent.parent
SOURCES = ("vitcop_compile", "passes", "export")


def test_import_is_light():
    """Beyond torch and transformers next to nothing is loaded: no GPU touched, nothing drawn, served, exported or compiled."""
    code = (
        "import sys, torch\n"
        "from transformers import GenerationMixin, LlavaForConditionalGeneration, PreTrainedModel\n"
        "before = set(sys.modules)\n"
        "import vitcop_compile\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before if name.split('.')[0] != 'torch'}))\n"
        "print(*sorted(name for name in set(sys.modules) - before if name.startswith(('torch._inductor', 'torch.onnx'))))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages, heavy = out.stdout.split("\n")[:2]
    foreign = {name for name in packages.split() if not name.startswith("_") and name not in sys.stdlib_module_names}
    assert foreign == {"rich", "vitcop_compile"} and not heavy


def test_every_folder_is_packaged():
    """`passes` and `export` lie beside the package, and are part of it."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    mapping = setup["package-dir"]
    folders = {path.parent for source in SOURCES for path in (ROOT / source).rglob("*.py")}
    packaged = {ROOT / mapping.get(name, name.replace(".", "/")) for name in setup["packages"]}
    assert folders == packaged
    assert vitcop_compile.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_no_import_circles():
    """Not through imports inside functions either; what is imported for types alone closes none."""
    modules = {}
    for source in SOURCES:
        for path in (ROOT / source).rglob("*.py"):
            inner = [] if source == "vitcop_compile" else [source]
            parts = ["vitcop_compile", *inner, *path.relative_to(ROOT / source).parts]
            modules[".".join(parts).removesuffix(".py").removesuffix(".__init__")] = path
    edges = {name: imports(name, path, modules) for name, path in modules.items()}
    done, doing = set(), []

    def visit(name):
        assert name not in doing, " -> ".join([*doing[doing.index(name) :], name])
        if name in done:
            return
        doing.append(name)
        for other in edges[name]:
            visit(other)
        doing.pop()
        done.add(name)

    for name in edges:
        visit(name)


def imports(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of the package that `name` imports, at once or later; a package does not count as its own children's."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in running(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
        target = f"{base}.{node.module}" if node.module else base
        for alias in node.names:
            inner = f"{target}.{alias.name}"
            found.add(inner if inner in modules else target)
    return found - {name}


def running(node: ast.AST) -> Iterator[ast.AST]:
    """Everything below `node`, at any depth, that can run: all but what stands under `if TYPE_CHECKING`."""
    for_types = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    for child in node.orelse if for_types else ast.iter_child_nodes(node):
        yield child
        yield from running(child)
