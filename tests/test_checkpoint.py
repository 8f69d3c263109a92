"States that fastai's, PyTorch's and the authors' optimizers saved: read, continued, copied, or refused with nothing changed."
import copy
import math
import pickle
from functools import partial

import fastai.optimizer as fo
import pytest
import torch
from fastcore.foundation import L
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

from helpers import (
    SHAPES,
    authors_state,
    averages,
    build,
    close,
    f64,
    flatten,
    frozen,
    hypers_of,
    identical,
    is_torch,
    numbers,
    params_of,
    plain_step,
    run,
    through_file,
)
from radam_fastai.optimizer import RAdam, Ranger, reference_settings
from radam_fastai.torch_optim import RAdam as TorchRAdam

# ---- one run, two optimizers

torch_settings = reference_settings['torch']
both = dict(betas=(.9,.99), weight_decay=.1)
PAIRS = {
    'fastai RAdam':             (partial(fo.RAdam, wd=.1), RAdam),
    'fastai RAdam, L2':         (partial(fo.RAdam, wd=.1, decouple_wd=False, mom=.8), partial(RAdam, decouple_wd=False)),
    'fastai RAdam, SAdam':      (partial(fo.RAdam, beta=20., sqr_mom=.95), RAdam),
    'fastai ranger':            (partial(fo.ranger, wd=.1), Ranger),
    'torch RAdam':              (partial(torch.optim.RAdam, **both), partial(RAdam, **torch_settings)),
    'torch RAdam, decoupled':   (partial(torch.optim.RAdam, decoupled_weight_decay=True, **both),
                                 partial(RAdam, **{**torch_settings, 'decouple_wd': True})),
    'torch RAdam, maximize':    (partial(torch.optim.RAdam, maximize=True, **both), partial(RAdam, maximize=True, **torch_settings)),
    'torch RAdam to torch':     (partial(torch.optim.RAdam, decoupled_weight_decay=True, **both), TorchRAdam),
    'torch RAdam, maximize, to torch': (partial(torch.optim.RAdam, maximize=True, **both), TorchRAdam),
    # with eps 0 it makes no difference where eps goes
    'fastai RAdam to torch':    (partial(fo.RAdam, wd=.1, eps=0.), partial(TorchRAdam, decoupled_weight_decay=True)),
    'fastai RAdam, L2, to torch': (partial(fo.RAdam, wd=.1, eps=0., decouple_wd=False), TorchRAdam),
    'ours to fastai RAdam':     (partial(RAdam, wd=.1, beta=20.), partial(fo.RAdam)),
    'ours to fastai ranger':    (partial(Ranger, wd=.1), fo.ranger),
    'ours, torch to fastai':    (partial(TorchRAdam, **both), partial(RAdam, **torch_settings)),
}

@pytest.mark.parametrize('n', [0, 3, 6, 11])
@pytest.mark.parametrize('name', PAIRS)
def test_a_run_goes_on(name, n):
    """From the state after `n` steps, the second optimizer continues as the first would have.

    One parameter is idle until step 4, one at every other step."""
    first,second = PAIRS[name]
    missing = lambda t: {i for i,gone in ((1, t < 4), (3, t%2)) if gone}
    a = run(build(first), range(n), missing)
    sd = through_file(a.state_dict(), weights_only=False)
    b = build(second, like=a, lr=.7)
    b.load_state_dict(sd)
    close(run(b, range(n, 20), missing), run(a, range(n, 20), missing))

@pytest.mark.parametrize('name', PAIRS)
def test_hypers_of_each_group_are_loaded(name):
    first,second = PAIRS[name]
    a = build(first)
    for h,lr in zip(hypers_of(a), (.01, .02)): h['lr'] = lr
    run(a, range(8))
    b = build(second, like=a, lr=.7)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    assert [g['lr'] for g in b.param_groups] == [.01, .02]
    close(run(b, range(8, 12)), run(a, range(8, 12)))

@pytest.mark.parametrize('n', [0, 3, 8])
@pytest.mark.parametrize('target,phase', [(partial(RAdam, **reference_settings['author']), 'skip'), (TorchRAdam, 'momentum')],
                         ids=['fastai', 'torch'])
