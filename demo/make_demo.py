"""Write the demo world as text, from a fixed seed, with the standard library only.

    python demo/make_demo.py              # into the repository root
    python demo/make_demo.py /tmp/demo    # into another folder

- `input.txt`: about a megabyte of little stories, descriptions, dialogues and comparisons about the sixteen
  characters of `world.py`. Documents are separated by a line holding only `<|endoftext|>`.
- `demo/hellaswag.jsonl`: beginnings of stories, each with four endings, in HellaSwag's fields. Every fourth
  (character, story) pair is held out: the character is never seen in that story. The right ending follows
  from what `input.txt` tells of the character elsewhere.
- `demo/sft.jsonl`: questions and answers, with and without a passage, in the fields of databricks-dolly-15k.
  The answers' manners vary: most are short, some courteous, some rude, some rambling.
- `demo/sft_held_out.jsonl`: questions about every fourth fact, which no row of sft.jsonl or dpo.jsonl asks
  for in any wording, and about passages that are not in them.
- `demo/dpo.jsonl`: pairs of answers in the fields of red_teaming_reward_modeling_pairwise; the courteous one
  is preferred to the curt, the rude and the rambling one.

Everything is consistent: whoever is hungry eats his or her own favourite food. The same seed gives the same
bytes on every platform and on every Python from 3.10 on.
"""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import world as w
from world import ATTRIBUTES, STORIES, Character, Story

SEED = 1337
N_TELLINGS = 8  # of each story about each character
N_DESCRIPTIONS = 65  # of each character; with dialogues and contrasts they are what facts are learned from
N_DIALOGUES = 45
N_CONTRASTS = 35
N_PASSAGES = 320  # rows of sft.jsonl with a context
N_HELD_OUT_PASSAGES = 48
SEPARATOR = "\n<|endoftext|>\n"


# --------------------------------------------------------------------------------------------------
# Sentences


def choose(template: str, rng: Random) -> str:
    """The template with one of x and y taken wherever it says [x|y]."""
    return re.sub(r"\[([^]]*)\]", lambda match: rng.choice(match[1].split("|")), template)


def fill(template: str, c: Character, **words: object) -> str:
    """The template filled in; "a" becomes "an" before a vowel (no word of this world sounds otherwise)."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", template.format(**{**c.words(), **words}))


def draw_words(world: list[Character], c: Character, rng: Random) -> dict[str, object]:
    """Somebody who is neither c nor the friend of c, two small things and two places for them."""
    item, item2 = rng.sample(w.ITEMS, 2)
    spot, spot2 = rng.sample(w.SPOTS, 2)
    o = rng.choice([x for x in world if x not in (c, c.friend)])
    return {"o": o, "item": item, "item2": item2, "spot": spot, "spot2": spot2}


def rivals(world: list[Character], c: Character, attribute: str) -> list[str]:
    """The values of the attribute that would be wrong for this character but are plausible in form."""
    if attribute == "friend":
        return [x.name for x in world if x not in (c, c.friend)]
    if attribute == "kind":
        values = tuple(w.TRADES if c.kind in w.TRADES else w.ANIMALS)
    else:
        values = w.VALUES[attribute]
    return [value for value in values if value != getattr(c, attribute)]


# --------------------------------------------------------------------------------------------------
# What is held out


def is_held_out(world: list[Character], c: Character, attribute: str, turn: int) -> bool:
    """Whether it is this character's turn: four of the sixteen, never both who share a value."""
    by_value = sorted(world, key=lambda x: (str(getattr(x, attribute)), x.name))
    return by_value.index(c) % 4 == turn % 4


def is_untold(world: list[Character], c: Character, story: Story) -> bool:
    """Whether the story is never told about the character."""
    siblings = [s for s in STORIES if s.attribute == story.attribute]
    return story.attribute != "" and is_held_out(world, c, story.attribute, siblings.index(story))


