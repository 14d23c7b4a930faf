"""When an answer has fallen into repetition: one rule for generate, which drops such answers, and
for bench, which measures them apart (a drafter guesses them all, and nobody wants them)."""

SHORTEST = 24  # tokens below which nothing is called repetitive
PERIODS = 32  # longest loop looked for
LOOPS = 4  # times that a loop must have come round at the end of the answer
GRAM, SHARE = 4, 0.5  # more than this share of 4-grams seen before in the answer


def is_repetitive(ids: list[int]) -> bool:
    """True when an answer ends in a loop of up to 32 tokens, or most of its 4-grams are repeats."""
    if len(ids) < SHORTEST:
        return False
    for period in range(1, PERIODS + 1):
        tail = ids[-max(SHORTEST, LOOPS * period) :]
        if len(tail) >= LOOPS * period and tail[period:] == tail[:-period]:
            return True
    grams = list(zip(*(ids[i:] for i in range(GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) > SHARE