def test_authors_state(target, phase, n):
    "Continued as by the algorithm written out; the authors' default skips the first steps, `degenerated_to_sgd=True` takes them"
    opt = build(target, lr=.7, **(dict(decoupled_weight_decay=True) if is_torch(target) else {}))
    rule = dict(lr=.05, mom=.9, sqr_mom=.99, eps=1e-8, wd=.1, eps_debiased=False, sgd_phase=phase)
    ps,states = [p.detach().clone() for p in params_of(opt)],[{} for _ in params_of(opt)]
    def plain(steps):
        for t in steps:
            for i,s in enumerate(states): ps[i] = plain_step(ps[i], numbers(ps[i].shape, 1000+100*t+i), s, **rule)
    plain(range(n))
    for p,q in zip(params_of(opt), ps): p.data.copy_(q)
    opt.load_state_dict(through_file(authors_state(opt, states, dict(lr=.05, betas=(.9,.99), eps=1e-8, weight_decay=.1))))
    plain(range(n, 15))
    run(opt, range(n, 15))
    for p,q,(step,m,v),s in zip(params_of(opt), ps, averages(opt), states):
        torch.testing.assert_close([p.detach(), m, v], [q, s['m'], s['v']], rtol=1e-12, atol=1e-12)
        assert step == 15
    run(opt, range(15, 17)).load_state_dict(through_file(opt.state_dict()))

# ---- Adam, AdamW

ADAMS = {
    'fastai Adam':        (partial(fo.Adam, wd=.1), True),
    'fastai Adam, L2':    (partial(fo.Adam, wd=.1, decouple_wd=False), False),
    'torch AdamW':        (partial(torch.optim.AdamW, weight_decay=.1, betas=(.8,.99)), True),
    'torch AdamW, fused': (partial(torch.optim.AdamW, weight_decay=.1, betas=(.8,.99), fused=True), True),
    'torch Adam':         (partial(torch.optim.Adam, weight_decay=.1, betas=(.8,.99)), False),
}

@pytest.mark.parametrize('target', [RAdam, TorchRAdam], ids=['fastai', 'torch'])
@pytest.mark.parametrize('name', ADAMS)
def test_adam_state(name, target):
    "Averages and step counts to the bit; the step that follows is Algorithm 2 from there"
    source,decoupled = ADAMS[name]
    missing = lambda t: {2} if t%2 else {3}
    a = run(build(source), range(9), missing)
    kw = dict(decoupled_weight_decay=decoupled) if is_torch(target) else dict(decouple_wd=decoupled)
    b = build(target, like=a, lr=.7, **kw)
    b.load_state_dict(through_file(a.state_dict(), weights_only=False))
    assert identical(averages(b), averages(a)) and [s[0] for s in averages(b)] == [9, 9, 5, 4]

    h = a.hypers[0] if not is_torch(source) else None
    rule = (dict(mom=h['mom'], sqr_mom=h['sqr_mom'], eps=h['eps']) if h else dict(mom=.8, sqr_mom=.99, eps=1e-8)) | dict(
        lr=.05, wd=.1, decouple_wd=decoupled, eps_debiased=not is_torch(target))
    want = [plain_step(p.detach(), numbers(p.shape, 1900+i), dict(t=t, m=m, v=v), **rule)
            for i,(p,(t,m,v)) in enumerate(zip(params_of(a), averages(a)))]
    for p,q in zip(params_of(run(b, [9])), want): torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-12)

def test_step_counts_keep_their_kind():
    "An int for fastai, a float32 tensor for torch, from either"
    for target,kind in ((RAdam, int), (TorchRAdam, torch.Tensor)):
        for source in (fo.RAdam, torch.optim.RAdam, partial(torch.optim.AdamW, fused=True)):
            b = build(target)
            b.load_state_dict(run(build(source), range(3)).state_dict())
            assert all(type(b.state[p]['step']) is kind and b.state[p]['step'] == 3 for p in params_of(b))

# ---- copies

COPIES = {**PAIRS, 'torch RAdam, tensor lr': (partial(torch.optim.RAdam, lr=torch.tensor(.05), foreach=False),
                                              partial(RAdam, **torch_settings)),
          'torch RAdam, tensor lr, to torch': (partial(torch.optim.RAdam, lr=torch.tensor(.05), foreach=False), TorchRAdam),
          'ours': (RAdam, RAdam), 'our Ranger': (Ranger, Ranger), 'ours, torch': (TorchRAdam, TorchRAdam)}
