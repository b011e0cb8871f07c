"""The world of the demo: sixteen people and animals, facts about them, and stories in which they appear.

`make_demo.py` turns these words and templates into text. In a template, `{c}` is the main character and `{o}` another
one; `{he}`, `{his}`, `{him}`, `{He}`, `{His}` are the pronouns of `{c}`; `{home}` is the home of `{c}` and `{o.home}`
that of `{o}`, likewise for the other attributes; `{item}` and `{item2}` are small objects, `{spot}` and `{spot2}` are
places for them; `[x|y]` is a random choice.

A value of an attribute appears only where it states a fact, so every mention is true. The values of an attribute start
with different letters, and so do all names: a model that reads bytes can distinguish them by the first byte.
"""

import re
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

SEED = 1337
ATTRIBUTES = ("kind", "home", "food", "thing", "colour", "fear", "friend")

WOMEN = ("Ada", "Cora", "Ella", "Greta")
MEN = ("Ben", "Dan", "Finn", "Hugo")
SHE_ANIMALS = ("Ivy", "Kira", "Mona", "Rosa")
HE_ANIMALS = ("Jasper", "Leo", "Otto", "Sam")

# kind of a character -> what it does all day
TRADES = {
    "baker": "baked bread",
    "doctor": "looked after the sick",
    "farmer": "worked in the field",
    "sailor": "mended the sails",
}
ANIMALS = {
    "cat": "slept in the sun",
    "fox": "ran through the woods",
    "goat": "climbed the rocks",
    "rabbit": "dug holes",
}
DID = TRADES | ANIMALS
VALUES = {  # each value belongs to two characters
    "home": ("barn", "castle", "greenhouse", "inn", "lighthouse", "mill", "school", "tower"),
    "food": ("apples", "cheese", "fish", "honey", "noodles", "pancakes", "rice", "soup"),
    "thing": ("bell", "drum", "flute", "kite", "lamp", "map", "rope", "wagon"),
    "colour": ("blue", "green", "orange", "pink", "red", "violet", "white", "yellow"),
    "fear": ("bees", "deep water", "geese", "loud noises", "owls", "spiders", "thunder", "wolves"),
}
ITEMS = ("cup", "egg", "glove", "hat", "jug", "nut", "pen", "spoon")
SPOTS = ("at the gate", "behind the door", "in the garden", "near the well", "on the table", "under the bed")


@dataclass(eq=False)
class Character:
    """A person or an animal. `did` is what this kind does all day. Friendship is mutual."""

    name: str
    female: bool
    kind: str
    did: str
    home: str
    food: str
    thing: str
    colour: str
    fear: str
    friend: "Character | None" = None  # set by make_characters

    def __str__(self) -> str:
        return self.name

    def words(self) -> dict[str, object]:
        """The fields of templates about this character."""
        he, his, him = ("she", "her", "her") if self.female else ("he", "his", "him")
        pronouns = {"he": he, "his": his, "him": him, "He": he.capitalize(), "His": his.capitalize()}
        return {"c": self, "did": self.did, **pronouns, **{a: getattr(self, a) for a in ATTRIBUTES}}


def make_characters() -> list[Character]:
    """The characters. Each value belongs to two of them. The best friend of a person is an animal."""
    rng = Random(SEED)

    def two_of_each(values: tuple[str, ...]) -> list[str]:
        both = [*values, *values]
        rng.shuffle(both)
        return both

    kinds = two_of_each(tuple(TRADES)) + two_of_each(tuple(ANIMALS))
    values = {attribute: two_of_each(VALUES[attribute]) for attribute in VALUES}
    characters = []
    for i, name in enumerate((*WOMEN, *MEN, *SHE_ANIMALS, *HE_ANIMALS)):
        own = {attribute: values[attribute][i] for attribute in VALUES}
        characters.append(Character(name, name in WOMEN + SHE_ANIMALS, kinds[i], DID[kinds[i]], **own))
    friends = characters[8:]
    rng.shuffle(friends)
    for c, friend in zip(characters, friends):
        c.friend, friend.friend = friend, c
    return characters


CHARACTERS = make_characters()

