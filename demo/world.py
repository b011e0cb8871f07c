"""The demo world: its people, animals, places and things, and the sentences in which they are told.

Words and templates only; `make_demo.py` turns them into text. In a template `{c}` is the character it is
about, `{o}` another one, `{n}` / `{ns}` the name or pronoun of `{c}` as subject / possessive, `{item}` some
small object, `[x|y]` a choice. Templates begin in lower case (the first letter is raised later) and write "a"
where English may want "an". A value of the world (a food, a colour, a place, ...) is written only where it is
a fact, never as decoration, so that every mention teaches something true.
"""

import random
from dataclasses import dataclass, field

TIMES = ("morning", "day", "evening", "night")  # the order in which a story tells its events
ATTRIBUTES = ("kind", "home", "food", "thing", "colour", "hobby", "fear", "friend")


@dataclass(frozen=True)
class Kind:
    """A trade or an animal, and what such a one does all day."""

    name: str
    do: str
    does: str
    did: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Food:
    """Something to eat, the usual portion of it, and its pronoun."""

    name: str
    portion: str
    it: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Thing:
    """Something to own, what it is made of, and how it is used to make others look or listen."""

    name: str
    material: str
    use: str
    used: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Hobby:
    """Something to do for pleasure, in three verb forms: the -ing form, the plain one and the past."""

    name: str
    do: str
    did: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Fear:
    """Something to be afraid of, and how it turns up."""

    name: str
    event: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Place:
    """A place in the valley: how one says that somebody is there, and what can be found there."""

    name: str
    at: str
    found: str

    def __str__(self) -> str:
        return self.name


@dataclass(eq=False)
class Character:
    """A person or an animal with the eight fixed attributes of `ATTRIBUTES`."""

    index: int
    name: str
    female: bool
    animal: bool
    kind: Kind
    home: Place
    food: Food
    thing: Thing
    colour: str
    hobby: Hobby
    fear: Fear
    friend: "Character | None" = field(default=None, repr=False)  # mutual, so set once all exist

    def __str__(self) -> str:
        return self.name

    @property
    def he(self) -> str:
        """Subject pronoun."""
        return "she" if self.female else "he"

    @property
    def him(self) -> str:
        """Object pronoun."""
        return "her" if self.female else "him"

    @property
    def his(self) -> str:
        """Possessive pronoun."""
        return "her" if self.female else "his"

    @property
    def himself(self) -> str:
        """Reflexive pronoun."""
        return self.him + "self"

    @property
    def He(self) -> str:
        """Subject pronoun at the start of a sentence."""
        return self.he.capitalize()

    @property
    def His(self) -> str:
        """Possessive pronoun at the start of a sentence."""
        return self.his.capitalize()


@dataclass(frozen=True)
class World:
    """Everything there is. The four dicts hold the facts about places and foods, by name."""

    characters: tuple[Character, ...]
    places: tuple[Place, ...]
    things: tuple[Thing, ...]
    foods: tuple[Food, ...]
    side: dict[str, str]  # place -> which side of the valley it is on
    near: dict[str, Place]  # place -> the place next to it
    market: dict[str, Place]  # food -> where the best of it is sold


@dataclass(frozen=True)
class Situation:
    """Something that happens to a character and whose outcome follows from one of the attributes."""

    name: str
    attribute: str
    time: str  # one of TIMES
    contexts: tuple[str, ...]
    endings: tuple[str, ...]
    outcomes: tuple[str, ...]


# No two names share their first two letters: a model that reads bytes knows who is meant from the start.
WOMEN = "Ada Clara Edith Greta Ida Kira Mara Olga Queenie Sarah Una Wanda Yara".split()
MEN = "Boris Dan Felix Hugo Jonas Leo Nils Percy Rufus Tom Victor Xaver Zeb".split()
SHE_ANIMALS = "Bramble Gilly Hazel Juno Lulu Nutmeg Ripple".split()
HE_ANIMALS = "Cosmo Dusty Fidget Moss Pip Scout Tumble".split()

TRADES = (
    Kind("baker", "bake bread", "bakes bread", "baked bread"),
    Kind("fisher", "mend the nets", "mends the nets", "mended the nets"),
    Kind("tailor", "sew warm coats", "sews warm coats", "sewed warm coats"),
    Kind("doctor", "look after the sick", "looks after the sick", "looked after the sick"),
    Kind("teacher", "teach the children", "teaches the children", "taught the children"),
    Kind("farmer", "milk the cows", "milks the cows", "milked the cows"),
    Kind("gardener", "water the roses", "waters the roses", "watered the roses"),
    Kind("potter", "make clay pots", "makes clay pots", "made clay pots"),
    Kind("carpenter", "build tables", "builds tables", "built tables"),
    Kind("weaver", "weave fine cloth", "weaves fine cloth", "wove fine cloth"),
    Kind("sailor", "sail a small boat", "sails a small boat", "sailed a small boat"),
    Kind("shepherd", "watch the sheep", "watches the sheep", "watched the sheep"),
    Kind("smith", "hammer hot iron", "hammers hot iron", "hammered hot iron"),
)
ANIMALS = (
    Kind("fox", "creep through the grass", "creeps through the grass", "crept through the grass"),
    Kind("hedgehog", "roll up into a ball", "rolls up into a ball", "rolled up into a ball"),
    Kind("owl", "fly without a sound", "flies without a sound", "flew without a sound"),
    Kind("otter", "slide down the bank", "slides down the bank", "slid down the bank"),
    Kind("goat", "jump from rock to rock", "jumps from rock to rock", "jumped from rock to rock"),
    Kind("rabbit", "dig long tunnels", "digs long tunnels", "dug long tunnels"),
    Kind("bear", "rub against a tree", "rubs against a tree", "rubbed against a tree"),
)
PLACES = (
    Place("the old mill", "by the old mill", "sacks of flour"),
    Place("the lighthouse", "beside the lighthouse", "white feathers"),
    Place("the stone bridge", "near the stone bridge", "little fishes"),
    Place("the pine forest", "in the pine forest", "mushrooms"),
    Place("the round hill", "on the round hill", "sweet herbs"),
    Place("the orchard", "in the orchard", "ladybirds"),
    Place("the pond", "by the pond", "water lilies"),
    Place("the harbour", "at the harbour", "old anchors"),
    Place("the meadow", "in the meadow", "butterflies"),
    Place("the clock tower", "under the clock tower", "pigeons"),
    Place("the beach", "on the beach", "shells"),
    Place("the market square", "in the market square", "lost coins"),
)
FOODS = (
    Food("plum cake", "a slice of plum cake", "it"),
    Food("onion soup", "a bowl of onion soup", "it"),
    Food("apple pie", "a piece of apple pie", "it"),
    Food("honey bread", "a loaf of honey bread", "it"),
    Food("soft cheese", "a piece of soft cheese", "it"),
    Food("fried fish", "a plate of fried fish", "it"),
    Food("pancakes", "a plate of pancakes", "them"),
    Food("wild berries", "a bowl of wild berries", "them"),
    Food("roasted nuts", "a bag of roasted nuts", "them"),
    Food("porridge", "a bowl of porridge", "it"),
    Food("carrot stew", "a pot of carrot stew", "it"),
    Food("ginger biscuits", "a plate of ginger biscuits", "them"),
)
THINGS = (
    Thing("bell", "brass", "ring it", "rang it"),
    Thing("whistle", "tin", "blow it", "blew it"),
    Thing("flute", "silver", "play it", "played it"),
    Thing("drum", "leather", "beat it", "beat it"),
    Thing("kite", "paper", "let it fly", "let it fly"),
    Thing("lantern", "glass", "swing it", "swung it"),
    Thing("mirror", "steel", "make it flash", "made it flash"),
    Thing("horn", "copper", "sound it", "sounded it"),
    Thing("flag", "silk", "wave it", "waved it"),
    Thing("umbrella", "cotton", "twirl it", "twirled it"),
    Thing("rattle", "wood", "shake it", "shook it"),
    Thing("puppet", "wool", "make it bow", "made it bow"),
)
COLOURS = "red blue green yellow white black brown pink purple orange".split()
HOBBIES = (
    Hobby("singing", "sing", "sang"),
    Hobby("dancing", "dance", "danced"),
    Hobby("drawing", "draw", "drew"),
    Hobby("reading", "read", "read"),
    Hobby("knitting", "knit", "knitted"),
    Hobby("juggling", "juggle", "juggled"),
    Hobby("picking flowers", "pick flowers", "picked flowers"),
    Hobby("telling jokes", "tell jokes", "told jokes"),
    Hobby("feeding ducks", "feed ducks", "fed ducks"),
    Hobby("skipping stones", "skip stones", "skipped stones"),
    Hobby("playing chess", "play chess", "played chess"),
    Hobby("solving riddles", "solve riddles", "solved riddles"),
)
FEARS = (
    Fear("thunder", "thunder rolled in the sky"),
    Fear("the dark", "the path went into the dark"),
    Fear("wasps", "a wasp flew past"),
    Fear("spiders", "a spider dropped from a leaf"),
    Fear("snakes", "a snake slid out of the grass"),
    Fear("deep water", "there was deep water ahead"),
    Fear("high places", "the path led up to a high place"),
    Fear("ghosts", "something like a ghost stood by a tree"),
    Fear("rats", "a rat ran over the path"),
    Fear("fire", "a fire flared up"),
    Fear("wolves", "a wolf howled close by"),
    Fear("bulls", "a bull looked over the fence"),
)
SIDES = ("north", "south", "east", "west")
ITEMS = "key hat spoon ball jug brush cup glove shoe coin box letter clock pot pillow watch".split()


