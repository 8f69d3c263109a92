"""Where numbers end: inf, NaN, huge and denormal gradients, thousands of zeros, ten million steps, β2 next to 1.

The result is the plain loop's, or a clear error."""
import math
from decimal import Decimal, localcontext
from functools import partial

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from helpers import plain_adam, plain_sgd, plain_step
from radam_fastai.baselines import SGD, Adam, Adam2kFn, AdamLinearFn
from radam_fastai.optimizer import RAdam, Ranger
from radam_fastai.rectify import rectification, rho, rho_inf
from radam_fastai.torch_optim import RAdam as TorchRAdam, RAdamWrapper

pytestmark = pytest.mark.slow
f64,f32,bf16 = torch.float64,torch.float32,torch.bfloat16
inf,nan = math.inf,math.nan

def torch_kind(cls, ps, lr=.01, mom=.9, sqr_mom=.99, eps=1e-5, wd=0., **kw):
    kw.setdefault('decoupled_weight_decay', True)
    return cls(ps, lr=lr, betas=(mom, sqr_mom), eps=eps, weight_decay=wd, **kw)

def ours(cls, ps, **kw): return cls(ps, **{**dict(lr=.01, mom=.9, sqr_mom=.99, eps=1e-5, wd=0.), **kw})
def sgd(ps, lr=.01, mom=.9, sqr_mom=.99, eps=1e-5, wd=0.): return SGD(ps, lr=lr, mom=mom, wd=wd)
def plain_sgd_(p, g, s, *, sqr_mom, eps, **kw): return plain_sgd(p, g, s, **kw)

eps_first = partial(plain_step, eps_debiased=False)
OPTS = { # each optimizer, and one update of its definition
    'RAdam':       (partial(ours, RAdam), plain_step),
    'RAdam, L2':   (partial(ours, RAdam, decouple_wd=False), partial(plain_step, decouple_wd=False)),
    'RAdam, skip': (partial(ours, RAdam, sgd_phase='skip', eps_debiased=False), partial(eps_first, sgd_phase='skip')),
    'Ranger':      (partial(ours, Ranger, k=10**9), plain_step), # its slow weights are test_ranger's
    'torch':       (partial(torch_kind, TorchRAdam), eps_first),
    'torch, foreach': (partial(torch_kind, TorchRAdam, foreach=True), eps_first),
    'torch, loop': (partial(torch_kind, TorchRAdam, foreach=False), eps_first),
    'wrapper':     (partial(torch_kind, RAdamWrapper), eps_first),
    'Adam':        (partial(ours, Adam), plain_adam),
    'Adam, linear': (lambda ps, **kw: ours(AdamLinearFn, ps, **kw),
                     lambda p, g, s, **kw: plain_adam(p, g, s, factor=lambda t: min(1., (1-kw['sqr_mom'])/2*t), **kw)),
    'Adam-2k':     (partial(ours, partial(Adam2kFn, n_steps=4)), partial(plain_adam, n=4)),
    'SGD':         (sgd, plain_sgd_)}
HYPERS = dict(lr=.01, mom=.9, sqr_mom=.99, eps=1e-5, wd=0.)
each = pytest.mark.parametrize('name', OPTS)

def start(dtype=f64, n=6): return torch.linspace(.5, 1.5, n, dtype=f64).to(dtype)
def grads(n, dtype=f64, size=6):
    return [torch.randn(size, generator=torch.Generator().manual_seed(t), dtype=f64).to(dtype) for t in range(n)]

def drive(name, gs, dtype=f64, **hypers):
    "The parameter after each gradient, and the optimizer"
    p = nn.Parameter(start(dtype))
    opt,res = OPTS[name][0]([p], **{**HYPERS, **hypers}),[]
    for g in gs:
        p.grad = g.to(dtype).clone()
        opt.step()
        res.append(p.detach().clone())
    return res,opt

