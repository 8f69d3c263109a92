"""The recorders of gradients against numpy on gradients and averages that an independent callback has copied."""
import copy
import pickle
import random
from functools import partial

import fastai.optimizer as fo
import numpy as np
import pytest
import torch
from fastai.basics import DataLoaders, Learner, OptimWrapper, load_learner
from fastai.callback.all import GradientAccumulation, GradientClip, MixedPrecision, ProgressCallback
from fastai.callback.core import Callback, CancelBackwardException, CancelBatchException, CancelStepException, CancelTrainException
from torch import nn

from helpers import Data
from radam_fastai import gradients
from radam_fastai.gradients import (
    AdaptiveLRVariance,
    GradientHistogram,
    layer_parameters,
    log_edges,
    lr_variances,
    sample_coordinates,
    squared_averages,
    squared_gradients,
)
from radam_fastai.optimizer import RAdam, Ranger
from radam_fastai.torch_optim import RAdamWrapper

def first_and_rest(m): return [list(m[0].parameters()), list(m[2].parameters())]

def get_learner(opt_func=RAdam, cbs=(), n=32, model=None, **kwargs):
    "8 batches an epoch; the relu gives some exact zeros"
    torch.manual_seed(0)
    random.seed(0) # of the loaders' order
    ds = Data((torch.randn(4), torch.randn(2)) for _ in range(n))
    dls = DataLoaders.from_dsets(ds, Data(ds[:4]), bs=4, shuffle=True, num_workers=0, device='cpu')
    model = model or nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    learn = Learner(dls, model, loss_func=nn.MSELoss(), opt_func=opt_func, splitter=first_and_rest, cbs=cbs, train_bn=False, **kwargs)
    learn.remove_cb(ProgressCallback)
    learn.logger = print
    return learn

class Copy(Callback):
    "The gradients that each step was given: copied by the optimizer's own call"
    def before_fit(self):
        self.grads,step = getattr(self, 'grads', []),self.opt.step
        def copying(*args, **kwargs):
            self.grads.append([None if p.grad is None else p.grad.detach().clone() for p in self.model.parameters()])
            return step(*args, **kwargs)
        self.opt.step = copying
    def after_fit(self): del self.opt.__dict__['step']

def flat(grads): return torch.cat([g.flatten() for g in grads if g is not None]).abs().double().numpy()

def expected(grads, edges):
    "zero, below, above, non-finite, and numpy's counts"
    x = flat(grads)
    ok = np.isfinite(x)
    return [(x == 0).sum(), ((x > 0) & (x < edges[0])).sum(), (ok & (x >= edges[-1])).sum(), (~ok).sum(), *np.histogram(x[ok], edges)[0]]

def counts(learn): return learn.gradient_histogram.to_frame().iloc[:, 2:].to_numpy()

wrapped = partial(OptimWrapper, opt=torch.optim.AdamW)
opts = {'RAdam': RAdam, 'Ranger': partial(Ranger, k=2), 'RAdamWrapper': RAdamWrapper,
        'fastai Adam': partial(fo.Adam, decouple_wd=False, wd=.1),
        'fastai SGD': fo.SGD, 'fastai ranger': partial(fo.ranger, k=2), 'torch AdamW': wrapped,
        'torch SGD': partial(OptimWrapper, opt=torch.optim.SGD)}

@pytest.mark.parametrize('name', opts)
def test_histogram_is_numpys(name):
    "Of every step, over an axis that some gradients are off, with the gradients as the optimizer gets them (an L2 penalty comes after)"
    learn = get_learner(opts[name], [GradientHistogram(every=1, lo=1e-2, hi=.3, bins=7), Copy()])
    learn.fit(2, .05)
    df,edges = learn.gradient_histogram.to_frame(),learn.gradient_histogram.edges
    assert list(df.columns) == ['step', 'epoch', 'zero', 'below', 'above', 'non_finite', *range(7)]
    assert df.step.tolist() == list(range(1, 17)) and df.epoch.tolist() == [0]*8 + [1]*8
    want = np.array([expected(g, edges) for g in learn.copy.grads])
    assert (counts(learn) == want).all() and want[:, [0, 1, 2, 5]].all(axis=1).any()

