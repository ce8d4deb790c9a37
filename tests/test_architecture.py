"""The house rules that a machine can hold, read off the syntax trees.  Raising a limit is one line in a review.

A rule is a function from a parsed file to complaints; the table BAD shows that each of them does complain.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LONGEST_FILE, LONGEST_FUNCTION = 400, 80
LEARNERS = (  # where a backward pass may start
    "rung/train/step.py",
    "rung/deeprl/",
    "rung/density/",
    "rung/text/",
    "rung/truth/",
    "rung/recipes/flat/",
)
LIBRARIES = "rung/"
OUTER_WORLD = {"gymnasium", "transformers", "ray", "fastapi", "matplotlib"}
# room -> packages that no file of it imports, not even inside a function
FOREIGN = {
    "rung/": {"transformers", "trl", "accelerate", "datasets", "peft", "pytest"},
    "rung/core/": OUTER_WORLD,
    "rung/objectives/": OUTER_WORLD,
    "rung/lm/": OUTER_WORLD,
    "rung/engine/": OUTER_WORLD | {"tokenizers", "jinja2"},
    "rung/model/": OUTER_WORLD,
    "rung/train/": OUTER_WORLD,
    "rung/tasks/": {"torch", "matplotlib", "transformers"},
}
VERB = ("help", "run")  # of every file of rung/cli: rung/cli/main.py says what they do
EXEMPT = {"rung/lm/foreign.py": {"transformers"}}
FOR_DEVELOPERS = {"peers", "dev"}  # extras that no user needs
UNDECLARED = {  # and why
    "llvmlite",  # numba is made of it
    "markupsafe",  # jinja2 is
    "petsc4py",  # compiled for an hour, or the system's: rung/mdp/petsc.py says how to get it
}
MODULES = {"pillow": "PIL", "pyyaml": "yaml"}  # where the name of the import differs


@dataclass(frozen=True)
class File:
    """A source file: its path from the root of the project, its text and its tree."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)


Complaint = tuple[int, str]  # line, sentence
Rule = Callable[[File], Iterator[Complaint]]


def no_hasattr(file: File) -> Iterator[Complaint]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Name) and node.id == "hasattr":
            yield node.lineno, "hasattr asks an object what it is; wrap it, or pass a function"


def short_files(file: File) -> Iterator[Complaint]:
    lines = len(file.text.splitlines())
    if lines > LONGEST_FILE:
        yield lines, f"{lines} lines are more than {LONGEST_FILE}"


def short_functions(file: File) -> Iterator[Complaint]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LONGEST_FUNCTION:
                yield node.lineno, f"{node.name} has {lines} lines, more than {LONGEST_FUNCTION}"


def backward_only_in_learners(file: File) -> Iterator[Complaint]:
    if not file.path.startswith(LIBRARIES) or file.path.startswith(LEARNERS):
        return
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "backward":
            yield node.lineno, f"a backward pass starts only in {', '.join(LEARNERS)}"


def no_global_randomness(file: File) -> Iterator[Complaint]:
    seeds = ("torch.manual_seed", "torch.random.manual_seed", "torch.cuda.manual_seed", "torch.seed", "random.seed")
    for node in ast.walk(file.tree):
        name = _dotted(node) if isinstance(node, ast.Attribute) else ""
        if name.endswith(seeds) or (isinstance(node, ast.alias) and node.name == "manual_seed"):
            yield node.lineno, "there is no global randomness: derive a key, or hand a generator in"


def no_print_outside_the_command_line(file: File) -> Iterator[Complaint]:
    if not file.path.startswith(LIBRARIES) or file.path.startswith("rung/cli/"):
        return
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Name) and node.id == "print":
            yield node.lineno, "a library returns or raises; rung/cli prints"


def no_foreign_imports(file: File) -> Iterator[Complaint]:
    banned: set[str] = set()
    for room, packages in FOREIGN.items():
        banned |= packages if file.path.startswith(room) else set()
    banned -= EXEMPT.get(file.path, set())
    for node in ast.walk(file.tree):
        for module in _imports(node):
            if module.split(".")[0] in banned:
                yield node.lineno, f"this room does not import {module}"
            if module.startswith("torch.distributed") and not file.path.startswith("rung/parallel/"):
                yield node.lineno, "torch.distributed lives in rung/parallel"


def only_declared_packages(file: File) -> Iterator[Complaint]:
    """A person who installs Rung has what pyproject.toml names, and not what the tests' own peers bring along."""
    if not file.path.startswith(LIBRARIES):
        return
    for node in ast.walk(file.tree):
        for module in _imports(node):
            package = module.split(".")[0]
            if package not in {"rung", "", *sys.stdlib_module_names, *_declared(), *UNDECLARED}:
                yield node.lineno, f"{package} is neither a dependency nor an extra for users in pyproject.toml"


