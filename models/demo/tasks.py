"""The tasks of the demo model: short questions whose answers can be checked by a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from . import words as w

Message = dict[str, str]


@dataclass(frozen=True)
class Sample:
    """One question with its accepted answers.

    `messages` ends with the user turn to be answered. `key` names the content of the question
    apart from its wording; the train/held-out split is drawn over it, so a sum that is held out
    is held out in every phrasing. Tasks that test memorised facts use the wording itself as key.
    """

    messages: list[Message]
    answers: tuple[str, ...]
    key: str
    inner: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """The answer that is trained on."""
        return self.answers[0]


@dataclass(frozen=True)
class Task:
    """A named generator of samples; `weight` is its share in the training mixture."""

    name: str
    generate: Callable[[Random], Sample]
    weight: float = 1.0


def check(answers: Sequence[str], completion: str) -> bool:
    """Whether a completion equals an accepted answer, apart from outer blanks and a full stop."""
    return completion.strip().rstrip(".") in {answer.rstrip(".") for answer in answers}


def turn(role: str, content: str) -> Message:
    """One chat message."""
    return {"role": role, "content": content}


def ask(prompt: str, answer: str, key: str | None = None) -> Sample:
    """A single-turn sample; without a key its wording is the key."""
    return Sample([turn("user", prompt)], (answer,), prompt if key is None else key)


def say(rng: Random, templates: Sequence[str], **fields: object) -> str:
    """Fill in one of the templates."""
    return rng.choice(templates).format(**fields)


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def pseudo_word(rng: Random, syllables: int) -> str:
    """A made-up word, so that spelling cannot be solved by remembering whole words."""
    parts = [rng.choice("bdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(syllables)]
    return "".join(parts) + rng.choice(["", "", *"nrstlk"])


def any_word(rng: Random, longest: int = 12) -> str:
    """A listed or a made-up word of at most `longest` letters."""
    while True:
        word = rng.choice(w.WORDS) if rng.random() < 0.6 else pseudo_word(rng, rng.randint(1, 3))
        if len(word) <= longest:
            return word


def some_words(rng: Random, low: int, high: int) -> list[str]:
    """Between `low` and `high` different listed words."""
    return rng.sample(w.WORDS, rng.randint(low, high))


SUM = ("{a} + {b} =", "{a}+{b}", "What is {a} + {b}?", "{a} plus {b}?", "Add {a} and {b}.")
DIFFERENCE = ("{a} - {b} =", "{a}-{b}", "What is {a} - {b}?", "{a} minus {b}?")
PRODUCT = (
    "{a} * {b} =", "{a} x {b}", "What is {a} times {b}?", "{a} times {b}?", "Multiply {a} by {b}.",
    "What is {a} * {b}?",
)  # fmt: skip


def sum_key(a: int, b: int) -> str:
    """The key of a sum; the order of the operands does not matter."""
    return f"{min(a, b)}+{max(a, b)}"


def add_two_digits(rng: Random) -> Sample:
    """Sums of numbers up to 99."""
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    return ask(say(rng, SUM, a=a, b=b), str(a + b), sum_key(a, b))


def subtract(rng: Random) -> Sample:
    """Differences of numbers up to 99, never negative."""
    b, a = sorted((rng.randint(0, 99), rng.randint(0, 99)))
    return ask(say(rng, DIFFERENCE, a=a, b=b), str(a - b), f"{a}-{b}")


def multiply(rng: Random) -> Sample:
    """The table up to 12 times 12; these are facts, so the wording is the key."""
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    return ask(say(rng, PRODUCT, a=a, b=b), str(a * b))


def add_again(rng: Random) -> Sample:
    """A second turn that builds on the answer of the first."""
    a, b, c = (rng.randint(1, 49) for _ in range(3))
    follow_up, result = rng.choice([("Now add {c}.", a + b + c), ("Add {c} to that.", a + b + c)])
    if rng.random() < 0.4 and c <= a + b:
        follow_up, result = "Now take away {c}.", a + b - c
    messages = [
        turn("user", say(rng, SUM, a=a, b=b)),
        turn("assistant", str(a + b)),
        turn("user", follow_up.format(c=c)),
    ]
    return Sample(messages, (str(result),), f"{a}+{b},{c},{result}", (sum_key(a, b),))


def compare(rng: Random) -> Sample:
    """The larger or the smaller of two numbers."""
    a, b = rng.sample(range(1000 if rng.random() < 0.3 else 100), 2)
    larger = rng.random() < 0.5
    which = rng.choice(["larger", "bigger"]) if larger else "smaller"
    templates = ("Which is {which}, {a} or {b}?", "Which number is {which}: {a} or {b}?")
    answer = max(a, b) if larger else min(a, b)
    return ask(say(rng, templates, which=which, a=a, b=b), str(answer), f"{larger} {a} {b}")


def extreme(rng: Random) -> Sample:
    """The largest or the smallest number of a list."""
    numbers = rng.sample(range(100), rng.randint(3, 6))
    largest = rng.random() < 0.5
    which = "largest" if largest else "smallest"
    templates = ("Which is the {which} of {l}?", "Find the {which} number: {l}")
    listed = ", ".join(map(str, numbers))
    answer = max(numbers) if largest else min(numbers)
    return ask(say(rng, templates, which=which, l=listed), str(answer), f"{which} {listed}")


def parity(rng: Random) -> Sample:
    """Even or odd."""
    n = rng.randint(0, 999)
    templates = ("Is {n} even or odd?", "Even or odd: {n}?")
    return ask(say(rng, templates, n=n), "odd" if n % 2 else "even", str(n))


def sort_numbers(rng: Random) -> Sample:
    """Three to six different numbers up to 99 in rising order."""
    numbers = rng.sample(range(100), rng.randint(3, 6))
    templates = ("Sort these numbers: {l}", "Sort {l}.", "Put in order: {l}")
    listed, answer = (", ".join(map(str, seq)) for seq in (numbers, sorted(numbers)))
    return ask(say(rng, templates, l=listed), answer, answer)


def sort_words(rng: Random) -> Sample:
    """Three to five listed words in alphabetical order."""
    chosen = some_words(rng, 3, 5)
    templates = ("Sort these words: {l}", "Put in alphabetical order: {l}", "Sort {l}.")
    answer = ", ".join(sorted(chosen))
    return ask(say(rng, templates, l=", ".join(chosen)), answer, answer)


def next_number(rng: Random) -> Sample:
    """The next member of a series with a constant step."""
    start, step = rng.randint(0, 60), rng.randint(1, 10)
    series = [start + i * step for i in range(rng.randint(4, 5))]
    answer = series[-1] + step
    if rng.random() < 0.3:
        series, answer = [answer, *reversed(series[1:])], series[0]
    templates = ("What comes next: {l}", "Continue: {l}", "{l}. Which number comes next?")
    listed = ", ".join(map(str, series))
    return ask(say(rng, templates, l=listed), str(answer), listed)


def count_up(rng: Random) -> Sample:
    """Count from one number to another, up or down."""
    low = rng.randint(0, 90)
    high = low + rng.randint(3, 9)
    steps = list(range(low, high + 1))
    if rng.random() < 0.3:
        steps.reverse()
    a, b = steps[0], steps[-1]
    return ask(say(rng, ("Count from {a} to {b}.",), a=a, b=b), ", ".join(map(str, steps)))


def copy_words(rng: Random) -> Sample:
    """Repeat a phrase of listed and made-up words and numbers."""
    parts = [
        str(rng.randint(0, 999)) if rng.random() < 0.15 else any_word(rng)
        for _ in range(rng.randint(2, 7))
    ]
    phrase = " ".join(parts)
    templates = ("Repeat: {p}", "Say this: {p}", "Repeat after me: {p}", "Copy this text: {p}")
    return ask(say(rng, templates, p=phrase), phrase, phrase)


def reverse_words(rng: Random) -> Sample:
    """A short list of words from last to first."""
    chosen = some_words(rng, 2, 5)
    templates = ("Reverse this list: {l}", "Say these words in reverse order: {l}")
    answer = ", ".join(reversed(chosen))
    return ask(say(rng, templates, l=", ".join(chosen)), answer, answer)


def spell(rng: Random) -> Sample:
    """The letters of a word, joined with hyphens."""
    word = any_word(rng)
    templates = ("Spell {w}.", "Spell the word {w}.", "How do you spell {w}?", "Please spell {w}.")
    return ask(say(rng, templates, w=word), "-".join(word), f"spell {word}")


def spell_backwards(rng: Random) -> Sample:
    """The letters of a word of up to six letters, from last to first."""
    word = any_word(rng, 6)
    templates = ("Spell {w} backwards.", "Spell the word {w} backwards.", "Reverse {w}.")
    return ask(say(rng, templates, w=word), "-".join(reversed(word)), f"backwards {word}")


def count_letters(rng: Random) -> Sample:
    """The number of letters of a word."""
    word = any_word(rng)
    templates = ("How many letters are in {w}?", "Count the letters of {w}.")
    return ask(say(rng, templates, w=word), str(len(word)), f"letters {word}")


def edge_letter(rng: Random) -> Sample:
    """The first or the last letter of a word."""
    word = any_word(rng)
    which = rng.choice(["first", "last"])
    templates = ("What is the {x} letter of {w}?", "Which letter is the {x} one in {w}?")
    answer = word[0] if which == "first" else word[-1]
    return ask(say(rng, templates, x=which, w=word), answer, f"{which} {word}")


def count_words(rng: Random) -> Sample:
    """The number of words of a phrase."""
    chosen = some_words(rng, 2, 9)
    templates = ("How many words are in this text: {p}", "Count the words: {p}")
    phrase = " ".join(chosen)
    return ask(say(rng, templates, p=phrase), str(len(chosen)), phrase)


def edge_word(rng: Random) -> Sample:
    """The first or the last word of a list."""
    chosen = some_words(rng, 3, 7)
    which = rng.choice(["first", "last"])
    templates = ("What is the {x} word: {l}", "Name the {x} word of this list: {l}")
    listed = ", ".join(chosen)
    answer = chosen[0] if which == "first" else chosen[-1]
    return ask(say(rng, templates, x=which, l=listed), answer, f"{which} {listed}")


def odd_one(rng: Random) -> Sample:
    """Find the word of a given category among words of other categories."""
    (kind, members), *others = rng.sample(w.CATEGORIES, 4)
    answer = rng.choice(members)
    listed = [rng.choice(other) for _, other in others[: rng.randint(2, 3)]]
    listed.insert(rng.randint(0, len(listed)), answer)
    templates = ("Which of these is {k}: {l}?", "Find the word for {k}: {l}")
    text = ", ".join(listed)
    return ask(say(rng, templates, k=kind, l=text), answer, f"{kind} {text}")