def test_gradients_that_are_not_finite_are_counted():
    class Spoil(Callback):
        def before_step(self): self.model[0].weight.grad[0, :3] = torch.tensor([torch.inf, torch.nan, 0.])
    learn = get_learner(fo.SGD, [Spoil(), GradientHistogram(steps=[1])])
    learn.fit(1, 0.)
    row = learn.gradient_histogram.to_frame().iloc[0]
    assert row.non_finite == 2 and row.zero >= 1 and row[2:].sum() == 44

def test_smallest_numbers_are_not_zero():
    h = GradientHistogram(steps=[1])
    p = nn.Parameter(torch.zeros(4))
    p.grad,h.sample = torch.tensor([1e-45, -1e-40, 0., -0.]),[(p, torch.arange(4))]
    assert h.measure()[:3].tolist() == [2, 2, 0]

def test_edges_belong_to_the_bin_above_and_fp16_gradients_count_as_they_are():
    h = GradientHistogram(steps=[1], lo=1., hi=4., bins=2)
    p,q = (nn.Parameter(torch.zeros(3, dtype=d)) for d in (torch.float16, torch.float64))
    p.grad,q.grad = torch.tensor([1., 2, -4], dtype=torch.float16),torch.tensor([3.999, .999, -1], dtype=torch.float64)
    h.sample = [(o, torch.arange(3)) for o in (p, q)]
    assert h.measure().tolist() == [0, 1, 2, 2, 1, 0]

def test_chosen_steps_over_several_fits():
    learn = get_learner(cbs=[GradientHistogram(steps=[3, 8, 1]), Copy()])
    learn.fit(1, .01)
    learn.fit(1, .01) # no step of it is asked for
    df = learn.gradient_histogram.to_frame()
    assert df.step.tolist() == [1, 3, 8] and learn.gradient_histogram.updates == 16
    assert (counts(learn) == [expected(learn.copy.grads[i], learn.gradient_histogram.edges) for i in (0, 2, 7)]).all()
    learn = get_learner(cbs=GradientHistogram(every=5))
    for _ in range(2): learn.fit(1, .01)
    assert learn.gradient_histogram.to_frame()[['step', 'epoch']].values.tolist() == [[5, 0], [10, 0], [15, 0]]

def test_clipped_gradients():
    learn = get_learner(cbs=[GradientHistogram(every=1), GradientClip(1e-3), Copy()])
    learn.fit(1, .01)
    assert (counts(learn) == [expected(g, learn.gradient_histogram.edges) for g in learn.copy.grads]).all()
    assert np.linalg.norm(flat(learn.copy.grads[0])) == pytest.approx(1e-3, rel=1e-3)

class FakeScaler(Callback):
    "Scales the loss by 1,024, unscales before the step, and cancels some steps as for an overflow"
    order = MixedPrecision.order
    def __init__(self, *overflow): self.overflow = overflow
    def before_backward(self): self.learn.loss_grad = self.loss_grad*1024
    def before_step(self):
        for p in self.model.parameters(): p.grad /= 1024
        if self.train_iter in self.overflow: raise CancelStepException()

class CancelLate(Callback):
    "Cancels a step after everyone else has seen its gradients"
    order = 1000
    def before_step(self):
        if self.train_iter == 4: raise CancelStepException()

@pytest.mark.parametrize('cb', [FakeScaler(1, 2), CancelLate()])
def test_a_skipped_step_is_no_update(cb):
    learn = get_learner(cbs=[GradientHistogram(every=1), AdaptiveLRVariance(5), cb, Copy()])
    learn.fit(1, .01)
    n = 8 - len(getattr(cb, 'overflow', [4]))
    assert learn.gradient_histogram.to_frame().step.tolist() == list(range(1, n+1)) and len(learn.copy.grads) == n
    assert (counts(learn) == [expected(g, learn.gradient_histogram.edges) for g in learn.copy.grads]).all()
    assert (learn.adaptive_lr_variance.v == averages(learn.copy.grads, .99)[:5].astype(np.float32)).mean() > .5 # to a rounding
    np.testing.assert_allclose(learn.adaptive_lr_variance.v, averages(learn.copy.grads, .99)[:5], rtol=1e-5)