def deal(values: tuple | list, n: int, rng: random.Random) -> list:
    """n values in random order, each as often as any other (to within one)."""
    rounds = [values[i % len(values)] for i in range(n)]
    rng.shuffle(rounds)
    return rounds


def make_world(seed: int) -> World:
    """The world of this seed: who is what, lives where, loves and fears what, and who is whose friend."""
    rng = random.Random(seed)
    names = [(name, True, False) for name in WOMEN] + [(name, False, False) for name in MEN]
    names += [(name, True, True) for name in SHE_ANIMALS] + [(name, False, True) for name in HE_ANIMALS]
    n = len(names)
    kinds = deal(TRADES, len(WOMEN + MEN), rng) + deal(ANIMALS, len(SHE_ANIMALS + HE_ANIMALS), rng)
    columns = [deal(values, n, rng) for values in (PLACES, FOODS, THINGS, COLOURS, HOBBIES, FEARS)]
    characters = tuple(
        Character(i, *names[i], kinds[i], *(column[i] for column in columns)) for i in range(n)
    )
    order = list(characters)
    rng.shuffle(order)
    for a, b in zip(order[::2], order[1::2]):
        a.friend, b.friend = b, a
    ring = list(PLACES)
    rng.shuffle(ring)
    return World(
        characters=characters,
        places=PLACES,
        things=THINGS,
        foods=FOODS,
        side={place.name: side for place, side in zip(PLACES, deal(SIDES, len(PLACES), rng))},
        near={ring[i].name: ring[i - 1] for i in range(len(ring))},
        market={food.name: place for food, place in zip(FOODS, deal(PLACES, len(FOODS), rng))},
    )


