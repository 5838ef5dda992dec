"""Cards of value functions and tuned models: templates, filled with measured figures."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from ..value.serialization import LIBRARY, replace_file

if TYPE_CHECKING:
    from .value_function import ValueFunction

TEMPLATES = Path(__file__).resolve().parent / "templates"
TAG = "metricopt"
# Stands in every value function's card that was made here: one without it was written by a person, and stays.
MARKER = "<!-- Made by metricopt_hf. Remove this line to keep your own words when the card is made anew. -->"


# Fields that are Markdown already; all others may hold a stranger's words.
RAW = {"comparison", "training_results", "start_link"}
# Fields that stand between quotes, or as a name, in code.
CODE = {"repo", "model_class"}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.A)  # names that can be linked on the Hub
# Fields of a signature that a card shows in other words, or not at all
SHOWN_OTHERWISE = {"origin", "basis"}
# Characters that may be markup in a line of Markdown or HTML: they are written as entities.
_SAFE = re.compile(r"[^\w ,.:;%()=+'/-]|_(?![^\W_])|(?<![^\W_])_|(?<=/)/|(?<=:)/|(?<=www)\.|(?<=[\w.])@", re.I)


def plain(value: Any) -> Any:
    """A copy whose texts (keys too) are escaped, so that a card shows them and makes no heading or link of them.

    Example:
        >>> plain("worst_class_recall (top-5)"), plain("# <b>https://x.org</b>")
        ('worst_class_recall (top-5)', '&#35; &#60;b&#62;https:&#47;&#47;x.org&#60;/b&#62;')
    """
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    if not isinstance(value, str):
        return value
    line = " ".join(printable(value).split())
    return _SAFE.sub(lambda match: f"&#{ord(match[0])};", line)


def printable(text: str) -> str:
    """A text that can be written as UTF-8: a lone surrogate, as of a file name in another encoding, is spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def code(text: str) -> str:
    """A text that stands between double quotes in a line of code, and ends neither the quotes nor the line."""
    return json.dumps(printable(text), ensure_ascii=False)[1:-1]


def render(template: str, data: ModelCardData, **fields: Any) -> ModelCard:
    """The card that a template in `templates/` gives with these metadata and fields; see `RAW`, `CODE` and `plain`."""
    citation = (TEMPLATES / "citation.md").read_text(encoding="utf-8").strip()
    path = str(TEMPLATES / f"{template}.md")
    if HUB_NAME.fullmatch(fields.get("finetuned_from") or ""):
        fields["start_link"] = fields["finetuned_from"]
    escaped = {name: code if name in CODE else plain for name in fields.keys() - RAW}
    fields = {name: escaped[name](value) if name in escaped else value for name, value in fields.items()}
    return ModelCard.from_template(data, template_path=path, marker=MARKER, citation=citation, **fields)


def write(
    path: str | os.PathLike,
    value_function: ValueFunction,
    repo: str = "user/name",
    observed: str | None = None,
    comparison: str | None = None,
    task: str | None = None,
    dataset: tuple[str, str] | None = None,
    license: str | None = None,
) -> None:
    """Write the card of a value function, unless somebody has written one.

    Args:
        repo: the name by which it is loaded.
        observed: "predictions" or "scores", whichever its run observed; None if unknown.
        comparison: Markdown on its use, such as a table of methods.
        task, dataset: the Hub's names of both, (type, name) of the data set.
        license: the Hub's name of it.
    """
    path = Path(path)
    if path.exists() and MARKER.encode() not in path.read_bytes():  # in whatever encoding a person writes
        return
    signature, observations = value_function.signature, value_function.observations
    data = ModelCardData(
        library_name=LIBRARY,
        tags=[TAG, "value-function"],
        metrics=[printable(signature.metric)] if signature else None,
        datasets=[dataset[0]] if dataset else None,
        license=license,
    )
    scores = observations.scores
    fields = {
        "name": repo.rpartition("/")[2],
        "repo": repo,
        "task": task,
        "dataset": dataset,
        "signature": signature and {n: value for n, value in vars(signature).items() if n not in SHOWN_OTHERWISE},
        "phi_dim": signature.origin.numel() if signature else None,
        "num_coordinates": value_function.num_coordinates,
        "num_members": value_function.num_members,
        "hidden_size": value_function.hidden_size,
        "num_observations": len(scores),
        "lowest": float(scores.min()) if len(scores) else None,
        "highest": float(scores.max()) if len(scores) else None,
        "seconds": float(observations.seconds.sum()),
        "observed": observed,
        "comparison": comparison,
    }
    replace_file(path, printable(str(render("value_function", data, **fields))).encode())
