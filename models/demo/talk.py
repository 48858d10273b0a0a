"""Tasks about sentences, facts and small talk, and the table of all tasks."""

from __future__ import annotations

from random import Random

from . import tasks as t
from . import words as w
from .tasks import Sample, Task, ask, say, turn


def who_has(rng: Random) -> Sample:
    """A person has a coloured thing; ask for the person, the thing or its colour."""
    name, colour, thing = rng.choice(w.NAMES), rng.choice(w.COLOURS), rng.choice(w.THINGS)
    questions = (
        (f"Who has the {thing}?", f"{name} has the {thing}."),
        (f"What does {name} have?", f"{name} has {t.article(colour)} {thing}."),
        (f"What colour is the {thing}?", f"The {thing} is {colour}."),
    )
    question, answer = rng.choice(questions)
    return ask(f"{name} has {t.article(colour)} {thing}. {question}", answer)


def where_is(rng: Random) -> Sample:
    """A person or an animal does something in a place; ask where, who, or what."""
    actor = rng.choice([*w.NAMES, *(f"the {animal}" for animal in w.ANIMALS)])
    place, verb = rng.choice(w.PLACES), rng.choice(w.VERBS)
    start = actor[0].upper() + actor[1:]
    questions = (
        (f"Where is {actor}?", f"{start} is in the {place}."),
        (f"Who is in the {place}?", f"{start} is in the {place}."),
        (f"What does {actor} like?", f"{start} likes to {verb}."),
    )
    question, answer = rng.choice(questions)
    return ask(f"{start} likes to {verb} in the {place}. {question}", answer)


def yes_or_no(rng: Random) -> Sample:
    """Whether a person has the thing that the sentence says."""
    name, things = rng.choice(w.NAMES), rng.sample(w.THINGS, 2)
    asked = rng.choice(things)
    fact = f"{name} has {t.article(things[0])}."
    question = f"Does {name} have {t.article(asked)}?"
    return ask(f"{fact} {question}", "Yes." if asked == things[0] else "No.")


def recall(rng: Random) -> Sample:
    """The user states a fact in one turn and asks for it in a later one."""
    kind = rng.choice(["name", "animal", "colour"])
    if kind == "name":
        value = rng.choice(w.NAMES)
        stated = say(rng, ("My name is {v}.", "I am {v}.", "Hello, my name is {v}."), v=value)
        reply, answer = f"Nice to meet you, {value}!", f"Your name is {value}."
        question = rng.choice(["What is my name?", "Do you know my name?", "Who am I?"])
    elif kind == "animal":
        value = rng.choice(w.ANIMALS)
        stated = f"I have {t.article(value)}."
        reply, answer = f"How nice, {t.article(value)}!", f"You have {t.article(value)}."
        question = rng.choice(["Which animal do I have?", "What do I have?"])
    else:
        value = rng.choice(w.COLOURS)
        stated = say(rng, ("I like the colour {v}.", "My favourite colour is {v}."), v=value)
        reply, answer = f"Ah, {value} is lovely!", f"Your favourite colour is {value}."
        question = rng.choice(["What is my favourite colour?", "Which colour do I like?"])
    messages = [turn("user", stated), turn("assistant", reply)]
    between: tuple[str, ...] = ()
    if rng.random() < 0.5:
        # A turn in between, so that the fact is not always the latest thing said.
        other = rng.choice([t.add_two_digits, t.spell, t.copy_words])(rng)
        messages += [*other.messages, turn("assistant", other.answer)]
        between = (other.key,)
    messages.append(turn("user", question))
    return Sample(messages, (answer,), f"{stated} {between} {question}", between)


def persona(rng: Random) -> Sample:
    """The system message gives the assistant a name or a liking; the user asks for it."""
    name, animal = rng.choice(w.NAMES), rng.choice(w.ANIMALS)
    system = f"Your name is {name}. You like {t.article(animal)}."
    question, answer = rng.choice(
        [
            ("What is your name?", f"My name is {name}."),
            ("Who are you?", f"My name is {name}."),
            ("Which animal do you like?", f"I like {t.article(animal)}."),
        ]
    )
    messages = [turn("system", system), turn("user", question)]
    return Sample(messages, (answer,), f"{system} {question}")


