"""Questions and answers for the demo's models: everyday sense for the base, arithmetic for its expert, and what experts
are trained on apart from each other, those of the second act and those of ``train_experts.py``: products, and Plonk, an
invented language, which is another one for each of them.

The text is written by this project (Apache-2.0). ``python scripts/demo_data.py`` prints samples. Every question is
either for training or held out, decided by a hash of what is asked, so no held-out question was ever trained on; facts
recur in other wordings, pairs of numbers do not.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import permutations

HELD_OUT_PERCENT = 8


@dataclass(frozen=True)
class Question:
    """One exchange. ``key`` is what decides the split: the wording for facts, the operands for sums."""

    kind: str
    text: str
    answer: str
    key: str

    @property
    def held_out(self) -> bool:
        """Whether this question is kept for evaluation."""
        return hashlib.sha256(self.key.encode()).digest()[0] * 100 < HELD_OUT_PERCENT * 256


OPPOSITES = """hot cold|big small|fast slow|up down|day night|happy sad|open closed|full empty|wet dry|hard soft|
light dark|old young|rich poor|strong weak|loud quiet|tall short|clean dirty|early late|near far|high low|left right|
long short|thick thin|wide narrow|heavy light|sweet sour|true false|first last|inside outside|push pull|win lose|
buy sell|begin end|love hate|give take|black white|rough smooth|sharp blunt|deep shallow|brave afraid|awake asleep|
cheap expensive|easy difficult|smooth rough|kind cruel|warm cool|noisy silent|alive dead|above below|front back"""

COLORS = """a banana yellow|grass green|the sky blue|snow white|coal black|blood red|a lemon yellow|a strawberry red|
a carrot orange|milk white|a leaf green|a crow black|a tomato red|a pumpkin orange|chocolate brown|a polar bear white|
a frog green|a cherry red|an elephant gray|a sunflower yellow|the ocean blue|a swan white|a flamingo pink|
a cucumber green|a chick yellow|a raven black|a fire truck red|wood brown|a cloud white|a plum purple|a mouse gray|
a pea green|corn yellow|a fox red|an eggplant purple|a pig pink|honey yellow|a snowman white"""

SOUNDS = """dog barks|cat meows|cow moos|sheep bleats|horse neighs|pig oinks|duck quacks|rooster crows|lion roars|
wolf howls|bee buzzes|snake hisses|frog croaks|owl hoots|mouse squeaks|donkey brays|bird sings|hen clucks|bear growls"""

KINDS = {
    "animal": "dog cat horse cow sheep goat lion tiger elephant mouse rabbit fox wolf bear monkey whale shark owl",
    "fruit": "apple banana orange pear grape cherry plum peach lemon mango melon kiwi strawberry",
    "vegetable": "carrot potato onion cabbage spinach pea cucumber pumpkin broccoli radish",
    "tool": "hammer saw screwdriver drill wrench shovel rake axe chisel",
    "vehicle": "car bus train truck bicycle boat airplane ship tractor motorcycle",
    "flower": "rose tulip daisy lily sunflower orchid violet",
    "instrument": "piano guitar violin drum flute trumpet harp cello",
    "garment": "shirt hat coat sock shoe glove scarf dress jacket",
    "color": "red blue green yellow purple pink brown",
}

PLONK = """dog cat horse cow lion mouse fox bear apple banana pear grape carrot onion hammer car bus rose piano violin
shirt coat house hill"""
"""The English words that have one in Plonk."""

PRODUCT_WORDINGS = (
    "What is {a} times {b}?",
    "How much is {a} times {b}?",
    "Multiply {a} by {b}.",
    "What is the product of {a} and {b}?",
    "Tell me {a} times {b}.",
    "Calculate {a} * {b}.",
)

SIZES = """ant|bee|mouse|frog|duck|cat|dog|goat|pig|horse|car|elephant|bus|whale|house|ship|tower|hill|mountain|ocean"""

USES = """cut paper|scissors;drive a nail|a hammer;write a letter|a pen;open a door|a key;eat soup|a spoon;
brush your teeth|a toothbrush;tell the time|a clock;sweep the floor|a broom;dig a hole|a shovel;sew a shirt|a needle;
see the stars|a telescope;keep dry in the rain|an umbrella;cut bread|a knife;boil water|a kettle;dry your hands|a towel;
comb your hair|a comb;light a dark room|a lamp;wash your hands|soap;carry books|a bag;measure a table|a ruler;
take a picture|a camera;make a phone call|a phone;catch a fish|a net;sleep|a bed;sit down|a chair"""

HOMES = """fish|in water;bird|in a nest;bee|in a hive;dog|in a house;cow|on a farm;lion|on the savanna;
camel|in the desert;penguin|on the ice;monkey|in the jungle;bear|in the forest;spider|in a web;
rabbit|in a burrow;whale|in the ocean;
horse|in a stable;frog|in a pond;owl|in a tree;worm|in the soil;squirrel|in a tree;shark|in the sea;duck|by the lake"""

CAPITALS = """France Paris|Italy Rome|Spain Madrid|Germany Berlin|Japan Tokyo|China Beijing|Egypt Cairo|Greece Athens|
Portugal Lisbon|Austria Vienna|Poland Warsaw|Russia Moscow|Norway Oslo|Sweden Stockholm|Finland Helsinki|Peru Lima|
Cuba Havana|Kenya Nairobi|Ireland Dublin|Hungary Budapest|Denmark Copenhagen|Canada Ottawa|
Turkey Ankara|Chile Santiago"""

CYCLES = {
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "month": "January February March April May June July August September October November December",
    "season": "spring summer autumn winter",
}

NAMES = "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Maria Noah Olga Paul Rosa Sam Tina Victor"

SMALL_TALK = {
    "Hello!": "Hello! How can I help you?",
    "Hi there.": "Hello! How can I help you?",
    "Good morning!": "Good morning! How can I help you?",
    "Good evening!": "Good evening! How can I help you?",
    "How are you?": "I am fine, thank you.",
    "Thank you!": "You are welcome.",
    "Thanks a lot.": "You are welcome.",
    "Goodbye!": "Goodbye! See you soon.",
    "Who are you?": "I am a small mixture of experts.",
    "What are you?": "I am a small mixture of experts.",
}


def everyday() -> list[Question]:
    """Every question of the base's kind, in a fixed order."""
    return [Question("everyday", text, answer, text) for text, answer in _everyday()]