COPIES = {k: v for k,v in COPIES.items() if ' to fastai ' not in k} # fastai's own loading shares the tensors

def set_lr(opt, lr):
    for h in hypers_of(opt):
        if isinstance(h['lr'], torch.Tensor): h['lr'].fill_(lr) # as a schedule does
        else: h['lr'] = lr

@pytest.mark.parametrize('name', COPIES)
def test_loading_copies(name):
    "No tensor and no dict is shared: neither optimizer moves the other, nor the state that was loaded"
    first,second = COPIES[name]
    a = run(build(first), range(8))
    b = build(second, like=a)
    sd = a.state_dict()
    saved = copy.deepcopy(sd)
    b.load_state_dict(sd)
    assert identical(sd, saved)

    set_lr(b, .3)
    run(b, range(8, 16))
    assert identical(sd, saved) and identical(a.state_dict(), saved)
    before = frozen(b)
    set_lr(a, .9)
    run(a, range(8, 16))
    assert identical(frozen(b), before)

@pytest.mark.parametrize('cls', [RAdam, Ranger, TorchRAdam], ids=['RAdam', 'Ranger', 'torch'])
def test_its_own_state_changes_nothing(cls):
    a = run(build(cls), range(8))
    before = frozen(a)
    a.load_state_dict(a.state_dict())
    assert identical(frozen(a), before)
    close(run(a, range(8, 14)), run(build(cls), range(14)), 0)

@pytest.mark.parametrize('cls', [RAdam, Ranger, TorchRAdam], ids=['RAdam', 'Ranger', 'torch'])
def test_an_earlier_state_takes_the_place_of_a_later_one(cls):
    "Averages that the checkpoint does not have are forgotten"
    a = run(build(cls), range(2), lambda t: {1})
    early = copy.deepcopy(a.state_dict())
    b = run(build(cls), range(9))
    b.load_state_dict(early)
    for p,q in zip(params_of(b), params_of(a)): p.data.copy_(q.data)
    close(run(b, range(2, 12)), run(a, range(2, 12)), 0)

# ---- round trips

shape = st.sampled_from([(), (1,), (3,), (2,3), (0,), (2,1,2), (1,3,1,1)])
@st.composite
def runs(draw):
    "Groups of shapes, which parameters have a gradient at each step, where the run is cut, which are not decayed"
    shapes = draw(st.lists(st.lists(shape, min_size=1, max_size=3), min_size=1, max_size=3))
    n = sum(map(len, shapes))
    has_grad = draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=16))
    return shapes,has_grad,draw(st.integers(0, len(has_grad))),draw(st.sets(st.integers(0, n-1)))

@pytest.mark.many
@pytest.mark.parametrize('cls', [partial(RAdam, wd=.1, sqr_mom=.9), partial(Ranger, wd=.1, sqr_mom=.9, k=3), partial(TorchRAdam, **both)],
                         ids=['RAdam', 'Ranger', 'torch'])
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(case=runs(), dtype=st.sampled_from([torch.float32, f64]))
def test_round_trip_mid_run(cls, case, dtype):
    "Saved, read with weights_only and continued: every number of the uninterrupted run"
    shapes,has_grad,cut,undecayed = case
    missing = lambda t: {i for i,has in enumerate(has_grad[t]) if not has}
    a = build(cls, shapes, dtype)
    for i in undecayed: a.state[params_of(a)[i]]['do_wd'] = False
    run(a, range(cut), missing)
    sd = through_file(a.state_dict())
    b = build(cls, shapes, dtype, like=a, lr=.7)
    b.load_state_dict(sd)
    assert identical(b.state_dict(), a.state_dict())
    rest = range(cut, len(has_grad))
    assert identical(frozen(run(b, rest, missing)), frozen(run(a, rest, missing)))

@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=['deepcopy', 'pickle'])
@pytest.mark.parametrize('cls', [RAdam, Ranger, TorchRAdam], ids=['RAdam', 'Ranger', 'torch'])
def test_duplicates(cls, duplicate):
    "A copy mid-run is an optimizer of its own, also when its parameters then move in memory"
    a = run(build(cls), range(8))
    b = duplicate(a)
    for p in params_of(b): p.data = p.data.clone()
    close(run(b, range(8, 14)), run(build(cls), range(14)), 0)
    close(a, run(build(cls), range(8)), 0)
    close(run(a, range(8, 14)), b, 0)