def plain(name, gs, dtype=f64, **hypers):
    "The same by the definition, in `dtype`"
    p,s,res = start(dtype),{},[]
    for g in gs: res.append(p := OPTS[name][1](p, g.to(dtype), s, **{**HYPERS, **hypers}))
    return res

def agree(got, want, rtol):
    "Finite in the same places, and there the same"
    for t,(a,b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a.isfinite(), b.isfinite()), f'update {t+1}: {a} instead of {b}'
        torch.testing.assert_close(a[a.isfinite()].double(), b[b.isfinite()].double(), rtol=rtol, atol=rtol/10)

def averages(opt):
    s, = [s for s in opt.state.values()]
    return [s[a] if a in s else s[b] for a,b in (('grad_avg', 'exp_avg'), ('sqr_avg', 'exp_avg_sq'))]

# ---- inf and NaN

@each
@pytest.mark.parametrize('dtype', [f64, f32, bf16], ids=str)
@pytest.mark.parametrize('bad', [nan, inf, -inf])
@pytest.mark.parametrize('when', [2, 11])
def test_a_gradient_that_is_not_finite(name, dtype, bad, when):
    "It ruins its own element, as in the definition, for good, and no other"
    good,gs = grads(16, dtype),grads(16, dtype)
    gs[when][2] = bad
    got,undisturbed = drive(name, gs, dtype)[0],drive(name, good, dtype)[0]
    want = plain(name, gs, dtype)
    for t in range(16):
        assert torch.equal(got[t].isfinite(), want[t].isfinite()), f'update {t+1}'
        rest = [i for i in range(6) if i != 2]
        assert torch.equal(got[t][rest], undisturbed[t][rest])
    still = name == 'Adam-2k' and when == 2 and not math.isnan(bad) # only the squared average is infinite
    assert got[-1].isfinite()[2] == still and got[when-1].isfinite().all()

@pytest.mark.parametrize('bad', [nan, inf, -inf, 1e30])
def test_as_in_pytorchs_kernel(bad):
    "In the adaptive phase the element becomes what torch's AdamW makes of it, in the same update"
    ps = [nn.Parameter(start(f32)) for _ in 'ab']
    a,b = Adam([ps[0]], lr=.01, mom=.9, sqr_mom=.99, eps=1e-5, wd=.1),torch.optim.AdamW([ps[1]], lr=.01, betas=(.9,.99), eps=1e-5,
                                                                                        weight_decay=.1, fused=True)
    for t,g in enumerate(grads(12, f32)):
        if t == 7: g[2] = bad
        for p,o in zip(ps, (a, b)):
            p.grad = g.clone()
            o.step()
        assert torch.equal(ps[0].isnan(), ps[1].isnan()) and torch.equal(ps[0].isinf(), ps[1].isinf())
        torch.testing.assert_close(ps[0], ps[1], equal_nan=True, rtol=1e-6, atol=0)