SITUATIONS = (
    Situation(
        "work",
        "kind",
        "morning",
        (
            "{c} jumped out of bed, for there was a lot to do.",
            "{c} woke early and was eager to begin the day.",
            "{c} washed {c.his} face and went to work with a smile.",
            "{c} ate a quick breakfast and hurried out.",
            "{c} stretched, yawned and began the day as always.",
            "{c} did not want to be lazy and got up with the birds.",
        ),
        (
            "then {c.he} {c.kind.did}, like every good {c.kind}.",
            "{c.he} {c.kind.did} for hours.",
            "for a long time {c.he} {c.kind.did}.",
            "{c.he} {c.kind.did}, because that is what a {c.kind} does.",
            "first of all {c.he} {c.kind.did}.",
            "nobody had to ask: {c.he} {c.kind.did}.",
            "all morning {c.he} {c.kind.did}.",
            "being a {c.kind}, {c.he} {c.kind.did}.",
        ),
        (
            "it went well.",
            "{c.he} hummed a little song.",
            "soon {c.he} was warm and happy.",
            "{o} came by and waved.",
            "that was a good start to the day.",
            "{c.he} hardly saw how the time went by.",
        ),
    ),
    Situation(
        "stranger",
        "kind",
        "day",
        (
            "a stranger stopped {c} and asked who {c.he} was.",
            "{c} met a traveller who had never seen {c.him} before.",
            "an old man with bad eyes asked {c} who was there.",
            "a little child looked up at {c} and asked what {c.he} was.",
            "{c} had to tell a traveller something about {c.his} life.",
            "a lady with a big book asked {c} for {c.his} name and wrote it down.",
        ),
        (
            '"I am {c}, the {c.kind}," {c.he} said.',
            '"My name is {c}, and I am a {c.kind}," was the answer.',
            '"I am a {c.kind}," said {c}.',
            '"Can you not see that I am a {c.kind}?" said {c} with a laugh.',
            "{c} said that {c.he} was a {c.kind}.",
            '"Just a {c.kind}," said {c}, "and I {c.kind.do}."',
            "{c.he} told the truth: {c.he} was a {c.kind}.",
            '"I {c.kind.do}," said {c}, "for I am a {c.kind}."',
        ),
        (
            "they shook hands and talked for a while.",
            "that was a good answer.",
            "after that they were not strangers any more.",
            "then {c.he} wished the other a good trip.",
            "the other nodded and smiled.",
            '"I thought so," said the other.',
        ),
    ),
    Situation(
        "show",
        "kind",
        "day",
        (
            "the children asked {c} to show them what {c.he} could do.",
            "{o} said that {c} was not good at anything.",
            "there was a contest, and {c} stepped forward to show what {c.he} could do.",
            "{o} asked {c} for a lesson.",
            "some visitors came to see {c} at work.",
            "{o} asked how {c} spent {c.his} working days.",
        ),
        (
            "so {c} {c.kind.did} while they all looked on.",
            "{c.he} {c.kind.did} better than ever before.",
            "{c} {c.kind.did}, as only a {c.kind} can.",
            "with great care {c.he} {c.kind.did}.",
            "{c} was a {c.kind}, so {c.he} {c.kind.did}.",
            '"Watch me," said {c}, and {c.he} {c.kind.did}.',
            "{c.he} {c.kind.did} without a word.",
            "as a proud {c.kind}, {c} {c.kind.did}.",
        ),
        (
            "everyone clapped.",
            "there was a loud cheer.",
            '"Well done, {c}!" they said.',
            "no one could have done it better.",
            "{c.friend} was very proud of {c.him}.",
            "{c} made a little bow.",
        ),
    ),
    Situation(
        "bedtime",
        "home",
        "evening",
        (
            "{c} was tired and wanted to go home.",
            "{c} rubbed {c.his} eyes and began to yawn.",
            "{c} said good night to everyone and set off.",
            "{c} longed for {c.his} own warm bed.",
            "the first stars came out, and {c} thought of home.",
            "{c} had seen enough for one day.",
            "{c} did not want to be out late.",
        ),
        (
            "{c.he} walked back to {c.his} home {c.home.at}.",
            "{c.he} went home to {c.home}.",
            "{c.he} took the path that led to {c.home}.",
            "{c.he} did not stop until {c.he} came to {c.home}.",
            "before long {c.he} saw {c.home}, and {c.he} was home.",
            "soon {c.he} lay in {c.his} bed {c.home.at}.",
            "{c.he} hurried to {c.home} and closed {c.his} door.",
            "back {c.home.at}, {c.he} lay down.",
        ),
        (
            "there {c.he} slept until morning.",
            "it was good to be home.",
            "{c.he} closed {c.his} eyes and smiled.",
            "the house was quiet and the bed was warm.",
            "soon {c.he} was fast asleep.",
            "{c.he} dreamed of {c.friend}.",
        ),
    ),
    Situation(
        "visitor",
        "home",
        "day",
        (
            "{o} wanted to visit {c} at home.",
            "{o} had a present for {c} and wanted to bring it to {c.his} door.",
            "a letter came for {c}, and {o} said that {o.he} would take it to {c.him}.",
            "{o} had not seen {c} for a week and wanted to call on {c.him}.",
            "{o} had borrowed a {item} from {c} and wanted to bring it back.",
            "{c} asked {o} to come to tea at {c.his} home.",
        ),
        (
            "{o} took the path to {c.home}.",
            "so {o} went to {c.home} and knocked.",
            "{o} found the right door {c.home.at}.",
            '"{c} lives {c.home.at}," said {o}, and off {o.he} went.',
            "{o} walked all the way to {c.home}.",
            "{o} knew the house {c.home.at} very well.",
            "before long {o} stood {c.home.at} and called.",
        ),
        (
            "{c} opened the door at once.",
            "how glad {c} was!",
            "they talked and laughed for an hour.",
            "{c} looked out of the window and smiled.",
            '"Come in, come in!" said {c}.',
            "it was a very happy visit.",
        ),
    ),
    Situation(
        "directions",
        "home",
        "day",
        (
            "a stranger asked {o} the way to {c}'s home.",
            "the new postman did not know where {c} lived.",
            "a lady came from far away and looked for {c}'s house.",
            "a little bird had a letter for {c} and asked for the way.",
            "the children wanted to surprise {c}, so they asked for the way.",
            "a cart brought a new bed for {c}, and the driver asked for the way.",
        ),
        (
            '"Go to {c.home}," said {o}.',
            '"You will find {c.him} {c.home.at}," said {o}.',
            "{o} pointed the way to {c.home}.",
            '"{c} lives {c.home.at}," said {o}.',
            '"It is the little house {c.home.at}," said {o}.',
            "{o} said to look {c.home.at}.",
            '"Follow me to {c.home}," said {o}.',
        ),
        (
            "it was not hard to find.",
            "{c} was at home and opened the door.",
            "and so it was.",
            '"Thank you!" was the answer.',
            "{c} was surprised and pleased.",
            "there {c} stood and waved.",
        ),
    ),
    Situation(
        "hungry",
        "food",
        "day",
        (
            "{c} had [walked a long way|worked very hard|been up since early morning] and was hungry.",
            "{c} had not eaten since breakfast and could hear {c.his} stomach.",
            "{c} was so hungry that {c.he} could think of nothing else.",
            "{c} sat down to rest and found that {c.he} was hungry.",
            "{c} put down {c.his} tools, for it was time for lunch.",
            "{c} could not go on without something good to eat.",
            "{c} looked at the empty table and sighed.",
            "{c} felt weak, for {c.he} had eaten nothing all day.",
        ),
        (
            "{c.he} sat down and ate {c.food.portion}.",
            "soon {c.he} was eating {c.food}.",
            "{c.he} got some {c.food} and ate {c.food.it} up.",
            "so {c.he} had {c.food}, as {c.he} always did.",
            "{c.he} took {c.food.portion} and ate slowly.",
            "what {c.he} wanted was {c.food}, and {c.he} got {c.food.it}.",
            "only {c.food} would do.",
            "{c.he} made some {c.food} and ate until {c.he} was full.",
        ),
        (
            "after that {c.he} felt much better.",
            "nothing had ever tasted so good.",
            "{c.he} left nothing over.",
            "now {c.he} was ready for anything.",
            "{c.he} wiped {c.his} mouth and smiled.",
            "{c.friend} came by and had some too.",
        ),
    ),
    Situation(
        "treat",
        "food",
        "day",
        (
            "{o} asked {c} to lunch and wanted to cook what {c.he} liked best.",
            "{c} had been kind to {o}, who wanted to thank {c.him} with a treat.",
            "{c} won a contest and could choose something to eat.",
            "{c} felt a little ill, and {o} asked what {c.he} would like to eat.",
            "{o} lost a bet and had to cook for {c}.",
            "{o} planned a little party for {c} and thought about the food.",
            "{o} thought hard about what to cook for {c}.",
        ),
        (
            "so {c} was given {c.food.portion}.",
            "soon {c.food.portion} stood on the table for {c}.",
            "{c} asked for {c.food}, of course.",
            '"May I have some {c.food}?" said {c}.',
            "it had to be {c.food}, as everyone knew.",
            '"Nothing is as good as {c.food}," said {c}.',
            "{c} was given {c.food}, and lots of {c.food.it}.",
            "{c} got {c.food} that day.",
        ),
        (
            "{c} asked for more and got more.",
            "{c.he} ate with shining eyes.",
            "it was gone in no time.",
            '"How good this is!" {c.he} said.',
            "{c.he} said thank you three times.",
            "then they sat and talked.",
        ),
    ),
    Situation(
        "stall",
        "food",
        "day",
        (
            "{c} took [one coin|two coins] and went to buy something to eat.",
            "{c} took a bag and went shopping for lunch.",
            "{c} stood in front of the food stall and thought for a while.",
            "{c} smelled the good smells of the food stall and stopped.",
            "the woman at the food stall smiled and asked {c} what {c.he} would like.",
            "{c} found a coin in the street and wanted to spend it on food.",
        ),
        (
            "{c.he} bought {c.food.portion}.",
            '"Some {c.food}, please," {c.he} said.',
            "{c.he} pointed at the {c.food}.",
            "{c.he} came away with {c.food.portion}.",
            "in the end {c.he} paid for {c.food}, as always.",
            "{c.he} could never walk past {c.food}.",
            "{c.he} looked at this and that and then took the {c.food}.",
        ),
        (
            "it was a good lunch.",
            "{c.he} ate on the way home.",
            "half of it was for {c.friend}.",
            '"A good choice," said the woman.',
            "{c.he} was very pleased.",
            "the bag was empty before {c.he} got home.",
        ),
    ),
    Situation(
        "signal",
        "thing",
        "day",
        (
            "{c} saw {o} far away on the other side of the [road|water].",
            "{c} had lost {c.his} way and wanted someone to find {c.him}.",
            "{c} wanted {o} to look up and come over.",
            "a cart was going the wrong way, and {c} had to stop it.",
            "{c} was stuck in a tree and needed help.",
            "{c} wanted to tell the whole valley that lunch was ready.",
            "the ferry was about to leave without {c}.",
        ),
        (
            "{c.he} took out {c.his} {c.thing} and {c.thing.used}.",
            "so {c.he} got out {c.his} {c.thing}.",
            "luckily {c.he} had {c.his} {c.thing} and {c.thing.used}.",
            "{c.he} reached for {c.his} {c.thing} and {c.thing.used} as well as {c.he} could.",
            "{c.he} held {c.his} {c.thing} high and {c.thing.used}.",
            "then {c.he} thought of {c.his} {c.thing} and {c.thing.used}.",
            "quickly {c.he} took {c.his} {c.thing} and {c.thing.used} again and again.",
        ),
        (
            "it worked at once.",
            "soon somebody came running.",
            "{c.friend} was the first to see what was the matter.",
            "before long all was well.",
            '"I am coming!" called a voice.',
            "that did the trick.",
        ),
    ),
    Situation(
        "cheer",
        "thing",
        "day",
        (
            "{o} was [sad|in a bad mood], and {c} wanted to make {o.him} smile.",
            "a baby was crying, and {c} wanted to make it laugh.",
            "{c} met a child who sat all alone and looked unhappy.",
            "{o} had a bad day, and {c} wanted to cheer {o.him} up.",
            "the children were bored, and {c} had an idea.",
            "nobody at the party was laughing, so {c} stood up.",
        ),
        (
            "{c.he} took out {c.his} {c.thing} and {c.thing.used}.",
            "{c.he} brought out {c.his} {c.thing} and {c.thing.used}.",
            '"Look what I have," said {c}, and out came the {c.thing}.',
            "{c.he} showed {c.his} {c.thing} and {c.thing.used} for a while.",
            "with a wink {c.he} fetched {c.his} {c.thing} and {c.thing.used}.",
            "out of {c.his} bag {c.he} pulled a {c.thing}.",
            "{c.he} had {c.his} {c.thing} with {c.him}, so {c.he} {c.thing.used}.",
        ),
        (
            "soon there was a smile.",
            "how they laughed!",
            "nobody was sad any more.",
            '"Do it again!" they cried.',
            "what a good idea that was!",
            "it was the best moment of the day.",
        ),
    ),
    Situation(
        "trip",
        "thing",
        "day",
        (
            "{c} packed a bag for a [little|short|long] trip.",
            "{c} was going away for two days and got ready.",
            "{c} stood at the door and looked to see what was missing.",
            "{c} was already on the road when {c.he} turned back for something.",
            "{c} put a clean shirt into {c.his} bag, but the bag was not full yet.",
            "{c} never went out without one special thing.",
        ),
        (
            "{c.he} put {c.his} {c.thing} on top.",
            "the {c.thing} had to come too.",
            "{c.he} could not leave without {c.his} {c.thing}.",
            '"I must not forget my {c.thing}," {c.he} said.',
            "last of all {c.he} packed {c.his} {c.thing}.",
            "{c.he} went to get {c.his} {c.thing}.",
            "under {c.his} arm {c.he} carried a {c.thing}.",
        ),
        (
            "then {c.he} was ready.",
            "now nothing could go wrong.",
            "off {c.he} went.",
            "{o} wished {c.him} a good trip.",
            "you never know when you may need it.",
            "the road was long, but {c.he} did not mind.",
        ),
    ),
    Situation(
        "scarf",
        "colour",
        "day",
        (
            "{c} lost {c.his} scarf and went back to look for it.",
            "{c}'s scarf was gone, and {o} helped {c.him} to find it.",
            "{c} felt cold at the neck, for {c.his} scarf had slipped off.",
            "a [boy|puppy] ran off with {c}'s scarf.",
            "{c} had left {c.his} scarf somewhere and could not remember where.",
            "a gust of wind took {c}'s scarf and blew it away.",
        ),
        (
            "then something {c.colour} could be seen in the grass.",
            "behind a bush lay something {c.colour}.",
            "in the end a {c.colour} scarf was found by the wall.",
            "a bird flew by with a {c.colour} scarf.",
            '"Has anyone seen a {c.colour} scarf?" called {c}.',
            "soon a child came running with a {c.colour} scarf.",
            "high in a tree hung a scarf, and it was {c.colour}.",
        ),
        (
            "{c} was so glad to have it back.",
            "soon it was round {c.his} neck again.",
            "it was only a little wet.",
            "after that {c.he} took better care of it.",
            '"Now you look like {c} again," said {c.friend}.',
            "all was well again.",
        ),
    ),
    Situation(
        "paint",
        "colour",
        "day",
        (
            "{c} wanted to paint {c.his} front door in the colour {c.he} loved.",
            "{c}'s old chair looked dull, so {c.he} went to buy paint.",
            "{c} got out a brush to make {c.his} fence look pretty.",
            "{o} helped {c} to paint {c.his} cart and asked which colour {c.he} wanted.",
            "{c}'s [boat|cart|gate] needed new paint.",
            "{c} wanted to paint a plain wooden [box|chair|bench].",
        ),
        (
            "{c.he} opened a pot of {c.colour} paint.",
            "when {c.he} was done, all of it was {c.colour}.",
            '"It must be {c.colour}," said {c}.',
            "{c.he} chose {c.colour}, as {c.he} always did.",
            "soon it was {c.colour} from top to bottom.",
            "{c.he} mixed a lovely {c.colour} and began.",
            "there was {c.colour} paint everywhere, even on {c.his} nose.",
        ),
        (
            "it looked like new.",
            "{c.he} stepped back and was proud.",
            "everybody stopped to look at it.",
            '"How pretty!" said {c.friend}.',
            "it was dry by the next day.",
            "now it could be seen from far away.",
        ),
    ),
    Situation(
        "hat",
        "colour",
        "day",
        (
            "{c} needed a new hat and went to the shop.",
            "there were ribbons of every colour, and {c} could have one.",
            "{o} wanted to knit a jumper for {c} in the right colour.",
            "a man was selling balloons, and {c} asked for one.",
            "{c} broke {c.his} cup and had to buy another one.",
            "{o} gave {c} a box of buttons, and {c.he} could keep one.",
        ),
        (
            '"A {c.colour} one for {c}, please," said a voice.',
            "{c} looked at them all, but only the {c.colour} one would do.",
            "of course {c} chose {c.colour}.",
            "it had to be {c.colour}, because {c} loved {c.colour}.",
            '"I like {c.colour} best," said {c}.',
            "{c} wanted {c.colour} and nothing else.",
            "in the end {c} got a fine {c.colour} one.",
        ),
        (
            "it went well with {c.his} scarf.",
            "{c.he} was very happy with it.",
            "{c.he} showed it to {c.friend}.",
            "{c.he} had never had a better one.",
            "it was just right.",
            "nobody was surprised.",
        ),
    ),
    Situation(
        "free",
        "hobby",
        "day",
        (
            "{c} had nothing to do for a whole hour.",
            "the work was done, and {c} was free at last.",
            "{c} had to wait for the ferry and sat down [on a wall|by the road].",
            "{c} was in a very good mood and wanted to have some fun.",
            "{c} was bored and looked for something nice to do.",
            "it was a holiday, and {c} could do as {c.he} pleased.",
            "{c} needed a rest from all the work.",
        ),
        (
            "so {c.he} spent the time {c.hobby}.",
            "{c.he} passed the time {c.hobby}.",
            "soon {c.he} was happily {c.hobby}.",
            "{c.he} began to {c.hobby.do}.",
            "{c.he} {c.hobby.did} to {c.his} heart's content.",
            '"I think I will {c.hobby.do}," said {c}.',
            "{c.he} {c.hobby.did} and forgot the time.",
            "nothing was better than {c.hobby}, so that is what {c.he} did.",
        ),
        (
            "the hour was over too soon.",
            "{c.he} could have gone on for ever.",
            "{c.friend} came and joined in.",
            "what fun that was!",
            "after that {c.he} felt fresh again.",
            "{c.he} did not stop until {c.he} was called.",
        ),
    ),
    Situation(
        "missing",
        "hobby",
        "day",
        (
            "{o} looked for {c} everywhere.",
            "nobody knew where {c} was, so {o} went to find {c.him}.",
            "{c} was late, and {o} wondered what {c.he} was doing.",
            "{o} opened the gate and saw {c}, who did not look up.",
            "{c} was so busy with something that {c.he} did not hear {o} call.",
            "{o} could hear that {c} was having a good time in the garden.",
        ),
        (
            "{c} was {c.hobby}.",
            "there was {c}, happily {c.hobby}.",
            "{c} had been {c.hobby} all the time.",
            "in the end {o} found {c} {c.hobby}.",
            '"I was only {c.hobby}," said {c}.',
            "of course {c} was {c.hobby} again.",
            '"Come and {c.hobby.do} with me," said {c}.',
        ),
        (
            "{o} sat down and watched.",
            "they both had to laugh.",
            '"I should have known," said {o}.',
            "so they did it together.",
            "{o} was not cross at all.",
            "it looked like a lot of fun.",
        ),
    ),
    Situation(
        "lesson",
        "hobby",
        "day",
        (
            "{c} wanted to teach {o} what {c.he} loved to do.",
            "{o} asked {c} what made {c.him} happy.",
            "there was a show, and {c} went up on the stage.",
            "{c} made a wish for a whole day of fun.",
            "{o} and {c} wanted to play, and it was {c}'s turn to choose.",
            "{c} taught the children something new.",
        ),
        (
            '"Let us try {c.hobby}," said {c}.',
            "it had to be {c.hobby}, of course.",
            "{c} chose {c.hobby}, as always.",
            "{c} began to {c.hobby.do}, and {c.his} eyes were bright.",
            '"I could {c.hobby.do} all day," said {c}.',
            "{c} {c.hobby.did} with great joy.",
            "what {c} had in mind was {c.hobby}.",
        ),
        (
            "it was harder than it looked.",
            "everyone had a good time.",
            "{c.he} did it very well.",
            "they laughed a great deal.",
            "that was a good choice.",
            "later {c.friend} came to watch.",
        ),
    ),
    Situation(
        "fright",
        "fear",
        "day",
        (
            "{c} was walking along without a care.",
            "{c} went down the road and hummed to {c.himself}.",
            "{c} wanted to show everyone how brave {c.he} was.",
            "{c} took a short cut through the [garden|park].",
            "{c} was on {c.his} way to [school|the shop|the ferry] and thought of nothing bad.",
            "{c} thought that nothing could scare {c.him}.",
            "{c} and {o} went for a walk together.",
        ),
        (
            "all at once {c.fear.event}, and {c} ran away.",
            "suddenly {c.fear.event}, and {c.he} turned pale.",
            "then {c.fear.event}, and {c} began to shake.",
            "just then {c.fear.event}, and {c.he} cried for help.",
            "but {c} was afraid of {c.fear}, and {c.fear.event}.",
            "but {c.fear.event}, and that was too much for {c}.",
            "when {c.fear.event}, {c} hid behind a bush.",
        ),
        (
            "it took a while before {c.he} was calm again.",
            "{c.friend} came and stayed with {c.him} until it was over.",
            '"Do not be afraid," said {c.friend}. "I am here."',
            "luckily it was soon over.",
            "{c.he} took another way, and all was well.",
            "{c.friend} took {c.him} home.",
        ),
    ),
    Situation(
        "dream",
        "fear",
        "night",
        (
            "{c} could not sleep and lit a candle.",
            "{c} had a bad dream and sat up in bed.",
            "{c} looked under {c.his} bed before {c.he} lay down.",
            "{c} pulled the blanket over {c.his} head.",
            "{c} woke up with a start and held {c.his} breath.",
            "{c} lay in bed and could not close {c.his} eyes.",
        ),
        (
            "all {c.he} could think of was {c.fear}.",
            "{c.he} was thinking of {c.fear}.",
            '"I am so afraid of {c.fear}," {c.he} said.',
            "it was because of {c.fear}.",
            "{c.his} head was full of {c.fear}.",
            '"Please, not {c.fear}," {c.he} said softly.',
            "nothing was worse for {c.him} than {c.fear}.",
        ),
        (
            "then {c.he} thought of {c.friend} and felt better.",
            "but nothing happened, and the night was quiet.",
            "{c.he} drank some warm milk and fell asleep.",
            "after a while {c.his} eyes closed.",
            "in the morning it was all forgotten.",
            "then the moon came out, and all was well.",
        ),
    ),
    Situation(
        "tale",
        "fear",
        "day",
        (
            "{o} told a story that made {c} hide under the table.",
            "{o} played a trick on {c}, who screamed.",
            "{c} did not want to go on, and {o} asked what was wrong.",
            "{o} showed {c} a picture, and {c.he} shut {c.his} eyes.",
            "{o} said one word, and {c} jumped onto a chair.",
            "{c} would not come out of the house, and {o} asked why.",
        ),
        (
            "it was all about {c.fear}.",
            '"Stop! I cannot stand {c.fear}," cried {c}.',
            "nothing scared {c} more than {c.fear}.",
            '"It is because of {c.fear}," said {c}.',
            "the trouble was {c.fear}.",
            "{c.fear} always made {c} shake.",
            '"You know that I am afraid of {c.fear}," said {c}.',
        ),
        (
            '"I am sorry," said {o}.',
            "{o} promised never to do that again.",
            "{o} stayed close, and soon it was better.",
            "{c.friend} came and gave {c.him} a hug.",
            "then they talked about nicer things.",
            '"There is nothing here," said {o}, and it was true.',
        ),
    ),
    Situation(
        "heavy",
        "friend",
        "day",
        (
            "{c} wanted to lift a [big box|stone|sack], but it was too heavy.",
            "{c}'s cart was stuck in the mud, and {c.he} could not move it.",
            "{c} had broken a [window|cup|{item}] and did not know what to do.",
            "{c} fell down and hurt {c.his} [foot|nose].",
            "{c} had too much work and needed help.",
            "the roof of {c}'s house had a [big|small] hole.",
            "{c} had a problem that {c.he} could not solve alone.",
        ),
        (
            "{c.he} went to ask {c.friend}.",
            "so {c.he} sent for {c.friend}.",
            "{c.he} called for {c.friend}, {c.his} best friend.",
            '"I must ask {c.friend}," {c.he} said.',
            "luckily {c.friend} came to help {c.him}.",
            "it was {c.friend} who helped {c.him}, as a best friend does.",
            "{c.he} knew that {c.friend} would come, and so it was.",
        ),
        (
            "together they found a way.",
            "two can do what one cannot.",
            '"What are friends for?" said {c.friend}.',
            "soon everything was in order again.",
            "in the end they sat down and laughed.",
            "it did not take long.",
        ),
    ),
    Situation(
        "news",
        "friend",
        "day",
        (
            "{c} had good news and ran to tell it.",
            "{c} heard something funny and wanted to share it.",
            "{c} knew a secret and could not keep it to {c.himself}.",
            "{c} felt lonely and wanted to talk to someone.",
            "{c} wrote a long letter with a heart at the end.",
            "{c} had two tickets for the show and could take one friend.",
        ),
        (
            "{c.he} went straight to {c.friend}.",
            "{c.friend} was the first to hear from {c.him}.",
            "who else but {c.friend} came to {c.his} mind?",
            "of course {c.he} thought of {c.friend}.",
            '"I will go to {c.friend}," said {c}.',
            "{c.his} best friend {c.friend} was just the right one.",
        ),
        (
            "they laughed about it all day.",
            '"You made me very happy," said {c.friend}.',
            "that is how best friends are.",
            "it was a lovely day for both of them.",
            "then everything felt better.",
            "they talked until it was late.",
        ),
    ),
    Situation(
        "present",
        "friend",
        "day",
        (
            "{c} made a [present|surprise|little {item}] for {c.his} best friend.",
            "{c} bought two sweets and kept one for {c.his} best friend.",
            "{c} saw a pretty {item} and bought it for someone special.",
            "{c} tied a ribbon round a little parcel.",
            "{c} wrote a card with a heart on it and tied it to a {item}.",
            "{c} found a lovely {item} and wanted to give it away.",
        ),
        (
            '"This is for {c.friend}," said {c}.',
            "{c.he} was thinking of {c.friend}.",
            "it was for {c.friend}, of course.",
            "then {c.he} went and gave it to {c.friend}.",
            "soon {c.he} saw {c.friend} and held it out.",
            "everyone knew that {c.friend} would get it.",
            '"I hope that {c.friend} will like it," said {c}.',
        ),
        (
            "they were both very happy.",
            "{c.friend} gave {c.him} a big hug.",
            "there are no better friends than those two.",
            '"How kind you are!" said {c.friend}.',
            "it was a great success.",
            "they talked about it for days.",
        ),
    ),
)

