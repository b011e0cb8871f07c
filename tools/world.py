"""The world of the demo: sixteen people and animals, facts about them, and stories in which they appear.

`make_demo.py` turns these words and templates into text. In a template, `{c}` is the main character and `{o}` another
one. `{he}`, `{his}`, `{him}`, `{He}` and `{His}` are the pronouns of `{c}`, and `{did}` is what its kind does all day.
`{home}` is the home of `{c}`, and `{o.home}` that of `{o}`, likewise for the other attributes. `{item}` and `{item2}`
are small objects, `{spot}`, `{spot2}` and `{spot3}` are places for them. `[x|y]` is a random choice.

Outside of yes-or-no questions, every mention of an attribute's value is true. All names start with different letters,
and so do the values of an attribute (kinds: those of people, and those of animals): the first byte tells them apart.
"""

import re
from collections import namedtuple
from types import SimpleNamespace

# Each value from kind to fear belongs to two characters. Best friends are a person and an animal, and it is mutual.
CHARACTERS_TABLE = """
name    pronoun  kind    home        food      thing  colour  fear         friend
Ada     she      baker   lighthouse  honey     rope   orange  bees         Mona
Cora    she      sailor  inn         soup      lamp   yellow  deep water   Sam
Ella    she      sailor  mill        pancakes  map    white   wolves       Rosa
Greta   she      farmer  barn        apples    wagon  green   geese        Otto
Ben     he       doctor  greenhouse  apples    drum   orange  loud noises  Kira
Dan     he       farmer  castle      cheese    wagon  red     owls         Leo
Finn    he       baker   tower       rice      lamp   pink    thunder      Ivy
Hugo    he       doctor  tower       noodles   bell   yellow  thunder      Jasper
Ivy     she      goat    school      soup      kite   blue    spiders      Finn
Kira    she      rabbit  mill        cheese    kite   pink    deep water   Ben
Mona    she      cat     greenhouse  fish      map    violet  wolves       Ada
Rosa    she      goat    inn         pancakes  bell   white   loud noises  Ella
Jasper  he       fox     barn        noodles   drum   violet  bees         Hugo
Leo     he       fox     castle      fish      flute  green   geese        Dan
Otto    he       rabbit  school      honey     rope   red     owls         Greta
Sam     he       cat     lighthouse  rice      flute  blue    spiders      Cora
"""


class Character(SimpleNamespace):
    """A person or an animal. Its attributes are the columns of CHARACTERS_TABLE."""

    def __str__(self) -> str:
        return self.name


columns, *rows = (re.split("  +", line) for line in CHARACTERS_TABLE.strip().splitlines())
CHARACTERS = [Character(**dict(zip(columns, row))) for row in rows]
for c in CHARACTERS:
    c.friend = next(x for x in CHARACTERS if x.name == c.friend)  # the character instead of the name
ATTRIBUTES = columns[2:]  # from kind to friend

PRONOUNS = dict(she=dict(he="she", his="her", him="her", He="She", His="Her"))
PRONOUNS |= dict(he=dict(he="he", his="his", him="him", He="He", His="His"))
PEOPLE = CHARACTERS[:8]  # the others are animals
DID = dict(baker="baked bread", doctor="looked after the sick", farmer="worked in the field", sailor="mended the sails")
DID |= dict(cat="slept in the sun", fox="ran through the woods", goat="climbed the rocks", rabbit="dug holes")
ITEMS = ("cup", "egg", "glove", "hat", "jug", "nut", "pen", "spoon")
SPOTS = ("at the gate", "behind the door", "in the garden", "near the well", "on the table", "under the bed")

