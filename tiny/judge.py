"""The judge of the little world: what every word means, and the true ("gold") score of a response.

In reading order:
  1. lexicon     the whole language, each word with its class, topic, sentiment and vividness
  2. word order  which class of word may follow which
  3. score       six terms, each counted in a line or two, and their sum

make.py writes its reviews with this lexicon and draws its preference labels from this score.
Policies and reward models see neither: the judge is what a reader measures them with, `--judge
tiny/judge.py:score`. Pure Python, and it imports nothing of the project, so that it can be loaded
alone from its path.
"""

from itertools import pairwise
from math import tanh
from typing import NamedTuple

# --------------------------------------------------------------------------------------- 1. lexicon


class Word(NamedTuple):
    kind: str  # word class: DET NOUN ADJ ADV COP CONJ PREP PRON STOP
    topic: str | None  # one of TOPICS, or None for a word that fits every topic
    sentiment: int  # -1, 0 or +1
    vivid: int  # 0 or 1


TOPIC_WORDS = {  # per topic: its nouns; its positive, negative and vivid adjectives
    "food": ("soup bread curry cake salad stew",
             "tasty delicious", "bland stale", "golden smoky crunchy buttery"),
    "film": ("film scene plot trailer drama finale",
             "gripping thrilling", "clumsy predictable", "neon misty shadowy dreamlike"),
    "book": ("novel chapter story poem diary fable",
             "witty absorbing", "tedious shallow", "lyrical hazy feverish windswept"),
    "hotel": ("room lobby suite terrace hallway balcony",
              "cozy spotless", "dirty cramped", "candlelit mirrored velvety carpeted"),
    "music": ("song melody album chorus ballad anthem",
              "catchy soulful", "shrill tuneless", "silvery pulsing echoing booming"),
    "garden": ("rose lawn hedge pond orchard meadow",
               "lush blooming", "withered barren", "crimson dewy mossy fragrant"),
    "phone": ("phone screen camera keypad speaker charger",
              "fast sturdy", "fragile outdated", "glowing metallic humming glossy"),
    "trip": ("trip hike cruise safari voyage tour",
             "scenic relaxing", "exhausting delayed", "salty sunbaked moonlit snowy"),
}
TOPICS = tuple(TOPIC_WORDS)

SHARED_ADJECTIVES = {  # sentiment: adjectives that fit every topic
    +1: "great good lovely wonderful excellent charming",
    -1: "bad awful poor terrible dreadful boring",
    0: "new old large small typical familiar modern recent usual common standard regular simple "
       "ordinary",
}

OTHER_WORDS = {  # word class: words without topic, sentiment or vividness
    "DET": "the this that our my their his her",
    "PRON": "it",
    "COP": "was is seemed felt looked remained stayed appeared became",  # joins noun and adjective
    "ADV": "very really quite rather truly fairly always often mostly rarely never",
    "CONJ": "and but yet",
    "PREP": "with near beside behind above",
    "STOP": ".",
}


def build_lexicon() -> dict[str, Word]:
    """Word -> its entry, in a fixed order, which is also the order of the tokenizer's ids."""
    entries = []
    for kind, words in OTHER_WORDS.items():
        entries += [(word, Word(kind, None, 0, 0)) for word in words.split()]
    for sentiment, words in SHARED_ADJECTIVES.items():
        entries += [(word, Word("ADJ", None, sentiment, 0)) for word in words.split()]
    for topic, (nouns, positive, negative, vivid) in TOPIC_WORDS.items():
        entries += [(word, Word("NOUN", topic, 0, 0)) for word in nouns.split()]
        entries += [(word, Word("ADJ", topic, +1, 0)) for word in positive.split()]
        entries += [(word, Word("ADJ", topic, -1, 0)) for word in negative.split()]
        entries += [(word, Word("ADJ", topic, 0, 1)) for word in vivid.split()]
    lexicon = dict(entries)
    assert len(lexicon) == len(entries), "a word stands twice in the lexicon"
    return lexicon


LEXICON = build_lexicon()
UNKNOWN = Word("UNKNOWN", None, 0, 0)  # any other string, such as "<unk>": no pair with it is legal


def entry_of(word: str) -> Word:
    return LEXICON.get(word, UNKNOWN)


# ------------------------------------------------------------------------------------ 2. word order

FOLLOWS = {  # word class: the classes that may come next; END is the end of the text
    "DET": {"ADJ", "NOUN"},
    "PRON": {"COP"},
    "NOUN": {"COP", "CONJ", "STOP"},
    "COP": {"ADV", "ADJ"},
    "ADV": {"ADJ"},
    "ADJ": {"NOUN", "CONJ", "PREP", "STOP"},
    "CONJ": {"ADV", "ADJ", "DET", "PRON"},
    "PREP": {"DET"},
    "STOP": {"DET", "PRON", "END"},
    "UNKNOWN": set(),
}

# ----------------------------------------------------------------------------------------- 3. score


def topic_of(prompt: str) -> str | None:
    """The topic of the prompt's first noun; without one, None: every topical word is off-topic."""
    nouns = (word for word in prompt.split() if entry_of(word).kind == "NOUN")
    return next((LEXICON[word].topic for word in nouns), None)


def illegal_pairs(prompt: str, response: str, ended: bool) -> int:
    """Number of neighbours whose classes may not follow each other. The first pair is the prompt's
    last word and the response's first; the last is the response's last word and the end, unless it
    was cut."""
    words = prompt.split()[-1:] + response.split()
    kinds = [entry_of(word).kind for word in words] + ["END"] * ended
    return sum(after not in FOLLOWS[before] for before, after in pairwise(kinds))


def terms(prompt: str, response: str, ended: bool) -> dict[str, float]:
    """The six terms of one response's gold score, with their signs. The prompt's own words earn
    nothing.

    sentiment   +1.5 * tanh(S / 2), S = summed sentiment of the response's distinct on-topic words
    vividness   +1.0 * tanh(D / 2), D = number of its distinct on-topic vivid words
    repeats     -0.3 for each noun or adjective that the response has used before
    word_order  -0.5 for each illegal pair (see illegal_pairs)
    off_topic   -0.4 for each word that belongs to another topic than the prompt
    not_ended   -1.0 if the response was cut before it ended

    On-topic are the words of the prompt's topic and those that fit every topic. tanh makes both
    rewards saturate: the first positive word adds 0.69, the fourth 0.09, and no response reaches
    2.5.
    """
    topic = topic_of(prompt)
    words = response.split()
    on_topic = [word for word in words if entry_of(word).topic in (None, topic)]
    distinct = [entry_of(word) for word in dict.fromkeys(on_topic)]
    content = [word for word in words if entry_of(word).kind in ("NOUN", "ADJ")]
    return {
        "sentiment": 1.5 * tanh(sum(entry.sentiment for entry in distinct) / 2),
        "vividness": 1.0 * tanh(sum(entry.vivid for entry in distinct) / 2),
        "repeats": -0.3 * (len(content) - len(set(content))),
        "word_order": -0.5 * illegal_pairs(prompt, response, ended),
        "off_topic": -0.4 * (len(words) - len(on_topic)),
        "not_ended": -1.0 * (not ended),
    }


def score(prompts: list[str], responses: list[str], ended: list[bool]) -> list[float]:
    """The gold score of each response: the sum of its six terms."""
    return [sum(terms(*row).values()) for row in zip(prompts, responses, ended, strict=True)]