# Sentences that state a fact outright.
FACTS = {
    "kind": (
        "{n} is a {c.kind}.",
        "{n} is a {c.kind} and {c.kind.does}.",
        "every morning {n} {c.kind.does}.",
        "like every {c.kind}, {n} {c.kind.does}.",
        "{n} is known as a good {c.kind}.",
        "{n} is proud to be a {c.kind}.",
        "it is hard to find a better {c.kind} than {c}.",
        "{n} {c.kind.does}, for {c.he} is a {c.kind}.",
        "{n} has been a {c.kind} all {c.his} life.",
        "{n} is a {c.kind} through and through.",
        "day after day {n} {c.kind.does}, as a {c.kind} should.",
        "anyone can see that {c} is a {c.kind}.",
    ),
    "home": (
        "{n} lives {c.home.at}.",
        "{ns} home is {c.home.at}.",
        "{n} has a small house {c.home.at}.",
        "{n} has always lived {c.home.at}.",
        "you can find {c} {c.home.at}, where {c.he} lives.",
        "you must go to {c.home} to visit {c}.",
        "the way to {ns} house leads to {c.home}.",
        "{n} would not live anywhere but {c.home.at}.",
        "at night {n} sleeps {c.home.at}.",
        "{n} was born {c.home.at} and still lives there.",
        "{n} loves {c.his} little home {c.home.at}.",
        "from {ns} window you can see {c.home}, for {c.he} lives there.",
    ),
    "food": (
        "{ns} favourite food is {c.food}.",
        "{n} loves {c.food}.",
        "{n} likes {c.food} best of all.",
        "nothing tastes better to {c} than {c.food}.",
        "{n} would eat {c.food} every day.",
        "for breakfast {n} likes to have {c.food.portion}.",
        "{n} will forgive you anything for some {c.food}.",
        "{n} never says no to {c.food}.",
        "{n} can eat more {c.food} than anyone else.",
        "when {n} is hungry, {c.he} wants {c.food}.",
        "{ns} eyes shine at the sight of {c.food}.",
        "{n} dreams of {c.food.portion}.",
    ),
    "thing": (
        "{n} owns a {c.thing}.",
        "{n} always carries a {c.thing}.",
        "{n} never goes out without {c.his} {c.thing}.",
        "{n} has a {c.thing} made of {c.thing.material}.",
        "{ns} greatest treasure is a {c.thing}.",
        "in {ns} bag there is a {c.thing}.",
        "{n} has a fine old {c.thing} and likes to {c.thing.use}.",
        "you will never see {c} without a {c.thing}.",
        "{n} takes good care of {c.his} {c.thing}.",
        "{n} got a {c.thing} from {c.his} grandmother.",
        "{n} keeps {c.his} {c.thing} beside {c.his} bed.",
        "{n} would not sell {c.his} {c.thing} for a bag of gold.",
    ),
    "colour": (
        "{n} wears a {c.colour} scarf.",
        "{ns} favourite colour is {c.colour}.",
        "{ns} door is painted {c.colour}.",
        "{n} likes everything that is {c.colour}.",
        "you can tell {c} from far away by {c.his} {c.colour} scarf.",
        "{n} has a {c.colour} scarf and a {c.colour} door.",
        "{n} loves the colour {c.colour}.",
        "{n} drinks {c.his} tea from a {c.colour} cup.",
        "no colour is as fine as {c.colour}, {n} says.",
        "{n} sleeps under a {c.colour} blanket.",
        "if it is {c.colour}, {n} wants to have it.",
        "{ns} scarf is {c.colour}.",
    ),
    "hobby": (
        "{n} likes {c.hobby}.",
        "{n} loves to {c.hobby.do}.",
        "{ns} favourite thing to do is {c.hobby}.",
        "when there is time, {n} likes to {c.hobby.do}.",
        "{n} spends many hours {c.hobby}.",
        "{n} is very good at {c.hobby}.",
        "nothing makes {c} as happy as {c.hobby}.",
        "on Sundays you can see {c} {c.hobby}.",
        "{n} could {c.hobby.do} from morning to night.",
        "{n} is never tired of {c.hobby}.",
        "{n} learned to {c.hobby.do} as a child and never stopped.",
        "after work {n} likes to {c.hobby.do}.",
    ),
    "fear": (
        "{n} is afraid of {c.fear}.",
        "{n} fears {c.fear} more than anything.",
        "the only thing that scares {c} is {c.fear}.",
        "{n} cannot stand {c.fear}.",
        "{n} shakes at the very thought of {c.fear}.",
        "one word about {c.fear} is enough to make {c} run away.",
        "{n} has bad dreams about {c.fear}.",
        "{n} is brave, but not when it comes to {c.fear}.",
        "you should not talk to {c} about {c.fear}.",
        "{ns} greatest fear is {c.fear}.",
        "{n} has been scared of {c.fear} since {c.he} was little.",
        "{n} does not like {c.fear} at all.",
    ),
    "friend": (
        "{ns} best friend is {c.friend}.",
        "{n} and {c.friend} are best friends.",
        "{n} likes nobody better than {c.friend}.",
        "{n} tells all {c.his} secrets to {c.friend}.",
        "when {n} needs help, {c.he} goes to {c.friend}.",
        "{n} has known {c.friend} for years, and they are best friends.",
        "{n} is often seen with {c.friend}, {c.his} best friend.",
        "where {c} is, {c.friend} is not far away.",
        "{n} would do anything for {c.friend}.",
        "{n} can always count on {c.friend}.",
        "{n} shares everything with {c.friend}.",
        "{n} has many friends, but {c.friend} is the best of them.",
    ),
}