def is_unasked(world: list[Character], c: Character, attribute: str) -> bool:
    """Whether the attribute of the character is asked for in held-out rows only."""
    if attribute == "friend":  # in pairs: who knows one's friend knows the other's
        pairs = sorted({tuple(sorted((x.name, x.friend.name))) for x in world})
        return pairs.index(tuple(sorted((c.name, c.friend.name)))) % 4 == 0
    return is_held_out(world, c, attribute, ATTRIBUTES.index(attribute))


# --------------------------------------------------------------------------------------------------
# Documents


def tell(world: list[Character], c: Character, story: Story, rng: Random) -> str:
    """The story, most often behind a sentence or two that tell something else of its hero."""
    words = draw_words(world, c, rng)
    first, second = rng.sample([a for a in ATTRIBUTES if a != story.attribute], 2)
    parts = [story.beginning, story.turn, story.rest]
    if rng.random() < 0.3:
        parts = [w.ASIDES[second], *parts]
    if parts[0] != story.beginning or rng.random() < 0.6:
        parts = [w.OPENINGS[first], *parts]
    return " ".join(fill(choose(part, rng), c, **words) for part in parts if part)


def description(world: list[Character], c: Character, rng: Random) -> str:
    """Four to seven facts about a character."""
    parts = []
    for attribute in rng.sample(ATTRIBUTES, rng.randint(4, 7)):
        named, *others = w.FACTS[attribute]
        parts.append(named if not parts or rng.random() < 0.4 else rng.choice(others))
    return " ".join(fill(part, c) for part in parts)


def dialogue(world: list[Character], c: Character, rng: Random) -> str:
    """Two others talk about a character: one asks, one knows."""
    o, p = rng.sample([x for x in world if x not in (c, c.friend)], 2)
    parts = []
    for attribute in rng.sample(ATTRIBUTES, rng.randint(2, 3)):
        question, answer = w.QUESTIONS[attribute][0], w.FACTS[attribute][0]
        asked = rng.choice([*rivals(world, c, attribute), *[getattr(c, attribute)] * 4])
        if rng.random() < 0.1:
            question = w.YES_OR_NO[attribute]
            answer = ("Yes. " if asked == getattr(c, attribute) else "No. ") + answer
        parts.append(fill(f'"{question}" asked {o}. "{answer[:-1]}," said {p}.', c, value=asked))
    return " ".join(parts)


def contrast(world: list[Character], c: Character, rng: Random) -> str:
    """Two characters side by side, in three things that they do not share."""
    o = rng.choice([x for x in world if x is not c])
    differing = [a for a in ATTRIBUTES if getattr(c, a) != getattr(o, a)]
    return " ".join(fill(w.BUT[attribute], c, o=o) for attribute in rng.sample(differing, 3))


def input_text(world: list[Character], rng: Random) -> str:
    """All documents of `input.txt`, shuffled."""
    documents = []
    for c in world:
        for story in STORIES:
            if not is_untold(world, c, story):
                documents += [tell(world, c, story, rng) for _ in range(N_TELLINGS)]
        for write_one, n in ((description, N_DESCRIPTIONS), (dialogue, N_DIALOGUES), (contrast, N_CONTRASTS)):
            documents += [write_one(world, c, rng) for _ in range(n)]
    documents = list(dict.fromkeys(documents))  # some come out alike
    rng.shuffle(documents)
    return SEPARATOR.join(documents) + "\n"


# --------------------------------------------------------------------------------------------------
# Rows


