"""The direction of imports: every room of the house rests on those below it, and nobody on who is above."""

import ast
import importlib
import inspect
import subprocess
import sys
import textwrap
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import transformers

import metricopt_hf

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "metricopt_hf"
# What a room may import, beside itself.
BELOW = {
    "errors": set(),
    "redaction": set(),
    "extras": set(),
    "metrics": {"errors"},
    "phi": {"errors"},
    "value": {"phi", "errors"},
    "evaluation": {"phi", "metrics", "redaction", "errors"},
    "posthoc": {"evaluation", "errors"},
    "diagnosis": {"evaluation"},
    "linear": {"evaluation", "value", "phi", "errors"},
    "guides": {"linear", "value"},
    "experimental": {"guides", "linear", "evaluation", "errors"},
    "phase": {"guides", "linear", "value", "posthoc", "evaluation", "phi", "errors"},
    "hub": {"value", "phi", "errors"},
    "training": {
        "hub", "phase", "guides", "linear", "value", "posthoc", "diagnosis", "evaluation", "phi", "redaction", "extras",
        "errors",
    },
    "cli": {"training", "hub", "linear", "posthoc", "diagnosis", "evaluation", "extras", "errors"},
}
# Rooms that benchmarks, examples and everybody's own scripts may import beside the names of the package.
PUBLIC = {"diagnosis", "experimental", "posthoc", "metrics", "extras"}
# What times the inside by itself, or builds another method of its parts, has to reach it.
INSPECTED = {
    "benchmarks/large_models.py": {"evaluation", "linear", "phase"},  # a linearisation alone is timed
    "benchmarks/looks.py": {"evaluation"},  # methods without a trainer are looked at as its candidates are
    "benchmarks/methods.py": {"guides"},  # a control that says the opposite of pairs
    "benchmarks/paper.py": {"phase"},  # the names of its candidates
    "benchmarks/provenance.py": {"phase"},  # how many calls a run makes
    "benchmarks/ranks.py": {"evaluation", "linear"},  # as large_models.py
    # searchers have the trainer's evaluation, its cache, its linearisation and its selection
    "benchmarks/searchers.py": {"evaluation", "linear", "phase", "phi"},
    "benchmarks/wide_phi.py": {"linear", "phi"},  # exact coordinates in place of a sketch's
}
# What those below `training` may know of transformers, and who knows the Hub.
TRANSFORMERS = {
    "evaluation": {"EvalPrediction", "EvalLoopContainer"},
    "experimental": {"EvalPrediction"},
    "guides": {"EvalPrediction"},
    "linear": {"EvalPrediction"},
    "phase": {"EvalPrediction"},
    "posthoc": {"EvalPrediction", "PredictionOutput"},
    "diagnosis": {"EvalPrediction"},
}
KNOW_THE_HUB = {"hub", "training"}

