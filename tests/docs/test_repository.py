"""What lies around the code for those who host, contribute or read by machine: valid, and true of the code."""

import json
import re

import pytest
from helpers import ROOT

yaml = pytest.importorskip("yaml")
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")


def read(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_workflow_runs_the_tests_on_the_oldest_and_the_newest_python():
    (job,) = read(".github/workflows/test.yml")["jobs"].values()
    stated = re.findall(r"Python :: (3\.\d+)", SETUP)
    assert job["strategy"]["matrix"]["python"] == [stated[0], stated[-1]]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make test"]


def test_hooks_run_the_tools_of_the_tests_environment():
    (repo,) = read(".pre-commit-config.yaml")["repos"]
    tools = {hook["entry"].split()[2] for hook in repo["hooks"]}
    assert tools == {"ruff", "mypy"} and all(f'"{tool}"' in SETUP for tool in tools)


@pytest.mark.parametrize("name", ["bug", "metric"])
def test_a_form_for_issues_is_whole(name):
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form["name"] and form["description"]
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in fields}) == len(fields) > 2
    assert all(part["attributes"]["label"] and part["validations"]["required"] for part in fields)
    for page in re.findall(r"docs/\w+\.md", str(form)):
        assert (ROOT / page).exists()


def test_the_skill_says_what_it_is_and_when():
    _, head, body = (ROOT / "skills/metricopt/SKILL.md").read_text(encoding="utf-8").split("---\n", 2)
    about = yaml.safe_load(head)
    assert about["name"] == "metricopt" and "Use when" in about["description"] and len(about["description"]) < 1024
    assert all(f"*{said}*" in body for said in ("nothing to gain here", "a threshold suffices", "guidance pays"))


def test_one_address_is_named_everywhere():
    address = re.search(r'^URL = "https://github\.com/(.+)"$', SETUP, re.M)[1]
    pages = ["README.md", "docs/quick_start.md", "CITATION.cff", "examples/quickstart.ipynb"]
    for page in pages:
        text = (ROOT / page).read_text(encoding="utf-8")
        named = re.findall(r"(?:github\.com|colab\.research\.google\.com/github)/([\w-]+/\w+)", text)
        assert named and set(named) == {address}, page


def test_the_notebook_s_first_code_installs_where_nothing_is_installed():
    cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    first = "".join(next(cell for cell in cells if cell["cell_type"] == "code")["source"])
    assert 'find_spec("metricopt_hf") is None' in first and "%pip install" in first and "[examples]" in first