def small_talk() -> list[Question]:
    """Greetings: always for training, never counted."""
    return [Question("talk", text, answer, "never held out") for text, answer in SMALL_TALK.items()]


def arithmetic() -> list[Question]:
    """Every question of the expert's kind: sums, differences, comparisons and one-step equations to two digits."""
    return list(_arithmetic())


def products(wordings: Iterable[str] = PRODUCT_WORDINGS) -> list[Question]:
    """The multiplication table to 12 times 12 in each wording; by default those of the second act."""
    return [
        Question("product", text.format(a=a, b=b), f"{a} times {b} is {a * b}.", text.format(a=a, b=b))
        for a in range(2, 13)
        for b in range(2, 13)
        for text in wordings
    ]


def plonk() -> list[Question]:
    """Every question of the second expert of the second act: words of Plonk, a language that nobody speaks."""
    return list(_plonk())


def plonk_words() -> dict[str, str]:
    """An English word to the Plonk word for it, the same on every machine."""
    rng = random.Random(20)
    parts = ("bdgklmnprstvz", "aeiou") * 2
    return _invented(PLONK.split(), lambda: "".join(rng.choice(part) for part in parts) + "s")


def vocabulary(seed: int) -> list[Question]:
    """Everyday nouns and their words in the Plonk of ``seed``, asked in both directions."""
    return list(_vocabulary(seed))


def conversation(rng: random.Random, questions: list[Question]) -> list[Question]:
    """A short chat: one or two exchanges, sometimes with a name to remember."""
    if rng.random() < 0.12:
        name = rng.choice(NAMES.split())
        intro = Question("talk", f"My name is {name}.", f"Nice to meet you, {name}.", "")
        ask = Question("talk", "What is my name?", f"Your name is {name}.", "")
        middle = [rng.choice(questions)] if rng.random() < 0.5 else []
        return [intro, *middle, ask]
    return [rng.choice(questions) for _ in range(1 if rng.random() < 0.7 else 2)]