FILES = {
    str(path.relative_to(ROOT)): path
    for folder in ("metricopt_hf", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if path != PACKAGE / "__init__.py"
}
SCRIPTS = [name for name in FILES if Path(name).parts[:2] == ("metricopt_hf", "metrics") and len(Path(name).parts) > 3]
INSIDE = sorted(name for name in FILES if name.startswith("metricopt_hf") and name not in SCRIPTS)


def room_of(file):
    """The room of a file of the package: a folder, or a module that stands alone."""
    return FILES[file].relative_to(PACKAGE).with_suffix("").parts[0]


ABOVE = sorted(set(FILES) - set(INSIDE) - set(SCRIPTS))


def imports(path):
    """(module, name, whether for type checkers alone) of all that a file imports, relative imports resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    tree = ast.parse(path.read_text())
    typing = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    for_types = {id(inner) for node in typing for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", id(node) in for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from ((module, alias.name, id(node) in for_types) for alias in node.names)


def ours(path):
    """(room, part of it or "", name) of what is imported from this library; the room is "" for the public names."""
    for module, name, _ in imports(path):
        package, _, inner = module.partition(".")
        if package == "metricopt_hf":
            room, _, part = inner.partition(".")
            if not room and name in BELOW:
                yield name, "", ""
            elif room and not part and (PACKAGE / room / f"{name}.py").exists():
                yield room, name, ""
            else:
                yield room, part, name


@pytest.mark.parametrize("file", INSIDE)
def test_a_room_rests_on_lower_ones(file):
    own = room_of(file)
    assert own in BELOW, "a new room needs its place in BELOW"
    for room, *_ in ours(FILES[file]):
        assert room == own or room in BELOW[own], f"{own} imports {room or 'the public names'}"


def test_no_room_rests_on_itself():
    assert list(TopologicalSorter({room: below for room, below in BELOW.items()}).static_order())[0] == "errors"
    rooms = {room: set() for room in BELOW}
    for file in INSIDE:
        rooms[room_of(file)] |= {room for room, *_ in ours(FILES[file]) if room not in ("", room_of(file))}
    order = list(TopologicalSorter(rooms).static_order())  # raises CycleError
    assert order.index("errors") < order.index("phi") < order.index("evaluation") < order.index("linear")


def test_no_module_rests_on_itself():
    """Of the modules; a package's door, which imports all of them, aside."""
    modules = {}
    for file in INSIDE:
        path = FILES[file]
        if path.name == "__init__.py":
            continue
        needed = set()
        for module, name, for_types in imports(path):
            for candidate in (f"{module}.{name}", module):
                found = ROOT / Path(*candidate.split(".")).with_suffix(".py")
                if not for_types and found.is_file():
                    needed.add(str(found.relative_to(ROOT)))
        modules[file] = needed
    order = list(TopologicalSorter(modules).static_order())  # raises CycleError
    assert set(modules) <= set(order)
    first, last = "metricopt_hf/errors.py", "metricopt_hf/training/trainer.py"
    assert order.index(first) < order.index("metricopt_hf/phi/space.py") < order.index(last)


def classes():
    """Every class of the package."""
    for file in INSIDE:
        if not file.endswith("__init__.py"):
            module = importlib.import_module(".".join(Path(file).with_suffix("").parts))
            for cls in vars(module).values():
                if isinstance(cls, type) and cls.__module__ == module.__name__:
                    yield cls


def attributes_of_self(cls):
    """(that are read, that are set) by the methods which a class itself has."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):  # of C, or made by a decorator
        return set(), set()
    nodes = list(ast.walk(tree))
    found = [n for n in nodes if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "self"]
    read, put = ({n.attr for n in found if isinstance(n.ctx, kind)} for kind in (ast.Load, ast.Store))
    calls = [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "register_buffer"]
    return read, put | {call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)}


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__qualname__)
def test_no_method_uses_what_only_a_class_built_on_its_own_sets(cls):
    """A hidden arrow: `self.x` in a class whose `x` is set by one that inherits from it."""
    known = set(dir(cls))
    for base in cls.__mro__:
        known |= set(getattr(base, "__annotations__", ())) | attributes_of_self(base)[1]
    assert attributes_of_self(cls)[0] <= known


def test_the_trainer_is_one_class_that_puts_no_method_on_itself():
    path = PACKAGE / "training" / "trainer.py"
    assert len(path.read_text().splitlines()) <= 300
    (cls,) = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    assert [base.id for base in cls.bases] == ["Trainer"]
    methods = {name for name, value in inspect.getmembers(transformers.Seq2SeqTrainer) if callable(value)}
    swapped = {"eval_dataset", "prepare"} | methods
    for file in INSIDE:
        if not file.startswith("metricopt_hf/training"):
            continue
        for node in ast.walk(ast.parse(FILES[file].read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                assert node.attr not in swapped, f"{file}:{node.lineno} sets {node.attr}"
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr", "vars"):
                of_trainer = getattr(node.args[0], "id", "") == "trainer"
                assert not of_trainer or file.endswith("subclasses.py"), f"{file}:{node.lineno}"


@pytest.mark.parametrize("file", ABOVE)
def test_what_is_built_on_top_uses_public_names(file):
    for room, part, name in ours(FILES[file]):
        if room == "":
            assert name in metricopt_hf.__all__
        else:
            assert room in PUBLIC or room in INSPECTED.get(file, ()), f"{room} is not public: import from metricopt_hf"
        assert not name.startswith("_") and not part.startswith("_")


@pytest.mark.parametrize("file", INSIDE)
def test_few_know_transformers_and_who_shares_the_hub(file):
    own = room_of(file)
    for module, name, _ in imports(FILES[file]):
        package = module.partition(".")[0]
        if package == "transformers" and own not in ("training", "cli"):
            assert name in TRANSFORMERS.get(own, ())
        if package == "huggingface_hub":
            assert own in KNOW_THE_HUB


@pytest.mark.parametrize("file", SCRIPTS)
def test_a_metric_script_stands_alone(file):
    assert not list(ours(FILES[file]))


@pytest.mark.slow
def test_importing_the_library_imports_no_more_than_it_needs():
    heavy = ("timm", "matplotlib", "tabulate", "cma", "benchmarks")
    told = "import sys, metricopt_hf; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    assert "transformers" in imported and not imported & set(heavy)
