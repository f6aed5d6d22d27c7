"""Verifiable rewards for the demo: right or wrong can be checked, so no reward model is needed.

    REWARD_FN=demo/verifiable.py:correct RUN=runs/verifiable bash iterate.sh

"name three trees" has the truth in its meta, {"category": "trees", "count": 3}, as an arithmetic
problem would have its result there. An answer is correct where its form is that of a list,
"oak, elm, fir", and it holds COUNT different words of the category and nothing else. Such a reward
is 0 or 1, so it often ties; make_pairs.py counts the prompts whose answers are all right or all
wrong.
"""

from collections import Counter

from demo.gold import CATEGORIES


def correct(prompt, response: str, meta: dict) -> float:
    """1 if the answer is right, else 0. Called once per answer."""
    items = response.split(", ")
    right = set(items) & set(CATEGORIES[meta["category"]])
    return float(len(items) == len(right) == meta["count"])


def correct_and_rare(prompt, responses: list[str], meta: dict) -> list[float]:
    """A right answer shares the reward 1 with all answers that equal it; a wrong one gets 0.

    `responses`, and not `response`: so score.py calls it once per prompt, with all answers. Of two
    right answers, the one that fewer others repeat wins: the policy does not settle on one list.
    """
    times_written = Counter(responses)
    rewards = []
    for response in responses:
        rewards.append(correct(prompt, response, meta) / times_written[response])
    return rewards