def test_accumulated_batches_are_no_updates():
    learn = get_learner(cbs=[GradientHistogram(every=1), GradientAccumulation(8), Copy()])
    learn.fit(2, .01)
    assert learn.gradient_histogram.to_frame().step.tolist() == list(range(1, 9))
    assert (counts(learn) == [expected(g, learn.gradient_histogram.edges) for g in learn.copy.grads]).all()

def test_frozen_parameters_are_absent():
    learn = get_learner(cbs=GradientHistogram(every=1))
    learn.freeze()
    learn.fit(1, .01)
    learn.unfreeze()
    learn.fit(1, .01)
    assert counts(learn).sum(1).tolist() == [14]*8 + [44]*8
    learn = get_learner(cbs=GradientHistogram(every=1, layers='0'))
    learn.freeze()
    learn.fit(1, .01)
    assert counts(learn).sum(1).tolist() == [0]*8

@pytest.mark.parametrize('layers,n', [('0', 30), (['2'], 14), (['0.bias', '2.weight'], 18), (['2', '2.bias'], 14), (None, 44)])
def test_layers(layers, n):
    learn = get_learner(cbs=GradientHistogram(every=8, layers=layers))
    learn.fit(1, .01)
    assert counts(learn).sum() == n

def test_a_name_is_no_prefix_of_another_and_shared_weights_count_once():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(12)])
    assert len(layer_parameters(model, ['1'])) == 2
    model[3].weight = model[1].weight
    assert layer_parameters(model, ['3.weight'])[0] is model[1].weight and len(layer_parameters(model, ['1', '3'])) == 3

# Sampling

def test_a_sample_is_distinct_fixed_and_proportional():
    sizes = [60_000, 0, 30_000, 10_000]
    parts = sample_coordinates(sizes, 5_000)
    for part,size in zip(parts, sizes):
        assert len(np.unique(part)) == len(part) and (np.diff(part) > 0).all() and (part < size).all() and (part >= 0).all()
        assert len(part) == pytest.approx(size/20, abs=4*(size/20)**.5)
    assert sum(map(len, parts)) == 5_000
    assert all((a == b).all() for a,b in zip(parts, sample_coordinates(sizes, 5_000)))
    assert [p.tolist() for p in sample_coordinates([2, 1], 3)] == [[0, 1], [0]]
    assert np.histogram(parts[0], 6, (0, 60_000))[0] == pytest.approx(np.full(6, 500), rel=.2)

def test_only_the_sampled_coordinates_are_counted():
    learn = get_learner(cbs=[GradientHistogram(every=1, n_samples=20), Copy()])
    learn.fit(1, .01)
    index = sample_coordinates([24, 6, 12, 2], 20)
    want = [expected([g.flatten()[i] for g,i in zip(grads, index)], learn.gradient_histogram.edges) for grads in learn.copy.grads]
    assert (counts(learn) == want).all() and (counts(learn).sum(1) == 20).all()

def test_memory_order_is_no_matter():
    "The same coordinates, whether a convolution's gradient is laid out as channels_last or not"
    h = GradientHistogram(steps=[1])
    p = nn.Parameter(torch.zeros(8, 4, 3, 3))
    g,i = torch.randn(8, 4, 3, 3),torch.arange(0, 288, 3)
    p.grad,h.sample = g,[(p, i)]
    a = h.measure()
    p.grad = g.to(memory_format=torch.channels_last)
    assert torch.equal(a, h.measure()) and not torch.equal(p.grad.permute(0, 2, 3, 1).flatten()[i], g.flatten()[i])

# Nothing else is touched

def recorders(): return [GradientHistogram(every=1, n_samples=20), AdaptiveLRVariance(16, n_samples=20)]

