"""How glad a text sounds, by a lexicon that people rated: the truth of benchmarks/real.

VADER (Hutto and Gilbert, ICWSM 2014): about 7,500 words and signs with a valence that ten people
gave them, and rules for negation, degree and emphasis. `compound` is the sum of valences, squeezed
into [-1, 1]; 0 where no word is known. Needs the package vaderSentiment.
"""

import functools

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


@functools.cache
def analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def score(prompts: list[str], responses: list[str], ended: list[bool]) -> list[float]:
    """VADER's compound of each response alone, whatever its prompt and however it ended."""
    return [analyzer().polarity_scores(response)["compound"] for response in responses]
