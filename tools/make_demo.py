"""Generate the demo data from a fixed seed, with the standard library only.

    python -m tools.make_demo              # into the repository
    python -m tools.make_demo /tmp/demo    # into another folder

- `input.txt`: 0.9 MB of short stories, descriptions, dialogues and comparisons about the sixteen characters of
  `world.py`. A line with only `<|endoftext|>` separates the documents.
- `demo/hellaswag.jsonl`: beginnings of stories with four endings each, in HellaSwag's format. One in four pairs of a
  character and a story is held out: `input.txt` never tells this story about this character. The correct ending
  follows from what `input.txt` tells about the character elsewhere.
- `demo/sft.jsonl`: questions and answers, with and without a passage, in the format of databricks-dolly-15k. Most
  answers are short; the others end with a polite, rude or rambling sentence.
- `demo/sft_held_out.jsonl`: questions about one fact in four and about passages. Neither sft.jsonl nor dpo.jsonl
  contains these facts or passages.
- `demo/dpo.jsonl`: pairs of answers in the format of red_teaming_reward_modeling_pairwise. The polite answer is
  preferred to one that is short, rude or rambling.

The files are consistent: a hungry character always eats its own favourite food. The same seed gives the same bytes on
every platform and in every Python from 3.10 on.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

from neogpt import files
from tools import world

SEED = 1337
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


def draw_words(characters: list[world.Character], c: world.Character, rng: Random) -> dict[str, object]:
    """Two small objects, two places, and another character who is not the friend of c."""
    item, item2 = rng.sample(world.ITEMS, 2)
    spot, spot2 = rng.sample(world.SPOTS, 2)
    o = rng.choice([x for x in characters if x not in (c, c.friend)])
    return {"o": o, "item": item, "item2": item2, "spot": spot, "spot2": spot2}


def wrong_values(characters: list[world.Character], c: world.Character, attribute: str) -> list[str]:
    """The values of the attribute that are plausible for c but wrong."""
    if attribute == "friend":
        return [x.name for x in characters if x not in (c, c.friend)]
    if attribute == "kind":
        values = tuple(world.TRADES if c.kind in world.TRADES else world.ANIMALS)
    else:
        values = world.VALUES[attribute]
    return [value for value in values if value != getattr(c, attribute)]


def in_fold(characters: list[world.Character], c: world.Character, attribute: str, fold: int) -> bool:
    """Whether c is in this fold of four. Two characters with the same value are in different folds."""
    by_value = sorted(characters, key=lambda x: (str(getattr(x, attribute)), x.name))
    return by_value.index(c) % 4 == fold % 4


def is_story_held_out(characters: list[world.Character], c: world.Character, story: world.Story) -> bool:
    """Whether `input.txt` never tells this story about c."""
    same_attribute = [s for s in world.STORIES if s.attribute == story.attribute]
    return story.attribute != "" and in_fold(characters, c, story.attribute, same_attribute.index(story))


def is_fact_held_out(characters: list[world.Character], c: world.Character, attribute: str) -> bool:
    """Whether only sft_held_out.jsonl asks for this attribute of c."""
    if attribute == "friend":  # friendship is mutual, so both friends are held out together
        pairs = sorted({tuple(sorted((x.name, x.friend.name))) for x in characters})
        return pairs.index(tuple(sorted((c.name, c.friend.name)))) % 4 == 0
    return in_fold(characters, c, attribute, world.ATTRIBUTES.index(attribute))


def tell(characters: list[world.Character], c: world.Character, story: world.Story, rng: Random) -> str:
    """The story, usually after one or two sentences with other facts about c."""
    words = draw_words(characters, c, rng)
    first, second = rng.sample([a for a in world.ATTRIBUTES if a != story.attribute], 2)
    parts = [story.beginning, story.turn, story.rest]
    if rng.random() < 0.3:
        parts = [world.ASIDES[second], *parts]
    if parts[0] != story.beginning or rng.random() < 0.6:
        parts = [world.OPENINGS[first], *parts]
    return " ".join(fill(choose(part, rng), c, **words) for part in parts if part)


def description(characters: list[world.Character], c: world.Character, rng: Random) -> str:
    """Four to seven facts about c."""
    parts = []
    for attribute in rng.sample(world.ATTRIBUTES, rng.randint(4, 7)):
        named, *others = world.FACTS[attribute]
        parts.append(named if not parts or rng.random() < 0.4 else rng.choice(others))
    return " ".join(fill(part, c) for part in parts)


def dialogue(characters: list[world.Character], c: world.Character, rng: Random) -> str:
    """Two other characters talk about c: one asks, the other answers."""
    o, p = rng.sample([x for x in characters if x not in (c, c.friend)], 2)
    parts = []
    for attribute in rng.sample(world.ATTRIBUTES, rng.randint(2, 3)):
        question, answer = world.QUESTIONS[attribute][0], world.FACTS[attribute][0]
        value = rng.choice([*wrong_values(characters, c, attribute), *[getattr(c, attribute)] * 4])
        if rng.random() < 0.1:
            question = world.YES_OR_NO[attribute]
            answer = ("Yes. " if value == getattr(c, attribute) else "No. ") + answer
        parts.append(fill(f'"{question}" asked {o}. "{answer[:-1]}," said {p}.', c, value=value))
    return " ".join(parts)


def comparison(characters: list[world.Character], c: world.Character, rng: Random) -> str:
    """Three differences between c and another character."""
    o = rng.choice([x for x in characters if x is not c])
    differing = [a for a in world.ATTRIBUTES if getattr(c, a) != getattr(o, a)]
    return " ".join(fill(world.BUT[attribute], c, o=o) for attribute in rng.sample(differing, 3))


def input_text(characters: list[world.Character], rng: Random) -> str:
    """All documents of `input.txt`, shuffled."""
    documents = []
    for c in characters:
        for story in world.STORIES:
            if not is_story_held_out(characters, c, story):
                documents += [tell(characters, c, story, rng) for _ in range(N_VERSIONS)]
        for write, n in ((description, N_DESCRIPTIONS), (dialogue, N_DIALOGUES), (comparison, N_COMPARISONS)):
            documents += [write(characters, c, rng) for _ in range(n)]
    documents = list(dict.fromkeys(documents))  # without duplicates
    rng.shuffle(documents)
    return SEPARATOR.join(documents) + "\n"


def jsonl(rows: list[Row]) -> str:
    """One row per line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def hellaswag(characters: list[world.Character], rng: Random) -> str:
    """Three questions for every held-out pair of a character and a story."""
    rows: list[Row] = []
    for c, story in [(c, s) for c in characters for s in world.STORIES if is_story_held_out(characters, c, s)]:
        for _ in range(3):
            words = draw_words(characters, c, rng)
            context = fill(choose(story.beginning, rng), c, **words)
            turn = choose(story.turn, rng)
            endings = []
            wrong = rng.sample(wrong_values(characters, c, story.attribute), 3)
            for value in (getattr(c, story.attribute), *wrong):
                changed = {story.attribute: value}
                if story.attribute == "kind":
                    changed["did"] = (world.TRADES | world.ANIMALS)[value]
                endings.append(fill(turn, c, **words, **changed))
            label = rng.randrange(4)
            row = {"ind": len(rows), "activity_label": story.attribute, "ctx_a": context, "ctx_b": "", "ctx": context}
            row |= {"endings": [*endings[1 : label + 1], endings[0], *endings[label + 1 :]], "label": label}
            source_id = f"demo~{c}~{world.STORIES.index(story)}"
            rows.append(row | {"source_id": source_id, "split": "val", "split_type": "zeroshot"})
    return jsonl(rows)