@pytest.mark.parametrize('name', ['RAdam', 'fastai Adam', 'torch AdamW'])
def test_training_and_random_numbers_are_as_without(name):
    a,b = get_learner(opts[name]),get_learner(opts[name], recorders())
    for l in (a, b):
        l.model.insert(2, nn.Dropout(.5)) # random numbers within a step, too
        l.splitter = lambda m: [list(m.parameters())]
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        l.fit_one_cycle(2, .01)
        l.after = torch.rand(3),np.random.rand(),random.random()
    assert all(torch.equal(p, q) for p,q in zip(a.model.parameters(), b.model.parameters()))
    assert torch.equal(a.after[0], b.after[0]) and a.after[1:] == b.after[1:]

def test_leaves_no_rows_elsewhere():
    learn = get_learner(cbs=[GradientHistogram(every=3), AdaptiveLRVariance(20)])
    def seen(): return len(learn.gradient_histogram.rows),learn.gradient_histogram.updates,learn.adaptive_lr_variance.counts.tolist()
    learn.lr_find(show_plot=False, num_it=10)
    learn.validate()
    learn.get_preds()
    assert seen() == (0, 0, [])
    learn.fit(3, .01)
    rows = seen()
    assert rows == (8, 24, [20]*4)
    learn.validate()
    learn.get_preds()
    learn.lr_find(show_plot=False, num_it=10)
    assert seen() == rows
    learn.fit(1, .01)
    assert seen() == (10, 32, [20]*4)

def test_export_and_pickle(tmp_path):
    learn = get_learner(cbs=[GradientHistogram(every=4), AdaptiveLRVariance(8)], path=tmp_path)
    learn.fit(1, .01)
    learn.export('l.pkl')
    again = load_learner(tmp_path/'l.pkl')
    for name in 'gradient_histogram','adaptive_lr_variance':
        cb = getattr(learn, name)
        assert getattr(again, name).to_frame().equals(cb.to_frame())
        learn.remove_cb(cb)
        assert pickle.loads(pickle.dumps(cb)).to_frame().equals(cb.to_frame())
        assert not cb.sample # no parameters go with it
        cb.plot()

@pytest.mark.parametrize('cancel', [CancelBatchException, CancelTrainException])
def test_an_update_counts_though_another_callback_cancels_what_follows(cancel):
    class Cancel(Callback):
        def after_step(self): raise cancel()
    learn = get_learner(cbs=[GradientHistogram(every=1), AdaptiveLRVariance(2), Cancel()])
    learn.fit(2, .01)
    n = 16 if cancel is CancelBatchException else 2
    assert learn.gradient_histogram.to_frame().step.tolist() == list(range(1, n+1)) and learn.adaptive_lr_variance.counts.tolist() == [2]*4

def test_a_step_without_gradients_is_no_update():
    class NoBackward(Callback):
        def before_backward(self):
            if self.train_iter in (0, 3): raise CancelBackwardException()
    learn = get_learner(cbs=[GradientHistogram(every=1), NoBackward(), Copy()])
    learn.fit(1, .01)
    grads = [g for g in learn.copy.grads if any(o is not None for o in g)]
    assert len(grads) == 6 == learn.gradient_histogram.updates
    assert (counts(learn) == [expected(g, learn.gradient_histogram.edges) for g in grads]).all()

# Several devices; meta, which holds no numbers, stands for a second one

def test_gradients_on_two_devices(monkeypatch):
    h,p,q = GradientHistogram(steps=[1], lo=1., hi=4., bins=2),*(nn.Parameter(torch.zeros(3, device=d)) for d in ('cpu', 'meta'))
    p.grad,q.grad = torch.tensor([1., 2, -4]),torch.zeros(3, device='meta')
    h.sample = [(o, torch.arange(3, device=o.device)) for o in (q, p)]
    assert h.measure().tolist() == [0, 0, 1, 1, 1, 0]
    r = nn.Parameter(torch.zeros(2))
    r.grad = torch.tensor([3., .5])
    h.sample.append((r, torch.arange(2)))
    monkeypatch.setattr(gradients, '_by_device', list) # each tensor on a device of its own
    assert h.measure().tolist() == [0, 1, 1, 2, 1, 0]

