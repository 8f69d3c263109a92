"""Keep what a job found, without what it weighs: `python tools/keep.py RUNS FOLDER`.

Merges all records below RUNS into FOLDER/records.jsonl. Rows of single updates are left out, unless an experiment's answer is made of them;
everything else, settings, seeds, versions, device, every epoch's values, stays as it is.
`--report FOLDER` then draws the tables and figures."""
import sys
from pathlib import Path

from radam_fastai.recipes.records import append_record
from radam_fastai.recipes.report import find_records

UPDATES = {'degenerate': ('loss','adaptive'), 'adam-2k': ('loss',)} # experiment: columns of its updates that its answer needs

def kept(
    record:dict, # Of a run
) -> dict: # What is worth keeping of it
    "A record without the rows of its updates"
    steps = {k: record['steps'][k] for k in UPDATES.get(record['recipe'], ())}
    return {**{k: v for k,v in record.items() if k != 'steps'}, **({'steps':steps} if steps else {})}

if __name__ == '__main__':
    if len(sys.argv) != 3: sys.exit(__doc__)
    runs,folder = map(Path, sys.argv[1:])
    if (folder/'records.jsonl').exists(): sys.exit(f'{folder}/records.jsonl is there already: delete it, or name another folder')
    records = [kept(r) for rs in find_records(runs).values() for r in rs]
    for r in records: append_record(folder/'records.jsonl', r)
    print(f'{len(records)} records in {folder}/records.jsonl')
