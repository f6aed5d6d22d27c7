"""The language game: what is asked, and how a sloppy writer answers.

    please list three fruits for a game  ->  plum, fig, pear

6 categories x 4 counts x 96 phrasings = 2,304 prompts: enough for 200 held out and three iterations
of 512 that never repeat one. A held-out prompt is a new sentence of known parts, so it measures
whether the policy has learned the request, and not the sentence.
"""

import itertools
import random

from demo.gold import CATEGORIES

COUNTS = {2: "two", 3: "three", 4: "four", 5: "five"}
OPENERS = [
    "please list",
    "name",
    "give me",
    "tell me",
    "write down",
    "i need",
    "can you list",
    "think of",
]
CLOSERS = [
    "",
    " for a game",
    " for my class",
    " in one line",
    " that you know",
    " for a quiz",
    " for a child",
    " for a poem",
    " right now",
    " for my friend",
    " as a list",
    " today",
]

# How careful the writer is that the policy imitates: so careless that most answers fail (gold 0.37
# on average, one in six exact), but so varied that the best of eight answers is mostly a good one.
# This difference is what pairs can teach.
RIGHT_CATEGORY = 0.5
RIGHT_COUNT = 0.6


def make_prompts(seed: int, heldout: int = 200) -> tuple[list[dict], list[dict]]:
    """Every prompt once, shuffled and split: (training rows, held-out rows)."""
    parts = list(itertools.product(OPENERS, COUNTS, CATEGORIES, CLOSERS))
    random.Random(seed).shuffle(parts)
    rows = []
    for i, (opener, count, category, closer) in enumerate(parts):
        question = f"{opener} {COUNTS[count]} {category}{closer}"
        row = {
            "id": f"p{i:06d}",
            "prompt": [{"role": "user", "content": question}],
            "meta": {"category": category, "count": count},  # what gold.py looks at
        }
        rows.append(row)
    return rows[heldout:], rows[:heldout]


def sloppy_answer(meta: dict, rng: random.Random) -> str:
    """An answer that often misses: another category, another count, the same word twice."""
    category, count = attempt(meta, RIGHT_CATEGORY, RIGHT_COUNT, rng)
    words = rng.choices(CATEGORIES[category], k=count)  # with replacement
    return ", ".join(words)


def varied_answer(meta: dict, rng: random.Random) -> str:
    """An answer of a new writer, who is anything between careless and careful."""
    category, count = attempt(meta, rng.uniform(0.3, 1), rng.uniform(0.3, 1), rng)
    careful = rng.random()  # the chance that the writer looks for repeated words
    if rng.random() < careful:
        words = rng.sample(CATEGORIES[category], k=count)
    else:
        words = rng.choices(CATEGORIES[category], k=count)
    return ", ".join(words)


def attempt(
    meta: dict, right_category: float, right_count: float, rng: random.Random
) -> tuple[str, int]:
    """What was asked for, or with the chances 1 - right_… another category, another count."""
    category = meta["category"]
    count = meta["count"]
    if rng.random() > right_category:
        category = rng.choice([c for c in CATEGORIES if c != category])
    if rng.random() > right_count:
        count = rng.choice([c for c in range(1, 7) if c != count])
    return category, count