def test_variance_of_parameters_on_two_devices(monkeypatch):
    whole,parts = (get_learner(cbs=AdaptiveLRVariance(8)) for _ in range(2))
    whole.fit(1, .01)
    monkeypatch.setattr(gradients, '_by_device', list)
    parts.fit(1, .01)
    assert (whole.adaptive_lr_variance.v == parts.adaptive_lr_variance.v).all()
    monkeypatch.undo()
    a,b = torch.ones(2, device='meta'),torch.ones(3)
    assert [t.device.type for t in gradients._by_device([b, a, b])] == ['cpu', 'meta'] and len(gradients._by_device([b, b])[0]) == 6

# Warnings

def message(cb, epochs=1, opt_func=RAdam, fits=1, **kwargs):
    "The one warning of a fit that trains as it would without the callback"
    learn,plain = (get_learner(opt_func, **{k: copy.deepcopy(v) for k,v in kwargs.items()}) for _ in range(2))
    for l in (learn, plain):
        for _ in range(fits-1): l.fit(1, .01)
    learn.add_cb(cb)
    with pytest.warns(UserWarning, match=type(cb).__name__) as said: learn.fit(epochs, .01)
    plain.fit(epochs, .01)
    assert all(torch.equal(a, b) for a,b in zip(plain.model.parameters(), learn.model.parameters())) and not cb.sample
    said = [str(w.message) for w in said if type(cb).__name__ in str(w.message)]
    assert len(said) == 1
    return said[0]

@pytest.mark.parametrize('kw,says', [
    (dict(steps=[1], every=2), 'either steps.*or every.*got steps=.1., every=2'),
    (dict(steps=[3, 0]), 'each of steps must be a whole number of at least 1, got 0'),
    (dict(steps=[1.5]), 'whole number of at least 1, got 1.5'),
    (dict(steps=[]), r'steps must be update numbers.*got \[\]'),
    (dict(steps=5), 'steps must be update numbers.*got 5'),
    (dict(every=0), 'every must be a whole number of at least 1, got 0'),
    (dict(every=1, bins=0), 'bins must be a whole number of at least 1, got 0'),
    (dict(every=1, bins=10**5, lo=1., hi=1.001), '100000 bins between 1.0 and 1.001 are narrower'),
    (dict(every=1, lo=1., hi=1.), '1.2e-38 <= lo < hi <= 3.4e.38, got lo=1.0, hi=1.0'),
    (dict(every=1, lo=0.), 'lo < hi.*got lo=0.0'),
    (dict(every=1, lo=-1.), 'lo < hi.*got lo=-1.0'),
    (dict(every=1, hi=float('inf')), 'lo < hi.*hi=inf'),
    (dict(every=1, lo=float('nan')), 'lo < hi.*lo=nan'),
    (dict(every=1, n_samples=0), 'n_samples must be a whole number of at least 1, got 0'),
    (dict(every=1, layers=[]), r'layers must be names.*got \[\]'),
    (dict(every=1, layers=[3]), r'layers must be names.*got \[3\]')])
def test_options_that_no_fit_could_honour(kw, says):
    with pytest.raises(ValueError, match=says): GradientHistogram(**kw)

@pytest.mark.parametrize('kw', [dict(n_steps=0), dict(n_steps=2.5), dict(n_samples=0), dict(layers=[])])
def test_options_of_the_variance(kw):
    with pytest.raises(ValueError, match=f'{next(iter(kw))} must be'): AdaptiveLRVariance(**kw)

def test_steps_that_this_fit_does_not_reach():
    says = message(cb := GradientHistogram(steps=[1, 17]), epochs=2)
    assert 'update 17 is never reached: this fit ends at update 16 at the latest (0 made before it, then 2 epochs of 8 batches)' in says
    assert [r[0] for r in cb.rows] == [1]
    assert 'GradientHistogram: update 9 is never' in message(GradientHistogram(every=9))
    assert 'AdaptiveLRVariance: update 100 is never' in message(cb := AdaptiveLRVariance())
    assert cb.to_frame().step.tolist() == list(range(1, 9)) # what there is
    learn = get_learner(cbs=GradientHistogram(every=8))
    learn.fit(1, .01)
    learn.remove_cb(cb := learn.gradient_histogram)
    cb.steps,cb.needed = frozenset([16]),16 # updates before count
    learn.add_cb(cb)
    learn.fit(1, .01)
    assert [r[0] for r in cb.rows] == [8, 16]
    cb.needed = 25
    says = r'update 25 is never reached: this fit ends at update 24 at the latest \(16 made before it, then 1 epochs'
    with pytest.warns(UserWarning, match=says): learn.fit(1, .01)