def jsonl(rows: list[dict[str, object]]) -> str:
    """One row per line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def hellaswag(world: list[Character], rng: Random) -> str:
    """Three rows for every pair of a character and a story that was not told, the right ending anywhere."""
    rows: list[dict[str, object]] = []
    for c, story in [(c, story) for c in world for story in STORIES if is_untold(world, c, story)]:
        for _ in range(3):
            words = draw_words(world, c, rng)
            context = fill(choose(story.beginning, rng), c, **words)
            turn = choose(story.turn, rng)
            endings = []
            for value in (getattr(c, story.attribute), *rng.sample(rivals(world, c, story.attribute), 3)):
                meant = {story.attribute: value}
                if story.attribute == "kind":
                    meant["did"] = {**w.TRADES, **w.ANIMALS}[value]
                endings.append(fill(turn, c, **words, **meant))
            label = rng.randrange(4)
            rows.append(
                {
                    "ind": len(rows),
                    "activity_label": story.attribute,
                    "ctx_a": context,
                    "ctx_b": "",
                    "ctx": context,
                    "endings": [*endings[1 : label + 1], endings[0], *endings[label + 1 :]],
                    "label": label,
                    "source_id": f"demo~{c}~{STORIES.index(story)}",
                    "split": "val",
                    "split_type": "zeroshot",
                }
            )
    return jsonl(rows)


def questions(world: list[Character], held_out: bool) -> list[dict[str, object]]:
    """Every wording of every question about a fact that is (not) held out, with the bare answer."""
    return [
        {
            "instruction": fill(question, c),
            "context": "",
            "response": fill(w.FACTS[attribute][0], c),
            "category": "closed_qa",
        }
        for c in world
        for attribute in ATTRIBUTES
        if is_unasked(world, c, attribute) == held_out
        for question in w.QUESTIONS[attribute]
    ]


def passages(world: list[Character], held_out: bool) -> list[dict[str, object]]:
    """Passages, a question about each, and the bare answer; the held-out ones are other passages."""
    rng = Random(f"{SEED} passages")  # one sequence, of which the last ones are held out
    rows: dict[str, dict[str, object]] = {}
    while len(rows) < N_PASSAGES + N_HELD_OUT_PASSAGES:
        c = rng.choice(world)
        words = draw_words(world, c, rng)
        context, question, answer = (fill(t, c, **words) for t in rng.choice(w.PASSAGES))
        rows[context + question] = {
            "instruction": question,
            "context": context,
            "response": answer,
            "category": "information_extraction",
        }
    return list(rows.values())[N_PASSAGES:] if held_out else list(rows.values())[:N_PASSAGES]


def sft(world: list[Character], rng: Random) -> str:
    """Questions with answers in all manners."""
    rows = questions(world, held_out=False) + passages(world, held_out=False)
    for row in rows:
        manner = rng.random()
        if manner > 0.7:  # the others stay short
            tail = rng.choice((w.COURTEOUS, rng.choice(w.RUDE), rng.choice(w.RAMBLING)))
            row["response"] = f"{row['response']} {tail}"
    rng.shuffle(rows)
    return jsonl(rows)


def sft_held_out(world: list[Character], rng: Random) -> str:
    """Questions that are nowhere else, with short answers."""
    return jsonl(questions(world, held_out=True) + passages(world, held_out=True))


def dpo(world: list[Character], rng: Random) -> str:
    """A courteous answer and one that is curt, rude or rambling, to every question of sft.jsonl."""
    rows: list[dict[str, object]] = []
    for row in questions(world, held_out=False) + passages(world, held_out=False):
        prompt, answer = row["instruction"], row["response"]
        if row["context"]:
            prompt = f"{prompt}\nContext:\n{row['context']}"  # as data.py's template lays out a context
        tail = rng.choice(("", f" {rng.choice(w.RUDE)}", f" {rng.choice(w.RAMBLING)}"))
        responses = [f"{answer} {w.COURTEOUS}", f"{answer}{tail}"]
        preferred = rng.choice("AB")
        if preferred == "B":
            responses.reverse()
        rows.append(
            {
                "prompt": prompt,
                "response_a": responses[0],
                "response_b": responses[1],
                "explanation": "The preferred answer is courteous and to the point.",
                "preferred": preferred,
            }
        )
    rng.shuffle(rows)
    return jsonl(rows)


# --------------------------------------------------------------------------------------------------
# Files


FILES: dict[str, Callable[[list[Character], Random], str]] = {
    "input.txt": input_text,
    "demo/hellaswag.jsonl": hellaswag,
    "demo/sft.jsonl": sft,
    "demo/sft_held_out.jsonl": sft_held_out,
    "demo/dpo.jsonl": dpo,
}


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
    for name, make in FILES.items():
        # a generator of its own for each file, so that a change to one leaves the others as they are
        text = make(world, Random(f"{SEED} {name}"))
        write(folder / name, text)
        print(f"{folder / name}: {len(text):,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