# ---- containers, dtypes, flags

@pytest.mark.parametrize('source,target', [(fo.RAdam, RAdam), (fo.ranger, Ranger), (fo.RAdam, TorchRAdam)],
                         ids=['RAdam', 'Ranger', 'torch'])
def test_lists_and_Ls(source, target):
    "fastai keeps hypers and slow weights in `L`s, of which a careful saver makes lists"
    plain = lambda o: [plain(x) for x in o] if isinstance(o, (list, L)) else {k: plain(v)
                                                                              for k,v in o.items()} if isinstance(o, dict) else o
    fancy = lambda o: L(map(fancy, o)) if isinstance(o, (list, L)) else {k: fancy(v) for k,v in o.items()} if isinstance(o, dict) else o
    sd = run(build(source), range(8)).state_dict()
    res = []
    for f in (plain, fancy):
        b = build(target)
        b.load_state_dict(f(sd))
        res.append(frozen(run(b, range(8, 14))))
    assert identical(*res)

@pytest.mark.parametrize('source,target',
                         [(fo.RAdam, RAdam), (torch.optim.RAdam, RAdam), (fo.ranger, Ranger), (fo.RAdam, TorchRAdam),
                          (torch.optim.RAdam, TorchRAdam)],
                         ids=['fastai', 'torch to fastai', 'ranger', 'fastai to torch', 'torch'])
@pytest.mark.parametrize('old,new', [(torch.float32, f64), (f64, torch.float32), (torch.float32, torch.bfloat16),
                                     (torch.bfloat16, torch.float32)], ids=str)
def test_another_dtype_is_cast(source, target, old, new):
    a = run(build(source, dtype=old), range(8))
    b = build(target, dtype=new)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for (n,m,v),(n_,m_,v_) in zip(averages(b), averages(a)): assert n == n_ and identical([m, v], [m_.to(new), v_.to(new)])
    if target is Ranger: assert identical(b.slow_weights, [[o.to(new) for o in pg] for pg in a.slow_weights])
    c = build(target, dtype=new, like=b)
    c.load_state_dict(b.state_dict())
    assert identical(frozen(run(b, range(8, 12))), frozen(run(c, range(8, 12))))

@pytest.mark.parametrize('target', [RAdam, TorchRAdam], ids=['fastai', 'torch'])
def test_another_memory_layout(target):
    "Averages saved from a contiguous model, loaded for a channels_last one"
    conv = [[(4,3,2,5)]]
    a = run(build(target, conv), range(8))
    b = build(target, conv)
    p, = params_of(b)
    p.data = params_of(a)[0].detach().contiguous(memory_format=torch.channels_last)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    assert {o.stride() for o in averages(b)[0][1:]} == {p.stride()}
    close(run(b, range(8, 14)), run(a, range(8, 14)))

def flag(opt, **flags):
    "Sets a flag for one parameter each, by its number"
    for k,i in flags.items(): opt.state[params_of(opt)[i]][k] = k == 'force_train'
def flags_of(opt): return [{k: opt.state[p][k] for k in ('do_wd', 'force_train') if k in opt.state[p]} for p in params_of(opt)]

@pytest.mark.parametrize('source,target',
                         [(fo.RAdam, RAdam), (torch.optim.RAdam, RAdam), (fo.RAdam, TorchRAdam), (torch.optim.RAdam, TorchRAdam),
                          (fo.ranger, Ranger)],
                         ids=['fastai', 'torch to fastai', 'fastai to torch', 'torch', 'ranger'])
def test_flags_are_kept(source, target):
    "The checkpoint has none: those that the Learner set stay, for parameters with averages and without"
    a = run(build(source), range(8), lambda t: {2,3})
    b = build(target)
    flag(b, do_wd=0, force_train=2)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    assert flags_of(b) == [{'do_wd': False}, {}, {'force_train': True}, {}]
    assert [s and s[0] for s in averages(b)] == [8, 8, None, None]

@pytest.mark.parametrize('source,target', [(fo.RAdam, RAdam), (fo.ranger, Ranger), (RAdam, TorchRAdam), (TorchRAdam, RAdam)],
                         ids=['fastai to RAdam', 'fastai to Ranger', 'ours to torch', 'torch to ours'])
