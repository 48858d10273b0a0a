"""Make builtin.txt, the calibration text that ships: `python models/calibration/make.py`.

Hand-written paragraphs (paragraphs.txt beside this file) between passages drawn from templates with
a fixed seed: narration, dialogue, questions and answers, arithmetic, lists, letters, code, tables
and JSON. It wants to touch many words and forms of text in little space; it does not want to be
read. All of it was written for smelt and is licensed as smelt is (Apache-2.0). builtin.txt is
committed, so that its hash stays what manifests say; this script is how it was made.
"""
# ruff: noqa: E501, SIM905 - most lines are text

from __future__ import annotations

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
SEED = 20260
SIZE = 84_000

NAMES = (
    "Amara Bodil Chen Dmitri Elif Farid Greta Hana Ivo Jamal Keiko Lars Maryam Nils Olga Pedro Quentin Rosa "
    "Samir Tove Uma Viktor Wen Ximena Yusuf Zora"
).split()
PLACES = (
    "the harbour,the old library,a mountain hut,the night market,the railway station,the botanical garden,"
    "a village near the border,the hospital,a kitchen on the third floor,the workshop,the observatory,"
    "the river bank,a crowded bus,the court house,the bakery on the corner,an empty theatre"
).split(",")
THINGS = (
    "a brass key,three letters,a broken radio,the missing map,an umbrella,a jar of honey,the blue notebook,"
    "a violin,two train tickets,a telescope,the spare battery,a loaf of bread,some photographs,a wool coat,"
    "the contract,a bicycle pump,a box of tools,a thermometer"
).split(",")
VERBS = (
    "carried,forgot,repaired,described,borrowed,sold,hid,measured,photographed,inherited,returned,examined,"
    "painted,divided,delivered,cleaned"
).split(",")
WEATHER = (
    "It had rained since morning,The sun was already low,Snow lay on the roofs,A warm wind came from the south,"
    "Fog covered the fields,The air smelled of smoke,It was the hottest day of the year,Thunder rolled far away"
).split(",")
FEELINGS = (
    "relieved,suspicious,curious,tired,proud,nervous,amused,disappointed,grateful,confused".split(
        ","
    )
)
SUBJECTS = {
    "photosynthesis": "plants use light to turn carbon dioxide and water into sugar and oxygen",
    "a prime number": "it is a whole number above one that only one and itself divide",
    "inflation": "prices rise in general, so that the same money buys less than before",
    "a vaccine": "it shows the immune system a harmless part of a germ before the germ itself comes",
    "a glacier": "snow that lasts many summers is pressed into ice and flows slowly downhill",
    "an index in a database": "a second, sorted structure tells where the rows with a value are kept",
    "friction": "two surfaces resist sliding over each other, and the lost motion becomes heat",
    "a parliament": "elected members debate and vote on laws and watch over the government",
    "a black hole": "so much mass in so little space that not even light gets away from it",
    "fermentation": "microbes break down sugar without air and leave acid, gas or alcohol",
    "a sonnet": "it is a poem of fourteen lines, often in iambic pentameter with a turn near the end",
    "the water cycle": "water evaporates, forms clouds, falls as rain and runs back to the sea",
    "recursion": "a function solves a problem by calling itself on a smaller one",
    "a contract": "two parties promise each other something and the law holds them to it",
    "an earthquake": "stress between two plates of rock is released within seconds as they slip",
}
DISHES = "lentil soup,apple cake,fried rice,flat bread,potato salad,pancakes,vegetable curry,fish stew".split(
    ","
)
FOODS = (
    "200 g of flour,two eggs,a pinch of salt,half a litre of water,one onion,three carrots,a spoon of oil,"
    "100 g of butter,a cup of rice,fresh ginger,two cloves of garlic,a lemon,some parsley,black pepper"
).split(",")
CITIES = {
    "Oslo": ("Norway", 59.9), "Lima": ("Peru", -12.0), "Nairobi": ("Kenya", -1.3), "Hanoi": ("Vietnam", 21.0),
    "Lisbon": ("Portugal", 38.7), "Quito": ("Ecuador", -0.2), "Ankara": ("Türkiye", 39.9),
    "Wellington": ("New Zealand", -41.3), "Prague": ("Czechia", 50.1), "Rabat": ("Morocco", 34.0),
}  # fmt: skip
FUNCTIONS = (
    "total",
    "find",
    "merge",
    "count",
    "parse",
    "normalise",
    "filter",
    "schedule",
    "render",
    "split",
)


