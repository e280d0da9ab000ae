"""What is read from answers in words: a parser that guesses makes accuracies that cannot be compared."""

from __future__ import annotations

from collections import Counter

import pytest

from eval import answers


@pytest.mark.parametrize(
    ("text", "yes", "read"),
    [
        ("Yes.", "fake", "fake"),
        ("Yes.", "real", "real"),
        ("no", "fake", "real"),
        ("No, it is not.", "real", "fake"),
        ("No signs of manipulation are visible.", "fake", "real"),
        ("No signs of manipulation are visible.", "real", "real"),  # "No" answers nothing here
        ("The face is not real.", "real", "fake"),
        ("It is not a fake.", "fake", "real"),
        ("This image is real.", "fake", "real"),
        ("Yes, it has been forged.", "fake", "fake"),
        ("Yes, it is a real photo.", "fake", "invalid"),  # yes to "forged?", and real
        ("No, this face is not authentic.", "real", "fake"),
        ("It could be real, and it is fake.", "fake", "invalid"),
        ("Real or fake?", "fake", "invalid"),
        ("", "fake", "invalid"),
        ("The light is soft.", "fake", "invalid"),
        ("The light is soft. The face is forged.", "real", "fake"),  # the first clause with a decision
        ("The face is forged. Yes.", "real", "fake"),
        ("No doubt: this is a deepfake.", "real", "fake"),
        ("**Yes**, the photo was manipulated.", "fake", "fake"),
        ("I cannot tell.", "fake", "invalid"),
        ("Yesterday was sunny.", "fake", "invalid"),
    ],
)
def test_hard_sentences(text: str, yes: answers.Side, read: str) -> None:
    """Read wrong: "not real" as real, a reversed question the wrong way round, a guess where nothing was said."""
    assert answers.read_decision(text, yes) == read


def test_yes_to_everything_is_right_half_of_the_time() -> None:
    """A set of questions with one polarity makes a yes-sayer a perfect finder of fakes."""
    every = [alias for aliases in answers.ALIASES.values() for alias in aliases]
    assert len(every) == len(set(every))  # the same words under two classes: whichever is written last would win
    assert Counter(q.yes for q in answers.QUESTIONS) == {"fake": 6, "real": 6}
    drawn = Counter(answers.question_for(f"s{i}").text for i in range(2400))
    assert len(drawn) == len(answers.QUESTIONS) and min(drawn.values()) > 140
    # The same in every process, so that runs can be compared.
    assert answers.question_for("a/b.png").text == "Is this photo free of manipulation?"


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("This is entire face synthesis.", "EFS"),  # not "face synthesis" of a shorter alias, nor FS
        ("Face swap", "FS"),
        ("This is not a face swap but face reenactment.", "FR"),
        ("It is a face swap of a real person.", "FS"),
        ("There is no manipulation.", "real"),
        ("Real.", "real"),
        ("not real", "invalid"),
        ("A face swap or face editing.", "invalid"),
        ("The face was edited.", "invalid"),
        ("unrealistic", "invalid"),
        ("", "invalid"),
    ],
)
def test_classes(text: str, read: str) -> None:
    """A shorter alias inside a longer one, a denied class, two classes."""
    assert answers.read_class(text) == read


def test_confusion_and_macro_f1_by_hand() -> None:
    """Invalid answers dropped from the denominator make a silent model good."""
    truth, said = ["FS", "FS", "real", "real"], ["FS", "invalid", "real", "FS"]
    table = answers.confusion(truth, said, ("FS", "real"))
    assert table == {"FS": {"FS": 1, "real": 0, "invalid": 1}, "real": {"FS": 1, "real": 1, "invalid": 0}}
    # FS: 2*1/(2+2) = 0.5; real: 2*1/(2+1) = 0.667
    assert answers.macro_f1(truth, said) == pytest.approx((0.5 + 2 / 3) / 2)
    assert answers.macro_f1([], []) is None