# Stories, as "attribute: beginning > turn and rest". The turn, the sentence after ">", follows from the attribute and
# cannot be predicted from the beginning. Stories without an attribute have no turn.
STORIES_TEXT = """
food: {c} came home [late|tired] and was [very|so] hungry. {He} sat down at the table. > {c} ate a [big|whole] plate of
  {food}. After that {he} felt [much better|happy], [and soon {he} was asleep|and {he} went to bed early].
food: It was {c}'s birthday. {friend} wanted to cook what {c} liked best. > So {friend} made {food} for {c}. "Thank you,
  {friend}!" said {c}. {He} ate it all up, and then they [sang and danced|sang a song].
food: {c} went to the market with [one coin|two coins]. {He} wanted [something good to eat|to buy something to eat]. >
  So {c} bought some {food}. On the way home {he} met {o}. {c} gave some of the {food} to {o}, and they sat under a tree
  and ate.
home: {c} was far from home when it began to rain. Soon {he} was wet and cold. > {c} ran back to the {home}. There {he}
  [made a fire|lit the fire], [dried {his} {colour} coat|took off the wet {colour} coat], and was warm again.
home: {c} met {o} on the road. "Where do you live?" asked {o}. > "I live in the {home}," said {c}. The next day {o} came
  to the {home} with some {o.food}, and they [had a good time|talked all day].
home: All day long {c} {did}. In the evening {he} was very tired. > {c} went home to the {home}. {He} [ate some
  {food}|had some {food}] and [fell asleep|went to bed].
thing: It rained all day, and {c} had nothing to do. {He} looked for something to play with. > {c} found {his} {thing}.
  Then {friend} came, and they played with the {thing} until the rain [stopped|was over].
thing: {c} was [very sad|crying]. "What is the matter?" asked {o}. > {c} had lost {his} {thing}. They looked {spot} and
  {spot2}. At last {o} found the {thing}. "Thank you!" said {c}, and {he} was happy again.
thing: There was a fair in the village. {friend} told {c} to bring something to show. > So {c} brought {his} {thing}.
  Everybody [liked|loved] the {thing}, and {c} won [the first prize|a prize].
colour: It was a cold [morning|day], and there was snow on the ground. {c} wanted to go out. > {c} put on {his} {colour}
  coat. Then {he} and {friend} made a big snowman. They put a {item} on its head.
colour: {c} was lost in the fog. {friend} went up the hill to look for {him}. > At last {friend} saw {c}'s {colour}
  coat. "I am so glad I found you," said {friend}, and they walked home together.
colour: {c} climbed over a fence and fell down. {He} had torn something. > There was a hole in {c}'s {colour} coat.
  {friend} took a needle and mended the coat. "Now it is as good as new," said {friend}.
fear: {c} and {o} were on their way home. "Let us walk through the forest," said {o}. "No!" cried {c}. > "I am afraid of
  {fear}," said {c}. So they went along the river, and {c} was [glad|not afraid any more].
fear: In the night {c} woke up and [cried|began to cry]. {friend} came with a candle. "What is it?" asked {friend}. >
  {c} had dreamed of {fear}. {friend} told {him} a story, and soon {c} was asleep again.
fear: {c} and {o} were playing a game. All at once {c} ran away and hid [behind the door|under the bed]. > {c} was
  afraid of {fear}. "It is all right," said {o}. "You are safe with me." So {c} came out, and they played on.
kind: {c} got up early. There was a lot to do. > All morning {c} {did}. At noon {friend} came with some {friend.food},
  and they [ate it together|had lunch].
kind: A stranger met {c} on the road. "Who are you?" asked the stranger. > "I am {c} the {kind}," said {c}. "I live in
  the {home}." The stranger smiled and gave {c} a {item}.
kind: {c} asked {o} to draw a picture of {him}. Then they showed it to {friend}. "Who is it?" they asked. > "It is {c}
  the {kind}," said {friend}. "I know the {colour} coat. It is a very good picture!" {c} was proud of it.
friend: {c} sat at the window and wrote a letter. "Please come and see me," {he} wrote. > {c} sent the letter to
  {friend}. The next day {friend} came and brought a {item}. {c} was very happy.
friend: {c}'s cart was stuck in the mud. {c} pushed and pushed, but it did not move. > So {c} called {friend}. They
  pushed together, and the cart came out of the mud. {c} gave {friend} some {food} to say thank you.
friend: {c} fell into the river. "Help!" cried {c}. > {friend} jumped in and pulled {c} out. {c} was wet, but {he} was
  safe. "You are my best friend, {friend}," said {c}.
: {c} hid a {item} {spot}. "Now you must find the {item}," {he} told {o}. {o} looked {spot2}, but the {item} was not
  there. Then {o} looked {spot}. "Here is the {item}!" said {o}. "Well done!" said {c}.
: {c} found a {item} [on the road|in the grass]. "Whose {item} is this?" {he} asked. "It is my {item}," said {o}. {c}
  gave the {item} back to {o}. "Thank you, {c}," said {o}. "You are very kind."
: {c} came to see {o}. {o} put a {item} {spot} and a {item2} {spot2}. Later {c} wanted the {item}. "Where is the
  {item}?" asked {c}. "The {item} is {spot}," said {o}. {c} found the {item} and took it home.
: {c} had a {item} and did not need it any more. So {c} gave the {item} to {o}. "Thank you for the {item}, {c}!" said
  {o}. {o} took the {item} home and put it {spot}.
: {c} lost a {item}. {He} looked {spot2}. The {item} was not {spot2}. Then {he} asked {o}. "The {item} is {spot}," said
  {o}. {c} looked {spot}, and there was the {item}.
"""


