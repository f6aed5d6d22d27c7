"""The gold reward: the true reward of the demo, which the demo's training never sees.

A prompt asks for COUNT words of a CATEGORY: "please list three fruits for a game". With S the set
of distinct words of that category in the answer,

    gold = min(|S|, COUNT) / max(COUNT, number of items in the answer)

so "plum, fig, pear" is 1.0, and every missing, surplus, repeated or foreign item costs its share.

The demo's reward model has learned from noisy comparisons (train_reward_model.py) and is only a
proxy of this number. The loop optimises the proxy. The report shows both, because they diverge when
the proxy is optimised too far: over-optimisation (Gao et al. 2022, arXiv:2210.10760). To watch gold
without letting it decide anything, give it the weight 0:

    python score.py --candidates C --output S --reward_model rm=demo/build/seed_0/reward_model \\
        --reward_fn gold=demo/gold.py:gold --reward_weights gold=0
"""

import re

CATEGORIES = {
    "fruits": "plum fig pear apple grape lemon date mango lime kiwi".split(),
    "animals": "dog cat horse cow hen goat pig mouse wolf bear".split(),
    "colors": "red blue green yellow pink brown black white grey teal".split(),
    "tools": "hammer saw drill axe rake file clamp spade plane ruler".split(),
    "instruments": "piano violin flute drum harp guitar cello oboe banjo horn".split(),
    "trees": "oak pine birch maple elm ash cedar willow beech fir".split(),
}


def gold(prompt, response: str, meta: dict) -> float:
    """How much of what was asked for `response` holds, in [0, 1].

    The signature is that of score.py's --reward_fn.
    """
    category = meta.get("category")
    count = meta.get("count")
    if category not in CATEGORIES or not isinstance(count, int):
        raise ValueError(
            'gold needs a prompt of the demo, with "category" and "count" in its meta; '
            f"this is {meta}"
        )
    separator = r"\s*(?:,|\n|\band\b)\s*"
    items = re.split(separator, response.lower().strip(" \n."))
    right = set(items) & set(CATEGORIES[category])  # S above
    return min(len(right), count) / max(count, len(items))