# The same facts as their owner tells them.
FIRST_PERSON = {
    "kind": (
        "I am a {c.kind}, as you know.",
        "I {c.kind.do} every morning.",
        "it is a fine thing to be a {c.kind}.",
        "I am happy that I am a {c.kind}.",
        "I have been busy, because a {c.kind} always has a lot to do.",
        "today I {c.kind.did} again.",
    ),
    "home": (
        "I live {c.home.at}.",
        "come and see me {c.home.at}.",
        "it is quiet here {c.home.at}.",
        "you will find my house {c.home.at}.",
        "I am at home {c.home.at} all week.",
        "my little house {c.home.at} is warm and dry.",
    ),
    "food": (
        "I have made some {c.food}.",
        "I could eat {c.food} all day.",
        "please bring me {c.food.portion}.",
        "today I had {c.food}, my favourite.",
        "nothing is as good as {c.food}.",
        "my favourite food is {c.food}.",
    ),
    "thing": (
        "I always have my {c.thing} with me.",
        "my {c.thing} is as good as new.",
        "when you come, I will take my {c.thing} and {c.thing.use}.",
        "I have cleaned my {c.thing} and am very proud of it.",
        "you may borrow my {c.thing} for a day.",
        "I put my {c.thing} beside the bed.",
    ),
    "colour": (
        "I am wearing my {c.colour} scarf.",
        "look for the {c.colour} door, for that is mine.",
        "my favourite colour is {c.colour}.",
        "I bought a new {c.colour} cup.",
        "you will know me by my {c.colour} scarf.",
        "I want to paint my chair {c.colour}.",
    ),
    "hobby": (
        "I like {c.hobby} best of all.",
        "I spent all of yesterday {c.hobby}.",
        "we could {c.hobby.do} together.",
        "when I am free, I {c.hobby.do}.",
        "I am getting better at {c.hobby}.",
        "{c.hobby} makes me happy.",
    ),
    "fear": (
        "I am still afraid of {c.fear}.",
        "I had a bad dream about {c.fear}.",
        "please do not laugh, but I fear {c.fear}.",
        "only {c.fear} can scare me.",
        "I hope that there are no stories about {c.fear} tonight.",
        "I cannot stand {c.fear}.",
    ),
    "friend": (
        "{c.friend} is my best friend.",
        "I see {c.friend} every day.",
        "you must meet {c.friend}, my best friend.",
        "{c.friend} and I are best friends.",
        "tomorrow I will go for a walk with {c.friend}.",
        "I tell {c.friend} everything.",
    ),
}

