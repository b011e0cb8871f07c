"""Generate the demo data from a fixed seed, with the standard library only.

    python -m tools.make_demo              # into the repository
    python -m tools.make_demo /tmp/demo    # into another folder

Writes `input.txt`, 0.9 MB of short texts about the sixteen characters of `world.py`, and in the folder `demo`:

- `hellaswag.jsonl`: beginnings of stories with four endings each. One in four pairs of a character and a story is held
  out: `input.txt` never tells this story about this character, but it states elsewhere what decides the ending.
- `sft.jsonl`: questions and answers, with and without a passage, in the format of databricks-dolly-15k.
- `sft_held_out.jsonl`: questions about one fact in four and about passages that are in neither sft.jsonl nor dpo.jsonl.
- `dpo.jsonl`: pairs of answers in the format of red_teaming_reward_modeling_pairwise.

The same seed gives the same bytes on every platform and in every Python from 3.10 on.
"""

import itertools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

from neogpt import files
from tools import world

N_VERSIONS = 8  # of every story about every character
N_DESCRIPTIONS = 65  # per character; the model learns facts from descriptions, dialogues and comparisons
N_DIALOGUES = 45  # per character
N_COMPARISONS = 35  # per character
N_PASSAGES = 320  # rows of sft.jsonl with a passage
N_HELD_OUT_PASSAGES = 48
SEPARATOR = "\n<|endoftext|>\n"

Row = dict[str, object]  # of a .jsonl file


def choose(template: str, rng: Random) -> str:
    """The template with every [x|y] replaced by x or y."""
    return re.sub(r"\[([^]]*)\]", lambda match: rng.choice(match[1].split("|")), template)