def fact(rng: Random) -> Sample:
    """Calendar, alphabet, opposites, young animals, legs and colours, learnt by heart."""
    templates: tuple[str, ...]
    kind = rng.choice(["day", "month", "letter", "opposite", "young", "legs", "colour"])
    if kind in ("day", "month", "letter"):
        ring = {"day": w.DAYS, "month": w.MONTHS, "letter": "abcdefghijklmnopqrstuvwxyz"}[kind]
        forward = rng.random() < 0.5
        index = rng.randrange(len(ring))
        if kind == "letter":
            index = rng.randrange(25) + (0 if forward else 1)
        answer = ring[(index + (1 if forward else -1)) % len(ring)]
        which = "after" if forward else "before"
        templates = (
            "Which {k} comes {x} {v}?", "What {k} is {x} {v}?", "What is the {k} {x} {v}?",
            "Name the {k} {x} {v}.", "The {k} {x} {v}?",
        )  # fmt: skip
        return ask(say(rng, templates, k=kind, x=which, v=ring[index]), answer)
    if kind == "opposite":
        first, second = rng.sample(rng.choice(w.OPPOSITES), 2)
        templates = ("What is the opposite of {v}?", "Name the opposite of {v}.",
                     "The opposite of {v}?", "Which word is the opposite of {v}?")  # fmt: skip
        return ask(say(rng, templates, v=first), second)
    if kind == "young":
        animal, answer = rng.choice(w.YOUNG)
        templates = ("What is a young {v} called?", "What do you call a young {v}?",
                     "Name a young {v}.", "How do we call a young {v}?")  # fmt: skip
        return ask(say(rng, templates, v=animal), answer)
    if kind == "legs":
        animal, answer = rng.choice(w.LEGS)
        templates = ("How many legs does {v} have?", "Count the legs of {v}.",
                     "How many legs has {v}?")  # fmt: skip
        return ask(say(rng, templates, v=t.article(animal)), answer)
    thing, answer = rng.choice(w.TYPICAL_COLOURS)
    templates = ("What colour is {v}?", "Which colour has {v}?", "Name the colour of {v}.")
    return ask(say(rng, templates, v=thing), answer)


def small_talk(rng: Random) -> Sample:
    """Greetings, thanks and questions about the model, in several spellings."""
    phrases, answers = w.SMALL_TALK[rng.choice(sorted(w.SMALL_TALK))]
    index = rng.randrange(len(phrases))
    phrase = phrases[index]
    if rng.random() < 0.6:
        phrase = phrase[0].upper() + phrase[1:]
    if rng.random() < 0.3:
        phrase += ", " + rng.choice(["smelt", "my friend", "please", "computer"])
    phrase += rng.choice(["", ".", "!", "?"])
    # The phrase picks the answer, so that greedy decoding has one right continuation to learn.
    first = index % len(answers)
    return Sample([turn("user", phrase)], answers[first:] + answers[:first], phrase)


STORIES = {
    "short": (
        "Once there was {a} in the {p}. Its name was {n}. {n} found a {c} {t} and was very happy."
    ),
    "sad": (
        "{n} was {a}. One day {n} lost the {c} {t} in the {p}. {n} looked for it all day long, "
        "but it was gone."
    ),
    "funny": (
        "{n} was {a} with a {c} {t}. In the {p} everybody laughed, for {n} wore the {t} like a hat."
    ),
    "bedtime": (
        "It was night in the {p}. {n} was {a} and very tired. Under the {c} {t} {n} fell asleep. "
        "Good night, {n}."
    ),
}


def story(rng: Random) -> Sample:
    """A fixed little story with the given animal, name, place and thing filled in."""
    mood = rng.choice(sorted(STORIES))
    fields = {
        "a": t.article(rng.choice(w.ANIMALS)),
        "n": rng.choice(w.NAMES),
        "p": rng.choice(w.PLACES),
        "c": rng.choice([colour for colour in w.COLOURS if colour != "orange"]),
        "t": rng.choice(w.THINGS),
    }
    asked = "Tell a {m} story about {n}, {a}, in the {p} with a {c} {t}."
    return ask(asked.format(m=mood, **fields), STORIES[mood].format(**fields))


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("add_two_digits", t.add_two_digits, 3.0),
        Task("subtract", t.subtract, 2.5),
        Task("multiply", t.multiply, 1.0),
        Task("add_again", t.add_again, 2.0),
        Task("compare", t.compare, 1.0),
        Task("extreme", t.extreme, 1.0),
        Task("parity", t.parity, 0.4),
        Task("sort_numbers", t.sort_numbers, 1.5),
        Task("sort_words", t.sort_words, 1.8),
        Task("next_number", t.next_number, 1.5),
        Task("count_up", t.count_up, 0.8),
        Task("copy_words", t.copy_words, 1.0),
        Task("reverse_words", t.reverse_words, 0.5),
        Task("spell", t.spell, 2.0),
        Task("spell_backwards", t.spell_backwards, 1.7),
        Task("count_letters", t.count_letters, 0.6),
        Task("edge_letter", t.edge_letter, 0.5),
        Task("count_words", t.count_words, 0.4),
        Task("edge_word", t.edge_word, 0.3),
        Task("odd_one", t.odd_one, 0.4),
        Task("who_has", who_has, 1.2),
        Task("where_is", where_is, 1.2),
        Task("yes_or_no", yes_or_no, 1.5),
        Task("recall", recall, 0.4),
        Task("persona", persona, 0.3),
        Task("fact", fact, 1.0),
        Task("small_talk", small_talk, 0.4),
        Task("story", story, 0.2),
    )
}
