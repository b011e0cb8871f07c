"""Rewards for grpo.py: plain functions of an answer, and sums of them such as `exact + 0.2*ends(40)`."""

import math
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from neogpt import files


class Answer(NamedTuple):
    """What a model answered to a prompt."""

    prompt: str  # in the prompt template
    reference: str  # the response in the data
    text: str  # the answer without end-of-text
    ids: list[int]  # its tokens, with end-of-text if it ended
    ended: bool  # by end-of-text; if not, it was cut off


class Term(NamedTuple):
    """A reward in a sum."""

    weight: float
    function: Callable[..., float]  # of an Answer and of the arguments
    arguments: tuple[float | str, ...]
    code: str  # the content of a user's file


Terms = dict[str, Term]  # by the text of the term without its weight, as log.txt names it


def exact(answer: Answer) -> float:
    """1 if the answer ended and equals the reference, else 0."""
    return float(answer.ended and answer.text.strip() == answer.reference.strip())


def begins(answer: Answer) -> float:
    """1 if the answer equals the reference, or begins with it and a space, else 0."""
    return float(f"{answer.text} ".startswith(f"{answer.reference} "))


def ends(answer: Answer, n_tokens: float = math.inf) -> float:
    """1 if the answer ended within n_tokens, end-of-text included, else 0."""
    return float(answer.ended and len(answer.ids) <= n_tokens)


def format(answer: Answer, pattern: str) -> float:
    """1 if the whole answer matches the regular expression, else 0."""
    return float(re.fullmatch(pattern, answer.text, re.DOTALL) is not None)


def length(answer: Answer, n_tokens: float) -> float:
    """1 for an answer of n_tokens, less by 1 / n_tokens for every token more or fewer, at least 0."""
    return max(0.0, 1 - abs(len(answer.ids) - n_tokens) / n_tokens)


def gsm8k(answer: Answer) -> float:
    """1 if the number after #### equals that of the reference (the format of GSM8K, arXiv:2110.14168), else 0."""
    found, expected = (re.findall(r"#### *(-?[\d.,]*\d)", text) for text in (answer.text, answer.reference))
    return float(bool(found and expected) and found[-1].replace(",", "") == expected[-1].replace(",", ""))


def repetition(answer: Answer, n: float = 3) -> float:
    """Minus the fraction of the n-grams of words that occur earlier in the answer: 0 without repetition."""
    words, n = answer.text.split(), int(n)
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) - 1 if grams else 0.0


REWARDS = {function.__name__: function for function in (exact, begins, ends, format, length, gsm8k, repetition)}
NUMBER = r"\d+(?:\.\d*)?|\.\d+"
TERM = re.compile(
    rf"""\s*(?P<sign>[+-])\s*(?:(?P<weight>{NUMBER})\s*\*\s*)?(?P<term>(?P<name>[\w./~][\w./~-]*\.py:\w+|\w+)"""
    rf"""(?:\(\s*(?:(?P<number>{NUMBER})|"(?P<text>[^"]*)")?\s*\))?)\s*"""
)


def load(source: str) -> tuple[Callable, str]:
    """The function that FILE.py:FUNCTION names, and the file's content. Raises ValueError."""
    try:
        path, _, name = str(Path(source).expanduser()).rpartition(":")
        return runpy.run_path(path)[name], Path(path).read_text(encoding="utf-8")
    except Exception as error:  # the file of a user can raise anything
        raise ValueError(f"cannot load {source}: {type(error).__name__}: {files.one_line(error)}") from error


def parse(text: str) -> Terms:
    """The terms of a sum. A term is a name of REWARDS or FILE.py:FUNCTION, perhaps with a number or a text in double
    quotes as its argument, and perhaps times a number. FILE.py is executed, the text itself is not. Raises ValueError.
    """
    terms, rest = {}, text if text.lstrip().startswith(("+", "-")) else f"+{text}"
    while rest:
        match = TERM.match(rest)
        if not match:
            raise ValueError(f"--reward={text}: expected a sum such as exact + 0.2*ends(40), found {rest!r}")
        name, term, rest = match["name"], re.sub(r"\s", "_", match["term"]), rest[match.end() :]
        if name not in REWARDS and ".py:" not in name:
            raise ValueError(f"--reward={text}: unknown {name}, expected {', '.join(REWARDS)} or FILE.py:FUNCTION")
        function, code = (REWARDS[name], "") if name in REWARDS else load(name)
        arguments = (float(match["number"]),) if match["number"] else () if match["text"] is None else (match["text"],)
        if term in terms:
            raise ValueError(f"--reward={text}: {term} occurs twice, add the weights")
        terms[term] = Term(float(match["sign"] + (match["weight"] or "1")), function, arguments, code)
    return terms


def score(terms: Terms, answer: Answer) -> list[float]:
    """The value of every term, without its weight. Raises ValueError if a function fails or is not finite."""
    values = []
    for name, term in terms.items():
        try:
            values.append(float(term.function(answer, *term.arguments)))
            if not math.isfinite(values[-1]):
                raise ValueError(f"it returned {values[-1]}")
        except Exception as error:  # the function of a user can raise anything
            problem = f"{type(error).__name__}: {files.one_line(error)}"
            raise ValueError(f"the reward {name} failed for the answer {answer.text!r:.200}: {problem}") from error
    return values