def test_every_tenth_update_is_the_default():
    learn = get_learner(cbs=GradientHistogram())
    learn.fit(3, .01)
    assert learn.gradient_histogram.to_frame().step.tolist() == [10, 20]

def test_epochs_that_are_skipped_are_not_counted():
    learn = get_learner(cbs=GradientHistogram(steps=[9]))
    with pytest.warns(UserWarning, match='update 9 is never reached: this fit ends at update 8'): learn.fit(3, .01, start_epoch=2)

@pytest.mark.parametrize('cb, says', [
    (lambda: GradientHistogram(every=1, layers=['2', '0.wieght']),
     "no layer '0.wieght' with parameters in the model; similar names: '0.weight'"),
    (lambda: AdaptiveLRVariance(2, layers='1'), "no layer '1'"), # the relu
    (lambda: GradientHistogram(every=1, layers='head'),
     "no layer 'head' with parameters in the model; similar names: '0', '0.weight'")])
def test_layers_that_do_not_exist_are_an_error_before_the_first_batch(cb, says):
    learn = get_learner(cbs=cb())
    before = [p.detach().clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match=says): learn.fit(1, .01)
    assert all(torch.equal(a, b) for a,b in zip(before, learn.model.parameters()))

def test_parameters_that_are_not_the_optimizers():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    opt = lambda params, **_: OptimWrapper(opt=torch.optim.SGD(params[1], lr=.1))
    assert "the optimizer (OptimWrapper) has none of the parameters of ['0']" in message(GradientHistogram(every=1, layers='0'),
                                                                                         opt_func=opt, model=model)

@pytest.mark.parametrize('opt,name', [(fo.SGD, 'Optimizer'), (fo.RMSProp, 'Optimizer'),
                                      (partial(OptimWrapper, opt=torch.optim.SGD), 'SGD')])
def test_variance_needs_squared_averages(opt, name):
    says = message(AdaptiveLRVariance(2), opt_func=opt)
    assert 'needs an optimizer with a debiased average of squared gradients, such as Adam or RAdam' in says
    assert f'this one ({name}) has the hyper-parameters' in says

def test_variance_needs_the_first_update():
    assert 'this one has made 8 and 0 are recorded' in message(AdaptiveLRVariance(2), fits=2)
    learn = get_learner(cbs=AdaptiveLRVariance(8))
    learn.fit(1, .01)
    learn.fit(1, .01, reset_opt=True) # the record is full
    learn = get_learner(cbs=GradientHistogram(every=1))
    learn.add_cb(cb := AdaptiveLRVariance(8))
    cb.n_steps = cb.needed = 4
    cb.v,cb.hypers = cb.v[:4],cb.hypers[:4]
    learn.fit(1, .01)
    cb.counts = np.array([2]*4)
    with pytest.warns(UserWarning, match='this one has made 0 and 2 are recorded'): learn.fit(1, .01, reset_opt=True)

def test_variance_needs_one_beta2():
    for layers,says in ((None, r'sqr_mom and eps differ between the parameter groups \(\[\(0.9, 1e-05\), \(0.99, 1e-05\)\]\)'),
                        ('0', None)):
        learn = get_learner(cbs=AdaptiveLRVariance(2, layers=layers))
        learn.create_opt()
        learn.opt.hypers[0]['sqr_mom'] = .9
        if says is None: learn.fit(1, .01)
        else:
            with pytest.warns(UserWarning, match=says): learn.fit(1, .01)
    assert learn.adaptive_lr_variance.hypers[:, 0].tolist() == [.9, .9]

def test_reading_nothing_says_so():
    for cb in (GradientHistogram(every=1), AdaptiveLRVariance()):
        assert len(cb.to_frame()) == 0
        with pytest.raises(ValueError, match='nothing is recorded yet'): cb.plot()

