"""How hard the attacking tests attack, and what became of it: their sums stand at the end of pytest's output."""
import os
from collections import Counter

FULL = bool(os.environ.get('RADAM_FULL')) # everything, instead of what fits into every test run
tally = Counter() # (what was tried, how it ended) → how often

def summary():
    "A line for each kind of attack"
    for kind in dict.fromkeys(k for k,_ in tally):
        ends = {end: n for (k,end),n in tally.items() if k == kind}
        yield f"{kind}: {sum(ends.values()):,} tried; " + ', '.join(f'{n:,} {end}' for end,n in ends.items())
