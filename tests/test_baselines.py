"""The baselines: each beside a plain loop written from its definition, fastai, PyTorch and schedules set by hand; its state, its errors."""
import copy
import inspect
import math
from functools import partial

import fastai.optimizer as fo
import pytest
import torch
from torch import nn

from helpers import (
    At,
    assert_close,
    assert_same,
    compare,
    drive,
    frozen,
    get_learner,
    identical,
    no_warnings,
    params,
    plain,
    plain_adam,
    plain_sgd,
    set_grads,
    stable,
    steps,
    tensors,
    through_file,
    train_both,
)
from radam_fastai.baselines import (
    SGD,
    Adam,
    Adam2kFn,
    AdamEpsFn,
    AdamExponentialFn,
    AdamFn,
    AdamLinearFn,
    AdamWarmupFn,
    SGDFn,
    after,
    linear_warmup,
    never,
    no_warmup,
)
from radam_fastai.bucket import Buckets
from radam_fastai.functional import radam_step_
from radam_fastai.optimizer import RAdam, RAdamFn, Ranger
from radam_fastai.torch_optim import RAdam as TorchRAdam

# ---- each baseline beside its definition

b2,hypers = .99,dict(mom=.9, sqr_mom=.99, eps=1e-6, wd=1e-2) # the hyper-parameters of RAdamFn
sgd_hypers = dict(mom=.9, wd=1e-2)

def linear(n): return lambda t: min(1, t/n)
untuned_linear,untuned_exponential = linear(2/(1-b2)),lambda t: 1-math.exp(-(1-b2)*t)

baselines = { # the opt_func, its definition, and the definition's hyper-parameters
    'adam':        (AdamFn, plain_adam, hypers),
    'warmup':      (partial(AdamWarmupFn, n_steps=50), partial(plain_adam, factor=linear(50)), hypers),
    'linear':      (AdamLinearFn, partial(plain_adam, factor=untuned_linear), hypers),
    'exponential': (AdamExponentialFn, partial(plain_adam, factor=untuned_exponential), hypers),
    '2k':          (partial(Adam2kFn, n_steps=50), partial(plain_adam, n=50), hypers),
    '2k-freeze':   (partial(Adam2kFn, n_steps=50, sgd_phase='freeze'), partial(plain_adam, n=50, own_count=False), hypers),
    'eps':         (AdamEpsFn, plain_adam, {**hypers, 'eps': 1e-4, 'eps_debiased': False}),
    'sgd':         (SGDFn, plain_sgd, sgd_hypers)}
opt_funcs = {k: v[0] for k,v in baselines.items()}
each = pytest.mark.parametrize('opt_func', opt_funcs.values(), ids=opt_funcs)
precisions = pytest.mark.parametrize('dtype,tol', [(torch.float64, 1e-12), (torch.float32, 2e-5)])

@pytest.mark.many
@precisions
@pytest.mark.parametrize('variant', [{}, dict(wd=.3), dict(decouple_wd=False, wd=.3), dict(maximize=True), dict(mom=0.)], ids=str)
@pytest.mark.parametrize('name', baselines)
def test_definition(name, variant, dtype, tol):
    "300 steps with moving lr and mom, gradients that are missing and parameters that join late"
    opt_func,step,kw = baselines[name]
    sched = 'mom' not in variant
    got = drive(opt_func(ps := params(dtype), lr=.01, **variant), ps, sched=sched)
    compare(got, plain(step, sched=sched, dtype=dtype, lr=.01, **{**kw, **variant}), tol)

@pytest.mark.many
@precisions
@pytest.mark.parametrize('variant', [dict(beta=2.), dict(eps=1e-2, eps_debiased=False), dict(sqr_mom=.9), dict(sqr_mom=0.)], ids=str)
@pytest.mark.parametrize('name', ['adam', 'warmup', '2k', '2k-freeze'])
def test_adam_definition(name, variant, dtype, tol):
    opt_func,step,kw = baselines[name]
    compare(drive(opt_func(ps := params(dtype), lr=.01, **variant), ps), plain(step, dtype=dtype, lr=.01, **{**kw, **variant}), tol)