def test_flags_are_loaded(source, target):
    "And take effect: with zero gradients, all move by their decay but the one without it"
    wd = lambda cls: {'weight_decay' if is_torch(cls) else 'wd': .5}
    a = build(source, **wd(source))
    flag(a, do_wd=0, force_train=3)
    run(a, range(8), lambda t: {3})
    b = build(target, **({} if target is Ranger
                         else {'decoupled_weight_decay' if is_torch(target) else 'decouple_wd': not is_torch(source)}))
    flag(b, force_train=1)
    b.state[params_of(b)[0]]['do_wd'] = True # what was saved counts
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    assert flags_of(b) == [{'do_wd': False}, {'force_train': True}, {}, {'force_train': True}]
    with torch.no_grad(): torch._foreach_zero_([s[1] for s in averages(b) if s])
    before = [p.detach().clone() for p in params_of(b)]
    for p in params_of(b): p.grad = torch.zeros_like(p)
    b.step()
    assert [p.equal(q) for p,q in zip(params_of(b), before)] == [True, False, False, False]

# ---- refused

def fastai_sd(source=RAdam, **kw): return copy.deepcopy(run(build(source, **kw), range(8)).state_dict())
def torch_sd(source=torch.optim.RAdam, **kw): return copy.deepcopy(run(build(source, **kw), range(8)).state_dict())

def edit(f, make):
    "What `make()` returns after `f` has changed it"
    def _inner():
        sd = make()
        f(sd)
        return sd
    return _inner

def put(*keys):
    "A function that sets the last of `keys` (all but the value) in a nest of containers"
    *path,k,v = keys
    def _inner(o):
        for x in path: o = o[x]
        o[k] = v
    return _inner

def cut(*keys):
    "A function that deletes the item at `keys`"
    *path,k = keys
    def _inner(o):
        for x in path: o = o[x]
        del o[k]
    return _inner

bad_steps = {'nan': math.nan, 'infinite': math.inf, 'negative': -1, 'fractional': 2.5, 'text': 'x', 'none': None,
             'two': torch.tensor([1.,2.]), 'nan tensor': torch.tensor(math.nan)}
bad_hypers = dict(lr=(-1., r'lr .*-1'), mom=(1., r'mom .*1\.0'), sqr_mom=(1.5, r'sqr_mom .*1\.5'), eps=(math.nan, 'eps .*nan'),
                  wd=(-.1, r'wd .*-0\.1'))
bad_groups = dict(lr=(-1., r'lr .*-1'), betas=((1.,.99), r'mom .*1\.0'), eps=(math.nan, 'eps .*nan'), weight_decay=(-.1, r'wd .*-0\.1'))

