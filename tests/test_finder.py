"""The learning rate finder whose axis is the rate that is taken."""
from functools import partial

import fastai.optimizer as fo
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.training import GradientAccumulation

from helpers import opts, plain_rect, recorded_learner, state_of
from radam_fastai.finder import rectified_lr_find
from radam_fastai.optimizer import RAdam

def found(learn, num_it, **kwargs):
    "The rates that a suggestion is made from, and what the finder returns if that is the fourth"
    seen = []
    def suggest(lrs, losses, num_it):
        seen.extend(lrs.tolist())
        return float(lrs[3]),(float(lrs[3]), float(losses[3]))
    return seen,rectified_lr_find(learn, num_it=num_it, start_lr=1e-5, end_lr=.1, stop_div=False, suggest_funcs=suggest, **kwargs)

@pytest.mark.many
@pytest.mark.parametrize('name', opts)
def test_finder_has_the_taken_rate_on_its_axis(name):
    lrs,res = found(recorded_learner(opts[name]), 80)
    set_to = [1e-5*1e4**(i/80) for i in range(80)]
    expect = [lr*plain_rect(t, .99, 5) for t,lr in enumerate(set_to, 1) if t > 8][:-5]
    assert lrs == pytest.approx(expect, rel=1e-5) and res.suggest == pytest.approx(expect[3])
    ax = plt.gca()
    assert 'lr·$r_t$' in ax.get_xlabel()
    x = ax.lines[0].get_xdata()
    assert np.isnan(x[:5]).all()
    assert x[5:] == pytest.approx([lr*plain_rect(t, .99, 5) for t,lr in enumerate(set_to, 1) if t > 5][:-5], rel=1e-5)
    plt.close('all')

@pytest.mark.many
@pytest.mark.parametrize('name', opts)
def test_finder_leaves_everything_as_found(name):
    learn = recorded_learner(opts[name])
    learn.fit_one_cycle(2, .01)
    model,state,hypers = state_of(learn)
    rows,recorded = learn.rectifier.to_frame(),{k: list(getattr(learn.recorder, k))
                                                for k in ('lrs', 'losses', 'iters', 'values', 'metric_names')}
    rectified_lr_find(learn, show_plot=False)
    model2,state2,hypers2 = state_of(learn)
    assert all(map(torch.equal, model, model2)) and hypers == hypers2 and len(state) == len(state2)
    for a,b in zip(state, state2): assert a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    pd.testing.assert_frame_equal(rows, learn.rectifier.to_frame())
    assert recorded == {k: list(getattr(learn.recorder, k)) for k in recorded}
    assert not [cb for cb in learn.cbs if type(cb).__name__ == '_EffectiveLR']

def test_finder_on_a_fresh_learner_leaves_no_optimizer():
    learn,again = recorded_learner(RAdam),recorded_learner(RAdam)
    assert rectified_lr_find(learn, show_plot=False) == again.rectified_lr_find(show_plot=False) # a method, as `lr_find` is
    assert learn.opt is None and not hasattr(learn.recorder, 'lrs')

def test_finder_with_accumulated_gradients():
    "r_t is the last update's; the first tenth has fewer updates"
    lrs,_ = found(recorded_learner(RAdam, cbs=[GradientAccumulation(8)]), 130, show_plot=False)
    assert lrs[:20] == pytest.approx([1e-5*1e4**(i/130)*plain_rect((i+1)//2, .99, 5) for i in range(13, 33)], rel=1e-5)
    for n in (80, 109): # the batch with which a tenth is over belongs to update 5 at 109, and to update 6 at 110
        with pytest.raises(ValueError, match=f'num_it={n} .* the first tenth of the updates'):
            rectified_lr_find(recorded_learner(RAdam, cbs=[GradientAccumulation(8)]), num_it=n)
    assert np.isfinite(found(recorded_learner(RAdam, cbs=[GradientAccumulation(8)]), 110, show_plot=False)[0]).all()

@pytest.mark.parametrize('opt_func, num_it, match', [
    (fo.Adam, 100, 'has no rectifier: use learn.lr_find'),
    (RAdam, 40, 'num_it=40 with sqr_mom=0.99.*Use a larger num_it'),
    (partial(RAdam, sqr_mom=.5), 100, 'learn.lr_find if sqr_mom is too small to rectify')])
def test_finder_refuses(opt_func, num_it, match):
    learn = recorded_learner(opt_func)
    with pytest.raises(ValueError, match=match): rectified_lr_find(learn, num_it=num_it)
    assert learn.opt is None and not len(learn.rectifier.to_frame())