@precisions
@pytest.mark.parametrize('f', [partial(linear_warmup, n_steps=60), partial(after, n_steps=60)], ids=['linear', 'after'])
def test_momentum_until_then(f, dtype, tol):
    "No factor for a while, and Adam's momentum phase meanwhile"
    opt = Adam(ps := params(dtype), lr=.01, lr_factor=lambda t, b: None if t <= 20 else f(t, b))
    def step(p, g, s, lr, mom, wd, **kw):
        t = s.get('t', 0)+1
        if t > 20 and f(t, b2): return plain_adam(p, g, s, lr=lr, mom=mom, wd=wd, factor=lambda t: f(t, b2), **{**kw, 'eps': 1e-5})
        s.update(t=t, v=b2*s.get('v', 0.) + (1-b2)*g**2)
        return plain_sgd(p, g, s, lr=lr, mom=mom, wd=wd)
    compare(drive(opt, ps), plain(step, dtype=dtype, lr=.01, **hypers), tol)

# ---- fastai, PyTorch, and schedules by hand

@pytest.mark.many
@pytest.mark.parametrize('dtype,tol', [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize('variant', [{}, dict(sqr_mom=.9), dict(sqr_mom=.999, wd=.3), dict(decouple_wd=False), dict(eps=1e-2),
                                     dict(mom=.5)], ids=str)
def test_fastai_adam(variant, dtype, tol):
    "fastai's defaults, too"
    compare(drive(Adam(a := params(dtype), lr=.01, **variant), a), drive(fo.Adam(b := params(dtype), lr=.01, **variant), b), tol)

def torch_run(cls, factor, dtype, **kw):
    "PyTorch's Adam or AdamW under a LambdaLR, whose own count starts at 0"
    opt = cls(ps := params(dtype), lr=.01, betas=(.9, b2), **kw)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda done: factor(done+1))
    for t in range(1, 301):
        for p,g in zip(ps, tensors(dtype, seed=t)): p.grad = g
        opt.step()
        sched.step()
    return ps

@pytest.mark.many
@pytest.mark.parametrize('dtype,tol', [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize('name,factor', [('adam', lambda t: 1.), ('warmup', linear(50)), ('linear', untuned_linear),
                                         ('exponential', untuned_exponential)])
@pytest.mark.parametrize('wd', [0., .5])
def test_a_warmup_is_a_schedule_of_torchs(name, factor, wd, dtype, tol):
    "The decay follows the warm-up; with L2 it never did anything else"
    for cls,decouple_wd in ((torch.optim.AdamW, True), (torch.optim.Adam, False)):
        ours = opt_funcs[name](a := params(dtype), lr=.01, wd=wd, eps=1e-8, decouple_wd=decouple_wd)
        compare(drive(ours, a, sched=False, gaps=False), torch_run(cls, factor, dtype, weight_decay=wd, eps=1e-8, foreach=False), tol)

def test_decay_follows_the_warmup_and_not_the_rectifier():
    "Without a gradient's pull the decay is all that moves"
    def moved(opt_func):
        p = nn.Parameter(torch.ones(1, dtype=torch.float64))
        p.grad,opt = torch.zeros_like(p),opt_func([p], lr=.1, wd=.5)
        for _ in range(8): opt.step()
        return p.item()
    assert moved(RAdamFn) == pytest.approx(.95**8) == moved(AdamFn)
    assert moved(partial(AdamWarmupFn, n_steps=4)) == pytest.approx(.9875*.975*.9625*.95**5)
    assert moved(partial(Adam2kFn, n_steps=3)) == pytest.approx(.95**5)

# ---- momentum SGD

def test_sgd_closed_form():
    "One gradient, then none: what is left of it at step t is (1-β1)β1^(t-1)/(1-β1^t)"
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = SGD([p], lr=.1, mom=.8)
    for t in range(1, 31):
        p.grad = torch.full_like(p, 3. if t == 1 else 0.)
        opt.step()
    assert p.item() == pytest.approx(-.1*3*sum(.2*.8**(t-1)/(1-.8**t) for t in range(1, 31)), rel=1e-13)

@pytest.mark.parametrize('kw', [{}, dict(wd=.3), dict(wd=.3, decouple_wd=False), dict(maximize=True)], ids=str)
def test_sgd_is_radam_that_never_rectifies(kw):
    "Bit for bit, the state included"
    a,b = SGD(ps := params(), lr=.01, **kw),RAdam(qs := params(), lr=.01, sqr_mom=.6, **kw)
    a.set_hyper('sqr_mom', .6)
    drive(a, ps), drive(b, qs)
    assert identical(frozen(a), frozen(b))

def test_sgd_and_fastais():
    "fastai's, with the learning rate that turns its sum of gradients into a debiased mean"
    a,b = SGD(ps := params(torch.float64), lr=1., wd=.1, decouple_wd=False),fo.SGD(qs := params(torch.float64), lr=1., mom=.9, wd=.1,
                                                                                   decouple_wd=False)
    for t in range(1, 101):
        b.set_hyper('lr', (1-.9)/(1-.9**t))
        for p,q,g in zip(ps, qs, tensors(torch.float64, seed=t)): p.grad,q.grad = g,g.clone()
        a.step(), b.step()
    compare(ps, qs, 1e-12)

# ---- three paths, one update

@pytest.mark.parametrize('lr_factor,kw', [(no_warmup, {}), (partial(linear_warmup, n_steps=9), dict(scale_wd=True)),
                                     (partial(linear_warmup, n_steps=9), {}),
                                     (partial(after, n_steps=4), dict(sgd_phase='skip')), (never, dict(maximize=True))],
                         ids=['no warm-up', 'linear, scaled decay', 'linear', 'after', 'never'])
def test_fused_foreach_and_loop_agree(lr_factor, kw):
    def path(fused, loop):
        ps,ms,vs = (tensors(torch.float64, seed=i) for i in (0, 1, 2))
        for v in vs: v.square_()
        for t in range(3, 10):
            lists = ps,tensors(torch.float64, seed=t),ms,vs
            for part in ([[o] for o in one] for one in zip(*lists)) if loop else [lists]:
                radam_step_(*part, t, lr=.01, mom=.9, sqr_mom=.9, eps=1e-6, wd=.3, lr_factor=lr_factor, fused=fused, **kw)
        return ps+ms+vs
    expect,*others = path(False, True),path(True, False),path(False, False),path(None, False)
    for got in others: compare(got, expect, 1e-13)

# ---- per-parameter decay

@each
def test_do_wd(opt_func):
    "Who must not decay goes as if there were no decay, and the rest do not notice"
    def go(wd, *flagged):
        opt = opt_func(ps := params(torch.float64), lr=.01, wd=wd)
        for i in flagged: opt.state[ps[i]]['do_wd'] = False
        return drive(opt, ps, n=120)
    mixed,all_decay,none = go(.5, 1, 4, 5),go(.5),go(0.)
    for i,p in enumerate(mixed):
        assert torch.equal(p, (none if i in (1, 4, 5) else all_decay)[i])
        if p.numel(): assert not torch.equal(all_decay[i], none[i])

# ---- state

def run(opt, n, start=1):
    for t in range(start, start+n):
        set_grads([p for pg in opt.param_lists for p in pg], t)
        opt.step()
    return opt

def some(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64)) for s in ((5, 3), (4,), ())]

short = {**opt_funcs, '2k': partial(Adam2kFn, n_steps=10), '2k-freeze': partial(Adam2kFn, n_steps=10, sgd_phase='freeze')}

@pytest.mark.parametrize('n', [0, 1, 7, 10, 11, 30])
@pytest.mark.parametrize('name', short)
def test_resumes_bit_for_bit(name, n):
    "Before, during and after the wait of Adam-2k, at its last step, too"
    a = run(short[name](some(), lr=.01), n)
    b = short[name]([nn.Parameter(p.detach().clone()) for p in a.param_lists[0]], lr=.5)
    with no_warnings(): b.load_state_dict(through_file(a.state_dict()))
    for o in (a, b): run(o, 25, start=n+1)
    assert identical(frozen(a), frozen(b))
    waited = [s.get('waited') for s in a.state_dict()['state']]
    assert waited == [10 if name == '2k' else None]*3

def go_on(ps, grads, step, states, **kw):
    "`step` over `grads` from `ps` and `states`"
    for g in grads: ps = [step(p, o, s, **kw) for p,o,s in zip(ps, g, states)]
    return ps

def plain_state(opt):
    return [dict(m=s['grad_avg'], v=s['sqr_avg'], t=s['step'], k=s['step']-s.get('waited', 0))
            for s in copy.deepcopy(opt.state_dict()['state'])]
def grads_of(start, n):
    "What `run` steps over"
    res,ps = [],some()
    for t in range(start, start+n):
        set_grads(ps, t)
        res.append([p.grad for p in ps])
    return res

anothers = fo.Adam, fo.RAdam, partial(torch.optim.AdamW, betas=(.9, .99)), RAdam, SGD, AdamLinearFn

pairs = [(k, o) for k in short for o in anothers] + [(k, partial(Adam2kFn, n_steps=4)) for k in ('2k', '2k-freeze')]

@pytest.mark.parametrize('name,theirs', pairs, ids=stable)
def test_goes_on_from_another(name, theirs):
    "With the state, and the hyper-parameters, of another: each moment has the count that it had there"
    ps = some()
    other = theirs(ps, lr=.02)
    for t in range(1, 7):
        set_grads(ps, t)
        other.step()
    ours = short[name](qs := [nn.Parameter(p.detach().clone()) for p in ps], lr=.5)
    ours.load_state_dict(copy.deepcopy(other.state_dict()))
    states,h = plain_state(ours),{k: ours.hypers[0][k] for k in ('lr', 'mom', 'sqr_mom', 'eps', 'wd')}
    step = baselines[name][1]
    if name == 'sgd': h = {k: h[k] for k in ('lr', 'mom', 'wd')}
    if name == 'eps': h['eps_debiased'] = False
    if name.startswith('2k'): step = partial(plain_adam, n=10, own_count=name == '2k')
    expect = go_on([p.detach().clone() for p in qs], grads_of(7, 30), step, states, **h)
    run(ours, 30, start=7)
    compare(qs, expect, 1e-12)

@pytest.mark.parametrize('cls', [RAdam, Ranger, AdamFn, SGDFn, TorchRAdam], ids=lambda o: getattr(o, 'func', o).__module__)
@pytest.mark.parametrize('waited', [10, 0, .5, 'x', None, 10**400], ids=lambda o: str(o)[:4])
def test_a_wait_is_adam_2ks(cls, waited):
    "Another optimizer would debias the first moment by gradients that it has not seen; of no wait there is nothing to know"
    sd = run(Adam2kFn(some(), lr=.02, n_steps=10), 12).state_dict()
    if cls is Ranger: sd.update(count=12, slow_weights=None)
    sd['state'][1]['waited'] = waited
    for i in (0, 2): del sd['state'][i]['waited']
    opt = cls(some(), lr=.02)
    before = copy.deepcopy(opt.state_dict())
    if waited == 0: opt.load_state_dict(sd)
    else:
        with pytest.raises(ValueError, match=r'parameter 1 \(shape \(4,\)\): waited in its state.* only Adam2kFn'): opt.load_state_dict(sd)
        assert identical(opt.state_dict(), before)

@pytest.mark.parametrize('name', short)
def test_stock_fastai_goes_on(name):
    "Its loader takes any state of these; from Adam's it gives Adam's numbers"
    a = run(short[name](some(), lr=.02), 12)
    b = fo.Adam(qs := [nn.Parameter(p.detach().clone()) for p in a.param_lists[0]], lr=.5)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    run(b, 10, start=13)
    if name == 'adam': compare(run(a, 10, start=13).param_lists[0], qs, 1e-12)

@pytest.mark.parametrize('waited,says', [(13, r'waited must be at most step \(12\), got 13'),
                                         (-1, 'waited must be a whole number of at least 0, got -1'), (.5, 'waited .* got 0.5'),
                                         ('x', 'waited .* got x')])
def test_waited_that_cannot_be(waited, says):
    a = run(Adam2kFn(some(), lr=.02, n_steps=10), 12)
    sd,before = copy.deepcopy(a.state_dict()),frozen(a)
    sd['state'][1]['waited'] = waited
    with pytest.raises(ValueError, match=rf'parameter 1 \(shape \(4,\)\): {says}'): a.load_state_dict(sd)
    assert identical(frozen(a), before)

@pytest.mark.parametrize('how', ['by hand', 'loaded'])
def test_each_parameter_has_its_own_wait(how):
    "Of one step count, with another `waited`: its bucket is another, also if that changes between two steps"
    opt = run(Adam2kFn(ps := some(), lr=.02, n_steps=10), 12)
    if how == 'by hand': opt.state[ps[1]]['waited'] = 3
    else:
        sd = opt.state_dict()
        sd['state'][1]['waited'] = 3
        opt.load_state_dict(sd)
    expect = go_on([p.detach().clone() for p in ps], grads_of(13, 5), plain_adam, plain_state(opt), lr=.02, **hypers)
    run(opt, 5, start=13)
    compare(ps, expect, 1e-12)
    assert [opt.state[p]['waited'] for p in ps] == [10, 3, 10]

def test_each_parameter_waits_for_itself():
    "One that joins late waits as long; after `clear_state` all wait again"
    opt = Adam2kFn(ps := some(), lr=.02, n_steps=10)
    def steps(n, who):
        for t in range(n):
            set_grads(ps, t)
            for p in ps:
                if not any(p is o for o in who): p.grad = None
            opt.step()
    steps(8, ps[:2])
    before = ps[2].detach().clone()
    steps(10, ps)
    assert torch.equal(ps[2], before) and [opt.state[p]['waited'] for p in ps] == [10]*3
    steps(1, ps)
    assert not torch.equal(ps[2], before)
    opt.clear_state()
    assert not any('waited' in s for s in opt.state_dict()['state'])
    before = [p.detach().clone() for p in ps]
    steps(10, ps)
    assert all(map(torch.equal, ps, before))

def test_sorted_once(monkeypatch):
    "Nor does waiting, or its end, sort afresh"
    sorts = []
    monkeypatch.setattr(Buckets, '_sort', lambda self, *a, real=Buckets._sort: (sorts.append(1), real(self, *a)))
    run(Adam2kFn(some(), lr=.02, n_steps=10), 25)
    assert len(sorts) == 1

@each
def test_copies_are_independent(opt_func):
    a = run(opt_func(some(), lr=.02), 8)
    b,before = copy.deepcopy(a),frozen(a)
    run(b, 5, start=9)
    assert identical(frozen(a), before)
    assert identical(frozen(run(a, 5, start=9)), frozen(b))

# ---- what can be asked

def test_factors_can_be_asked_for():
    "`settings` of any of them says what happens at a step"
    def factors(opt_func, *ts):
        s = opt_func(some(), lr=.1).settings
        return [s['lr_factor'](t, b2) for t in ts],s['sgd_phase']
    assert factors(AdamFn, 1, 9) == factors(AdamEpsFn, 1, 9) == ([1., 1.], 'momentum')
    assert factors(partial(AdamWarmupFn, n_steps=10), 1, 5, 10, 11) == ([.1, .5, 1., 1.], 'momentum')
    assert factors(AdamLinearFn, 1, 50, 200, 201)[0] == pytest.approx([.005, .25, 1., 1.])
    assert factors(AdamExponentialFn, 1, 100)[0] == pytest.approx([1-math.exp(-.01), 1-math.exp(-1)])
    assert factors(Adam2kFn, 1, 2000, 2001) == ([None, None, 1.], 'wait')
    assert factors(SGDFn, 1, 10**6) == ([None, None], 'momentum')
    rs,phase = factors(partial(RAdam, threshold=4), 4, 5, 100)
    assert rs[0] is None and rs[1] < rs[2] < 1 and phase == 'momentum'

def test_hypers_are_those_of_radam():
    "So that a comparison differs in the factor alone"
    radam = dict(RAdamFn(some(), lr=.1).hypers[0])
    for name in ('adam', 'warmup', 'linear', 'exponential', '2k', '2k-freeze'):
        assert dict(opt_funcs[name](some(), lr=.1).hypers[0]) == radam
    assert dict(AdamEpsFn(some(), lr=.1).hypers[0]) == {**radam, 'eps': 1e-4}
    sgd = dict(SGDFn(some(), lr=.1).hypers[0])
    assert sgd.keys() == radam.keys() and all(sgd[k] == radam[k] for k in ('lr', 'mom', 'wd'))

def test_signature_of_adam():
    "Every argument of fastai's, in its place, with its default"
    a,b = (list(inspect.signature(f).parameters.values()) for f in (Adam, fo.Adam))
    assert [(p.name, p.default) for p in a[:len(b)]] == [(p.name, p.default) for p in b]
    assert all(p.kind is p.KEYWORD_ONLY for p in a[len(b):])

# ---- refusals

@pytest.mark.parametrize('n_steps', [0, -1, 1.5, math.nan, math.inf, '5', None])
@pytest.mark.parametrize('opt_func', [AdamWarmupFn, Adam2kFn])
def test_n_steps_that_cannot_be(opt_func, n_steps):
    with pytest.raises(ValueError, match=f'n_steps must be a whole number of at least 1, got {n_steps}'):
        opt_func(some(), lr=.1, n_steps=n_steps)

@pytest.mark.parametrize('factor', [0., -1., math.nan, math.inf])
def test_a_factor_that_is_none(factor):
    opt = run(Adam(some(), lr=.1, lr_factor=lambda t, b: 1. if t <= 3 else factor), 3)
    set_grads(opt.param_lists[0], 4)
    before = frozen(opt)
    with pytest.raises(ValueError, match=f'lr_factor must give a positive number or None, got {factor} at step 4'): opt.step()
    assert identical(frozen(opt), before)

@pytest.mark.parametrize('kw,error,says',
                         [(dict(lr_factor=1.), TypeError, 'lr_factor must be a function of step and sqr_mom, got 1.0'),
                          (dict(sgd_phase='sleep'), ValueError, "sgd_phase must be one of momentum, skip, got 'sleep'"),
                                           (dict(eps=-1.), ValueError, 'eps .* got -1'), (dict(wd=math.nan), ValueError, 'wd .* got nan')])
def test_settings_that_cannot_be(kw, error, says):
    with pytest.raises(error, match=says): Adam(some(), lr=.1, **kw)

@pytest.mark.parametrize('phase', ['momentum', 'skip', 'sleep'])
def test_phases_of_adam_2k(phase):
    with pytest.raises(ValueError, match=f"sgd_phase must be one of wait, freeze, got '{phase}'"): Adam2kFn(some(), lr=.1, sgd_phase=phase)

@pytest.mark.parametrize('name', short)
def test_no_argument_is_ignored(name):
    "What a baseline has no use for it does not take"
    for kw in [dict(threshold=4)] + [dict(eps=1e-3), dict(sqr_mom=.9), dict(beta=1.)]*(name == 'sgd'):
        with pytest.raises(TypeError, match=next(iter(kw))): short[name](some(), lr=.1, **kw)

# ---- in a Learner

in_learner = {**opt_funcs, 'warmup': partial(AdamWarmupFn, n_steps=8), '2k': partial(Adam2kFn, n_steps=8),
              '2k-freeze': partial(Adam2kFn, n_steps=8, sgd_phase='freeze')}

@pytest.mark.parametrize('decouple_wd', [True, False])
@pytest.mark.parametrize('fit', ['fit', 'fit_one_cycle'])
def test_adam_equals_fastais_in_a_learner(fit, decouple_wd):
    pair = [partial(o, sqr_mom=.99, eps=1e-6, decouple_wd=decouple_wd) for o in (Adam, fo.Adam)]
    train_both(pair, lambda learn: getattr(learn, fit)(4, slice(.002, .02), wd=.1))

@pytest.mark.parametrize('name,factor', [('warmup', linear(8)), ('linear', untuned_linear), ('exponential', untuned_exponential)])
def test_warmup_on_top_of_one_cycle(name, factor):
    "It multiplies what the schedule gives: fastai's Adam with a callback that does so by hand"
    a,b = get_learner(in_learner[name]),get_learner(partial(fo.Adam, sqr_mom=.99, eps=1e-6))
    def scale(learn): learn.opt.set_hyper('lr', [h['lr']*factor(learn.train_iter+1) for h in learn.opt.hypers])
    a.fit_one_cycle(4, slice(.002, .02), wd=.1)
    b.fit_one_cycle(4, slice(.002, .02), wd=.1, cbs=At('before_step', scale))
    for h,g in zip(a.opt.hypers, b.opt.hypers): h['lr'] = g['lr'] # the last one, which b's callback has scaled
    assert_close(a, b)

@pytest.mark.many
@pytest.mark.parametrize('name', in_learner)
def test_save_and_load_go_on_as_if_never_stopped(name, tmp_path):
    "Into a new Learner, without a warning, to the last bit; Adam-2k in the middle of its wait"
    a,b,uninterrupted = (get_learner(in_learner[name], path=tmp_path) for _ in range(3))
    for learn in (a, uninterrupted): learn.fit_one_cycle(1, slice(.002, .02), wd=.1)
    with no_warnings():
        a.save('run')
        b.load('run')
    assert_same(a, b)
    for learn in (a, b, uninterrupted): learn.fit_one_cycle(2, slice(.002, .02), wd=.1)
    assert_same(a, uninterrupted)
    assert_same(b, uninterrupted)
    assert steps(b) == [15]*5

@pytest.mark.parametrize('name', in_learner)
def test_export_goes_on(name, tmp_path):
    a,b = (get_learner(in_learner[name], path=tmp_path) for _ in range(2))
    for learn in (a, b): learn.fit_one_cycle(1, .02)
    a.export()
    for learn in (a, b): learn.fit(2, .02)
    assert_same(a, b)
