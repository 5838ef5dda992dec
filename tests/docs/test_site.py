"""The documentation builds, without a warning."""

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow

pytest.importorskip("myst_parser")
pytest.importorskip("furo")
build = pytest.importorskip("sphinx.cmd.build")


def test_the_site_builds_without_a_warning(tmp_path, capfd):
    options = ["-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "doctrees")]
    assert build.build_main([*options, str(ROOT / "docs"), str(tmp_path / "site")]) == 0, capfd.readouterr().err
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    arguments = (tmp_path / "site" / "arguments.html").read_text(encoding="utf-8")
    assert "metricopt_hf.MetricOptTrainer" in api and "metric_steps" in arguments
    pictures = (tmp_path / "site" / "how_it_works.html").read_text(encoding="utf-8")
    assert 'href="_images/how_it_works.png"' in pictures and "phone.css" in pictures  # legible on a phone
