"""Values, texts and command lines without their secrets, to be shown, logged or pushed: <NAME> stands for a secret.

We recognise a secret by its name (an option `--token`, a header, a key of a dict, a variable) or by its form (`hf_...`,
a password in a URL). A secret without either, such as a bare password among the words of a command, is not found.
"""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

_NAMES = r"(?:key|token|secret|password|passwd|pwd|credentials?|auth|authorization|bearer|cookie)s?"
# Names, or ends of names, of secret values.
SECRET_NAME = re.compile(rf"{_NAMES}$", re.I)
# Forms of secret values, anywhere in a text.
SECRET_VALUE = re.compile(
    r"(?<![A-Za-z0-9_-])(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[a-z]-|AKIA|AIza|eyJ)[^\s\"'&;,|<>()\[\]{}\\]{8,}",
    re.I,
)
# (the part that stays, the part that is replaced): user and password of a URL; a bearer token; a private key
_PARTS = (
    re.compile(r"(\b\w+://)([^/\s:@]*:[^/\s]+(?=@))"),
    re.compile(r"(\bhttps?://)([^/\s@\"'<>]+(?=@))", re.I),
    re.compile(r"(\bbearer\s+)([^\s\"'<>]{8,})", re.I),
    re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----)(.+?)(?=-----END|\Z)", re.S),
)
# "token=...", "X-Api-Key: ...", '"password": "..."', and the whole line behind "Authorization:"
_NAMED = re.compile(
    rf"(?P<name>{_NAMES})(?P<between>\\?[\"']?\s*[:=]\s*)"
    r"(?P<value>\"(?:\\.|[^\"\\])*\"|'[^']*'|(?<=[:=])(?:(?:basic|bearer|digest|token)\s+)?[^\s\"'&,;}\])]+"
    r"|(?:(?:basic|bearer|digest|token)\s+)?[^\s\"'&,;}\])]+)",
    re.I,
)
_HEADER = re.compile(
    r"(?P<name>(?:proxy-)?authorization|(?:set-)?cookie)(?P<between>\s*:\s*)(?P<value>[^\s\"'][^\"'\n]*)", re.I
)
# The words of a command line, with their quotes and escapes.
_WORD = re.compile(r"(?:[^\s'\"\\]|\\.|\\$|'[^']*'|\"(?:\\.|[^\"\\])*\"|['\"].*\Z)+", re.S)
# Options that are given "user:password".
_USER_OPTIONS = ("-u", "--user", "-U", "--proxy-user")


def without_secrets(value: Any, name: str = "") -> Any:
    """A copy of `value` to be shown: <NAME> replaces secrets at any depth, in keys too.

    numpy's numbers and arrays become Python's, and sets become lists, so that the result can be written as JSON.

    Example:
        >>> without_secrets({"average": "macro", "api_key": "abc", "headers": {"X-Auth": ["d"]}})
        {'average': 'macro', 'api_key': '<API_KEY>', 'headers': {'X-Auth': '<X-AUTH>'}}
    """
    if value is None or isinstance(value, bool):
        return value
    if SECRET_NAME.search(name):
        return _placeholder(name)
    if isinstance(value, str):
        return text_without_secrets(value)
    if isinstance(value, (int, float, complex)):
        return value
    if isinstance(value, (np.generic, np.ndarray)):
        return without_secrets(value.tolist())
    if isinstance(value, Mapping):
        return {_key(key): without_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        options = ["", *(_option(item) for item in value)]
        shown = [without_secrets(item, option) for item, option in zip(value, options, strict=False)]
        return type(value)(shown) if type(value) in (list, tuple) else shown
    if isinstance(value, (set, frozenset)):
        return [without_secrets(item) for item in value]
    with suppress(Exception):  # an object of any kind is shown by its repr
        if (text := text_without_secrets(repr(value))) != repr(value):
            return text
    return value


def text_without_secrets(text: str) -> str:
    """A text without its secrets: headers, URLs, JSON, assignments, and tokens of known forms.

    Example:
        >>> text_without_secrets("GET https://me:pw@h.org/?token=abc&page=2 with Authorization: Basic abc")
        'GET https://<SECRET>@h.org/?token=<TOKEN>&page=2 with Authorization: <AUTHORIZATION>'
    """
    for named in (_HEADER, _NAMED):
        text = named.sub(_replaced, text)
    for part in _PARTS:
        text = part.sub(r"\1<SECRET>", text)
    return SECRET_VALUE.sub("<SECRET>", text)


def command_without_secrets(command: str) -> str:
    """A command line without its secrets: values of options, variables, headers, URLs and tokens, also in a quoted
    command (`sh -c '...'`). The other words stay as they were written.

    Example:
        >>> command_without_secrets("score.py --token 'a b' --key=abc {model}")
        'score.py --token <TOKEN> --key=<KEY> {model}'
    """
    shown, end, option = [], 0, ""
    for match in _WORD.finditer(command):
        word = _unquoted(match[0])
        hidden = _word_without_secrets(word, option)
        shown += [command[end : match.start()], match[0] if hidden == word else _quoted(hidden)]
        end, option = match.end(), word if word.startswith("-") and "=" not in word else ""
    return text_without_secrets("".join(shown) + command[end:])


def shareable(args: Any) -> Any:
    """A copy of training arguments whose pickle (`torch.save`) holds no secrets.

    In the pickle, tokens and passwords are None, and commands and keyword arguments are as logs show them.
    """
    hidden = copy.copy(args)
    hidden.__dict__.update(getattr(args, "_shown", {}))
    for name, value in vars(args).items():
        if isinstance(value, str) and SECRET_NAME.search(name):
            setattr(hidden, name, None)
    shared = copy.copy(args)
    shared.__reduce_ex__ = hidden.__reduce_ex__  # pickle asks the object, not its class
    return shared


def _word_without_secrets(word: str, option: str) -> str:
    """One unquoted word of a command without its secrets; `option` is the option in front of it, or ""."""
    if SECRET_NAME.search(option):
        return _placeholder(option)
    if option in _USER_OPTIONS and re.match(r"[^:/\s{]+:.", word):
        return "<SECRET>"
    name, equals, value = word.partition("=")
    if equals and value and SECRET_NAME.search(name) and re.fullmatch(r"[\w.-]+", name):
        return name + equals + _placeholder(name)
    text = text_without_secrets(word)
    return command_without_secrets(text) if re.search(r"\s", text.strip()) else text


def _unquoted(word: str) -> str:
    try:
        return " ".join(shlex.split(word)) if re.search(r"['\"\\]", word) else word
    except ValueError:  # a quote that is not closed
        return word.replace("'", "").replace('"', "")


def _quoted(word: str) -> str:
    """The word in quotes if it has blanks; <NAME> stays without."""
    return shlex.quote(word) if re.search(r"\s", word) else word


def _option(item: Any) -> str:
    """Name of the option, if this item of a list is one (the next item is then its value); else ""."""
    return item.lstrip("-") if isinstance(item, str) and item.startswith("-") and "=" not in item else ""


def _key(key: Any) -> Any:
    return text_without_secrets(key) if isinstance(key, str) else key


def _replaced(match: re.Match) -> str:
    before = re.split(r"[^\w-]", match.string[max(0, match.start() - 40) : match.start()])[-1]
    return match["name"] + match["between"] + _placeholder(before + match["name"])


def _placeholder(name: str) -> str:
    """<NAME>, unless the name itself may be a secret."""
    name = name.lstrip("-")
    return f"<{name.upper()}>" if re.fullmatch(r"[\w.-]{1,40}", name) and not SECRET_VALUE.search(name) else "<SECRET>"
