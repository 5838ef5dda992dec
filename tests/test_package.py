"""What is built is whole: a wheel, made from the sdist, works where nothing of the checkout is."""

import os
import re
import shutil
import subprocess
import sys
import tarfile

import pytest
from helpers import ROOT

import metricopt_hf
from metricopt_hf import metrics

pytestmark = pytest.mark.slow

pytest.importorskip("setuptools")
SOURCES = ("metricopt_hf", "setup.py", "pyproject.toml", "README.md", "LICENSE")
BUILD = "from setuptools import build_meta; import sys; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
USE = """
import evaluate, metricopt_hf
from metricopt_hf.hub.cards import TEMPLATES
from metricopt_hf.metrics import names, path
for name in names():
    evaluate.load(path(name))
print(metricopt_hf.__file__)
print(metricopt_hf.__version__, len(names()), *sorted(template.name for template in TEMPLATES.iterdir()))
"""


def build(kind, source, target):
    """The archive that a build front end would make of the folder `source`."""
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(target)]
    done = subprocess.run(command, cwd=source, check=True, capture_output=True, text=True)
    return target / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    source, unpacked, site = (folder / name for name in ("source", "unpacked", "site"))
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    with tarfile.open(build("sdist", source, folder)) as archive:
        archive.extractall(unpacked, filter="data")
    wheel = build("wheel", next(unpacked.iterdir()), folder)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True, capture_output=True)
    return site


def test_the_wheel_of_the_sdist_works_without_the_checkout(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    where, said = done.stdout.strip().splitlines()[-2:]
    assert where == str(installed / "metricopt_hf" / "__init__.py")
    templates = sorted(path.name for path in (ROOT / "metricopt_hf" / "hub" / "templates").iterdir())
    assert said.split() == [metricopt_hf.__version__, str(len(metrics.names())), *templates]


def test_every_module_is_in_the_wheel(installed):
    def modules(package):
        return {str(path.relative_to(package)) for path in package.rglob("*.py*") if path.suffix != ".pyc"}

    assert modules(installed / "metricopt_hf") == modules(ROOT / "metricopt_hf")
    assert not [name for name in ("tests", "benchmarks", "examples", "comparison") if (installed / name).exists()]


def test_a_package_index_shows_pictures_and_links(installed):
    (metadata,) = installed.glob("*.dist-info/METADATA")
    text = metadata.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", text)
    address = re.search(r"^Project-URL: Homepage, (.+)$", text, re.M)[1]
    assert len(targets) > 20 and not [target for target in targets if not target.startswith(("https://", "#"))]
    assert f"{address}/raw/main/docs/images/demo.png" in targets
    assert "Classifier: Typing :: Typed" in text


def test_one_version_is_told_everywhere(installed):
    (metadata,) = installed.glob("*.dist-info/METADATA")
    told = [
        re.search(r"^Version: (.+)$", metadata.read_text(encoding="utf-8"), re.M)[1],
        re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)[1],
        re.search(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[1],
    ]
    assert told == [metricopt_hf.__version__] * 3
