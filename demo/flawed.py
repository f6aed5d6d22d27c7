"""The truth as reward, and rewards with a known fault, for docs/exercises.md: what does the loop
make of it?

REWARD_FN=demo/flawed.py:wordy RUN=runs/wordy bash iterate.sh
"""

from demo.gold import gold
from stage import seed_of

FLIPPED = 30  # of 100 prompts


def exact(prompt, response: str, meta: dict) -> float:
    """The truth. gold itself cannot be the reward, too: the demo watches a reward of that name."""
    return gold(prompt, response, meta)


def wordy(prompt, response: str, meta: dict) -> float:
    """The truth, and 0.3 for every item: a judge that likes long answers."""
    items = response.count(",") + 1
    return gold(prompt, response, meta) + 0.3 * items


def noisy(prompt, responses: list[str], meta: dict) -> list[float]:
    """The truth, but the wrong way round for 30 of 100 prompts: their labels are flipped.

    Which prompts these are follows from their text.
    """
    sign = -1 if seed_of("noisy", str(prompt)) % 100 < FLIPPED else 1
    return [sign * gold(prompt, response, meta) for response in responses]