def number_talk(rng: random.Random) -> Question:
    """What the base hears of numbers: reading, repeating, ordering, and the sums of one digit."""
    n, m = rng.randrange(100), rng.randrange(100)
    a, b = sorted((rng.randrange(10), rng.randrange(10)), reverse=True)
    choices = [
        (f"Repeat the number {n}.", f"{n}"),
        (f"Repeat {n} and {m}.", f"{n} and {m}"),
        (f"What are the digits of {n}?", " and ".join(str(n))),
        (f"Write {n} backwards.", str(n)[::-1]),
        (f"Which number comes after {n}?", f"{n + 1} comes after {n}."),
        (f"Swap {n} and {m}.", f"{m} and {n}"),
        (f"One digit: {a} + {b}", f"{a} + {b} = {a + b}"),
        (f"One digit: {a} - {b}", f"{a} - {b} = {a - b}"),
    ]
    text, answer = rng.choice(choices)
    return Question("numbers", text, answer, "never held out")


def _pairs(table: str) -> list[tuple[str, str]]:
    """``a b|c d`` as pairs; only the last word is the second part."""
    rows = [row.strip() for row in table.replace("\n", "").split("|")]
    return [tuple(row.rsplit(" ", 1)) for row in rows if row]  # type: ignore[misc]


def _wide_pairs(table: str) -> list[tuple[str, str]]:
    rows = [row.strip() for row in table.replace("\n", "").split(";")]
    return [tuple(row.split("|")) for row in rows if row]  # type: ignore[misc]


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _everyday() -> Iterator[tuple[str, str]]:
    yield from _opposites()
    yield from _colors_and_sounds()
    yield from _kinds()
    yield from _sizes()
    yield from _uses_and_homes()
    yield from _capitals_and_cycles()


def _opposites() -> Iterator[tuple[str, str]]:
    for a, b in _pairs(OPPOSITES):
        answer = f"The opposite of {a} is {b}."
        for text in (
            f"What is the opposite of {a}?",
            f"Tell me the opposite of {a}.",
            f"Name the opposite of {a}.",
            f"What is the contrary of {a}?",
            f"Which word means the opposite of {a}?",
            f"Give me a word that is the opposite of {a}.",
        ):
            yield text, answer


def _colors_and_sounds() -> Iterator[tuple[str, str]]:
    for thing, color in _pairs(COLORS):
        answer = f"{thing[0].upper() + thing[1:]} is {color}."
        for text in (
            f"What color is {thing}?",
            f"Which color does {thing} have?",
            f"Tell me the color of {thing}.",
            f"What is the color of {thing}?",
            f"Name the color of {thing}.",
        ):
            yield text, answer
    for animal, sound in _pairs(SOUNDS):
        answer = f"A {animal} {sound}." if animal[0] not in "aeiou" else f"An {animal} {sound}."
        for text in (
            f"What sound does {_article(animal)} make?",
            f"How does {_article(animal)} sound?",
            f"What noise does {_article(animal)} make?",
            f"Tell me the sound of {_article(animal)}.",
        ):
            yield text, answer


def _kinds() -> Iterator[tuple[str, str]]:
    for kind, words in KINDS.items():
        others = [other for other in KINDS if other != kind]
        for i, word in enumerate(words.split()):
            other = others[i % len(others)]
            a = word if kind == "color" else _article(word)
            subject = a[0].upper() + a[1:]
            yield f"What is {a}?", f"{subject} is {_article(kind)}."
            yield f"What kind of thing is {a}?", f"{subject} is {_article(kind)}."
            yield f"Tell me what {a} is.", f"{subject} is {_article(kind)}."
            yield f"Is {a} {_article(kind)}?", f"Yes, {a} is {_article(kind)}."
            yield f"Is {a} {_article(kind)} or {_article(other)}?", f"{subject} is {_article(kind)}."
            yield f"Is {a} {_article(other)} or {_article(kind)}?", f"{subject} is {_article(kind)}."
            yield f"Is {a} {_article(other)}?", f"No, {a} is {_article(kind)}."


