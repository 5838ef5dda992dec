"""What a stranger, or a strange name, puts into a card: shown as it is, never as markup; and cards are written."""

import ast
import os
import re

import pytest
import torch
from helpers import Texts, tiny_bert, true_class_probability
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from metricopt_hf import MetricOptConfig, MetricOptTrainer, ValueFunction
from metricopt_hf.hub import cards
from metricopt_hf.value import Signature
from metricopt_hf.value.serialization import replace_file

HOSTILE = [
    "# Heading",
    "x\n\n# Heading\n",
    "x\n---\nlicense: other\n---\n",
    "[free](https://evil.example/a)",
    "![x](https://evil.example/a.png)",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "https://evil.example/a?b=c",
    "www.evil.example",
    "someone@evil.example",
    "**bold** _so_ __so__ `code` ~~not~~",
    "a | b | c",
    "&lt;b&gt;",
    "{{ citation }} {% for x in y %}",
    "\\[x\\]",
    "- item\n- item",
    "\udc80\ud800",
]
PLAIN = MarkdownIt("gfm-like", {"linkify": False})


def signature(text):
    phi = {"kind": text, "parameters": [[text, [3]]]}
    return Signature(text, phi, text, text, True, torch.zeros(3), torch.eye(3))


def shown(card):
    """What a reader sees as links, headings and HTML."""
    html = PLAIN.render(re.sub(r"(?s)\A---\n.*?\n---\n", "", card))
    return sorted(re.findall(r"<(?:h\d|a|img|script|strong|em|s|code)\b[^>]*>", html))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_stranger_s_words_are_no_markup_in_the_card_of_a_value_function(tmp_path, text):
    written = []
    for words in ("harmless", text):
        made = ValueFunction(3)
        made.signature = signature(words)
        made.observations.extend(torch.zeros(1, 3), torch.tensor([0.5]), step=0, seconds=0.1)
        told = {"observed": words, "task": words, "dataset": (words, words)}
        made.save_pretrained(tmp_path / str(len(written)), told)
        path = tmp_path / str(len(written)) / "README.md"
        written.append(path.read_text(encoding="utf-8"))
        assert ModelCard.load(path).data.library_name == "metricopt_hf"
    assert shown(written[1]) == shown(written[0])
    assert "://evil" not in written[1].partition("\n---\n")[2] and "www.evil" not in written[1].partition("\n---\n")[2]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_plain_shows_the_same_words(text):
    """Markdown gives them back as they were, but for the line breaks, and makes nothing of them."""
    (paragraph, inline, _) = PLAIN.parse(f"x {cards.plain(text)}")
    assert {token.type for token in inline.children} <= {"text", "text_special"}
    words = "".join(token.content for token in inline.children)
    assert words == " ".join(f"x {cards.printable(text)}".split())


@pytest.mark.parametrize("word", ["worst_class_recall", "eval/f1 (top-5)", "Größe 3,5 %", "loss gradients", "a+b=c"])
def test_ordinary_words_stay_as_they_are(word):
    assert cards.plain(word) == word


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return run(tmp_path_factory.mktemp("run"), "score")


@pytest.mark.parametrize("text", HOSTILE)
def test_names_of_a_run_are_no_markup_in_the_card_of_a_model(made, text):
    """The start model's name, and the keys of `compute_metrics` in the table of evaluations."""
    path, history = os.path.join(made.args.output_dir, "README.md"), made.state.log_history
    written = {}
    for start, key in (("harmless start", "harmless"), ("someone/bert", text), (text, text)):
        made.model.config._name_or_path = start
        names = {"eval_other": f"eval_{key}"}
        made.state.log_history = [{names.get(k, k): value for k, value in row.items()} for row in history]
        made.create_model_card()
        assert ModelCard.load(path).data.library_name == "transformers"
        written[start] = open(path, encoding="utf-8").read()
    made.state.log_history = history
    assert "Harmless" in written["harmless start"]
    assert "[someone/bert](https://huggingface.co/someone/bert), fine-tuned" in written["someone/bert"]
    link = [f'<a href="https://huggingface.co/{text}">'] if cards.HUB_NAME.fullmatch(text) else []
    assert shown(written[text]) == sorted(link + shown(written["harmless start"]))


@pytest.mark.parametrize("repo", ['a"b/c', "x\ny", "```", "a\\"])
def test_what_stands_in_code_ends_neither_quotes_nor_line(repo):
    shown = cards.code(repo)
    assert ast.literal_eval(f'"{shown}"') == repo and "\n" not in shown


def run(folder, name):
    trainer = MetricOptTrainer(
        tiny_bert(),
        MetricOptConfig(
            str(folder), max_steps=4, metric_steps=2, metric_call_budget=200, phi_dim=6, metric_for_best_model=name,
            greater_is_better=True, report_to=[], use_cpu=True, disable_tqdm=True, save_steps=2, eval_strategy="steps",
            eval_steps=2,
        ),
        train_dataset=Texts(80, seed=1), eval_dataset=Texts(40, seed=2),
        compute_metrics=lambda prediction: {name: true_class_probability(prediction), "other": 0.5},
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", ["\udc80score", "[a](https://evil.example) <b>"])
def test_a_run_with_a_strange_metric_is_saved_with_its_cards(tmp_path, name):
    trainer = run(tmp_path, name)
    trainer.save_model()
    trainer.create_model_card()
    for card in (tmp_path / "README.md", tmp_path / "value_function" / "README.md"):
        text = card.read_text(encoding="utf-8")
        assert "](https://evil" not in text.partition("\n---\n")[2] and "<b>" not in text.partition("\n---\n")[2]


def test_cards_that_people_wrote_in_another_encoding_are_no_obstacle(tmp_path):
    trainer = run(tmp_path, "score")
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "value_function"):
        (folder / "README.md").write_bytes("# Größe\n".encode("latin-1"))
    trainer.save_model()
    trainer.create_model_card()
    assert (tmp_path / "value_function" / "README.md").read_bytes() == "# Größe\n".encode("latin-1")
    assert "score" in (tmp_path / "README.md").read_text()


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links here")
def test_nothing_is_written_through_a_planted_link(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "shared"
    victim.write_text("mine")
    folder.mkdir()
    for name in ("config.json", "_config.json.tmp"):
        (folder / name).symlink_to(victim)
    replace_file(folder / "config.json", b"{}")
    assert victim.read_text() == "mine" and (folder / "config.json").read_text() == "{}"
    assert not (folder / "config.json").is_symlink() and [p.name for p in folder.iterdir()] == ["config.json"]