# The variance

def averages(grads, sqr_mom):
    "v after each update, in float64, from the gradients alone; NaN before the first"
    v,res = None,[]
    for gs in grads:
        g = torch.cat([g.flatten() for g in gs]).double().numpy()
        v = (1-sqr_mom)*g**2 + (0 if v is None else sqr_mom*v)
        res.append(v)
    return np.array(res)

adaptive = {'RAdam': (RAdam, .99, 1e-5), 'Ranger': (partial(Ranger, k=3), .99, 1e-6), 'fastai Adam': (fo.Adam, .99, 1e-5),
            'torch AdamW': (wrapped, .999, 1e-8),
            'RAdamWrapper': (partial(RAdamWrapper, betas=(.9, .99)), .99, 1e-8)}

@pytest.mark.parametrize('name', adaptive)
def test_variance_is_numpys(name):
    "Of 1/(sqrt(v̂)+eps), raw and with each coordinate in units of its own σ, by float64 loops over the gradients themselves"
    opt,sqr_mom,eps = adaptive[name]
    learn = get_learner(opt, [AdaptiveLRVariance(12), Copy()])
    learn.fit(2, .01)
    df,v = learn.adaptive_lr_variance.to_frame(),averages(learn.copy.grads[:12], sqr_mom)
    g = np.array([torch.cat([g.flatten() for g in gs]).double().numpy() for gs in learn.copy.grads[:12]])
    sigma = np.sqrt((g**2).mean(0))
    assert df.step.tolist() == list(range(1, 13))
    for t,row in zip(range(1, 13), df.itertuples()):
        on = v[t-1] > 0
        rate = 1/(np.sqrt(v[t-1][on]/(1-sqr_mom**t)) + eps)
        assert row.coordinates == on.sum() and row.rho == pytest.approx(2/(1-sqr_mom)-1 - 2*t*sqr_mom**t/(1-sqr_mom**t))
        assert row.variance == pytest.approx(rate.var(), rel=1e-3)
        assert row.scaled == pytest.approx((rate*sigma[on]).var(), rel=1e-3)
        assert row.pooled == pytest.approx(rate.var()*(sigma[sigma > 0]**2).mean(), rel=1e-3)
    late = df[df.rho > 4]
    np.testing.assert_allclose(late.first_order, late.rho/(2*(late.rho-2)*(late.rho-4)))
    assert df[df.rho <= 4].first_order.isna().all() and (df.exact.isna() == (df.rho <= 2)).all()
    assert len(late) == 12 - (df.rho <= 4).sum()

def test_normal_gradients_follow_the_theory():
    "A model whose gradients are its inputs: normal, with σ over three decades"
    class Weights(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(n))
        def forward(self, x): return x @ self.w
    torch.manual_seed(3)
    sigma = 10**torch.linspace(-3, 0, 5000)
    ds = [(torch.randn(5000)*sigma, torch.tensor(0.)) for _ in range(60)]
    learn = Learner(DataLoaders.from_dsets(ds, ds, bs=1, num_workers=0, device='cpu'), Weights(5000), loss_func=lambda pred, _: pred.sum(),
                    opt_func=partial(fo.Adam, eps=0.), cbs=AdaptiveLRVariance(60, n_samples=4000))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    df = learn.adaptive_lr_variance.to_frame()
    assert (df.coordinates == 4000).all() and (df.pooled > 50*df.exact)[5:].all()
    np.testing.assert_allclose(df.scaled[7:], df.normal[7:], rtol=.15)
    np.testing.assert_allclose(df.scaled[7:10], df.exact[7:10], rtol=.3)
    assert df.scaled[59] < .3*df.exact[59]

def test_squared_gradients_are_what_was_averaged():
    g2,b = np.random.default_rng(0).standard_normal((20, 3))**2,np.linspace(.9, .99, 20)
    v = squared_averages(g2, b)
    assert v[2] == pytest.approx(b[2]*(b[1]*(1-b[0])*g2[0] + (1-b[1])*g2[1]) + (1-b[2])*g2[2])
    np.testing.assert_allclose(squared_gradients(v, b), g2)

