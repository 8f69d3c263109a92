"""Hyper-parameters, settings, parameters and gradients that cannot be: each is an error that names it, before anything has changed."""
import math
import random
from functools import partial

import fastai.optimizer as fo
import pytest
import torch
from torch import nn

from helpers import FULL, identical, tally
from radam_fastai.baselines import SGD, Adam, Adam2kFn, AdamLinearFn
from radam_fastai.optimizer import RAdam, Ranger
from radam_fastai.torch_optim import RAdam as TorchRAdam, RAdamWrapper

nan,inf = math.nan,math.inf
# what is allowed: from the first number to below the second
FASTAI = dict(lr=[0, inf], mom=[0, 1], sqr_mom=[0, 1], eps=[0, inf], wd=[0, inf], beta=[0, inf])
ADAM = {k: v for k,v in FASTAI.items() if k != 'beta'}
TORCH = dict(lr=[0, inf], betas=[0, 1], eps=[0, inf], weight_decay=[0, inf])
ALIASES = dict(betas=r'betas|mom|sqr_mom', weight_decay='weight_decay|wd')
OPTS = {'RAdam': (RAdam, FASTAI), 'RAdam, L2': (partial(RAdam, decouple_wd=False), FASTAI), 'Ranger': (Ranger, FASTAI),
        'Adam': (Adam, ADAM),
    'Adam, linear': (AdamLinearFn, ADAM), 'Adam-2k': (partial(Adam2kFn, n_steps=3), ADAM),
    'SGD': (SGD, dict(lr=[0, inf], mom=[0, 1], wd=[0, inf])), 'torch': (TorchRAdam, TORCH),
    'torch, foreach': (partial(TorchRAdam, foreach=True), TORCH), 'wrapper': (RAdamWrapper, TORCH)}
WRONG = ['x', '.1', None, 1j, {}, object(), b'1', torch.ones(2), [], 10**400, -10**400]

def ps(dtype=torch.float32): return [nn.Parameter(torch.linspace(-1, 1, n).reshape(s).to(dtype)) for n,s in [(6, (2,3)), (3, (3,))]]

def stepped(opt, params, n=3):
    for t in range(n):
        for p in params: p.grad = torch.full_like(p, .5+t)
        opt.step()
    return opt

def far(rng, lo, hi):
    "A number outside [lo, hi), or none at all"
    out = [nan, -inf, inf, lo-10**rng.uniform(-12, 12), -5e-324]
    if hi < inf: out += [hi, hi+10**rng.uniform(-12, 12)]
    return rng.choice([*out, *out, *WRONG])

def live_hypers(opt):
    if isinstance(opt, fo._BaseOptimizer) and not isinstance(opt, RAdamWrapper): return opt.hypers[0]
    return getattr(opt, 'opt', opt).param_groups[0]

def held(opt, params): return [p.detach().clone() for p in params],opt.state_dict()['state']

def named(name, e): return any(k in str(e) for k in ALIASES.get(name, name).split('|'))

@pytest.mark.parametrize('name', OPTS)
def test_when_it_is_made(name):
    cls,allowed = OPTS[name]
    rng = random.Random(f'{name} made')
    for i in range(300 if FULL else 30):
        k = rng.choice(list(allowed))
        v = far(rng, *allowed[k])
        if k == 'betas': v = rng.choice([(v, .99), (.9, v), v, (.9,), (.9, .99, .999)])
        with pytest.raises((ValueError, TypeError, AssertionError)) as e: cls(ps(), **{'lr':.1, k:v})
        assert named(k, e.value), f'{k}={v!r}: {e.value!r}'
        tally['wrong hyper-parameters', 'refused by name'] += 1

@pytest.mark.parametrize('name', OPTS)
def test_in_the_middle_of_a_run(name):
    "Weights, averages and counts stay as they are, and the run goes on when the value is right again"
    cls,allowed = OPTS[name]
    rng = random.Random(f'{name} run')
    params,plain = ps(),ps()
    opt,other = (stepped(cls(o, lr=.1), o) for o in (params, plain))
    for i in range(300 if FULL else 30):
        k,group = rng.choice(list(allowed)),live_hypers(opt)
        v,was = far(rng, *allowed[k]),group[k]
        if k == 'betas': v = rng.choice([(v, .99), (.9, v), v, (.9,)])
        before = held(opt, params)
        with pytest.raises((ValueError, TypeError, AssertionError)) as e:
            group[k] = v
            stepped(opt, params, 1)
        group[k] = was
        assert named(k, e.value), f'{k}={v!r}: {e.value!r}'
        assert identical(held(opt, params), before), f'{k}={v!r} changed something'
        tally['wrong hyper-parameters', 'refused by name'] += 1
    for o,q in [(opt, params), (other, plain)]: stepped(o, q)
    assert identical(held(opt, params), held(other, plain))

def integers(): return [nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)]
def complexes(): return [nn.Parameter(torch.ones(3, dtype=torch.complex64))]
def twice():
    p, = ps()[:1]
    return [p, p]

PARAMS = {'none': (list, 'no parameters|empty'), 'numbers': (lambda: [1., 2.], 'float'), 'text': (lambda: ['a'], 'str'),
          'twice': (twice, 'more than once|duplicate'),
    'integers': (integers, 'int64|require|gradient|float'), 'complex': (complexes, 'complex')}

@pytest.mark.parametrize('name,what', [(n, w) for n in OPTS for w in PARAMS if n != 'SGD'])
def test_parameters(name, what):
    make,says = PARAMS[what]
    params = make()
    with pytest.raises((ValueError, TypeError), match=says):
        opt = OPTS[name][0](params, lr=.1)
        for p in params: p.grad = torch.ones_like(p)
        opt.step()
    tally['wrong parameters and gradients', 'refused by name'] += 1

@pytest.mark.parametrize('name', [k for k in OPTS if k != 'SGD'])
def test_a_sparse_gradient(name):
    "Of one parameter of two: the other does not move either"
    params = ps()
    opt = stepped(OPTS[name][0](params, lr=.1), params)
    before = held(opt, params)
    params[0].grad,params[1].grad = torch.ones_like(params[0]),torch.ones_like(params[1]).to_sparse()
    with pytest.raises((RuntimeError, ValueError, TypeError), match='sparse'): opt.step()
    assert identical(held(opt, params), before)
    tally['wrong parameters and gradients', 'refused by name'] += 1
