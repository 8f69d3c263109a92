"The recipes of nbs/tutorials/forum_recipes.ipynb, its cells run as they are and with the optimizers that they stand instead of"
import json
import warnings
from importlib.util import find_spec
from pathlib import Path

import fastai.optimizer as fo
import pytest
import torch
from fastai.basics import defaults, set_seed

page = Path(__file__).resolve().parent.parent/'nbs/tutorials/forum_recipes.ipynb'
instead_of = dict(RAdam=fo.RAdam, ranger=fo.ranger, torch_optim=torch.optim)
another = dict(RAdam=fo.Adam, ranger=fo.Adam, torch_optim=type('', (), dict(RAdam=torch.optim.Adam)))

def read():
    "Title and code of each cell"
    title = ''
    for c in json.loads(page.read_text())['cells']:
        src = ''.join(c['source'])
        if src.startswith('## '): title = src[3:].splitlines()[0]
        if c['cell_type'] == 'code' and '#| eval: false' not in src: yield title,src

CELLS = list(read())
RECIPES = [title for title,src in CELLS if 'instead of' in src]

def run_page(optimizers):
    "The losses of each recipe, all and in order, under `optimizers`"
    ns,losses,callbacks = {},{},defaults.callbacks
    try:
        for title,src in CELLS:
            if 'import lightning' in src and find_spec('lightning') is None: continue
            set_seed(0, reproducible=True)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore') # mixed precision without a GPU, workers
                exec(src, ns)
            ns.update(optimizers)
            if 'instead of' in src: losses[title] = [float(o) for o in (ns['learn'].recorder.losses if 'learn =' in src else ns['losses'])]
    finally: defaults.callbacks = callbacks
    return losses

@pytest.fixture(scope='module')
def results(): return [run_page(o) for o in ({}, instead_of, another)]

@pytest.mark.slow
@pytest.mark.xdist_group('forum') # or each worker would run the page
@pytest.mark.parametrize('title', RECIPES)
def test_same_losses(title, results):
    if title not in results[0]: pytest.skip('lightning is not installed')
    ours,theirs,other = (torch.tensor(r[title], dtype=torch.float64) for r in results)
    print(f'{title}: {len(ours)} losses, the last {ours[-1]:.6f} and {theirs[-1]:.6f}')
    torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=0) # rounding, grown over up to 66 updates
    assert (ours-theirs).abs().max() < .02*(other-theirs).abs().max() # Adam in that place would be seen

def test_recipes_are_short():
    assert len(RECIPES) == 11
    for title,src in CELLS:
        if 'instead of' in src and 'lightning' not in src: assert len([l for l in src.splitlines() if not l.startswith('#|')]) <= 8, title