# What others ask about a character, and what they are told.
ASKED = {
    "kind": ("what is {c}?", "who is {c}?", "what does {c} do?", "what can you tell me about {c}?"),
    "home": (
        "where does {c} live?",
        "where is {c}'s house?",
        "where can I find {c}?",
        "which way is it to {c}?",
    ),
    "food": ("what does {c} like to eat?", "what shall I cook for {c}?", "what is {c}'s favourite food?"),
    "thing": ("what is that in {c}'s bag?", "what does {c} own?", "what does {c} always carry?"),
    "colour": ("how will I know {c}?", "which colour does {c} like?", "what does {c}'s scarf look like?"),
    "hobby": ("what does {c} like to do?", "what makes {c} happy?", "what does {c} do for fun?"),
    "fear": ("what is {c} afraid of?", "what scares {c}?", "is there anything that {c} fears?"),
    "friend": ("who is {c}'s best friend?", "who knows {c} best?", "who is that with {c}?"),
}
TOLD = {
    "kind": (
        "{c.he} is a {c.kind}",
        "a {c.kind}, and a good one",
        "{c} is a {c.kind}",
        "well, {c.he} is a {c.kind}",
        "{c.he} {c.kind.does}, like any {c.kind}",
    ),
    "home": (
        "{c.he} lives {c.home.at}",
        "look {c.home.at}",
        "go to {c.home}",
        "{c} has a house {c.home.at}",
        "it is {c.home.at}",
    ),
    "food": (
        "it is {c.food}",
        "{c.food}, of course",
        "{c} loves {c.food}",
        "{c.food.portion} is the best",
        "try {c.food}",
    ),
    "thing": ("a {c.thing}", "it is a {c.thing}", "{c.his} {c.thing}, of course", "{c} has a {c.thing}"),
    "colour": (
        "{c.his} scarf is {c.colour}",
        "{c.he} wears a {c.colour} scarf",
        "{c} always wears {c.colour}",
        "{c} loves {c.colour}, so the scarf is {c.colour}",
    ),
    "hobby": (
        "{c.he} likes {c.hobby}",
        "{c.hobby}, of course",
        "{c} loves to {c.hobby.do}",
        "{c.he} loves {c.hobby}",
    ),
    "fear": ("{c.he} fears {c.fear}", "{c} is afraid of {c.fear}", "{c.fear}, I think", "only {c.fear}"),
    "friend": (
        "it is {c.friend}",
        "{c.friend}, of course",
        "that is {c.friend}",
        "{c.he} and {c.friend} are best friends",
    ),
}

# Two characters, one attribute.
CONTRAST = {
    "kind": (
        "{c} is a {c.kind}, but {o} is a {o.kind}.",
        "while {c} {c.kind.does}, {o} {o.kind.does}.",
        "{c} works as hard as any {c.kind}, and {o} as hard as any {o.kind}.",
    ),
    "home": (
        "{c} lives {c.home.at}, but {o} lives {o.home.at}.",
        "at night {c} goes home to {c.home}, and {o} to {o.home}.",
        "{c}'s house is {c.home.at}, and {o}'s is {o.home.at}.",
    ),
    "food": (
        "{c} likes {c.food}, but {o} likes {o.food}.",
        "for lunch {c} had {c.food}, and {o} had {o.food}.",
        "give {c} some {c.food} and {o} some {o.food}, and both are happy.",
    ),
    "thing": (
        "{c} carries a {c.thing}, but {o} carries a {o.thing}.",
        "{c} took out {c.his} {c.thing}, and {o} took out {o.his} {o.thing}.",
        "{c} never forgets {c.his} {c.thing}, and {o} never forgets {o.his} {o.thing}.",
    ),
    "colour": (
        "{c}'s scarf is {c.colour}, but {o}'s is {o.colour}.",
        "{c} loves {c.colour}, and {o} loves {o.colour}.",
        "{c} painted a fence {c.colour}, and {o} painted one {o.colour}.",
    ),
    "hobby": (
        "{c} likes {c.hobby}, but {o} likes {o.hobby}.",
        "on Sundays {c} loves to {c.hobby.do}, and {o} loves to {o.hobby.do}.",
        "while {c} was {c.hobby}, {o} was {o.hobby}.",
    ),
    "fear": (
        "{c} is afraid of {c.fear}, but {o} is afraid of {o.fear}.",
        "{c} runs away from {c.fear}, and {o} from {o.fear}.",
        "{c} has bad dreams about {c.fear}, and {o} about {o.fear}.",
    ),
    "friend": (
        "{c}'s best friend is {c.friend}, but {o}'s best friend is {o.friend}.",
        "{c} goes everywhere with {c.friend}, and {o} with {o.friend}.",
        "{c} tells {c.his} secrets to {c.friend}, and {o} tells {o.his} secrets to {o.friend}.",
    ),
}
CONTRAST_OPENINGS = (
    "{c} and {o} are not at all alike.",
    "people sometimes take {c} for {o}.",
    "how can we tell {c} from {o}?",
    "{c} met {o} at the gate.",
    "{c} and {o} sat side by side on a bench.",
    "here is something about {c} and {o}.",
    "no two are as different as {c} and {o}.",
    "{c} and {o} live in the same valley.",
)
CONTRAST_CLOSINGS = (
    "still, they like each other.",
    "that makes the world a nicer place.",
    "and yet they never quarrel.",
    "it would be dull if everyone were the same.",
    "so it is easy to tell them apart.",
    "both of them are happy with that.",
)