def story(r: random.Random) -> str:
    a, b = r.sample(NAMES, 2)
    place, other = r.sample(PLACES, 2)
    thing = r.choice(THINGS)
    return (
        f"{r.choice(WEATHER)} when {a} reached {place}. {a} had {r.choice(VERBS)} {thing} the week before, and "
        f"now {b} was asking about it. \"Where is it?\" said {b}, who looked {r.choice(FEELINGS)}. "
        f"\"I left it at {other},\" {a} answered, \"because nobody there asks questions.\" They walked on without "
        f"a word. After {r.randint(2, 59)} minutes they found {r.choice(THINGS)} instead, and {b} felt "
        f"{r.choice(FEELINGS)}. It was not what they had come for, but it would have to do."
    )  # fmt: skip


def explanation(r: random.Random) -> str:
    subject, meaning = r.choice(list(SUBJECTS.items()))
    question = r.choice(("What is", "Can you explain", "How would you describe", "Tell me about"))
    return (
        f"Question: {question} {subject}?\nAnswer: In short, {meaning}. "
        f"{r.choice(('To a child I would say', 'Put differently', 'An example helps here'))}: "
        f"imagine {r.choice(NAMES)} standing in {r.choice(PLACES)} and noticing it for the first time. "
        f"What matters is {r.choice(('the cause', 'the order of the steps', 'the amount', 'who decides'))}, "
        f"not {r.choice(('the name', 'the size', 'the date', 'the colour'))}."
    )


def sums(r: random.Random) -> str:
    lines = []
    for _ in range(5):
        a, b = r.randint(2, 999), r.randint(2, 99)
        kind = r.choice("+-*")
        value = {"+": a + b, "-": a - b, "*": a * b}[kind]
        lines.append(f"{a} {kind} {b} = {value}")
    price, count = r.randint(2, 40), r.randint(2, 12)
    lines.append(
        f"{r.choice(NAMES)} buys {count} tickets at {price} euros each and pays with a {price * count + 7} euro "
        f"voucher. The tickets cost {price * count} euros, so 7 euros are left."
    )
    return "\n".join(lines)


def recipe(r: random.Random) -> str:
    foods = r.sample(FOODS, 4)
    listed = "\n".join(f"- {food}" for food in foods)
    return (
        f"## {r.choice(DISHES).capitalize()}\n\nYou need:\n\n{listed}\n\n1. Mix {foods[0]} with {foods[1]}.\n"
        f"2. Add {foods[2]} and stir for {r.randint(2, 15)} minutes.\n3. Bake or cook at {r.randrange(90, 240, 10)} "
        f"degrees until it smells right.\n4. Finish with {foods[3]} and serve {r.choice(('hot', 'cold', 'at once'))}."
    )  # fmt: skip


def letter(r: random.Random) -> str:
    a, b = r.sample(NAMES, 2)
    return (
        f"Dear {a},\n\nthank you for your message of {r.randint(1, 28)} {r.choice(('March', 'June', 'October'))}. "
        f"We have {r.choice(VERBS)} {r.choice(THINGS)} as you asked; the invoice ({r.randint(1000, 9999)}-"
        f"{r.randint(10, 99)}) is attached. Unfortunately delivery to {r.choice(PLACES)} takes another "
        f"{r.randint(2, 9)} working days. If that is too late, please call +00 {r.randint(100, 999)} "
        f"{r.randint(1000, 9999)} or write to {b.lower()}@example.org.\n\nKind regards,\n{b}"
    )