def docstrings_on_what_is_public(file: File) -> Iterator[Complaint]:
    if not file.path.startswith(LIBRARIES):
        return
    if file.text.strip() and not ast.get_docstring(file.tree):
        yield 1, "a file begins with its idea and the source of it"
    for node in file.tree.body:
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if named and file.path.startswith("rung/cli/") and node.name in VERB:
            continue
        if named and not node.name.startswith("_") and not ast.get_docstring(node):
            yield node.lineno, f"{node.name} is public and has no docstring"


# rule -> a file that breaks it once, and its innocent neighbour
BAD: dict[Rule, tuple[File, File]] = {
    no_hasattr: (File("rung/a.py", "x = hasattr(1, 'y')"), File("rung/a.py", "x = 'hasattr'")),
    short_files: (
        File("tests/a.py", "x = 1\n" * (LONGEST_FILE + 1)),
        File("tests/a.py", "x = 1\n" * LONGEST_FILE),
    ),
    short_functions: (
        File("bench/a.py", "class A:\n  def f(self):\n" + "    x = 1\n" * LONGEST_FUNCTION),
        File("bench/a.py", "class A:\n  def f(self):\n" + "    x = 1\n" * (LONGEST_FUNCTION - 1)),
    ),
    backward_only_in_learners: (
        File("rung/train/data.py", "def f(loss):\n    loss.backward()"),
        File("rung/train/step.py", "def f(loss):\n    loss.backward()"),
    ),
    no_global_randomness: (
        File("tests/a.py", "import torch\ntorch.manual_seed(0)"),
        File("tests/a.py", "import torch\ntorch.Generator().manual_seed(0)"),
    ),
    no_print_outside_the_command_line: (File("rung/core/a.py", "print(1)"), File("rung/cli/a.py", "print(1)")),
    no_foreign_imports: (
        File("rung/model/a.py", "def f():\n    from transformers import AutoModel"),
        File("rung/report/a.py", "def f():\n    import matplotlib.pyplot"),
    ),
    only_declared_packages: (
        File("rung/a.py", "def f():\n    import psutil"),
        File("tests/a.py", "import psutil"),
    ),
    docstrings_on_what_is_public: (
        File("rung/a.py", '"""Why."""\ndef f(): ...'),
        File("rung/a.py", '"""Why."""\ndef _f(): ...'),
    ),
}


@pytest.mark.parametrize("rule", BAD, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule):
    assert len(_files()) > 20, "the walk found no project to judge"
    complaints = [f"{file.path}:{line}: {text}" for file in _files() for line, text in rule(file)]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("rule", BAD, ids=lambda rule: rule.__name__)
def test_the_rule_sees_a_breach_and_only_a_breach(rule):
    bad, good = BAD[rule]
    assert len(list(rule(bad))) == 1
    assert list(rule(good)) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("rung/core/a.py", "import matplotlib.pyplot as plt"),
        ("rung/tasks/a.py", "from torch import Tensor"),
        ("rung/cli/a.py", "import importlib\nimportlib.import_module('trl.trainer')"),
        ("rung/engine/a.py", "import torch.distributed"),
        ("rung/engine/a.py", "from torch import distributed"),
    ],
)
def test_a_foreign_import_is_seen_in_every_form(path, line):
    assert len(list(no_foreign_imports(File(path, line)))) == 1


@cache
def _files() -> tuple[File, ...]:
    folders = [ROOT / name for name in ("rung", "tests", "bench", ".ci")]
    paths = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return tuple(File(path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths)


@cache
def _declared() -> frozenset[str]:
    """What the dependencies, and the extras for users, are imported as."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(r for name in extras if name not in FOR_DEVELOPERS for r in extras[name])]
    names = [re.split(r"[^A-Za-z0-9_-]", requirement)[0].lower() for requirement in wanted]
    return frozenset(MODULES.get(name, name.replace("-", "_")) for name in names)


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _imports(node: ast.AST) -> list[str]:
    """Modules that a statement or an `import_module` call brings in; for `from a import b` that is a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        if any(f"{node.module}.{alias.name}" == "torch.distributed" for alias in node.names):
            return ["torch.distributed"]
        return [node.module or ""]
    if isinstance(node, ast.Call) and _dotted(node.func).endswith(("import_module", "__import__")) and node.args:
        name = node.args[0]
        return [name.value] if isinstance(name, ast.Constant) and isinstance(name.value, str) else []
    return []