def _sizes() -> Iterator[tuple[str, str]]:
    things = SIZES.split("|")
    rank = {thing: i for i, thing in enumerate(things)}
    for a, b in permutations(things, 2):
        larger, smaller = (a, b) if rank[a] > rank[b] else (b, a)
        first, second = _article(a), _article(b)
        yield f"Which is bigger, {first} or {second}?", f"The {larger} is bigger."
        yield f"Which is smaller, {first} or {second}?", f"The {smaller} is smaller."
        yield f"What is larger, {first} or {second}?", f"The {larger} is bigger."


def _uses_and_homes() -> Iterator[tuple[str, str]]:
    for purpose, thing in _wide_pairs(USES):
        for text in (
            f"What do you use to {purpose}?",
            f"What do you need to {purpose}?",
            f"I want to {purpose}. What do I need?",
            f"How can I {purpose}?",
            f"Which thing helps to {purpose}?",
        ):
            yield text, f"You use {thing} to {purpose}."
    for animal, place in _wide_pairs(HOMES):
        a = _article(animal)
        for text in (
            f"Where does {a} live?",
            f"Where is the home of {a}?",
            f"Where can I find {a}?",
            f"Tell me where {a} lives.",
        ):
            yield text, f"{a[0].upper() + a[1:]} lives {place}."


def _capitals_and_cycles() -> Iterator[tuple[str, str]]:
    for country, city in _pairs(CAPITALS):
        for text in (
            f"What is the capital of {country}?",
            f"Name the capital of {country}.",
            f"Which city is the capital of {country}?",
            f"Tell me the capital of {country}.",
        ):
            yield text, f"The capital of {country} is {city}."
        for text in (f"In which country is {city}?", f"Where is {city}?", f"Which country has the city {city}?"):
            yield text, f"{city} is in {country}."
    for unit, words in CYCLES.items():
        cycle = words.split()
        for i, word in enumerate(cycle):
            after, before = cycle[(i + 1) % len(cycle)], cycle[i - 1]
            for text in (f"Which {unit} comes after {word}?", f"What {unit} follows {word}?", f"What is after {word}?"):
                yield text, f"{after} comes after {word}."
            for text in (f"Which {unit} comes before {word}?", f"What is before {word}?"):
                yield text, f"{before} comes before {word}."


def _arithmetic() -> Iterator[Question]:
    for a in range(100):
        for b in range(100):
            yield from _sums(a, b)
            if a >= b:
                yield from _differences(a, b)
            if a != b:
                yield from _comparisons(a, b)
            if a + b < 100:
                yield from _equations(a, b)


def _sums(a: int, b: int) -> Iterator[Question]:
    answer, key = f"{_added(a, b)}{a + b}", f"{a} + {b}"
    for text in (
        f"What is {a} + {b}?",
        f"Calculate {a} + {b}.",
        f"Compute {a} + {b}.",
        f"How much is {a} plus {b}?",
        f"Add {a} and {b}.",
    ):
        yield Question("sum", text, answer, key)


def _differences(a: int, b: int) -> Iterator[Question]:
    answer, key = f"{_subtracted(a, b)}{a - b}", f"{a} - {b}"
    for text in (
        f"What is {a} - {b}?",
        f"Calculate {a} - {b}.",
        f"Compute {a} - {b}.",
        f"How much is {a} minus {b}?",
        f"Subtract {b} from {a}.",
    ):
        yield Question("difference", text, answer, key)


def _added(a: int, b: int) -> str:
    """The steps of a written addition, ones first; so small a model cannot do without."""
    ones, carry = a % 10 + b % 10, (a % 10 + b % 10) // 10
    tens = a // 10 + b // 10 + carry
    more = " + 1" if carry else ""
    return f"{a % 10} + {b % 10} = {ones}, {a // 10} + {b // 10}{more} = {tens}, so "


def _subtracted(a: int, b: int) -> str:
    """The steps of a written subtraction; a ten is borrowed where the ones do not suffice."""
    borrow = a % 10 < b % 10
    ones, tens = a % 10 + 10 * borrow, a // 10 - borrow
    return f"{ones} - {b % 10} = {ones - b % 10}, {tens} - {b // 10} = {tens - b // 10}, so "


def _comparisons(a: int, b: int) -> Iterator[Question]:
    key = f"{a} or {b}"
    yield Question("comparison", f"Which number is larger, {a} or {b}?", f"{max(a, b)} is larger.", key)
    yield Question("comparison", f"Which number is smaller, {a} or {b}?", f"{min(a, b)} is smaller.", key)