def dialogue(r: random.Random) -> str:
    a, b = r.sample(NAMES, 2)
    subject, meaning = r.choice(list(SUBJECTS.items()))
    return (
        f"{a}: Do you still remember what {subject} means?\n{b}: Not really. Something about "
        f"{r.choice(('school', 'energy', 'rules', 'time'))}?\n{a}: Nearly! {meaning.capitalize()}.\n"
        f"{b}: Oh, that's why everyone in {r.choice(PLACES)} was talking about it.\n"
        f"{a}: Exactly. Shall we meet at {r.randint(7, 22)}:{r.choice(('00', '15', '30', '45'))}?\n{b}: I'd love to."
    )


def code(r: random.Random) -> str:
    name, item = r.choice(FUNCTIONS), r.choice(("value", "row", "word", "task", "node"))
    limit = r.randint(2, 64)
    if r.random() < 0.5:
        return (
            f"```python\ndef {name}_{item}s({item}s: list[str], limit: int = {limit}) -> dict[str, int]:\n"
            f'    """Count each {item}; at most `limit` of them."""\n    seen: dict[str, int] = {{}}\n'
            f"    for i, {item} in enumerate({item}s):\n        if i >= limit or not {item}.strip():\n"
            f"            continue\n        seen[{item}.lower()] = seen.get({item}.lower(), 0) + 1\n"
            f"    return dict(sorted(seen.items(), key=lambda pair: -pair[1]))\n```"
        )
    return (
        f"```c\nstatic int {name}_{item}(const struct {item} *list, size_t n)\n{{\n    int sum = 0;\n"
        f"    for (size_t i = 0; i < n; i++) {{\n        if (list[i].flags & 0x{limit:02x})\n"
        f"            continue;   /* skip what is marked */\n        sum += list[i].size;\n    }}\n"
        f"    return sum > {limit} ? sum : -1;\n}}\n```"
    )


def table(r: random.Random) -> str:
    rows = r.sample(list(CITIES.items()), 4)
    lines = ["| city | country | latitude | visitors |", "|---|---|---|---|"]
    lines += [f"| {c} | {n} | {lat} | {r.randint(1, 900) * 1000:,} |" for c, (n, lat) in rows]
    south = [c for c, (_, lat) in rows if lat < 0]
    told = (
        f"Of these, {' and '.join(south)} lie south of the equator."
        if south
        else "All lie in the north."
    )
    return "\n".join(lines) + f"\n\n{told}"


def record(r: random.Random) -> str:
    city, (country, _) = r.choice(list(CITIES.items()))
    data = {
        "id": r.randint(10_000, 99_999),
        "name": r.choice(NAMES),
        "address": {"city": city, "country": country},
        "items": [{"what": t, "price": round(r.uniform(1, 90), 2)} for t in r.sample(THINGS, 2)],
        "paid": r.random() < 0.5,
    }
    return json.dumps(data, indent=2, ensure_ascii=False)


KINDS = (
    story,
    explanation,
    sums,
    recipe,
    letter,
    dialogue,
    code,
    table,
    record,
    story,
    explanation,
)


def build() -> str:
    """The whole text, the same for the same seed."""
    r = random.Random(SEED)
    written = (HERE / "paragraphs.txt").read_text(encoding="utf-8").strip().split("\n\n")
    parts: list[str] = []
    while sum(map(len, parts)) < SIZE:
        if written and len(parts) % 5 == 0:
            parts.append(written.pop(0))
        parts.append(r.choice(KINDS)(r))
    return "\n\n".join([*parts, *written]) + "\n"


if __name__ == "__main__":
    (HERE / "builtin.txt").write_text(build(), encoding="utf-8")
