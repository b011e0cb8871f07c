"""Generate the demo data from a fixed seed: the same bytes on every platform and in every Python from 3.11 on.

    python -m tools.make_demo [folder]    # default: the repository

Writes `input.txt`, 0.9 MB of short texts about the sixteen characters of `world.py`, and the folder `demo` with rows
for every later stage. One in four pairs of a character and a story with an attribute is held out for hellaswag.jsonl:
`input.txt` never tells this story about this character, but other texts state the fact that the ending needs. One fact
in four and some passages are held out for sft_held_out.jsonl. The formats are those of HellaSwag, databricks-dolly-15k
and, for dpo.jsonl, red_teaming_reward_modeling_pairwise.
"""

import itertools
import json
import re
import sys
from pathlib import Path
from random import Random

from tools import world
from tools.world import Character, Story

SEED = 1337  # every file has its own generator, so a change to one file does not affect the others
N_PASSAGES, N_HELD_OUT_PASSAGES = 320, 48  # rows of sft.jsonl and of sft_held_out.jsonl with a passage
N_TWO_STEPS, N_HELD_OUT_TWO_STEPS = 480, 96  # rows of grpo.jsonl and of grpo_held_out.jsonl


def choose(template: str, rng: Random) -> str:
    """The template with every [x|y] replaced by x or y."""
    return re.sub(r"\[([^]]*)\]", lambda match: rng.choice(match[1].split("|")), template)


def fill(template: str, c: Character, **words: object) -> str:
    """The template with its fields filled in, and with "an" instead of "a" before a vowel."""
    text = template.format(c=c, did=world.DID[c.kind], **vars(c), **world.PRONOUNS[c.pronoun], **words)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def strangers(c: Character) -> list[Character]:
    """All characters except c and the best friend of c."""
    return [x for x in world.CHARACTERS if x not in (c, c.friend)]


def draw_words(c: Character, rng: Random) -> dict[str, object]:
    """Two small objects, two places, and another character who is not the friend of c."""
    item, item2 = rng.sample(world.ITEMS, 2)
    spot, spot2 = rng.sample(world.SPOTS, 2)
    return dict(o=rng.choice(strangers(c)), item=item, item2=item2, spot=spot, spot2=spot2)


def wrong_values(c: Character, attribute: str) -> list[object]:
    """The values of the attribute that are plausible for c but wrong."""
    if attribute == "friend":
        return strangers(c)
    similar = [x for x in world.CHARACTERS if attribute != "kind" or (x in world.PEOPLE) == (c in world.PEOPLE)]
    return sorted({getattr(x, attribute) for x in similar} - {getattr(c, attribute)})


def in_fold(c: Character, attribute: str, fold: int) -> bool:
    """Whether c is in this fold of four. Two characters with the same value are in different folds."""
    by_value = sorted(world.CHARACTERS, key=lambda x: (str(getattr(x, attribute)), x.name))
    return by_value.index(c) % 4 == fold % 4


def is_story_held_out(c: Character, story: Story) -> bool:
    """Whether `input.txt` never tells this story about c."""
    same_attribute = [s for s in world.STORIES if s.attribute == story.attribute]
    return story.attribute != "" and in_fold(c, story.attribute, same_attribute.index(story))


def is_fact_held_out(c: Character, attribute: str) -> bool:
    """Whether the questions for this attribute of c are in sft_held_out.jsonl, and not in sft.jsonl and dpo.jsonl."""
    if attribute == "friend":  # mutual, so both friends are held out together: two of the eight pairs
        return any(x.name in ("Ada", "Ella") for x in (c, c.friend))
    return in_fold(c, attribute, world.ATTRIBUTES.index(attribute))


def tell(c: Character, story: Story, rng: Random) -> str:
    """The story, usually after one or two sentences with other facts about c."""
    words = draw_words(c, rng)
    first, second = rng.sample([a for a in world.ATTRIBUTES if a != story.attribute], 2)
    text = story.text.replace(" > ", " ")
    if rng.random() < 0.3:
        text = f"{world.PAST[first][0]} {world.PAST[second][1]} {text}"
    elif rng.random() < 0.6:
        text = f"{world.PAST[first][0]} {text}"
    return fill(choose(text, rng), c, **words)


def description(c: Character, rng: Random) -> str:
    """Four to seven facts about c."""
    parts = []
    for attribute in rng.sample(world.ATTRIBUTES, rng.randint(4, 7)):
        named, *others = world.FACTS[attribute]
        parts.append(named if not parts or rng.random() < 0.4 else rng.choice(others))
    return fill(" ".join(parts), c)


def dialogue(c: Character, rng: Random) -> str:
    """Two other characters talk about c: one asks, the other answers."""
    o, p = rng.sample(strangers(c), 2)
    parts = []
    for attribute in rng.sample(world.ATTRIBUTES, rng.randint(2, 3)):
        question, yes_or_no = world.QUESTIONS[attribute]
        answer, truth = world.FACTS[attribute][0], getattr(c, attribute)
        value = rng.choice([*wrong_values(c, attribute), *[truth] * 4])
        if rng.random() < 0.1:
            question, answer = yes_or_no, f"{'Yes' if value == truth else 'No'}. {answer}"
        parts.append(fill(f'"{question}" asked {o}. "{answer[:-1]}," said {p}.', c, value=value))
    return " ".join(parts)