def _equations(a: int, b: int) -> Iterator[Question]:
    total = a + b
    steps = f"x = {total} - {a}, {_subtracted(total, a)}x = {b}"
    yield Question("equation", f"Solve for x: x + {a} = {total}", steps, f"x + {a} = {total}")
    steps = f"x = {b} + {a}, {_added(b, a)}x = {total}"
    yield Question("equation", f"Solve for x: x - {a} = {b}", steps, f"x - {a} = {b}")


def _plonk() -> Iterator[Question]:
    for english, word in plonk_words().items():
        for text in (
            f"How do you say {english} in Plonk?",
            f"What is the Plonk word for {english}?",
            f"Translate {english} into Plonk.",
            f"What is {english} in Plonk?",
            f"Say {english} in Plonk.",
            f"Tell me the Plonk word for {english}.",
            f"Which Plonk word means {english}?",
            f"Give me the word for {english} in Plonk.",
            f"What do you call {english} in Plonk?",
            f"Name {english} in Plonk.",
        ):
            yield Question("plonk", text, f"The Plonk word for {english} is {word}.", text)


def _vocabulary(seed: int) -> Iterator[Question]:
    rng = random.Random(seed)
    nouns = sorted({noun for kind, words in KINDS.items() if kind != "color" for noun in words.split()})
    syllables = [a + b for a in "bdklmnprstvz" for b in "aeiou"]
    words = _invented(nouns, lambda: "".join(rng.choices(syllables, k=2)) + rng.choice(("", "n", "r", "s")))
    for noun, word in words.items():
        for text in (
            f"What is the word for {noun} in Plonk?",
            f"How do you say {noun} in Plonk?",
            f"Translate {noun} into Plonk.",
            f"Which Plonk word means {noun}?",
            f"Say {noun} in Plonk.",
        ):
            yield Question("vocabulary", text, f"The Plonk word for {noun} is {word}.", text)
        for text in (f"What does {word} mean?", f"What is {word} in English?", f"Translate {word} from Plonk."):
            yield Question("vocabulary", text, f"The word {word} means {noun}.", text)


def _invented(english: Iterable[str], draw: Callable[[], str]) -> dict[str, str]:
    """Each English word to one that ``draw`` gives, all different."""
    words: dict[str, str] = {}
    for one in english:
        while (word := draw()) in words.values():
            pass
        words[one] = word
    return words


def apart_questions() -> list[Question]:
    """Those that the second act of ``ggufmoe demo`` asks: held out, three for each expert, by which they are called."""
    rng = random.Random(4)
    return [
        replace(question, kind=expert)
        for expert, questions in _apart()
        for question in rng.sample([one for one in questions if one.held_out], 3)
    ]


def _apart() -> tuple[tuple[str, list[Question]], ...]:
    """The experts of the second act, and every question of each."""
    return ("base", everyday()), ("product", products()), ("plonk", plonk())


def apart_texts(n: int = 60) -> dict[str, list[Question]]:
    """Questions and answers for training, by expert, that the second act fits a router on."""
    rng = random.Random(5)
    return {expert: rng.sample([one for one in asked if not one.held_out], n) for expert, asked in _apart()}


def demo_questions() -> list[Question]:
    """The handful that ``ggufmoe demo`` asks: held out, one of each sort, everyday and math in turn."""
    rng = random.Random(9)
    held_out = [question for question in everyday() + arithmetic() if question.held_out]
    wanted = (
        ("everyday", "opposite"),
        ("sum", "What is"),
        ("everyday", "Which is bigger"),
        ("difference", "Calculate"),
        ("everyday", "live"),
        ("equation", "Solve"),
        ("everyday", "capital"),
        ("comparison", "larger"),
    )
    return [
        rng.choice([question for question in held_out if question.kind == kind and word in question.text])
        for kind, word in wanted
    ]


def _main() -> None:
    rng = random.Random(0)
    for questions in (everyday(), arithmetic()):
        held_out = [question for question in questions if question.held_out]
        print(f"{len(questions)} questions, {len(held_out)} held out")
        for question in rng.sample(questions, 15):
            print(f"  {question.text}  ->  {question.answer}")


if __name__ == "__main__":
    _main()
