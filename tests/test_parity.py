"""Hundreds of steps beside exact numbers, the paper's algorithm in float64, fastai, PyTorch and the other implementations."""
import csv
from itertools import groupby
from pathlib import Path

import fastai.optimizer as fo
import pytest
import torch
from torch import nn

from helpers import compare, drive, params, plain, plain_step
from radam_fastai.functional import radam_reference, radam_step_
from radam_fastai.optimizer import RAdam, Ranger, reference_settings
from radam_fastai.torch_optim import RAdam as TorchRAdam

# ---- exact numbers

rows = list(csv.DictReader((Path(__file__).parent/'oracle/trajectory.csv').open()))
settings = {k: list(v) for k,v in groupby(rows, lambda r: r['setting'])}

@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('name', settings)
def test_oracle(name, fused):
    "60 steps of one parameter, every number to 12 digits"
    first = settings[name][0]
    hypers = {k: float(first[k]) for k in ('lr', 'mom', 'sqr_mom', 'eps', 'wd', 'threshold')}
    hypers.update(sgd_phase=first['sgd_phase'], **{k: first[k] == 'True' for k in ('decouple_wd', 'eps_debiased')})
    p,m,v = (torch.full((1,), x, dtype=torch.float64) for x in (.5, 0., 0.))
    for row in settings[name]:
        radam_step_([p], [torch.tensor([float(row['grad'])], dtype=torch.float64)], [m], [v], int(row['step']), fused=fused, **hypers)
        for got,key in ((p, 'param'), (m, 'grad_avg'), (v, 'sqr_avg')):
            assert got.item() == pytest.approx(float(row[key]), rel=1e-12, abs=1e-18), key

@pytest.mark.parametrize('name', ['fastai', 'paper'])
def test_the_algorithm_is_the_oracles(name):
    "As it is written down, and with the paper's defaults"
    first = settings[name][0]
    hypers = {k: float(first[k]) for k in ('lr', 'mom', 'sqr_mom', 'eps', 'wd', 'threshold')}
    assert (first['decouple_wd'], first['eps_debiased'], first['sgd_phase']) == ('True', 'True', 'momentum')
    if name == 'paper': hypers = {k: hypers[k] for k in ('lr', 'wd')}
    p,m,v = (torch.full((1,), x, dtype=torch.float64) for x in (.5, 0., 0.))
    for row in settings[name]:
        p,m,v = radam_reference(p, torch.tensor([float(row['grad'])], dtype=torch.float64), m, v, int(row['step']), **hypers)
        for got,key in ((p, 'param'), (m, 'grad_avg'), (v, 'sqr_avg')):
            assert got.item() == pytest.approx(float(row[key]), rel=1e-9, abs=1e-18), key

@pytest.mark.parametrize('name', ['fastai', 'torch', 'author', 'paper'])
def test_reference_settings_are_the_oracles(name):
    first,ours = settings[name][0],reference_settings[name]
    assert {k: float(first[k]) for k in ('mom', 'sqr_mom', 'eps', 'threshold')} == {k: ours[k]
                                                                                    for k in ('mom', 'sqr_mom', 'eps', 'threshold')}
    assert (first['decouple_wd'], first['eps_debiased'], first['sgd_phase']) == (str(ours['decouple_wd']), str(ours['eps_debiased']),
                                                                                 ours['sgd_phase'])

# ---- trajectories

base = dict(lr=.01, mom=.9, sqr_mom=.99, eps=1e-5, wd=.1)
variants = [{}, dict(sqr_mom=.9), dict(sqr_mom=.999), dict(sqr_mom=.6), dict(decouple_wd=False), dict(maximize=True), dict(beta=2.),
            dict(eps_debiased=False),
            dict(threshold=4), dict(sgd_phase='skip'), dict(eps=0.), dict(mom=0.), dict(eps=1e-2, eps_debiased=False, decouple_wd=False)]
ids = lambda v: '-'.join(f'{k}={x}' for k,x in v.items()) or 'base'