REFUSED = { # name: (the state, what the error says)
    'a list':               (lambda: [1, 2], 'list'),
    'nothing':              (lambda: None, 'NoneType'),
    'empty':                (dict, 'nothing'),
    'model weights':        (lambda: nn.Linear(2, 2).state_dict(), 'weight, bias'),
    'one key':              (edit(cut('hypers'), fastai_sd), 'hypers'),
    'the other key':        (edit(cut('state'), fastai_sd), 'state'),
    'groups':               (partial(fastai_sd, shapes=[flatten(SHAPES)]), '1 parameter groups.* 2'),
    'parameters':           (partial(fastai_sd, shapes=[*SHAPES[:1], [()]]), '3 parameters.* 4'),
    'shape':                (partial(fastai_sd, shapes=[[(4,3), (5,)], SHAPES[1]]), r'parameter 0 \(shape \(3, 4\)\).*\(4, 3\)'),
    'shape of one average': (edit(put('state', 3, 'sqr_avg', torch.zeros(3, 2)), fastai_sd),
                             r'parameter 3 \(shape \(2, 3\)\).*sqr_avg.*\(3, 2\)'),
    'shape that broadcasts': (edit(put('state', 1, 'grad_avg', torch.zeros(1)), fastai_sd),
                              r'parameter 1 \(shape \(5,\)\).*grad_avg.*\(1,\)'),
    **{f'no {k}':           (edit(cut('state', 1, k), fastai_sd), f'parameter 1.*no {k}') for k in ('grad_avg', 'sqr_avg', 'step')},
    'an average that is a number': (edit(put('state', 1, 'grad_avg', 0.), fastai_sd), 'parameter 1.*grad_avg.*float'),
    'an average of integers': (edit(put('state', 1, 'sqr_avg', torch.zeros(5, dtype=torch.long)), fastai_sd), 'parameter 1.*sqr_avg'),
    **{f'step: {k}':        (edit(put('state', 2, 'step', v), fastai_sd), 'parameter 2.*step') for k,v in bad_steps.items()},
    **{f'hyper {k}':        (edit(put('hypers', 1, k, v), fastai_sd), match) for k,(v,match) in bad_hypers.items()},
    'fastai SGD with momentum': (partial(fastai_sd, fo.SGD, mom=.9), 'parameter 0.*no sqr_avg, step'),
    'fastai RMSProp':       (partial(fastai_sd, fo.RMSProp), 'parameter 0.*no grad_avg, step'),
    'fastai QHAdam':        (partial(fastai_sd, fo.QHAdam), 'nu_1, nu_2'),
    'fastai Larc':          (partial(fastai_sd, fo.Larc), 'parameter 0.*no sqr_avg, step'),
    'torch, groups':        (partial(torch_sd, shapes=[flatten(SHAPES)]), '1 parameter groups.* 2'),
    'torch, sizes of groups': (partial(torch_sd, shapes=[SHAPES[0][:1], SHAPES[0][1:]+SHAPES[1]]), r'\[1, 3\].*\[2, 2\]'),
    'torch, shape':         (partial(torch_sd, shapes=[[(4,3), (5,)], SHAPES[1]]), r'parameter 0 \(shape \(3, 4\)\).*\(4, 3\)'),
    **{f'torch, no {k}':    (edit(cut('state', 1, k), torch_sd), f'parameter 1.*no {v}')
       for k,v in dict(exp_avg='grad_avg', exp_avg_sq='sqr_avg', step='step').items()},
    **{f'torch, step: {k}': (edit(put('state', 2, 'step', v), torch_sd), 'parameter 2.*step') for k,v in bad_steps.items()},
    **{f'torch, {k}':       (edit(put('param_groups', 1, k, v), partial(torch_sd, decoupled_weight_decay=True)), match)
       for k,(v,match) in bad_groups.items()},
    **{f'torch, group without {k}': (edit(cut('param_groups', 1, k), torch_sd), f'group 1.*{k}')
       for k in ('lr', 'betas', 'eps', 'weight_decay', 'params')},
    'torch AdamW, amsgrad': (partial(torch_sd, torch.optim.AdamW, amsgrad=True), 'amsgrad'),
    'torch SGD with momentum': (partial(torch_sd, torch.optim.SGD, momentum=.9), 'group 0.*betas'),
    'torch Adamax':         (partial(torch_sd, torch.optim.Adamax), 'parameter 0.*sqr_avg'),
    'torch LBFGS':          (lambda: torch.optim.LBFGS([nn.Parameter(torch.ones(2))]).state_dict(), 'betas|groups|parameters'),
}
LOOKAHEAD = {
    'fastai ranger into RAdam': (RAdam, partial(fastai_sd, fo.ranger), 'Lookahead|slow_weights'),
    'Ranger into RAdam':    (RAdam, partial(fastai_sd, Ranger), 'Lookahead|slow_weights'),
    'Ranger into torch':    (TorchRAdam, partial(fastai_sd, Ranger), 'Lookahead|slow_weights'),
    'RAdam into Ranger':    (Ranger, fastai_sd, 'count|slow_weights'),
    'fastai RAdam into Ranger': (Ranger, partial(fastai_sd, fo.RAdam), 'count|slow_weights'),
    'torch RAdam into Ranger': (Ranger, torch_sd, 'count|slow_weights'),
    'a list into Ranger':   (Ranger, lambda: [1], 'list|Lookahead'),
    'no count':             (Ranger, edit(cut('count'), partial(fastai_sd, Ranger)), 'count'),
    'no slow weights':      (Ranger, edit(cut('slow_weights'), partial(fastai_sd, Ranger)), 'slow_weights'),
    'slow weights, shape':  (Ranger, edit(put('slow_weights', 0, 1, torch.zeros(4)), partial(fastai_sd, Ranger)), 'slow_weights.*shape'),
    'slow weights, short group': (Ranger, edit(cut('slow_weights', 0, 1), partial(fastai_sd, Ranger)), 'slow_weights'),
    'slow weights, group missing': (Ranger, edit(cut('slow_weights', 1), partial(fastai_sd, Ranger)), 'slow_weights'),
    'slow weights, empty':  (Ranger, edit(put('slow_weights', []), partial(fastai_sd, Ranger)), 'slow_weights'),
    'slow weights, numbers': (Ranger, edit(put('slow_weights', [[1.,2.],[3.,4.]]), partial(fastai_sd, Ranger)), 'slow_weights'),
    **{f'count: {k}':       (Ranger, edit(put('count', v), partial(fastai_sd, Ranger)), 'count') for k,v in bad_steps.items()},
    'averages':             (Ranger, edit(put('state', 3, 'sqr_avg', torch.zeros(3, 2)), partial(fastai_sd, Ranger)),
                             r'parameter 3.*sqr_avg'),
    'hyper':                (Ranger, edit(put('hypers', 0, 'lr', -1.), partial(fastai_sd, Ranger)), 'lr .*-1'),
}
FOR_ONE = { # states that the other class takes
    'torch RAdam, L2, into decoupled': (RAdam, partial(torch_sd, weight_decay=.1), 'group 0.*decoupled_weight_decay=False.*True'),
    'torch AdamW into L2':  (partial(RAdam, decouple_wd=False), partial(torch_sd, torch.optim.AdamW),
                             'group 0.*decoupled_weight_decay=True.*False'),
    'torch RAdam, maximize': (RAdam, partial(torch_sd, maximize=True), 'group 0.*maximize=True.*False'),
    'not maximize':         (partial(RAdam, maximize=True), torch_sd, 'group 0.*maximize=False.*True'),
    'SAdam into torch':     (TorchRAdam, partial(fastai_sd, fo.RAdam, beta=20.), 'beta'),
}
def run_on(cls, sd):
    opt = build(cls)
    opt.load_state_dict(sd)
    return opt