def comparison(c: Character, rng: Random) -> str:
    """Three differences between c and another character."""
    o = rng.choice([x for x in world.CHARACTERS if x is not c])
    differing = [a for a in world.ATTRIBUTES if getattr(c, a) != getattr(o, a)]
    facts = [world.FACTS[attribute][0] for attribute in rng.sample(differing, 3)]
    return " ".join(f"{fill(fact, c)[:-1]}, but {fill(fact, o)}" for fact in facts)


def input_text() -> str:
    """All documents of `input.txt`, shuffled."""
    rng = Random(f"{SEED} input.txt")
    documents = []
    for c in world.CHARACTERS:
        told = [story for story in world.STORIES if not is_story_held_out(c, story)]
        documents += [tell(c, story, rng) for story in told for _ in range(8)]
        documents += [description(c, rng) for _ in range(65)]  # descriptions, dialogues and comparisons teach facts
        documents += [dialogue(c, rng) for _ in range(45)]
        documents += [comparison(c, rng) for _ in range(35)]
    documents = list(dict.fromkeys(documents))  # without duplicates
    rng.shuffle(documents)
    return "\n<|endoftext|>\n".join(documents) + "\n"


def hellaswag() -> list[dict]:
    """Three questions for every held-out pair of a character and a story."""
    rng = Random(f"{SEED} demo/hellaswag.jsonl")
    rows = []
    pairs = [(c, s) for c in world.CHARACTERS for s in world.STORIES for _ in range(3) if is_story_held_out(c, s)]
    for c, story in pairs:
        words = draw_words(c, rng)
        beginning, turn, _ = story.text.split(" > ")
        context, turn = fill(choose(beginning, rng), c, **words), choose(turn, rng)
        values = rng.sample(wrong_values(c, story.attribute), 3)
        label = rng.randrange(4)
        values.insert(label, getattr(c, story.attribute))
        variants = [Character(**vars(c) | {story.attribute: value}) for value in values]
        endings = [fill(turn, variant, **words) for variant in variants]
        row = dict(ind=len(rows), activity_label=story.attribute, ctx_a=context, ctx_b="", ctx=context)
        source_id = f"demo~{c}~{world.STORIES.index(story)}"
        rows.append(row | dict(endings=endings, label=label, source_id=source_id, split="val", split_type="zeroshot"))
    return rows


def questions() -> tuple[list[dict], list[dict]]:
    """Questions about facts and passages with short answers: the rows to train on and the held-out rows."""
    train, held_out = [], []
    for c, attribute in itertools.product(world.CHARACTERS, world.ATTRIBUTES):
        answer = fill(world.FACTS[attribute][0], c)
        rows = held_out if is_fact_held_out(c, attribute) else train
        for question in (world.QUESTIONS[attribute][0], *world.REWORDINGS[attribute]):
            rows.append(dict(instruction=fill(question, c), context="", response=answer, category="closed_qa"))
    rng = Random(f"{SEED} passages")
    passages = {}
    while len(passages) < N_PASSAGES + N_HELD_OUT_PASSAGES:
        c = rng.choice(world.CHARACTERS)
        words = draw_words(c, rng)
        context, question, answer = (fill(t, c, **words) for t in rng.choice(world.PASSAGES))
        row = dict(instruction=question, context=context, response=answer, category="information_extraction")
        passages[context + question] = row
    rows = list(passages.values())
    return train + rows[:N_PASSAGES], held_out + rows[N_PASSAGES:]


def sft(train: list[dict]) -> list[dict]:
    """The questions with their answers. Three answers in ten end with a polite, rude or rambling sentence."""
    rng = Random(f"{SEED} demo/sft.jsonl")
    rows = [row.copy() for row in train]
    for row in rows:
        if rng.random() > 0.7:
            row["response"] += " " + rng.choice((world.POLITE, rng.choice(world.RUDE), rng.choice(world.RAMBLING)))
    rng.shuffle(rows)
    return rows


def dpo(train: list[dict]) -> list[dict]:
    """For each question, a polite answer and a short, rude or rambling one. The polite answer is preferred."""
    rng = Random(f"{SEED} demo/dpo.jsonl")
    rows = []
    for row in train:
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


def two_steps() -> list[dict]:
    """Questions about different passages of two events, with their answers."""
    rng = Random(f"{SEED} demo/grpo.jsonl")
    rows = {}
    while len(rows) < N_TWO_STEPS + N_HELD_OUT_TWO_STEPS:
        c = rng.choice(world.CHARACTERS)
        words = draw_words(c, rng)
        words["spot3"] = rng.choice([spot for spot in world.SPOTS if spot not in (words["spot"], words["spot2"])])
        template, passages = list(world.TWO_STEPS.items())[len(rows) % 2]
        question, context, answer = (fill(t, c, **words) for t in (template, *passages[len(rows) // 2 % 2]))
        rows[context] = dict(instruction=question, context=context, response=answer, category="reasoning")
    return list(rows.values())


def main(folder: Path) -> None:
    """Write all files of the demo into the folder."""
    train, held_out = questions()
    rows = two_steps()
    demo = {"hellaswag": hellaswag(), "sft": sft(train), "sft_held_out": held_out, "dpo": dpo(train)}
    demo |= {"grpo": rows[:N_TWO_STEPS], "grpo_held_out": rows[N_TWO_STEPS:]}
    texts = {f"demo/{name}.jsonl": "".join(json.dumps(row) + "\n" for row in rows) for name, rows in demo.items()}
    (folder / "demo").mkdir(parents=True, exist_ok=True)
    for name, text in {"input.txt": input_text(), **texts}.items():
        (folder / name).write_bytes(text.encode("ascii"))
        print(f"{folder / name}: {len(text):,} bytes")


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