@pytest.mark.many
@pytest.mark.parametrize('dtype,tol', [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize('variant', variants, ids=ids)
def test_algorithm_2(variant, dtype, tol):
    kw = {**base, **variant}
    sched = 'mom' not in variant
    compare(drive(RAdam(ps := params(dtype), **kw), ps, sched=sched), plain(plain_step, sched=sched, dtype=dtype, **kw), tol)

@pytest.mark.parametrize('dtype,tol', [(torch.bfloat16, .1), (torch.float16, 2e-2)])
def test_algorithm_2_in_half_precision(dtype, tol):
    "No more than the parameters' own rounding, step after step"
    compare(drive(RAdam(ps := params(dtype), **base), ps, n=60), plain(plain_step, n=60, dtype=dtype, **base), tol)

@pytest.mark.many
@pytest.mark.parametrize('dtype,tol', [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize('variant', [{}, dict(sqr_mom=.9), dict(sqr_mom=.999), dict(sqr_mom=.5), dict(decouple_wd=False), dict(beta=2.),
                                     dict(eps=0., wd=0.)], ids=ids)
def test_fastai_radam(variant, dtype, tol):
    kw = {**base, **variant}
    compare(drive(RAdam(a := params(dtype), **kw), a), drive(fo.RAdam(b := params(dtype), **kw), b), tol)

@pytest.mark.many
@pytest.mark.parametrize('dtype,tol', [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize('variant', [{}, dict(k=1), dict(k=5, alpha=.8), dict(alpha=0.), dict(alpha=1.),
                                     dict(sqr_mom=.999, decouple_wd=False)], ids=ids)
def test_fastai_ranger(variant, dtype, tol):
    kw = dict(lr=.01, wd=.1, **variant)
    compare(drive(Ranger(a := params(dtype), **kw), a), drive(fo.ranger(b := params(dtype), **kw), b), tol)

@pytest.mark.many
@pytest.mark.parametrize('dtype,tol', [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize('foreach', [None, True, False])
@pytest.mark.parametrize('variant', [{}, dict(betas=(.8, .9)), dict(betas=(.9, .99)), dict(betas=(.9, .5)), dict(weight_decay=.1),
                                     dict(weight_decay=.1, decoupled_weight_decay=True),
                                     dict(maximize=True, weight_decay=.1, decoupled_weight_decay=True), dict(maximize=True),
                                     dict(betas=(.9, 0.)), dict(eps=1e-3)], ids=ids)
def test_torch_radam(variant, foreach, dtype, tol):
    def run(cls, **kw):
        opt = cls(ps := params(dtype), lr=.01, **variant, **kw)
        def set_hypers(lr, mom): opt.param_groups[0].update(lr=lr, betas=(mom, opt.param_groups[0]['betas'][1]))
        return drive(opt, ps, n=120, set_hypers=set_hypers)
    compare(run(TorchRAdam, foreach=foreach), run(torch.optim.RAdam, foreach=False), tol)

@pytest.mark.parametrize('wd', [0., .1])
def test_reference_torch(wd):
    kw = dict(lr=.01, **{**reference_settings['torch'], 'wd': wd})
    ours = drive(RAdam(a := params(torch.float64), **kw), a, sched=False)
    compare(ours, drive(torch.optim.RAdam(b := params(torch.float64), lr=.01, weight_decay=wd), b, sched=False), 1e-12)

@pytest.mark.parametrize('wd', [0., .1])
def test_reference_optimi(wd):
    optimi = pytest.importorskip('optimi', reason='pip install radam_fastai[bench]')
    kw = dict(lr=.01, **{**reference_settings['optimi'], 'wd': wd})
    ours = drive(RAdam(a := params(torch.float64), **kw), a, sched=False, gaps=False) # optimi counts steps per group
    compare(ours, drive(optimi.RAdam(b := params(torch.float64), lr=.01, betas=(.9, .99), eps=1e-6, weight_decay=wd, foreach=False,
                                     triton=False), b, sched=False, gaps=False), 1e-12)

@pytest.mark.parametrize('wd', [0., .1])
def test_reference_author(wd):
    "`pytorch_optimizer` follows the authors' code, which skips the first steps; it counts steps per group"
    po = pytest.importorskip('pytorch_optimizer', reason='pip install radam_fastai[bench]')
    kw = dict(lr=.01, **{**reference_settings['author'], 'wd': wd})
    ours = drive(RAdam(a := params(torch.float64), **kw), a, sched=False, gaps=False)
    theirs = po.RAdam(b := params(torch.float64), lr=.01, betas=(.9, .999), eps=1e-8, weight_decay=wd, weight_decouple=True)
    compare(ours, drive(theirs, b, sched=False, gaps=False), 1e-12)

def test_momentum_sgd_for_ever():
    "β2 of at most 2/3 never rectifies: bias-corrected momentum SGD, here PyTorch's with the learning rate that corrects it"
    g = torch.Generator().manual_seed(0)
    a,b = nn.Parameter(torch.ones(5, dtype=torch.float64)),nn.Parameter(torch.ones(5, dtype=torch.float64))
    ours,sgd = RAdam([a], lr=.01, mom=.9, sqr_mom=.6),torch.optim.SGD([b], lr=.01, momentum=.9)
    for t in range(1, 201):
        a.grad = b.grad = torch.randn(5, generator=g, dtype=torch.float64)
        sgd.param_groups[0]['lr'] = .01*(1-.9)/(1-.9**t)
        ours.step(); sgd.step()
    compare([a], [b], 1e-12)

# ---- memory orders

def order(t, kind):
    "`t` (4-d) with its elements in another memory order"
    if kind == 'channels_last': return t.to(memory_format=torch.channels_last)
    if kind == 'transposed': return t.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == 'strided':
        wide = torch.zeros(*t.shape[:-1], t.shape[-1]*2, dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]
    return t.contiguous()

kinds = ['contiguous', 'channels_last', 'transposed', 'strided']

@pytest.mark.parametrize('grad_kind', kinds)
@pytest.mark.parametrize('param_kind', kinds)
def test_memory_orders(param_kind, grad_kind):
    "Parameters and gradients in any order, and orders that change on the way, give the numbers of the contiguous ones"
    g = torch.Generator().manual_seed(0)
    start = torch.randn(4, 3, 5, 5, generator=g)
    a,b = nn.Parameter(order(start.clone(), param_kind)),nn.Parameter(start.clone())
    oa,ob = RAdam([a], lr=.01, wd=.1),fo.RAdam([b], lr=.01, wd=.1)
    for t in range(40):
        grad = torch.randn(4, 3, 5, 5, generator=g)
        a.grad,b.grad = order(grad, grad_kind if t < 20 else 'contiguous'),grad
        if t == 30: a.data = order(a.data, 'channels_last')
        oa.step(); ob.step()
    compare([a], [b], 1e-6)
