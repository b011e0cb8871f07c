"""Write the demo world as text, from a fixed seed, with the standard library only.

    python demo/make_demo.py              # into the repository root
    python demo/make_demo.py /tmp/demo    # into another folder

Writes `demo/hellaswag.jsonl`, rows of held-out situations, and `input.txt`: about a megabyte of little
stories, descriptions, letters and dialogues about the forty characters of `world.py`, in simple English.
Documents are separated by a line holding only `<|endoftext|>`. All of it is consistent: whoever is hungry
eats his or her own favourite food, whoever is tired goes to his or her own home. The same seed gives the
same bytes on every platform and on every Python from 3.10 on.

Every fifth (character, situation) pair is held out: the fact is told in other words, but the character is
never seen in that situation. So whoever has read `input.txt` can be tested on situations that were not in it.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import world as w
from world import Character, Food, Place, Situation, Thing, World

SEED = 1337
WORDINGS = 4  # of each kind of sentence that are used: more make the text richer, and slower to learn
NOTES_PER_SUBJECT = 9  # documents about each place, food and thing
SEPARATOR = "\n<|endoftext|>\n"


# --------------------------------------------------------------------------------------------------
# Sentences


def fill(template: str, **words: object) -> str:
    """The template with its words filled in: first letter raised, "a" turned into "an" before a vowel."""
    text = template.format(**words)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)  # by letter: no word of this world sounds otherwise
    return text[0].upper() + text[1:]


def pick(templates: Sequence[str], rng: Random) -> str:
    """One of the first WORDINGS templates, with one of x and y taken wherever it says [x|y]."""
    return re.sub(r"\[([^]]*)\]", lambda m: rng.choice(m[1].split("|")), rng.choice(templates[:WORDINGS]))


def say(templates: Sequence[str], rng: Random, **words: object) -> str:
    """One of the templates, filled in."""
    return fill(pick(templates, rng), **words)


def after(lead: str, sentence: str, *named: Character) -> str:
    """The sentence behind a lead ("one day,"); only a name at its start keeps the capital letter."""
    if not sentence.startswith(tuple(c.name for c in named)):
        sentence = sentence[0].lower() + sentence[1:]
    return f"{fill(lead)} {sentence}"


def fact(c: Character, attribute: str, rng: Random, named: bool = True) -> str:
    """One sentence that states an attribute; with a pronoun as its subject unless `named`."""
    n, ns = (c.name, f"{c.name}'s") if named else (c.he, c.his)
    return say(w.FACTS[attribute], rng, c=c, n=n, ns=ns)


def first_person(c: Character, attribute: str, rng: Random) -> str:
    """One sentence that states an attribute as its owner would."""
    return say(w.FIRST_PERSON[attribute], rng, c=c)


def some_other(world: World, c: Character, rng: Random, besides: Character | None = None) -> Character:
    """A character who is neither c nor the best friend of c (nor the one given)."""
    return rng.choice([x for x in world.characters if x not in (c, c.friend, besides)])


# --------------------------------------------------------------------------------------------------
# Situations


def held_out(c: Character, situation: Situation) -> bool:
    """Whether the character is kept out of the situation: a fifth of all pairs, at most one per attribute."""
    siblings = [s.name for s in w.SITUATIONS if s.attribute == situation.attribute]
    offset = w.ATTRIBUTES.index(situation.attribute)
    return (c.index + 2 * siblings.index(situation.name) + offset) % 5 == 0


def rivals(world: World, c: Character, attribute: str) -> list[object]:
    """Every value of the attribute that would be wrong for this character but is plausible in form."""
    if attribute == "friend":
        return [x for x in world.characters if x is not c and x is not c.friend]
    values = {
        "kind": w.ANIMALS if c.animal else w.TRADES,
        "home": world.places,
        "food": world.foods,
        "thing": world.things,
        "colour": w.COLOURS,
        "hobby": w.HOBBIES,
        "fear": w.FEARS,
    }[attribute]
    return [value for value in values if value != getattr(c, attribute)]


def scene(
    world: World, c: Character, situation: Situation, rng: Random, other: Character, n_wrong: int = 3
) -> tuple[str, str, list[str], str]:
    """A context, the ending that follows from the world, `n_wrong` others of its form, and the outcome."""
    words = {"o": other, "item": rng.choice(w.ITEMS)}
    context, outcome = (say(t, rng, c=c, **words) for t in (situation.contexts, situation.outcomes))
    template = pick(situation.endings, rng)
    values = rivals(world, c, situation.attribute)
    rng.shuffle(values)
    wrong = [fill(template, c=replace(c, **{situation.attribute: v}), **words) for v in values[:n_wrong]]
    return context, fill(template, c=c, **words), wrong, outcome


# --------------------------------------------------------------------------------------------------
# Documents: each function tells the given attributes of one character


def story(world: World, c: Character, attributes: list[str], rng: Random) -> str:
    """A little story: perhaps a task, the events of the day in order, an end."""
    events = [
        rng.choice([s for s in w.SITUATIONS if s.attribute == a and not held_out(c, s)]) for a in attributes
    ]
    events.sort(key=lambda s: w.TIMES.index(s.time))
    o = some_other(world, c, rng)
    words = {"c": c, "o": o, "item": rng.choice(w.ITEMS)}
    only_one = len(events) == 1
    has_task = events[0].time == "day" and (only_one or rng.random() < 0.5)
    task, done = rng.choice(w.TASKS)
    introduced = rng.random() < 0.3 or (only_one and not has_task)
    parts = [say(w.INTRODUCTIONS, rng, **words)] if introduced else []
    when = pick(w.OPENINGS[events[0].time], rng)
    if has_task:
        parts.append(after(when, say([task], rng, **words), c))
    n_day = sum(event.time == "day" for event in events)
    for i, event in enumerate(events):
        if i > 0 or has_task:
            when = rng.choice(w.TASK_LINKS if i == 0 else w.LINKS[event.time])
        context, right, _, outcome = scene(world, c, event, rng, o)
        parts += [after(when, context, c, o), right]
        if only_one or rng.random() < 0.7:
            parts.append(outcome)
        if has_task and i == n_day - 1:
            parts.append(say([done], rng, **words))
    if rng.random() < 0.5 and events[-1].time == "day":
        parts.append(say(w.CLOSINGS, rng, **words))
    return " ".join(parts)


def description(world: World, c: Character, attributes: list[str], rng: Random) -> str:
    """Who somebody is, in three to five sentences, some of them as hearsay."""
    words = {"c": c, "o": some_other(world, c, rng)}
    opened = rng.random() < 0.5
    parts = [say(w.DESCRIPTION_OPENINGS, rng, **words)] if opened else []
    for i, attribute in enumerate(attributes):
        sentence = fact(c, attribute, rng, named=i % 3 == 0 and not (opened and i == 0))
        if rng.random() < 0.2:
            sentence = after(say(w.GOSSIP, rng, **words), sentence, c)
        parts.append(sentence)
    if rng.random() < 0.4:
        parts.append(say(w.DESCRIPTION_CLOSINGS, rng, **words))
    return " ".join(parts)


def letter(world: World, c: Character, attributes: list[str], rng: Random) -> str:
    """A letter or note in which somebody tells of himself or herself."""
    o = some_other(world, c, rng)
    sentences = [first_person(c, attribute, rng) for attribute in attributes]
    sentences.insert(rng.randrange(len(sentences) + 1), say(w.LETTER_FILLERS, rng))
    opening, closing = (say(t, rng, c=c, o=o) for t in (w.LETTER_OPENINGS, w.LETTER_CLOSINGS))
    return f"{opening}\n\nDear {o},\n" + " ".join(sentences) + f"\n{closing}"


def talk(world: World, c: Character, attributes: list[str], rng: Random) -> str:
    """Somebody tells another one about himself or herself."""
    o = some_other(world, c, rng)
    opening, closing = (say(t, rng, c=c, o=o) for t in (w.TALK_OPENINGS, w.TALK_CLOSINGS))
    first, *rest = (first_person(c, attribute, rng) for attribute in attributes)
    first = f'"{first[:-1]}," {rng.choice(("said", "began"))} {c}.'
    return f'{opening} {first} "{" ".join(rest)}" {closing}'


def dialogue(world: World, c: Character, attributes: list[str], rng: Random) -> str:
    """Two others talk about somebody: one asks, one knows."""
    o = some_other(world, c, rng)
    d = some_other(world, c, rng, o)
    parts = [say(w.DIALOGUE_OPENINGS, rng, c=c, o=o, d=d)] if rng.random() < 0.6 else []
    for attribute in attributes:
        asked, told = (say(t[attribute], rng, c=c) for t in (w.ASKED, w.TOLD))
        parts.append(f'"{asked}" asked {o}. "{told}," {rng.choice(("said", "answered"))} {d}.')
    if rng.random() < 0.6:
        parts.append(say(w.DIALOGUE_CLOSINGS, rng, c=c, o=o, d=d))
    return " ".join(parts)


def contrast(world: World, c: Character, attributes: list[str], rng: Random) -> str:
    """Two characters side by side, in what they do not share."""
    o = c.friend if rng.random() < 0.3 else some_other(world, c, rng)
    differing = [
        a for a in attributes if getattr(c, a) != getattr(o, a) and not (a == "friend" and o is c.friend)
    ]
    parts = [say(w.CONTRAST_OPENINGS, rng, c=c, o=o)]
    parts += [say(w.CONTRAST[attribute], rng, c=c, o=o) for attribute in differing]
    parts.append(say(w.CONTRAST_CLOSINGS, rng, c=c, o=o))
    return " ".join(parts)


def crowd(world: World, c: Character, attributes: list[str], rng: Random) -> str:
    """Several characters at once, each with the same attribute, now one and now another."""
    others = [x for x in world.characters if x is not c and x is not c.friend]
    rng.shuffle(others)
    parts = []
    for attribute in attributes:
        opening, each = w.CROWDS[attribute]
        parts.append(say(opening, rng))
        members = [c, *others[: 2 + rng.randrange(2)]]
        rng.shuffle(members)
        parts += [say(each, rng, c=member) for member in members]
    return " ".join(parts)


# How often each form of document is told, and with how many attributes.
FORMS: tuple[tuple[Callable[[World, Character, list[str], Random], str], int, tuple[int, ...]], ...] = (
    (story, 32, (1, 2, 2, 3)),
    (description, 10, (3, 4, 5)),
    (letter, 7, (3, 4)),
    (talk, 5, (3, 4)),
    (dialogue, 7, (2, 3)),
    (contrast, 3, (3,)),
    (crowd, 3, (2,)),
)


def plot(world: World, c: Character, template: str, rng: Random) -> str:
    """One of the whole stories, with this character in it."""
    return say([template], rng, c=c, o=some_other(world, c, rng))


def note(world: World, subject: Place | Food | Thing, rng: Random) -> str:
    """Some facts about a place, a food or a thing, and about those who live there, like it or own it."""
    if isinstance(subject, Place):
        words = {"p": subject, "side": world.side[subject.name], "near": world.near[subject.name]}
        groups, related = w.PLACE_FACTS, [c for c in world.characters if c.home == subject]
    elif isinstance(subject, Food):
        words = {"food": subject, "market": world.market[subject.name]}
        groups, related = w.FOOD_FACTS, [c for c in world.characters if c.food == subject]
    else:
        words = {"thing": subject}
        groups, related = w.THING_FACTS, [c for c in world.characters if c.thing == subject]
    rng.shuffle(related)
    sentences = []
    for i, group in enumerate(groups):
        c, o = related[i % len(related)], related[(i + 1) % len(related)]
        sentences.append(say(group, rng, c=c, o=o, **words))
    rng.shuffle(sentences)
    return " ".join(sentences)


# --------------------------------------------------------------------------------------------------
# Files


def draw(cards: list[str], n: int, rng: Random) -> list[str]:
    """The next n attributes, all different; each is in every round once, so all are told equally often."""
    if len(cards) < len(w.ATTRIBUTES):
        cards += w.deal(w.ATTRIBUTES, len(w.ATTRIBUTES), rng)
    hand = list(dict.fromkeys(cards))[:n]
    for attribute in hand:
        cards.remove(attribute)
    return hand


def input_text(world: World, rng: Random) -> str:
    """All documents of `input.txt`, shuffled."""
    documents = []
    for c in world.characters:
        cards: list[str] = []
        for tell, times, sizes in FORMS:
            for _ in range(times):
                documents.append(tell(world, c, draw(cards, rng.choice(sizes), rng), rng))
        documents += [plot(world, c, template, rng) for template in w.PLOTS]
    for subject in (*world.places, *world.foods, *world.things):
        documents += [note(world, subject, rng) for _ in range(NOTES_PER_SUBJECT)]
    documents = list(dict.fromkeys(documents))  # short ones may come out alike
    rng.shuffle(documents)
    return SEPARATOR.join(documents) + "\n"


def hellaswag(world: World, rng: Random) -> str:
    """Two rows for every held-out pair as jsonl in HellaSwag's fields, the right ending anywhere."""
    rows = []
    for c in world.characters:
        for situation in (s for s in w.SITUATIONS if held_out(c, s)):
            for _ in range(2):
                context, right, wrong, _ = scene(world, c, situation, rng, some_other(world, c, rng))
                label = rng.randrange(4)
                rows.append(
                    {
                        "ind": len(rows),
                        "activity_label": situation.name,
                        "ctx_a": context,
                        "ctx_b": "",
                        "ctx": context,
                        "endings": [*wrong[:label], right, *wrong[label:]],
                        "label": label,
                        "source_id": f"demo~{c.name}~{situation.name}",
                        "split": "val",
                        "split_type": "zeroshot",
                    }
                )
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="ascii", newline="\n") as f:
        f.write(text)
    os.replace(temporary, path)


def main(folder: Path) -> None:
    """Write all files of the demo world into the folder."""
    world = w.make_world(SEED)
    files = (("input.txt", input_text), ("demo/hellaswag.jsonl", hellaswag))
    for name, make in files:
        # a generator of its own for each file, so that a change to one leaves the others as they are
        text = make(world, Random(f"{SEED} {name}"))
        write(folder / name, text)
        print(f"{folder / name}: {len(text):,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