@pytest.mark.parametrize('k', [1, 3, 6])
def test_ranger(k):
    "A ruined weight ruins its slow weight at the next Lookahead step, and no other"
    p = nn.Parameter(start())
    opt = Ranger([p], lr=.01, k=k)
    for t,g in enumerate(grads(14)):
        if t == 7: g[2] = nan
        p.grad = g
        opt.step()
        bad = torch.arange(6) == 2
        assert torch.equal(p.isnan(), bad & (t >= 7))
        assert torch.equal(opt.slow_weights[0][0].isnan(), bad & ((t+1)//k*k > 7))

# ---- huge and tiny

sizes = {f64: [1e-310, 1e-200, 1e100, 1e200, 1e300], f32: [1e-44, 1e-40, 1e-30, 1e-20, 1e18, 1e21, 1e30, 1e37],
         bf16: [1e-40, 1e-30, 1e18, 1e30]}

@each
@pytest.mark.parametrize('eps', [1e-5, 0.])
@pytest.mark.parametrize('dtype,size', [(d, s) for d,ss in sizes.items() for s in ss], ids=str)
def test_huge_and_denormal_gradients(name, dtype, size, eps):
    "What the definition gives in the parameter's dtype: squares may overflow (the element stands still) or vanish (with eps 0 it is lost)"
    gs = [g*torch.tensor([1.]*3 + [size]*3, dtype=dtype) for g in grads(16, dtype)]
    got,opt = drive(name, gs, dtype, eps=eps)
    want = plain(name, gs, dtype, eps=eps)
    if dtype == bf16: # rounds every operation of the definition, but only the end of the kernel's
        for a,b in zip(got, want): assert torch.equal(a.isfinite(), b.isfinite())
        want = plain(name, gs, f32, eps=eps)
        keep = [i for i in range(6) if want[-1][i].isfinite() and want[-1][i].abs() < 1e4]
        torch.testing.assert_close(got[-1][keep].float(), want[-1][keep], rtol=.03, atol=.03)
    else: agree(got, want, {f64: 1e-10, f32: 2e-5}[dtype])
    if size >= (1e200 if dtype == f64 else 1e30) and name != 'SGD':
        assert averages(opt)[1][3:].isinf().all() and torch.equal(got[-1][3:], got[6][3:]) # still since the momentum phase

@pytest.mark.parametrize('wd', [0., 1., 1e3, 1e10, 1e30])
@pytest.mark.parametrize('dtype', [f64, f32], ids=str)
@each
def test_weight_decay_of_any_size(name, dtype, wd):
    agree(drive(name, grads(12, dtype), dtype, wd=wd)[0], plain(name, grads(12, dtype), dtype, wd=wd), {f64: 1e-9, f32: 1e-4}[dtype])

# ---- zeros

@each
@pytest.mark.parametrize('dtype', [f64, f32, bf16], ids=str)
def test_nothing_but_zeros(name, dtype):
    "No gradient ever: nothing moves, however long"
    p = nn.Parameter(start(dtype))
    opt = OPTS[name][0]([p], **HYPERS)
    p.grad = torch.zeros_like(p)
    for _ in range(1000): opt.step()
    assert torch.equal(p, start(dtype)) and not any(a.any() for a in averages(opt))

@pytest.mark.parametrize('name', ['RAdam', 'Ranger', 'torch', 'torch, foreach', 'Adam', 'SGD'])
@pytest.mark.parametrize('sqr_mom,eps', [(.9, 0.), (.9, 1e-5), (.99, 0.), (.99, 1e-5), (.999, 1e-5)])
def test_zeros_for_thousands_of_steps(name, sqr_mom, eps):
    "After thirty gradients, 3,000 zeros, to where float32 has only denormals left: no drift but the definition's, and no NaN"
    p,q,s = nn.Parameter(start(f32)),start(f64),{}
    opt = OPTS[name][0]([p], **{**HYPERS, 'sqr_mom': sqr_mom, 'eps': eps})
    gs = grads(30, f32)
    for t in range(3000):
        g = gs[t] if t < 30 else torch.zeros(6)
        p.grad = g.clone()
        opt.step()
        if t < 1000: q = OPTS[name][1](q, g.double(), s, **{**HYPERS, 'sqr_mom': sqr_mom, 'eps': eps}) # then float64's averages end, too
        if t == 999: then = p.detach().clone()
    torch.testing.assert_close(p.double(), q, rtol=1e-4, atol=1e-5)
    assert torch.equal(p, then) or sqr_mom == .999 or eps == 0

@each
def test_without_eps_a_parameter_without_gradients_is_nan(name):
    "0/0, as the paper's formula and PyTorch's kernels have it (`eps` says so): only in the adaptive phase, only there"
    gs = grads(10)
    for g in gs: g[2] = 0.
    agree(drive(name, gs, eps=0.)[0], want := plain(name, gs, eps=0.), 1e-12)
    assert want[-1].isnan().tolist() == [i == 2 and name != 'SGD' for i in range(6)]

# ---- many steps, and β2 next to 1

def exact_update(t, g, m, v, *, lr, mom, sqr_mom, eps, p=.5, threshold=5, eps_debiased=True):
    "The change of one parameter at update `t`, from averages `m` and `v` before it: 60 digits, from the very floats given"
    with localcontext() as ctx:
        ctx.prec = 60
        g,m,v,lr,b1,b2,eps = (Decimal(x) for x in (g, m, v, lr, mom, sqr_mom, eps))
        m,v = b1*m + (1-b1)*g,b2*v + (1-b2)*g*g
        r_inf = 2/(1-b2) - 1
        r = r_inf - 2*t*b2**t/(1-b2**t)
        m_hat,bias = m/(1-b1**t),(1-b2**t).sqrt()
        if r <= threshold: return -lr*m_hat,m,v
        rect = ((r-4)*(r-2)*r_inf/((r_inf-4)*(r_inf-2)*r)).sqrt()
        return -lr*rect*m_hat/(v.sqrt()/bias + eps if eps_debiased else (v.sqrt()+eps)/bias),m,v

def rounding(t, sqr_mom, dtype):
    "What an update may be off by, relative: PyTorch's kernels compute 1-β2^t by subtraction, in float64"
    with localcontext() as ctx:
        ctx.prec,b = 60,Decimal(sqr_mom)
        return torch.finfo(dtype).eps*20 + 2.3e-16/float(1-b**t) + (1.2e-7 if t > 2**24 else 0.) # and count in float32

BETAS = [0., .5, .9, .99, .999, .9999, 1-1e-7, 1-1e-9, 1-1e-10, 1-1e-12, math.nextafter(1, 0)]

@pytest.mark.parametrize('name', ['RAdam', 'Ranger', 'torch', 'torch, foreach', 'torch, loop'])
@pytest.mark.parametrize('sqr_mom', BETAS)
@pytest.mark.parametrize('t', [6, 100, 10_000, 1_000_000, 10_000_000, 2**24+3])
def test_one_update_after_many(name, sqr_mom, t):
    "From a state whose step is set: the 60-digit update"
    p = nn.Parameter(torch.zeros(1, dtype=f64)) # so that it is the update that is left
    opt = OPTS[name][0]([p], **{**HYPERS, 'sqr_mom': sqr_mom, 'eps': 1e-8})
    m,v,g = .3,.25*(1-sqr_mom**t),.7
    k = ('exp_avg', 'exp_avg_sq') if 'torch' in name else ('grad_avg', 'sqr_avg')
    n = torch.tensor(float(t-1)) if 'torch' in name else t-1
    opt.state[p] = {k[0]: torch.full_like(p, m).detach(), k[1]: torch.full_like(p, v).detach(), 'step': n}
    p.grad = torch.full_like(p, g)
    opt.step()
    want,_,_ = exact_update(int(n)+1, g, m, v, lr=.01, mom=.9, sqr_mom=sqr_mom, eps=1e-8, eps_debiased='torch' not in name)
    assert p.item() == pytest.approx(float(want), rel=rounding(t, sqr_mom, f64))
    assert opt.state[p]['step'] == int(n)+1

@pytest.mark.parametrize('dtype', [f64, f32], ids=str)
@pytest.mark.parametrize('name', ['RAdam', 'torch', 'torch, foreach'])
@pytest.mark.parametrize('sqr_mom', BETAS)
def test_from_the_first_update(name, sqr_mom, dtype):
    "Forty updates, each beside its 60-digit value"
    p = nn.Parameter(torch.zeros(1, dtype=dtype))
    opt = OPTS[name][0]([p], **{**HYPERS, 'sqr_mom': sqr_mom, 'eps': 1e-12})
    m = v = Decimal(0)
    for t in range(1, 41):
        g = torch.tensor([((7*t)%23-11)/23+.1], dtype=dtype)
        with torch.no_grad(): p.zero_()
        p.grad = g
        opt.step()
        want,m,v = exact_update(t, g.item(), m, v, lr=.01, mom=.9, sqr_mom=sqr_mom, eps=1e-12, eps_debiased='torch' not in name)
        tol = rounding(t, sqr_mom, dtype)*4
        assert p.item() == pytest.approx(float(want), rel=tol, abs=float(abs(want))*tol + 1e-12*torch.finfo(dtype).eps), f'update {t}'

@pytest.mark.parametrize('sqr_mom', [1-1e-7, 1-1e-9, 1-1e-12, math.nextafter(1, 0)])
@pytest.mark.parametrize('t', [5, 6, 7, 100, 10**7, 10**12, 2**53])
def test_rectifier_next_to_1(sqr_mom, t):
    "r_t to twelve digits, although rho is a difference of numbers of up to 1e16"
    with localcontext() as ctx:
        ctx.prec,b = 80,Decimal(sqr_mom)
        r_inf = 2/(1-b) - 1
        r = r_inf - 2*t*b**t/(1-b**t)
        want = float(((r-4)*(r-2)*r_inf/((r_inf-4)*(r_inf-2)*r)).sqrt()) if r > 5 else None
    got = rectification(t, sqr_mom)
    assert got is None if want is None else got == pytest.approx(want, rel=1e-12)
    assert 1 <= rho(t, sqr_mom) <= rho_inf(sqr_mom)

def test_beta2_of_1_is_an_error():
    for make in (partial(ours, RAdam), partial(torch_kind, TorchRAdam), partial(ours, Adam)):
        with pytest.raises(ValueError, match=r'sqr_mom \(β2\) must be in \[0, 1\), got 1.0'): make([nn.Parameter(start())], sqr_mom=1.)

# ---- nothing at all

@each
def test_lr_of_zero(name):
    "Nothing moves, whatever the decay; the averages do, as with any other learning rate"
    a,b = drive(name, grads(12), lr=0., wd=.3 if 'L2' not in name else 0.),drive(name, grads(12), lr=.1)
    assert all(torch.equal(p, start()) for p in a[0])
    assert all(map(torch.equal, averages(a[1]), averages(b[1])))

@each
@pytest.mark.parametrize('hypers', [dict(sqr_mom=0.), dict(mom=0.), dict(mom=0., sqr_mom=0.), dict(eps=0.), dict(eps=1e30), dict(lr=1e30),
                                    dict(mom=math.nextafter(1, 0)), dict(sqr_mom=0., eps=0.)], ids=str)
def test_ends_of_the_ranges(name, hypers):
    agree(drive(name, grads(20), **hypers)[0], plain(name, grads(20), **hypers), 1e-9)

# ---- anything

values = st.sampled_from([0., 1., -2., .3, 1e-310, 1e-160, 1e-100, -1e-30, 1e30, -1e100, 1e200, inf, -inf, nan])
hypers = st.fixed_dictionaries(dict(lr=st.sampled_from([0., 1e-12, .01, 1., 1e10]), mom=st.sampled_from([0., .3, .9, .999, 1-1e-9]),
    sqr_mom=st.sampled_from([0., .5, .7, .99, .9999, 1-1e-7]), eps=st.sampled_from([0., 1e-30, 1e-8, 1., 1e20]),
    wd=st.sampled_from([0., .1, 1e5])))

@each
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.lists(values, min_size=6, max_size=6), min_size=1, max_size=14), hypers)
def test_anything(name, rows, hypers):
    "Any gradients under any hyper-parameters: finite where the definition is, and there the same"
    gs = [torch.tensor(r, dtype=f64) for r in rows]
    agree(drive(name, gs, **hypers)[0], plain(name, gs, **hypers), 1e-6)