def questions(characters: list[world.Character], held_out: bool) -> list[Row]:
    """Every wording of every question about the facts that are (or are not) held out, with the short answer."""
    return [
        dict(instruction=fill(question, c), context="", response=fill(answers[0], c), category="closed_qa")
        for c in characters
        for attribute, answers in world.FACTS.items()
        if is_fact_held_out(characters, c, attribute) == held_out
        for question in world.QUESTIONS[attribute]
    ]


def passages(characters: list[world.Character], held_out: bool) -> list[Row]:
    """Questions about a passage, with the short answer."""
    rng = Random(f"{SEED} passages")  # both calls draw the same passages; the last ones are held out
    rows: dict[str, Row] = {}
    while len(rows) < N_PASSAGES + N_HELD_OUT_PASSAGES:
        c = rng.choice(characters)
        words = draw_words(characters, c, rng)
        context, question, answer = (fill(t, c, **words) for t in rng.choice(world.PASSAGES))
        row = dict(instruction=question, context=context, response=answer, category="information_extraction")
        rows[context + question] = row
    return list(rows.values())[N_PASSAGES:] if held_out else list(rows.values())[:N_PASSAGES]


def sft(characters: list[world.Character], rng: Random) -> str:
    """Questions with answers; three answers in ten have an additional sentence."""
    rows = questions(characters, held_out=False) + passages(characters, held_out=False)
    for row in rows:
        if rng.random() > 0.7:
            addition = rng.choice((world.POLITE, rng.choice(world.RUDE), rng.choice(world.RAMBLING)))
            row["response"] = f"{row['response']} {addition}"
    rng.shuffle(rows)
    return jsonl(rows)


def sft_held_out(characters: list[world.Character], rng: Random) -> str:
    """Held-out questions with short answers."""
    return jsonl(questions(characters, held_out=True) + passages(characters, held_out=True))


def dpo(characters: list[world.Character], rng: Random) -> str:
    """A polite answer and a short, rude or rambling answer to every question of sft.jsonl."""
    rows: list[Row] = []
    for row in questions(characters, held_out=False) + passages(characters, held_out=False):
        prompt, answer = row["instruction"], row["response"]
        if row["context"]:
            prompt = f"{prompt}\nContext:\n{row['context']}"  # as in chat.prompt_text
        addition = rng.choice(("", f" {rng.choice(world.RUDE)}", f" {rng.choice(world.RAMBLING)}"))
        responses = [f"{answer} {world.POLITE}", f"{answer}{addition}"]
        preferred = rng.choice("AB")
        if preferred == "B":
            responses.reverse()
        explanation = "The preferred answer is courteous and to the point."
        row = dict(prompt=prompt, response_a=responses[0], response_b=responses[1])
        rows.append(row | dict(explanation=explanation, preferred=preferred))
    rng.shuffle(rows)
    return jsonl(rows)


FILES: dict[str, Callable[[list[world.Character], Random], str]] = {
    "input.txt": input_text,
    "demo/hellaswag.jsonl": hellaswag,
    "demo/sft.jsonl": sft,
    "demo/sft_held_out.jsonl": sft_held_out,
    "demo/dpo.jsonl": dpo,
}


def main(folder: Path) -> None:
    """Write all files of the demo into the folder."""
    characters = world.make_world(SEED)
    for name, make in FILES.items():
        text = make(characters, Random(f"{SEED} {name}"))  # a change of one file does not change the others
        files.make_folder((folder / name).parent)
        with files.atomic_write(folder / name) as temporary:
            temporary.write_bytes(text.encode("ascii"))
        print(f"{folder / name}: {len(text):,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