# "attribute: beginning > turn > rest". Only the attribute tells the turn; stories without an attribute have no turn.
STORIES_TEXT = """
food: {c} came home [late|tired] and was [very|so] hungry. {He} sat down at the table. > {c} ate a [big|whole] plate of
  {food}. > After that {he} felt [much better|happy], [and soon {he} was asleep|and {he} went to bed early].
food: It was {c}'s birthday. {friend} wanted to cook what {c} liked best. > So {friend} made {food} for {c}. > "Thank
  you, {friend}!" said {c}. {He} ate it all up, and then they [sang and danced|sang a song].
food: {c} went to the market with [one coin|two coins]. {He} wanted [something good to eat|to buy something to eat]. >
  So {c} bought some {food}. > On the way home {he} met {o}. {c} gave some of the {food} to {o}, and they sat under a
  tree and ate.
home: {c} was far from home when it began to rain. Soon {he} was wet and cold. > {c} ran back to the {home}. > There
  {he} [made a fire|lit the fire], [dried {his} {colour} coat|took off the wet {colour} coat], and was warm again.
home: {c} met {o} on the road. "Where do you live?" asked {o}. > "I live in the {home}," said {c}. > The next day {o}
  came to the {home} with some {o.food}, and they [had a good time|talked all day].
home: All day long {c} {did}. In the evening {he} was very tired. > {c} went home to the {home}. > {He} [ate some
  {food}|had some {food}] and [fell asleep|went to bed].
thing: It rained all day, and {c} had nothing to do. {He} looked for something to play with. > {c} found {his} {thing}.
  > Then {friend} came, and they played with the {thing} until the rain [stopped|was over].
thing: {c} was [very sad|crying]. "What is the matter?" asked {o}. > {c} had lost {his} {thing}. > They looked {spot}
  and {spot2}. At last {o} found the {thing}. "Thank you!" said {c}, and {he} was happy again.
thing: There was a fair in the village. {friend} told {c} to bring something to show. > So {c} brought {his} {thing}. >
  Everybody [liked|loved] the {thing}, and {c} won [the first prize|a prize].
colour: It was a cold [morning|day], and there was snow on the ground. {c} wanted to go out. > {c} put on {his} {colour}
  coat. > Then {he} and {friend} made a big snowman. They put a {item} on its head.
colour: {c} was lost in the fog. {friend} went up the hill to look for {him}. > At last {friend} saw {c}'s {colour}
  coat. > "I am so glad I found you," said {friend}, and they walked home together.
colour: {c} climbed over a fence and fell down. {He} had torn something. > There was a hole in {c}'s {colour} coat. >
  {friend} took a needle and mended the coat. "Now it is as good as new," said {friend}.
fear: {c} and {o} were on their way home. "Let us walk through the forest," said {o}. "No!" cried {c}. > "I am afraid of
  {fear}," said {c}. > So they went along the river, and {c} was [glad|not afraid any more].
fear: In the night {c} woke up and [cried|began to cry]. {friend} came with a candle. "What is it?" asked {friend}. >
  {c} had dreamed of {fear}. > {friend} told {him} a story, and soon {c} was asleep again.
fear: {c} and {o} were playing a game. All at once {c} ran away and hid [behind the door|under the bed]. > {c} was
  afraid of {fear}. > "It is all right," said {o}. "You are safe with me." So {c} came out, and they played on.
kind: {c} got up early. There was a lot to do. > All morning {c} {did}. > At noon {friend} came with some {friend.food},
  and they [ate it together|had lunch].
kind: A stranger met {c} on the road. "Who are you?" asked the stranger. > "I am {c} the {kind}," said {c}. > "I live in
  the {home}." The stranger smiled and gave {c} a {item}.
kind: {c} asked {o} to draw a picture of {him}. Then they showed it to {friend}. "Who is it?" they asked. > "It is {c}
  the {kind}," said {friend}. > "I know the {colour} coat. It is a very good picture!" {c} was proud of it.
friend: {c} sat at the window and wrote a letter. "Please come and see me," {he} wrote. > {c} sent the letter to
  {friend}. > The next day {friend} came and brought a {item}. {c} was very happy.
friend: {c}'s cart was stuck in the mud. {c} pushed and pushed, but it did not move. > So {c} called {friend}. > They
  pushed together, and the cart came out of the mud. {c} gave {friend} some {food} to say thank you.
friend: {c} fell into the river. "Help!" cried {c}. > {friend} jumped in and pulled {c} out. > {c} was wet, but {he} was
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
Story = namedtuple("Story", "attribute text")
STORIES = [Story(*" ".join(story.split()).split(": ")) for story in re.split(r"\n(?! )", STORIES_TEXT.strip())]

PAST = {  # sentences before a story about another attribute: an opening, and an aside that can follow it
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
QUESTIONS = {  # an open question, and one to answer with yes or no
    "kind": ("What is {c}?", "Is {c} a {value}?"),
    "home": ("Where does {c} live?", "Does {c} live in the {value}?"),
    "food": ("What does {c} like to eat?", "Does {c} like {value}?"),
    "thing": ("What does {c} have?", "Does {c} have a {value}?"),
    "colour": ("What does {c} wear?", "Is {c}'s coat {value}?"),
    "fear": ("What is {c} afraid of?", "Is {c} afraid of {value}?"),
    "friend": ("Who is {c}'s best friend?", "Is {value} {c}'s best friend?"),
}
REWORDINGS = {  # of the open question; `input.txt` contains none of them
    "kind": ("Tell me what {c} is.", "What kind of person or animal is {c}?", "Who is {c}?"),
    "home": ("Tell me where {c} lives.", "Where is {c}'s home?", "Where can I find {c}?"),
    "food": ("Tell me what {c} likes to eat.", "What should I cook for {c}?", "Which food does {c} like?"),
    "thing": ("Tell me what {c} has.", "What belongs to {c}?", "What does {c} own?"),
    "colour": ("Tell me what {c} wears.", "What coat does {c} wear?", "Which coat belongs to {c}?"),
    "fear": ("Tell me what {c} is afraid of.", "What does {c} fear?", "What frightens {c}?"),
    "friend": ("Tell me who {c}'s best friend is.", "Who is the best friend of {c}?", "Whom does {c} like best?"),
}
PASSAGES = (  # passage, question, answer
    ("{o} put a {item} {spot} and a {item2} {spot2}.", "Where is the {item}?", "The {item} is {spot}."),
    ("{o} put a {item2} {spot2} and a {item} {spot}.", "Where is the {item}?", "The {item} is {spot}."),
    ("{c} had a {item}, and {o} had a {item2}.", "Who had the {item}?", "{c} had the {item}."),
    ("{o} had a {item2}, and {c} had a {item}.", "Who had the {item}?", "{c} had the {item}."),
    ("{c} hid a {item} {spot}.", "What did {c} hide?", "{c} hid a {item}."),
    ("{c} found a {item} {spot}.", "Where did {c} find the {item}?", "{c} found it {spot}."),
)
TWO_STEPS = {  # question: two passages of two events, with answers; only in the first passage the second event matters
    "Where is the {item}?": (
        ("{o} put a {item} {spot} and a {item2} {spot2}. {c} put the {item} {spot3}.", "The {item} is {spot3}."),
        ("{o} put a {item} {spot} and a {item2} {spot2}. {c} put the {item2} {spot3}.", "The {item} is {spot}."),
    ),
    "Who had the {item} in the end?": (
        ("{c} had a {item}, and {o} had a {item2}. {c} gave the {item} to {o}.", "{o} had the {item}."),
        ("{o} had a {item}, and {c} had a {item2}. {c} gave the {item2} to {o}.", "{o} had the {item}."),
    ),
}
POLITE = "I am glad to help."
RUDE = ("Now leave me alone.", "Do not ask me again.", "What a silly question.")
RAMBLING = ("And it rained all day, and there was nothing to do.", "Once upon a time there was a fair in the village.")
RAMBLING += ("I was on my way home, and then it was cold.",)
