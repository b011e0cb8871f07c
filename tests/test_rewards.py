"""rewards.py: the values of every reward, and sums of rewards that are read but never evaluated."""

from pathlib import Path

import pytest

from neogpt import rewards
from neogpt.rewards import Answer


def answer(text: str = "It is red.", reference: str = "It is red.", n_tokens: int = 10, ended: bool = True) -> Answer:
    return Answer("Which?\nResponse:\n", reference, text, [7] * n_tokens, ended)


VALUES = [
    ("exact", answer(" It is red.\n"), 1),
    ("exact", answer("It is red. Yes."), 0),
    ("exact", answer(ended=False), 0),
    ("begins", answer("It is red. Yes.", ended=False), 1),
    ("begins", answer("It is red.!"), 0),
    ("ends", answer(n_tokens=500), 1),
    ("ends", answer(ended=False), 0),
    ("ends(10)", answer(), 1),
    ("ends(9)", answer(), 0),
    ('format("It is (red|blue)[.]")', answer(), 1),
    ('format("It is")', answer(), 0),
    ('format("a.*b")', answer("a\n\nb"), 1),
    ('format("")', answer(""), 1),
    ("length(8)", answer(), 0.75),
    ("length(12.5)", answer(), 0.8),
    ("length(4)", answer(), 0),
    ("gsm8k", answer("so #### 1,200", "x\n#### 1200"), 1),
    ("gsm8k", answer("#### 1 #### -2.5.", "#### -2.5"), 1),
    ("gsm8k", answer("1200", "#### 1200"), 0),
    ("gsm8k", answer("#### 12", "#### 1200"), 0),
    ("repetition", answer("a b c a b c a b"), 3 / 6 - 1),
    ("repetition(1)", answer("a b a a"), 2 / 4 - 1),
    ("repetition", answer("a b"), 0),
]


@pytest.mark.parametrize("text, given, expected", VALUES, ids=str)
def test_values(text: str, given: Answer, expected: float) -> None:
    assert rewards.score(rewards.parse(text), given) == [expected]


def test_sums_have_weights_and_signs(tmp_path: Path) -> None:
    own = tmp_path / "my-rewards.py"
    own.write_text("def score(answer, factor=1):\n    return factor * len(answer.text)\n")
    terms = rewards.parse(f"exact + 0.2*ends(40) -repetition- .5 * length(20)+{own}:score+2*{own}:score(3)")
    assert [term.weight for term in terms.values()] == [1, 0.2, -1, -0.5, 1, 2]
    assert list(terms) == ["exact", "ends(40)", "repetition", "length(20)", f"{own}:score", f"{own}:score(3)"]
    assert rewards.score(terms, answer()) == [1, 1, 0, 0.5, 10, 30]
    assert [term.code for term in terms.values()] == ["", "", "", "", own.read_text(), own.read_text()]


REFUSED = ["", "exakt", "exact exact", "exact + ", "exact*2", "2*", "nan*exact", "1e3*exact", "exact + exact", "exact("]
REFUSED += ["__import__('os').system('touch x')", "exact(open('x', 'w'))", "exact.__class__", "exact\0", 'format("a']
REFUSED += ["--exact"]


@pytest.mark.parametrize("text", REFUSED)
def test_other_texts_are_refused_and_nothing_is_evaluated(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        rewards.parse(text)
    assert "--reward=" + text in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", ["", "def score(answer", "1 / 0", "import none_such"])
def test_files_that_cannot_be_loaded_are_named(code: str, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(code)
    for path in (own, tmp_path / "missing.py"):
        with pytest.raises(ValueError, match=f"{path}:score"):
            rewards.parse(f"{path}:score")


@pytest.mark.parametrize("code", ["return None", "return nan", "return answer.text", "raise OSError"])
def test_functions_that_fail_are_named_with_the_answer(code: str, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(f"nan = float('nan')\ndef score(answer):\n    {code}\n")
    with pytest.raises(ValueError, match=f"(?s){own}:score.*It is red") as error:
        rewards.score(rewards.parse(f"{own}:score"), answer())
    assert "\n" not in str(error.value)