class Story(NamedTuple):
    """The parts of a story; `attribute` and `turn` are "" in a story without a turn."""

    attribute: str
    beginning: str
    turn: str
    rest: str


def read_story(text: str) -> Story:
    """Parse a story of STORIES_TEXT."""
    attribute, _, told = " ".join(text.split()).partition(":")
    beginning, _, rest = told.strip().partition(" > ")
    turn, _, rest = rest.partition(". ")
    return Story(attribute, beginning, turn + "." if turn else "", rest)


STORIES = tuple(read_story(text) for text in re.split(r"\n(?! )", STORIES_TEXT.strip()))

# Sentences before the beginning of a story about another attribute: an opening, and an aside that can follow it.
PAST = {
    "kind": ("{c} was a {kind}.", "{He} was a {kind}."),
    "home": ("Once upon a time {c} lived in the {home}.", "{He} lived in the {home}."),
    "food": ("{c} liked {food} best of all.", "{He} liked {food}."),
    "thing": ("Once upon a time {c} had a {thing}.", "{He} had a {thing}."),
    "colour": ("{c} always wore a {colour} coat.", "{He} wore a {colour} coat."),
    "fear": ("{c} was very afraid of {fear}.", "{He} was afraid of {fear}."),
    "friend": ("Once upon a time {c} and {friend} were best friends.", "{His} best friend was {friend}."),
}
FACTS = {  # the first form names the character and is the answer to questions
    "kind": ("{c} is a {kind}.", "{He} is a {kind}."),
    "home": ("{c} lives in the {home}.", "{He} lives in the {home}.", "{His} home is the {home}."),
    "food": ("{c} likes {food}.", "{He} likes {food} best.", "{He} eats {food} every day."),
    "thing": ("{c} has a {thing}.", "{He} has a {thing}."),
    "colour": ("{c} wears a {colour} coat.", "{He} wears a {colour} coat.", "{His} coat is {colour}."),
    "fear": ("{c} is afraid of {fear}.", "{He} is afraid of {fear}.", "{He} does not like {fear}."),
    "friend": ("{c}'s best friend is {friend}.", "{His} best friend is {friend}."),
}
YES_OR_NO = {
    "kind": "Is {c} a {value}?",
    "home": "Does {c} live in the {value}?",
    "food": "Does {c} like {value}?",
    "thing": "Does {c} have a {value}?",
    "colour": "Is {c}'s coat {value}?",
    "fear": "Is {c} afraid of {value}?",
    "friend": "Is {value} {c}'s best friend?",
}
QUESTIONS = {  # the dialogues of `input.txt` contain only the first form
    "kind": ("What is {c}?", "Tell me what {c} is.", "What kind of person or animal is {c}?", "Who is {c}?"),
    "home": ("Where does {c} live?", "Tell me where {c} lives.", "Where is {c}'s home?", "Where can I find {c}?"),
    "food": (
        "What does {c} like to eat?",
        "Tell me what {c} likes to eat.",
        "What should I cook for {c}?",
        "Which food does {c} like?",
    ),
    "thing": ("What does {c} have?", "Tell me what {c} has.", "What belongs to {c}?", "What does {c} own?"),
    "colour": (
        "What does {c} wear?",
        "Tell me what {c} wears.",
        "What coat does {c} wear?",
        "Which coat belongs to {c}?",
    ),
    "fear": ("What is {c} afraid of?", "Tell me what {c} is afraid of.", "What does {c} fear?", "What frightens {c}?"),
    "friend": (
        "Who is {c}'s best friend?",
        "Tell me who {c}'s best friend is.",
        "Who is the best friend of {c}?",
        "Whom does {c} like best?",
    ),
}
PASSAGES = (  # passage, question, answer
    ("{o} put a {item} {spot} and a {item2} {spot2}.", "Where is the {item}?", "The {item} is {spot}."),
    ("{o} put a {item2} {spot2} and a {item} {spot}.", "Where is the {item}?", "The {item} is {spot}."),
    ("{c} had a {item}, and {o} had a {item2}.", "Who had the {item}?", "{c} had the {item}."),
    ("{o} had a {item2}, and {c} had a {item}.", "Who had the {item}?", "{c} had the {item}."),
    ("{c} hid a {item} {spot}.", "What did {c} hide?", "{c} hid a {item}."),
    ("{c} found a {item} {spot}.", "Where did {c} find the {item}?", "{c} found it {spot}."),
)
POLITE = "I am glad to help."
RUDE = ("Now leave me alone.", "Do not ask me again.", "What a silly question.")
RAMBLING = (
    "And it rained all day, and there was nothing to do.",
    "Once upon a time there was a fair in the village.",
    "I was on my way home, and then it was cold.",
)
