"""The direction of imports: every room of the house rests on the floors below it."""

import ast
from pathlib import Path

import pytest

import metricopt_hf

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    0: {"errors", "observation", "ledger"},
    1: {"phi", "metric", "metrics", "prefix_cache", "evaluator", "data", "checkpoint", "trajectory", "value", "trust"}
    | {"blend", "calibration"},
    2: {"basis", "guide", "observer", "phase"},
    3: {"config", "optimization", "preflight", "sharing", "trainer", "seq2seq"},
    4: {"posthoc", "report", "splits", "comparison", "study", "images"},  # and the benchmarks and examples
}
# On one floor rooms are strangers, but for these.
NEIGHBOURS = {
    "metric": {"metrics"},
    "evaluator": {"metric", "prefix_cache"},
    "value": {"trajectory"},
    "calibration": {"trajectory", "value"},
    "phase": {"guide", "observer"},
    "preflight": {"config"},
    "trainer": {"config", "optimization", "preflight", "sharing"},
    "seq2seq": {"config", "trainer"},
    "comparison": {"posthoc", "report", "splits"},
    "study": {"comparison", "report", "splits"},
    "images": {"splits", "study"},
}
# What times the inside by itself, or builds another method of its parts, has to reach it.
INSPECTED = {
    "benchmarks/overhead.py": {"blend", "phi"},
    "benchmarks/training.py": {"phi"},  # the coordinates that a run would take
    "benchmarks/searchers.py": {
        "evaluator",
        "phi",
    },  # searchers of their own have the trainer's evaluation and its cache
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
# What the lower floors may know of transformers, and who knows the Hub
TRANSFORMERS = {
    "metric": {"EvalPrediction"},
    "evaluator": {"EvalPrediction", "EvalLoopContainer"},
    "checkpoint": {"TRAINER_STATE_NAME"},
}
FILES = {
    str(path.relative_to(ROOT)): path
    for folder in ("metricopt_hf", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if path != ROOT / "metricopt_hf" / "__init__.py"
}


def imports(path):
    """(module, name) of everything imported anywhere in a file, relative imports resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from ((module, alias.name) for alias in node.names)


def ours(path):
    """(room, name) of what is imported from this library; the room is "" for the public names."""
    for module, name in imports(path):
        package, _, inner = module.partition(".")
        if package == "metricopt_hf":
            room = inner.partition(".")[0]
            yield (name, "") if not room and name in FLOOR_OF else (room, name)


def room_of(path):
    return path.relative_to(ROOT / "metricopt_hf").with_suffix("").parts[0]


INSIDE = sorted(name for name in FILES if name.startswith("metricopt_hf"))
TOP = sorted(n for n, path in FILES.items() if n not in INSIDE or FLOOR_OF.get(room_of(path)) == 4)


@pytest.mark.parametrize("file", INSIDE)
def test_a_room_rests_on_lower_floors(file):
    own = room_of(FILES[file])
    assert own in FLOOR_OF, "a new room needs a floor"
    for room, _ in ours(FILES[file]):
        lower = room in FLOOR_OF and FLOOR_OF[room] < FLOOR_OF[own]
        public = room == "" and FLOOR_OF[own] == 4
        assert room == own or lower or public or room in NEIGHBOURS.get(own, ()), f"{own} imports {room or 'the top'}"


@pytest.mark.parametrize("file", TOP)
def test_the_top_floor_uses_public_names(file):
    for room, name in ours(FILES[file]):
        if room == "":
            assert name in metricopt_hf.__all__
        else:
            public = room == "metrics" or FLOOR_OF[room] == 4 or room in INSPECTED.get(file, ())
            assert public, f"{room} is not public: import from metricopt_hf"
        assert not name.startswith("_")


@pytest.mark.parametrize("file", INSIDE)
def test_few_know_transformers_and_one_the_hub(file):
    own = room_of(FILES[file])
    for module, name in imports(FILES[file]):
        if module.partition(".")[0] == "transformers" and FLOOR_OF[own] < 3:
            assert name in TRANSFORMERS.get(own, ())
        if module.partition(".")[0] == "huggingface_hub":
            assert own == "value" or FLOOR_OF[own] >= 3


@pytest.mark.parametrize(
    "file", [name for name in INSIDE if Path(name).parts[1] == "metrics" and "__init__" not in name]
)
def test_a_metric_script_stands_alone(file):
    assert not list(ours(FILES[file]))