def test_coordinates_without_a_gradient_are_left_out():
    v = squared_averages(np.array([[1., 0, 0, 4], [1, 0, 9, 4]]), [.9, .9])
    df = lr_variances(v, [.9, .9], [0, 0])
    assert df.coordinates.tolist() == [2, 3] and df.scaled[0] == pytest.approx(0) and df.variance[0] == pytest.approx(np.var([1, 1/2]))
    assert df.pooled[0] == pytest.approx(np.var([1, 1/2])*np.mean([1, 4.5, 4])) # the second never has a gradient
    assert df.scaled[1] == pytest.approx(np.var([1, (9/2)**.5/(9*.1/.19)**.5, 1]))

def test_layers_unfrozen_later_have_first_updates_of_their_own():
    learn = get_learner(cbs=[AdaptiveLRVariance(8), Copy()])
    learn.freeze()
    learn.fit(1, .01)
    learn.unfreeze()
    cb = learn.adaptive_lr_variance
    assert np.isnan(cb.v[:, :30]).all() and not np.isnan(cb.v[:, 30:]).any()
    learn.fit(1, .01)
    head = averages([gs[2:] for gs in learn.copy.grads[:8]], .99)
    body = averages([gs[:2] for gs in learn.copy.grads[8:]], .99)
    np.testing.assert_allclose(cb.v, np.hstack([body, head]), rtol=1e-5)
    assert cb.counts.tolist() == [8]*4

def test_record_continues_over_fits():
    learn = get_learner(cbs=[AdaptiveLRVariance(8), Copy()])
    cb = learn.adaptive_lr_variance
    cb.needed = 4
    learn.fit(1, .01, cbs=GradientAccumulation(8)) # 4 updates
    assert cb.counts.tolist() == [4]*4 and len(cb.to_frame()) == 4
    learn.fit(1, .01)
    np.testing.assert_allclose(cb.v, averages(learn.copy.grads[:8], .99), rtol=1e-5)

# Figures

def test_figures():
    import matplotlib.pyplot as plt
    learn = get_learner(cbs=[GradientHistogram(every=1), AdaptiveLRVariance(16)])
    learn.fit(2, .01)
    h,v = learn.gradient_histogram,learn.adaptive_lr_variance
    _,axs = plt.subplots(1, 3)
    assert h.plot_ridge(axs[0]) is axs[0] and h.plot_heatmap(axs[1]) is axs[1] and v.plot(axs[2]) is axs[2]
    assert [a.get_xlabel() for a in axs] == ['|gradient|', 'update', 'update']
    assert (axs[0].get_xscale(), axs[1].get_yscale()) == ('log', 'log')
    drawn = axs[1].collections[0].get_array()
    df = h.to_frame()
    on_axis = df[list(range(140))].to_numpy()
    np.testing.assert_allclose(drawn.T*np.diff(np.log10(h.edges)), on_axis/44)
    ridge = axs[0].patches[0].get_data()
    np.testing.assert_allclose((ridge.values - ridge.baseline)/(ridge.values - ridge.baseline).max(), on_axis[0]/on_axis[0].max(),
                               rtol=1e-6)
    np.testing.assert_allclose(axs[2].lines[1].get_ydata(), v.to_frame().scaled)
    assert [a.get_ylabel() for a in h.plot()] == [axs[0].get_ylabel(), '|gradient|']
    plt.close('all')

def test_edges_are_those_used():
    e = log_edges(1e-12, 1e2, 140)
    assert (e == e.astype(np.float32)).all() and np.diff(np.log10(e)) == pytest.approx(.1, abs=1e-6)

def test_a_state_without_the_average_is_named():
    "Adamax has the hyper-parameters of Adam, and a maximum instead of the average: its first update tells"
    learn = get_learner(partial(OptimWrapper, opt=torch.optim.Adamax), AdaptiveLRVariance(2))
    with pytest.warns(UserWarning, match='the state of OptimWrapper has neither sqr_avg nor exp_avg_sq, but step, exp_avg, exp_inf'):
        learn.fit(1, .01)