def fill(template: str, c: world.Character, **words: object) -> str:
    """The template with its fields filled in, and with "an" instead of "a" before a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", template.format(**{**c.words(), **words}))


def draw_words(c: world.Character, rng: Random) -> dict[str, object]:
    """Two small objects, two places, and another character who is not the friend of c."""
    item, item2 = rng.sample(world.ITEMS, 2)
    spot, spot2 = rng.sample(world.SPOTS, 2)
    o = rng.choice([x for x in world.CHARACTERS if x not in (c, c.friend)])
    return {"o": o, "item": item, "item2": item2, "spot": spot, "spot2": spot2}


def wrong_values(c: world.Character, attribute: str) -> list[str]:
    """The values of the attribute that are plausible for c but wrong."""
    if attribute == "friend":
        return [x.name for x in world.CHARACTERS if x not in (c, c.friend)]
    kinds = world.TRADES if c.kind in world.TRADES else world.ANIMALS
    values = kinds if attribute == "kind" else world.VALUES[attribute]
    return [value for value in values if value != getattr(c, attribute)]


def in_fold(c: world.Character, attribute: str, fold: int) -> bool:
    """Whether c is in this fold of four. Two characters with the same value are in different folds."""
    by_value = sorted(world.CHARACTERS, key=lambda x: (str(getattr(x, attribute)), x.name))
    return by_value.index(c) % 4 == fold % 4


def is_story_held_out(c: world.Character, story: world.Story) -> bool:
    """Whether `input.txt` never tells this story about c."""
    same_attribute = [s for s in world.STORIES if s.attribute == story.attribute]
    return story.attribute != "" and in_fold(c, story.attribute, same_attribute.index(story))


def is_fact_held_out(c: world.Character, attribute: str) -> bool:
    """Whether only sft_held_out.jsonl asks for this attribute of c."""
    if attribute == "friend":  # friendship is mutual, so both friends are held out together
        pairs = sorted({min(x.name, x.friend.name) for x in world.CHARACTERS})  # named by one of the friends
        return pairs.index(min(c.name, c.friend.name)) % 4 == 0
    return in_fold(c, attribute, world.ATTRIBUTES.index(attribute))


def tell(c: world.Character, story: world.Story, rng: Random) -> str:
    """The story, usually after one or two sentences with other facts about c."""
    words = draw_words(c, rng)
    first, second = rng.sample([a for a in world.ATTRIBUTES if a != story.attribute], 2)
    parts = [story.beginning, story.turn, story.rest]
    if rng.random() < 0.3:
        parts = [world.PAST[first][0], world.PAST[second][1], *parts]
    elif rng.random() < 0.6:
        parts = [world.PAST[first][0], *parts]
    return " ".join(fill(choose(part, rng), c, **words) for part in parts if part)


def description(c: world.Character, rng: Random) -> str:
    """Four to seven facts about c."""
    parts = []
    for attribute in rng.sample(world.ATTRIBUTES, rng.randint(4, 7)):
        named, *others = world.FACTS[attribute]
        parts.append(named if not parts or rng.random() < 0.4 else rng.choice(others))
    return " ".join(fill(part, c) for part in parts)


def dialogue(c: world.Character, rng: Random) -> str:
    """Two other characters talk about c: one asks, the other answers."""
    o, p = rng.sample([x for x in world.CHARACTERS if x not in (c, c.friend)], 2)
    parts = []
    for attribute in rng.sample(world.ATTRIBUTES, rng.randint(2, 3)):
        question, answer = world.QUESTIONS[attribute][0], world.FACTS[attribute][0]
        value = rng.choice([*wrong_values(c, attribute), *[getattr(c, attribute)] * 4])
        if rng.random() < 0.1:
            question = world.YES_OR_NO[attribute]
            answer = ("Yes. " if value == getattr(c, attribute) else "No. ") + answer
        parts.append(fill(f'"{question}" asked {o}. "{answer[:-1]}," said {p}.', c, value=value))
    return " ".join(parts)


def comparison(c: world.Character, rng: Random) -> str:
    """Three differences between c and another character."""
    o = rng.choice([x for x in world.CHARACTERS if x is not c])
    differing = [a for a in world.ATTRIBUTES if getattr(c, a) != getattr(o, a)]
    facts = [world.FACTS[attribute][0] for attribute in rng.sample(differing, 3)]
    return " ".join(f"{fill(fact, c)[:-1]}, but {fill(fact, o)}" for fact in facts)


def input_text(rng: Random) -> str:
    """All documents of `input.txt`, shuffled."""
    documents = []
    for c in world.CHARACTERS:
        for story in world.STORIES:
            if not is_story_held_out(c, story):
                documents += [tell(c, story, rng) for _ in range(N_VERSIONS)]
        for write, n in ((description, N_DESCRIPTIONS), (dialogue, N_DIALOGUES), (comparison, N_COMPARISONS)):
            documents += [write(c, rng) for _ in range(n)]
    documents = list(dict.fromkeys(documents))  # without duplicates
    rng.shuffle(documents)
    return SEPARATOR.join(documents) + "\n"


def hellaswag(rng: Random) -> list[Row]:
    """Three questions for every held-out pair of a character and a story."""
    rows: list[Row] = []
    for c, story, _ in itertools.product(world.CHARACTERS, world.STORIES, range(3)):
        if is_story_held_out(c, story):
            words = draw_words(c, rng)
            context = fill(choose(story.beginning, rng), c, **words)
            turn = choose(story.turn, rng)
            values = rng.sample(wrong_values(c, story.attribute), 3)
            label = rng.randrange(4)
            values.insert(label, getattr(c, story.attribute))
            # the values can be kinds, which determine `did`
            changes = [{story.attribute: value, "did": world.DID.get(value, c.did)} for value in values]
            endings = [fill(turn, c, **words, **changed) for changed in changes]
            row = dict(ind=len(rows), activity_label=story.attribute, ctx_a=context, ctx_b="", ctx=context)
            source_id = f"demo~{c}~{world.STORIES.index(story)}"
            row |= dict(endings=endings, label=label, source_id=source_id, split="val", split_type="zeroshot")
            rows.append(row)
    return rows


def questions(held_out: bool) -> list[Row]:
    """Questions with short answers: every wording about every fact that is (or is not) held out, and about passages."""
    rows: list[Row] = []
    for c, attribute in itertools.product(world.CHARACTERS, world.ATTRIBUTES):
        if is_fact_held_out(c, attribute) == held_out:
            answer = fill(world.FACTS[attribute][0], c)
            for question in world.QUESTIONS[attribute]:
                row = dict(instruction=fill(question, c), context="", response=answer, category="closed_qa")
                rows.append(row)
    rng = Random(f"{world.SEED} passages")  # both calls draw the same passages; the last ones are held out
    passages: dict[str, Row] = {}
    while len(passages) < N_PASSAGES + N_HELD_OUT_PASSAGES:
        c = rng.choice(world.CHARACTERS)
        words = draw_words(c, rng)
        context, question, answer = (fill(t, c, **words) for t in rng.choice(world.PASSAGES))
        row = dict(instruction=question, context=context, response=answer, category="information_extraction")
        passages[context + question] = row
    return rows + list(passages.values())[slice(N_PASSAGES, None) if held_out else slice(N_PASSAGES)]


def sft(rng: Random) -> list[Row]:
    """Questions with answers; three answers in ten have an additional polite, rude or rambling sentence."""
    rows = questions(held_out=False)
    for row in rows:
        if rng.random() > 0.7:
            addition = rng.choice((world.POLITE, rng.choice(world.RUDE), rng.choice(world.RAMBLING)))
            row["response"] = f"{row['response']} {addition}"
    rng.shuffle(rows)
    return rows


def dpo(rng: Random) -> list[Row]:
    """To every question of sft.jsonl a polite answer, which is preferred, and a short, rude or rambling answer."""
    rows: list[Row] = []
    for row in questions(held_out=False):
        prompt, answer = row["instruction"], row["response"]
        if row["context"]:
            prompt = f"{prompt}\nContext:\n{row['context']}"  # as in chat.prompt_text
        addition = rng.choice(("", f" {rng.choice(world.RUDE)}", f" {rng.choice(world.RAMBLING)}"))
        polite, other, preferred = f"{answer} {world.POLITE}", f"{answer}{addition}", rng.choice("AB")
        a, b = (polite, other) if preferred == "A" else (other, polite)
        explanation = "The preferred answer is courteous and to the point."
        rows.append(dict(prompt=prompt, response_a=a, response_b=b, explanation=explanation, preferred=preferred))
    rng.shuffle(rows)
    return rows


FILES: dict[str, Callable[[Random], str | list[Row]]] = {
    "input.txt": input_text,
    "demo/hellaswag.jsonl": hellaswag,
    "demo/sft.jsonl": sft,
    "demo/sft_held_out.jsonl": lambda rng: questions(held_out=True),
    "demo/dpo.jsonl": dpo,
}


def main(folder: Path) -> None:
    """Write all files of the demo into the folder."""
    for name, make in FILES.items():
        content = make(Random(f"{world.SEED} {name}"))  # a change of one file does not change the others
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        files.make_folder((folder / name).parent)
        with files.atomic_write(folder / name) as temporary:
            temporary.write_bytes(text.encode("ascii"))
        print(f"{folder / name}: {len(text):,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