CASES = {**{f'{name}, into {cls.__module__.split(".")[-1]}': (cls, *case) for name,case in REFUSED.items() for cls in (RAdam, TorchRAdam)},
         **LOOKAHEAD, **FOR_ONE}

@pytest.mark.parametrize('cls', [RAdam, Ranger, TorchRAdam, fo.RAdam])
@pytest.mark.parametrize('theirs', [fo.RAdam, RAdam])
@pytest.mark.parametrize('mine', [3., 'text', [1, 2]], ids=str)
def test_hypers_of_the_users_own(cls, theirs, mine):
    "Saved and loaded as fastai does, whether the optimizer that loads has them or not"
    if cls is Ranger: theirs = {fo.RAdam: fo.ranger, RAdam: Ranger}[theirs]
    saved = run(build(theirs), range(7))
    for h in saved.hypers: h['mine'] = mine
    for has in (False, True):
        opt = build(cls)
        if has:
            for h in hypers_of(opt): h['mine'] = None
        opt.load_state_dict(through_file(saved.state_dict(), weights_only=False))
        assert [h['mine'] for h in hypers_of(opt)] == [mine]*2
        run(opt, range(7, 9))

@pytest.mark.parametrize('cls', [RAdam, TorchRAdam])
def test_what_the_recorder_left_behind(cls):
    "Files of earlier versions may have its readings among the hyper-parameters"
    sd = fastai_sd()
    expect = run(run_on(cls, sd), range(7, 9))
    for h in sd['hypers']: h.update(rect=.3, effective_lr=.015)
    opt = run_on(cls, sd)
    assert not {'rect', 'effective_lr'} & {k for h in hypers_of(opt) for k in h}
    close(run(opt, range(7, 9)), expect, 0)

@pytest.mark.many
@pytest.mark.parametrize('name', CASES)
def test_refused(name):
    "The error names what differs; the optimizer has not changed by a bit, and its run goes on"
    cls,make,match = CASES[name]
    opt,sd = run(build(cls), range(7)),make()
    before,saved = frozen(opt),copy.deepcopy(sd)
    with pytest.raises(ValueError, match=match): opt.load_state_dict(sd)
    assert identical(frozen(opt), before) and identical(sd, saved)
    close(run(opt, range(7, 12)), run(build(cls), range(12)), 0)