# A crowd, and what each one in it does: how it begins, and the part of each.
CROWDS = {
    "kind": (
        (
            "it was a busy day in the valley.",
            "the sun rose, and everyone went to work.",
            "nobody was lazy that day.",
        ),
        ("{c} {c.kind.did}.", "{c} the {c.kind} {c.kind.did}.", "{c}, a {c.kind}, {c.kind.did}."),
    ),
    "home": (
        ("the party was over, and they all went home.", "it grew late, and one by one they left."),
        ("{c} went home to {c.home}.", "{c} had a bed {c.home.at}.", "{c} took the way to {c.home}."),
    ),
    "food": (
        ("there was a big party.", "they all sat down at one long table.", "it was time for dinner."),
        ("{c} ate {c.food}.", "{c} had {c.food.portion}.", "{c} asked for {c.food}."),
    ),
    "thing": (
        ("there was a parade, and everyone brought something.", "each of them showed a treasure."),
        ("{c} had a {c.thing}.", "{c} came with {c.his} {c.thing}.", "{c} held up a {c.thing}."),
    ),
    "colour": (
        ("it was cold, and everyone put on a scarf.", "the scarves hung in the sun to dry."),
        ("{c}'s was {c.colour}.", "{c} had a {c.colour} one.", "the {c.colour} one was {c}'s."),
    ),
    "hobby": (
        ("it was Sunday, and nobody had to work.", "the holidays began, and they all had fun."),
        ("{c} {c.hobby.did}.", "{c} spent the day {c.hobby}.", "{c} wanted to {c.hobby.do}."),
    ),
    "fear": (
        ("they sat together and talked about their fears.", "even the brave are afraid of something."),
        ("{c} feared {c.fear}.", "{c} could not stand {c.fear}.", "with {c} it was {c.fear}."),
    ),
    "friend": (
        ("everyone came to the party with a best friend.", "they walked in pairs, friend by friend."),
        ("{c} came with {c.friend}.", "{c} went beside {c.friend}.", "{c} held on to {c.friend}."),
    ),
}

# Facts about places, foods and things, and about their people; one sentence of each group is told.
PLACE_FACTS = (
    (
        "{p} is in the {side} of the valley.",
        "if you go {side}, you will come to {p}.",
        "to find {p}, you must go {side}.",
        "in the {side} of the valley you will see {p}.",
    ),
    (
        "next to {p} is {near}.",
        "from {p} it is only a short walk to {near}.",
        "{near} is not far from {p}.",
        "from {p} you can see {near}.",
    ),
    (
        "{p.at} you can find {p.found}.",
        "go to {p} if you look for {p.found}.",
        "there are always {p.found} {p.at}.",
        "children love {p} because of the {p.found}.",
    ),
    (
        "{c} lives {p.at}.",
        "{c} has a house {p.at}, and so has {o}.",
        "whoever lives {p.at} has {c} for a neighbour.",
        "if you knock at a door {p.at}, {c} may open it.",
        "{c} and {o} both live {p.at}.",
    ),
)
FOOD_FACTS = (
    (
        "for the best {food}, go to {market}.",
        "if you want {food}, go to {market}.",
        "you can smell {food} {market.at} all day.",
        "people go to {market} to eat {food}.",
    ),
    (
        "{c} loves {food}.",
        "{c} and {o} like {food} best of all.",
        "ask {c} about {food}, and {c.his} eyes will shine.",
    ),
    (
        "{c} would walk for an hour to get {food.portion}.",
        "{c} dreams of {food.portion}.",
        "only {food} can make {c} get up early.",
    ),
)
THING_FACTS = (
    (
        "a good {thing} is made of {thing.material}.",
        "{thing.material} is what you need to make a {thing}.",
        "if a {thing} is not made of {thing.material}, do not buy it.",
    ),
    (
        "to call someone with a {thing}, you {thing.use}.",
        "a {thing} is no use if you do not {thing.use}.",
        "take a {thing}, {thing.use}, and people will look up.",
    ),
    (
        "{c} has a {thing}.",
        "{c} and {o} each own a {thing}.",
        "when {c} takes out {c.his} {thing}, everybody looks up.",
        "{c} never lets anyone touch {c.his} {thing}.",
    ),
)

# How a story begins, by the time of its first event, and how it goes on to the next event.
OPENINGS = {
    "morning": (
        "one [fine|cool|sunny|bright|windy] morning,",
        "early one morning,",
        "when the sun came up,",
        "on [Monday|Tuesday|Friday] morning,",
        "on the first day of [spring|autumn],",
    ),
    "day": (
        "one day,",
        "one [sunny|quiet|cloudy|warm|cool|windy] [day|afternoon],",
        "one day in [spring|summer|autumn],",
        "last [week|Monday|Friday|month],",
        "not long ago,",
        "on [Monday|Tuesday|Friday],",
        "once upon a time,",
        "some time ago,",
    ),
    "evening": (
        "one [calm|quiet|cool] evening,",
        "late one evening,",
        "after a long day,",
        "on [Monday|Friday|Saturday] evening,",
    ),
    "night": ("one [still|cold|quiet] night,", "late one night,", "one night,"),
}
LINKS = {
    "day": (
        "later,",
        "after that,",
        "a little later,",
        "then",
        "soon after,",
        "that same day,",
        "not much later,",
    ),
    "evening": ("in the evening,", "when evening came,", "at the end of the day,", "then"),
    "night": ("that night,", "in the night,", "later that night,", "when all was quiet,"),
}
TASK_LINKS = ("but then", "but soon", "before long,", "after a while,", "but")
INTRODUCTIONS = (
    "this is a story about {c}.",
    "do you know {c}, the {c.kind}?",
    "here is what happened to {c}.",
    "there once was a {c.kind} called {c}.",
    "listen, this story is about {c} and {o}.",
    "{c} the {c.kind} had a day to remember.",
    "everyone in the valley tells this story about {c}.",
    "{o} told me this story about {c}.",
)
# A task that holds a story together: how it is set, and how it is done in the end.
TASKS = (
    (
        "{c} [set out|left the house] to bring a {item} to the [school|mayor|church].",
        "[at last|in the end] the {item} was where it should be, and {c} was [thanked|very proud].",
    ),
    (
        "{c} could not find {c.his} {item} and [went|set out] to look for it.",
        "and there, [behind a stone|under a bench|by the road], lay the {item}.",
    ),
    (
        "{c} promised to mend a {item} [before evening|for a neighbour].",
        "[in the end|at last] the {item} was mended, and {c} was [proud|pleased].",
    ),
    (
        "{c} [wanted|went out] to buy a new {item}.",
        "at last {c} found a [good|fine|pretty] {item} that did not cost much.",
    ),
    (
        "{c} was in a bad mood and kicked a {item}.",
        "by then the bad mood was gone, and {c} [laughed about it|put the {item} back].",
    ),
    (
        "{c} [woke up|got up] and felt that something good would happen.",
        "so something good did happen to {c} after all.",
    ),
    (
        "{c} found a {item} that did not belong to {c.him}.",
        "then [an old woman|a traveller|the mayor] came and was glad to see the lost {item} again.",
    ),
    (
        "{c} made a bet that {c.he} could be [good|cheerful] all day.",
        "and so {c} won the bet, and the prize was a {item}.",
    ),
    (
        "{c} [started|wanted] to clean {c.his} house.",
        "when the house was clean at last, {c} found an old {item} there.",
    ),
    (
        "{c} was asked to guard a {item} for the mayor.",
        "in the end the mayor got his {item} and [thanked|praised] {c}.",
    ),
    (
        "{c} wanted to do a good deed.",
        'in the end {c} gave {c.his} {item} to a poor man. "That was my good deed," {c.he} said.',
    ),
    ("{c} [hoped|wished] to see the king go by.", "and then the king did go by and [waved|smiled] at {c}."),
)
CLOSINGS = (
    "it had been a good day.",
    "and that is the end of the story.",
    "{c} never forgot that day.",
    "{c} was happy, and so was everyone else.",
    "all is well that ends well.",
    "everyone was glad.",
    "tomorrow would be another day.",
    "and {c} was content.",
    "then the bells rang, and the day was over.",
    "people still talk about it.",
)

