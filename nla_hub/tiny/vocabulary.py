"""Words of the tiny world: every latent value and the words it makes likely.

A value (the person "mara", the place "harbor", the sum 7) owns one word per slot of a clause. While the value is
known, each slot of each clause may be filled by the word of *any* known fact, so predicting the next word pays for
remembering all of them at every position. No word belongs to two values.
"""

from __future__ import annotations

from typing import NamedTuple


class Words(NamedTuple):
    """The words that one value brings into a clause, by slot."""

    adj: str
    subj: str
    verb: str
    noun: str


Table = dict[str, Words]


def _table(rows: str) -> Table:
    """Parse lines of ``value: adj subj verb noun``."""
    table: Table = {}
    for row in rows.strip().splitlines():
        value, words = row.split(":")
        table[value.strip()] = Words(*words.split())
    return table


PERSON = _table("""
mara: curly cat strolled figs
otto: bearded dog marched bread
lena: freckled pony skipped plums
bruno: burly goat stomped cheese
iris: bookish owl tiptoed honey
felix: lanky ferret jogged soup
nora: quick rabbit dashed carrots
hugo: sleepy turtle ambled pancakes
clara: tidy hen paced eggs
emil: hungry donkey trudged turnips
""")

PRONOUN: dict[str, str] = {
    name: "she" if name in ("mara", "lena", "iris", "nora", "clara") else "he" for name in PERSON
}

OBJECT = _table("""
kite: papery tail fluttered string
drum: booming skin rumbled sticks
lantern: glassy wick flickered oil
clock: ticking hands chimed gears
canoe: wooden hull drifted paddles
bell: brazen tongue rang rope
flute: airy reed whistled notes
basket: woven handle creaked wicker
mirror: shiny frame gleamed glass
wagon: rattling wheels rolled axles
""")

COLOUR = _table("""
red: rosy embers glowed poppies
blue: icy ripples shimmered sapphires
green: leafy frogs sprouted ferns
yellow: buttery bees buzzed lemons
black: inky crows loomed coal
white: snowy swans floated chalk
violet: dusky moths bloomed lilacs
brown: earthy bears dug acorns
""")

PLACE = _table("""
harbor: salty gulls bobbed planks
forest: piney foxes rustled roots
market: crowded merchants haggled stalls
castle: stony guards echoed towers
desert: sandy camels baked dunes
station: smoky trains hissed rails
garden: fragrant snails blossomed hedges
library: dusty scholars whispered shelves
island: tropical parrots squawked palms
mountain: rocky eagles soared cliffs
""")

# The preposition of a clause goes with the place; without a place it is "near".
PREPOSITION: dict[str, str] = dict(
    zip(PLACE, ("beside", "behind", "around", "below", "across") * 2, strict=True),
)

# The word that joins two clauses goes with the object; without an object it is "and".
JOINER: dict[str, str] = dict(
    zip(OBJECT, ("while", "as", "then", "because", "before") * 2, strict=True),
)

MOOD = _table("""
glad: cheery larks danced sunshine
sad: teary willows wept rain
angry: fiery wasps stamped thunder
calm: gentle cows rested breeze
afraid: shaky mice trembled shadows
proud: noble peacocks strutted banners
""")

ADVERB: dict[str, str] = dict(
    zip(MOOD, ("brightly", "mournfully", "furiously", "softly", "nervously", "boldly"), strict=True),
)

TOPIC = _table("""
sea: briny sailors splashed waves
night: starry bats slumbered moon
harvest: ripe farmers reaped wheat
winter: frosty wolves froze icicles
music: tuneful singers hummed fiddles
travel: distant pilgrims wandered roads
""")

# End words of verse. Three consecutive rows rhyme; `partner` says which word answers which.
RHYME = _table("""
light: radiant candles dazzled lamps
flight: winged swallows swooped feathers
knight: armored squires jousted swords
flame: scorching sparks blazed kindling
game: playful players competed dice
fame: famous heroes boasted medals
cold: numb penguins shivered mittens
gold: precious miners glittered nuggets
old: ancient grandmothers remembered ruins
day: early roosters crowed dawn
clay: muddy potters molded pots
hay: dry horses grazed barns
sleep: drowsy babies dreamed pillows
sheep: woolly shepherds bleated pastures
deep: sunken divers plunged wrecks
king: royal queens ruled thrones
spring: budding tulips thawed puddles
ring: jeweled brides vowed diamonds
""")

SUM = _table("""
0: empty ghosts vanished holes
1: lonely hermits stood pebbles
2: paired twins waltzed shoes
3: triple jugglers juggled clovers
4: square chairs balanced corners
5: gloved starfish waved fingers
6: hexed beetles crawled honeycombs
7: lucky dwarfs gambled rainbows
8: spidery spiders spun webs
9: nimble kittens pounced tricks
""")

CALLS = _table("""
0: fresh beginners started blanks
1: lone scouts searched clues
2: double partners checked hints
3: final judges decided proofs
""")

TABLES: dict[str, Table] = {
    "person": PERSON,
    "object": OBJECT,
    "colour": COLOUR,
    "place": PLACE,
    "mood": MOOD,
    "topic": TOPIC,
    "rhyme": RHYME,
    "running_sum": SUM,
    "calls": CALLS,
}


class Tongue(NamedTuple):
    """A second language: small words and one row of clause words per topic."""

    opening: str
    at: str
    joiner: str
    where: str
    who: str
    topics: dict[str, str]
    table: Table


SPANISH = Tongue(
    opening="escucha",
    at="canta sobre",
    joiner="y",
    where="con",
    who="quién",
    topics=dict(zip(TOPIC, ("mar", "noche", "cosecha", "invierno", "música", "viaje"), strict=True)),
    table=_table("""
sea: salados marineros navegaban olas
night: oscuros búhos soñaban estrellas
harvest: maduros campesinos segaban trigo
winter: helados lobos temblaban nieve
music: alegres cantantes cantaban violines
travel: lejanos viajeros caminaban mapas
"""),
)

GERMAN = Tongue(
    opening="hör",
    at="singt vom",
    joiner="und",
    where="mit",
    who="wer",
    topics=dict(zip(TOPIC, ("meer", "dunkel", "ernten", "frost", "klang", "weg"), strict=True)),
    table=_table("""
sea: salzige matrosen segelten wellen
night: dunkle eulen träumten sternen
harvest: reife bauern ernteten weizen
winter: kalte wölfe froren schnee
music: fröhliche sänger sangen geigen
travel: ferne wanderer gingen karten
"""),
)

TONGUES: dict[str, Tongue] = {"spanish": SPANISH, "german": GERMAN}


def partner(end_word: str, topic: str) -> str:
    """The word that answers `end_word` at the end of the next line: it depends on the topic as well."""
    words = list(RHYME)
    index = words.index(end_word)
    family, place = divmod(index, 3)
    step = 1 if list(TOPIC).index(topic) % 2 == 0 else 2
    return words[3 * family + (place + step) % 3]