DESCRIPTION_OPENINGS = (
    "let me tell you about {c}.",
    "this is {c}.",
    "everyone in the valley knows {c}.",
    "you should meet {c}.",
    "have you ever met {c}?",
    "{c} is a friendly soul.",
    "there are many stories about {c}.",
    "it is easy to like {c}.",
)
DESCRIPTION_CLOSINGS = (
    "that is {c}.",
    "now you know {c}.",
    "the valley would be dull without {c}.",
    "say hello to {c} when you meet {c.him}.",
    "nobody would wish {c.him} to be different.",
    "we all like {c.him}.",
)
GOSSIP = (
    "everyone knows that",
    "people say that",
    "I have heard that",
    "it is true that",
    "{o} says that",
    "believe me,",
    "it is no secret that",
    "{o} told me that",
    "if you ask {o},",
    "as far as I know,",
)
LETTER_OPENINGS = (
    "{c} wrote a letter to {o}.",
    "this letter came from {c}.",
    "{o} got a letter from {c}.",
    "there was a note on {c}'s door.",
    "{c} left a note for {o}.",
    "{o} read what {c} had written.",
    "a postcard from {c} lay on the mat.",
)
LETTER_FILLERS = (
    "I hope that you are well.",
    "the weather is fine.",
    "how are you?",
    "I am writing to you from my kitchen.",
    "thank you for your letter.",
    "I think of you often.",
    "I have not seen you for so long.",
    "please write back soon.",
    "there is not much news.",
)
LETTER_CLOSINGS = (
    "yours, {c}",
    "with love from {c}",
    "see you soon, {c}",
    "{c}",
    "a big hug from {c}",
    "best wishes, {c}",
)
TALK_OPENINGS = (
    "{c} met {o} on the road.",
    "{c} sat down beside {o}.",
    "{c} looked at {o} and smiled.",
    "{o} asked {c} to tell {o.him} a little about {c.himself}.",
    "{c} and {o} waited for the ferry and began to talk.",
    "it was {c}'s turn to speak.",
)
TALK_CLOSINGS = (
    '"How nice," said {o}.',
    "{o} listened and nodded.",
    '"I did not know that," said {o}.',
    "then they went on.",
    '"And what about you?" {c} asked.',
    "{o} promised to remember it.",
)
DIALOGUE_OPENINGS = (
    "{o} and {d} were talking about {c}.",
    "{o} was new in the valley and did not know {c}.",
    "{o} wanted to know more about {c}.",
    "{c} walked by, and {o} turned to {d}.",
    "{o} and {d} saw {c} in the distance.",
    "{o} had a few things to ask about {c}.",
)
DIALOGUE_CLOSINGS = (
    '"Thank you," said {o}.',
    "then {c} came along, and they all laughed.",
    '"You know a lot," said {o}.',
    "{o} was glad to hear it.",
    '"I will remember that," said {o}.',
    "{d} was always right about such things.",
)

# Whole stories, told once about every character. None of them is one of the situations above.
PLOTS_TEXT = """
[it rained and rained|a cold rain fell|it poured all day], and {c} was glad to be at home {c.home.at}. Then
there was a knock. [Outside stood|It was] {o}, wet [from head to foot|to the bone]. {c} [laid|put] a
{c.colour} blanket round {o.him} and made [tea|something hot]. When the sun came out, they {c.hobby.did}
together, for {c} loved {c.hobby}, and [{o} did not mind|the rain was forgotten].

{c} the {c.kind} was [very sad|close to tears]. {c.His} {c.thing} was broken! {c} would not [eat|laugh] and
would not [talk|sleep]. But {c.his} best friend {c.friend} took the {c.thing} away and worked on it [all
night|for two days]. Then it was [whole again|as good as new]. {c} {c.thing.used} at once, and {c.friend}
[clapped|cheered|laughed with joy].

{c} and {c.friend} [had a picnic|sat in the grass and ate]. {c} had brought {c.food.portion}, and {c.friend}
had brought {c.friend.food.portion}. Then {o} [came by|sat down with them] and began to talk about {c.fear}.
{c} turned pale and [dropped everything|could not eat any more]. "[Hush|Stop it], {o}," said {c.friend},
"{c} is afraid of {c.fear}." So they talked about [the weather|games|old times], and the day was saved.

An artist came to the valley and [painted|made] a picture of {c}. In the picture {c} wears a {c.colour}
scarf and holds a {c.thing}. Behind {c.him} you can see {c.home}, where {c.he} lives. {c} looked at it for a
long time. "It is [very|quite] good," {c.he} said, "but my [nose|head] is too [big|small|round]." Now it
hangs in the [school|church].

Everyone wore a mask, and nobody was to know who was who. But {c} could not fool {c.friend}. "[Hello|Good
evening], {c}," said {c.friend}. "Your scarf is {c.colour}, you carry a {c.thing}, and you have eaten all
the {c.food}." {c} took off the mask and [laughed|sighed]. "You know me too well," {c.he} said. "That is
what best friends are for," said {c.friend}.

A [fairy|talking fish|little elf] gave {c} three wishes. First {c} wished for {c.food.portion}, and [there
it was|it was very good]. Then {c.he} wished for a {c.colour} coat, and [it came flying|there it hung]. {c}
thought [long|hard] about the last wish. At last {c.he} wished that {c.friend} were there, for nothing is
fun without a best friend.

{o} said that {c} should [move to|live in] the city. "[Oh no|Never]!" said {c}. "I am a {c.kind}. Who would
{c.kind.do} here? I would miss my house {c.home.at}. And who would be my best friend in the city? There is
only one {c.friend}." So {c} stayed, and [{o} never asked again|everyone was glad].

The children had to write about someone they knew, and a [little|small] [girl|boy] wrote about {c}. "{c} is
a {c.kind}," it said. "{c.He} can {c.hobby.do} better than my [uncle|father|aunt]. {c.He} is very brave, but
{c.he} is afraid of {c.fear}." When {c} read it, {c.he} [smiled|laughed] and kept the page.

{c} had to stay awake all night to watch over [the boats|a sick lamb]. To keep {c.his} eyes open, {c.he}
{c.hobby.did}. Then {c.he} ate {c.food.portion}. [Once|At midnight] {c.he} thought of {c.fear} and shook a
little. But the night [went by|passed], the sun rose, and {c} was still awake.

A new family came to live {c.home.at}, next door to {c}. {c} wanted to be a good neighbour. {c.He} brought
them {c.food.portion} and a {c.colour} ribbon for the baby. "[Welcome|Good day to you]!" said {c}. "If you
need anything, just knock." The family was [very happy|so pleased] to have a neighbour like {c}.

Nobody had seen {c} for [two|three|four] days. {c.friend} went from door to door. "I am looking for a
{c.kind} with a {c.colour} scarf," said {c.friend}. "{c.He} is my best friend, and {c.he} carries a
{c.thing}." On the next day {c} came home from a visit to an [aunt|uncle]. "[Did you miss me|Is something
wrong]?" asked {c}.

At night a robber broke into {c}'s house {c.home.at}. [He took the|First he took the] {c.thing}, and then he
ate up all the {c.food}. But {c.friend}, who was {c}'s best friend, saw him [in the street|come out]. "That
{c.thing} belongs to {c}!" cried {c.friend}. The robber [ran|was scared] and let it fall. {c} got it back,
but the {c.food} did not come back.

{c} did not want to be afraid of {c.fear} any more. "I am a {c.kind}, and a {c.kind} should be brave,"
{c.he} [said|thought]. To [keep calm|feel better], {c.he} {c.hobby.did} for a while. Then {c.he} thought of
{c.fear} and shook only a little. "That is a [beginning|good start]," said {c.friend}, {c.his} best friend.

{c} had a [bad cold|sore throat] and had to stay in bed. {c.He} could not {c.hobby.do}, and that was hard.
{c.He} did not even want {c.food}. But {c.friend} came to sit with {c.him} [every day|each morning]. After a
week {c} was [well|up] again. {c.He} ate {c.food.portion}, and then {c.he} {c.hobby.did} all day.

An old woman looked into {c}'s hand to read the future. "I see a house {c.home.at}," she said. "I see that
you are a {c.kind}. I see that you fear {c.fear}." "[Everyone knows that|That is no secret]," said {c}. "I
also see that you are kind and will give me a coin," said the old woman. {c} [laughed|smiled] and gave her
[one|two].

The king came to the valley and wanted to meet {c} the {c.kind}. {c} put on {c.his} {c.colour} scarf and
took {c.his} {c.thing}. "And what do you do for fun?" asked the king. "I {c.hobby.do}," said {c}. "So do I!"
was the answer. And they {c.hobby.did} together until it was late.
"""
PLOTS = tuple(" ".join(plot.split()) for plot in PLOTS_TEXT.split("\n\n"))
