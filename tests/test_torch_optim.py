"The torch class beside `torch.optim.RAdam`, in everything that training loops, schedulers and savers do to an optimizer."
import copy, inspect, math, pickle, warnings
from functools import partial

import fastai.optimizer as fo
import pytest
import torch
from fastai.callback import progress, schedule # Learner.no_bar, Learner.fit_one_cycle
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.optimizer import OptimWrapper
from torch import nn
from torch.optim import lr_scheduler

from radam_fastai.torch_optim import RAdam, RAdamWrapper

Torch = torch.optim.RAdam
f64 = torch.float64
SHAPES = [(3,4), (5,), ()]
HYPERS = dict(lr=.05, betas=(.9,.99), weight_decay=.1) # with β2 .99, the sixth step is the first adaptive one

def numbers(shape, seed, dtype=f64): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=f64).to(dtype)
def fresh(shapes=SHAPES, dtype=f64): return [nn.Parameter(numbers(s, i, dtype)) for i,s in enumerate(shapes)]

def build(cls, shapes=SHAPES, dtype=f64, **kw):
    "Parameters, the same each time, and an optimizer of them"
    ps = fresh(shapes, dtype)
    return ps,cls(ps, **{**HYPERS, **kw})

def set_grads(ps, t, missing=()):
    "The gradients of step `t`, none for the parameters numbered in `missing`"
    for i,p in enumerate(ps): p.grad = None if i in missing else torch.empty_like(p).copy_(numbers(p.shape, 1000*t+i, p.dtype))

def run(ps, opt, steps, missing=(), after=None):
    for t in steps:
        set_grads(ps, t, missing)
        opt.step()
        if after: after(t)
    return ps

def params_of(opt): return [p for g in opt.param_groups for p in g['params']]
def close(xs, ys, tol=1e-12):
    assert len(xs) == len(ys)
    for i,(x,y) in enumerate(zip(xs, ys)): torch.testing.assert_close(x, y, rtol=tol, atol=tol, msg=lambda m: f'parameter {i}: {m}')

def frozen(opt):
    "A deep copy of all that a step may change: values, averages, step counts, hyper-parameters"
    return copy.deepcopy([[p.detach() for p in params_of(opt)], opt.state_dict()])

def identical(a, b):
    "Whether two nests of containers and tensors are equal to the bit"
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(identical(v, b[k]) for k,v in a.items())
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(identical, a, b))
    return a == b

def refuses(opt, error, match, f):
    "`f` raises `error` and leaves `opt` as it was, to the bit"
    before = frozen(opt)
    with pytest.raises(error, match=match): f()
    assert identical(frozen(opt), before)

# ---- signature and plain steps

def test_signature_is_torchs():
    args = lambda f: [(p.name, p.default, p.kind) for p in inspect.signature(f).parameters.values()]
    assert args(RAdam) == args(Torch)

@pytest.mark.parametrize('kw', [{}, dict(decoupled_weight_decay=True), dict(maximize=True), dict(maximize=True, decoupled_weight_decay=True), dict(eps=1e-2),
                                dict(weight_decay=0), dict(betas=(0.,.99)), dict(betas=(.9,0.)), dict(betas=(.9,.5)), dict(betas=(.9,.999)), dict(lr=0.)], ids=str)
@pytest.mark.parametrize('foreach', [None, True, False])
def test_numbers_are_torchs(foreach, kw):
    close(run(*build(RAdam, foreach=foreach, **kw), range(15)), run(*build(Torch, **kw), range(15)))

def test_defaults_are_torchs():
    a,b = fresh(),fresh()
    close(run(a, RAdam(a), range(15)), run(b, Torch(b), range(15)))

def test_foreach_settings_agree():
    a,b,c = (run(*build(RAdam, foreach=o), range(15)) for o in (None, True, False))
    close(a, b, 1e-14)
    close(b, c, 1e-14)

@pytest.mark.parametrize('foreach', [None, True, False])
def test_foreach_picks_the_implementation(foreach, monkeypatch):
    "The fused kernel unless told otherwise, and with `False` one tensor at a time"
    run(*build(RAdam), range(8)) # whether there is a kernel is tried on first use
    fused,kernel,sizes,lerp = [],torch._fused_adam_,[],torch._foreach_lerp_
    monkeypatch.setattr(torch, '_fused_adam_', lambda ps, *args, **kw: (fused.append(len(ps)), kernel(ps, *args, **kw)))
    monkeypatch.setattr(torch, '_foreach_lerp_', lambda ps, *args: (sizes.append(len(ps)), lerp(ps, *args)))
    run(*build(RAdam, foreach=foreach), range(7)) # five momentum steps, two adaptive ones
    assert (fused, sizes) == {None: ([3]*2, [3]*5), True: ([], [3]*7), False: ([], [1]*21)}[foreach]

@pytest.mark.parametrize('missing', [{0}, {1,2}, {0,1,2}], ids=str)
def test_without_gradient(missing):
    "A parameter without a gradient stands still and does not count; one that joins late starts from step 1"
    (a,oa),(b,ob) = build(RAdam),build(Torch)
    for steps,gone in ((range(4), missing), (range(4, 12), ()), (range(12, 15), missing)):
        close(run(a, oa, steps, gone), run(b, ob, steps, gone))
        assert oa.state_dict()['state'].keys() == ob.state_dict()['state'].keys()
        assert all(s['step'] == ob.state[q]['step'] for s,q in ((oa.state[p], q) for p,q in zip(a, b) if q in ob.state))

def test_all_frozen():
    ps,opt = build(RAdam)
    for p in ps: p.requires_grad_(False)
    before = frozen(opt)
    assert opt.step() is None and identical(frozen(opt), before) and opt.state_dict()['state'] == {}

def test_closure_returns_the_loss():
    "The closure of LBFGS's kind: it clears, computes and backpropagates"
    (a,oa),(b,ob) = build(RAdam),build(Torch)
    def closure(ps, opt):
        opt.zero_grad()
        loss = sum((p**2).sum() for p in ps)
        loss.backward()
        return loss
    for _ in range(8):
        la,lb = oa.step(partial(closure, a, oa)),ob.step(closure=partial(closure, b, ob))
        assert la.requires_grad and la.item() == pytest.approx(lb.item(), rel=1e-12)
    close(a, b)

def test_groups_keep_their_own_settings():
    groups = lambda ps: [dict(params=ps[:1], lr=.01, maximize=True), dict(params=ps[1:], betas=(.8,.9), decoupled_weight_decay=True, foreach=True)]
    a,b = fresh(),fresh()
    close(run(a, RAdam(groups(a), **HYPERS), range(15)), run(b, Torch(groups(b), **HYPERS), range(15)))

def test_named_parameters():
    m = nn.Linear(3, 2)
    opt = RAdam(m.named_parameters(), lr=.1)
    assert opt.state_dict()['param_groups'][0]['param_names'] == ['weight', 'bias']

@pytest.mark.parametrize('lr', [torch.tensor(.05), torch.tensor([.05]), torch.tensor(.05, dtype=f64)], ids=['0-dim', '1-dim', 'float64'])
def test_tensor_lr(lr):
    "Changed in place between steps, as schedulers do"
    (a,oa),(b,ob) = build(RAdam, lr=lr.clone()),build(Torch, lr=lr.item())
    def halve(_): oa.param_groups[0]['lr'].mul_(.5)
    def halve_too(_): ob.param_groups[0]['lr'] *= .5
    close(run(a, oa, range(10), after=halve), run(b, ob, range(10), after=halve_too))

# ---- state

def test_state_dict_has_torchs_keys():
    (a,oa),(b,ob) = build(RAdam),build(Torch)
    assert oa.state_dict() == ob.state_dict()
    run(a, oa, range(8)), run(b, ob, range(8))
    sa,sb = oa.state_dict(),ob.state_dict()
    assert sa['param_groups'] == sb['param_groups'] and sa['state'].keys() == sb['state'].keys()
    for i in sb['state']:
        assert set(sa['state'][i]) == set(sb['state'][i])
        for k,v in sb['state'][i].items():
            assert (sa['state'][i][k].dtype, sa['state'][i][k].shape) == (v.dtype, v.shape)
            close([sa['state'][i][k]], [v])

@pytest.mark.parametrize('n', [0, 3, 8])
@pytest.mark.parametrize('first,second', [(RAdam, Torch), (Torch, RAdam)], ids=['ours to torch', 'torch to ours'])
def test_runs_go_on_in_the_other_class(first, second, n):
    a,oa = build(first)
    run(a, oa, range(n))
    b,ob = build(second, lr=1., weight_decay=0, decoupled_weight_decay=True)
    with torch.no_grad(): torch._foreach_copy_(b, a)
    ob.load_state_dict(copy.deepcopy(oa.state_dict()))
    close(run(b, ob, range(n, 20)), run(a, oa, range(n, 20)))
    close(b, run(*build(Torch), range(20)))

def test_step_counts_of_a_saved_state_stand_alone():
    "What is saved is a count per parameter: one that is changed moves no other"
    a,oa = build(RAdam)
    run(a, oa, range(3))
    saved = oa.state_dict()
    saved['state'][0]['step'] += 1
    assert [s['step'].item() for s in saved['state'].values()] == [4., 3., 3.]

@pytest.mark.parametrize('reset', [lambda s: s.update(step=torch.tensor(0.)), lambda s: s['step'].zero_()], ids=['replaced', 'in place'])
def test_restart_of_one_step_count(reset):
    "The rectifier of one parameter starts over, that of the others goes on"
    def go(cls):
        ps,opt = build(cls)
        run(ps, opt, range(8))
        reset(opt.state[ps[1]])
        run(ps, opt, range(8, 12))
        return ps+[opt.state[p]['step'] for p in ps]
    close(go(RAdam), go(Torch))

def test_counts_that_float32_cannot_hold(monkeypatch):
    "Beyond 2²⁴ updates: the count goes on, in the nearest numbers, and nothing is sorted anew at each step"
    from radam_fastai.bucket import Buckets
    sorts,sort = [],Buckets._sort
    monkeypatch.setattr(Buckets, '_sort', lambda *a: (sorts.append(1), sort(*a)))
    ps,opt = build(RAdam, [(3,)])
    run(ps, opt, range(1))
    opt.state[ps[0]]['step'].fill_(2**24-2)
    run(ps, opt, range(1, 9))
    assert len(sorts) == 2 and opt.state[ps[0]]['step'] == 2**24+6

@pytest.mark.parametrize('n', [0, 3, 8])
def test_deepcopy(n):
    "Model and optimizer copied together: two runs, independent and equal"
    a,oa = build(RAdam)
    run(a, oa, range(n))
    b,ob = copy.deepcopy((a, oa))
    run(a, oa, range(n, 15))
    close(b, run(*build(Torch), range(n)))
    close(run(b, ob, range(n, 15)), a, 0)
    close(a, run(*build(Torch), range(15)))

@pytest.mark.parametrize('n', [0, 8])
def test_pickle(n):
    a,oa = build(RAdam)
    run(a, oa, range(n))
    ob = pickle.loads(pickle.dumps(oa))
    close(run(params_of(ob), ob, range(n, 15)), run(a, oa, range(n, 15)), 0)

def test_unpickled_from_an_older_class():
    "A group pickled before a setting existed has its default"
    a,oa = build(RAdam)
    run(a, oa, range(3))
    for k in ('foreach', 'maximize', 'decoupled_weight_decay'): del oa.param_groups[0][k]
    ob = copy.deepcopy(oa)
    close(run(params_of(ob), ob, range(3, 12)), run(*build(Torch), range(12)))

def test_save_load_weights_only(tmp_path):
    a,oa = build(RAdam)
    run(a, oa, range(8))
    torch.save([a, oa.state_dict()], tmp_path/'o.pt')
    saved,sd = torch.load(tmp_path/'o.pt', weights_only=True)
    b,ob = build(RAdam)
    with torch.no_grad(): torch._foreach_copy_(b, saved)
    ob.load_state_dict(sd)
    close(run(b, ob, range(8, 15)), run(a, oa, range(8, 15)), 0)

def test_add_param_group_mid_run():
    "The newcomer is at step 1 while the others are adaptive"
    def go(cls):
        ps = fresh()
        opt = cls(ps[:2], **HYPERS)
        run(ps[:2], opt, range(8))
        opt.add_param_group(dict(params=ps[2:], lr=.2))
        return run(ps, opt, range(8, 20))
    close(go(RAdam), go(Torch))

@pytest.mark.parametrize('move', [
    lambda g: g[1]['params'].append(g[0]['params'].pop()),
    lambda g: g[0]['params'].append(g[1]['params'].pop(0)),
    lambda g: g[0]['params'].extend(g.pop(1)['params'])], ids=['to the next', 'to the one before', 'merge'])
def test_parameters_moved_between_groups(move):
    "Each takes the hyper-parameters of the group that it is in now"
    def go(cls):
        ps = fresh()
        opt = cls([dict(params=ps[:1]), dict(params=ps[1:], lr=.5, weight_decay=0)], **HYPERS)
        run(ps, opt, range(8))
        move(opt.param_groups)
        return run(ps, opt, range(8, 12))
    close(go(RAdam), go(Torch))

def test_load_hooks():
    "A pre-hook may adapt a state that would not fit (here: parameters in another order), as torch documents it"
    def reorder(opt, sd):
        sd = copy.deepcopy(sd)
        sd['state'] = {2-i: s for i,s in sd['state'].items()}
        return sd
    def go(cls):
        a,oa = build(cls)
        run(a, oa, range(8))
        opt = cls(a[::-1], **HYPERS)
        opt.register_load_state_dict_pre_hook(reorder)
        opt.load_state_dict(oa.state_dict())
        return run(a, opt, range(8, 12))
    close(go(RAdam), go(Torch))

def test_step_hooks():
    ps,opt = build(RAdam)
    seen = []
    opt.register_step_pre_hook(lambda *a: seen.append('pre'))
    opt.register_step_post_hook(lambda *a: seen.append('post'))
    run(ps, opt, range(2))
    assert seen == ['pre', 'post']*2

def test_zero_grad_releases():
    ps,opt = build(RAdam)
    run(ps, opt, range(1))
    opt.zero_grad()
    assert all(p.grad is None for p in ps)

# ---- schedulers

SCHEDULERS = dict(
    one_cycle=lambda o: lr_scheduler.OneCycleLR(o, max_lr=.1, total_steps=20, base_momentum=.8, max_momentum=.95),
    cosine=lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=15),
    lambda_lr=lambda o: lr_scheduler.LambdaLR(o, lambda t: 1/(t+1)),
    cyclic=lambda o: lr_scheduler.CyclicLR(o, base_lr=.01, max_lr=.1, step_size_up=4, cycle_momentum=True, base_momentum=.8, max_momentum=.95))

@pytest.mark.parametrize('lr', [.05, torch.tensor(.05)], ids=['float', 'tensor'])
@pytest.mark.parametrize('name', SCHEDULERS)
def test_schedulers(name, lr):
    def go(cls, lr):
        ps,opt = build(cls, lr=lr)
        sched,seen = SCHEDULERS[name](opt),[]
        def after(_):
            sched.step()
            seen.append((float(opt.param_groups[0]['lr']), float(opt.param_groups[0]['betas'][0])))
        return run(ps, opt, range(15), after=after),seen
    with warnings.catch_warnings():
        warnings.simplefilter('error') # torch warns of steps taken out of order
        (a,seen_a),(b,seen_b) = (go(c, lr.clone() if isinstance(lr, torch.Tensor) else lr) for c in (RAdam, Torch))
    close(a, b, 1e-7 if isinstance(lr, torch.Tensor) else 1e-12)
    assert seen_a == seen_b and len({lr for lr,_ in seen_a}) > 3
    if name in ('one_cycle', 'cyclic'): assert len({mom for _,mom in seen_a}) > 3

def test_reduce_lr_on_plateau():
    def go(cls):
        ps,opt = build(cls)
        sched,lrs = lr_scheduler.ReduceLROnPlateau(opt, patience=1, factor=.5),[]
        def after(_):
            sched.step(1.)
            lrs.append(opt.param_groups[0]['lr'])
        return run(ps, opt, range(10), after=after),lrs
    (a,lrs),(b,_) = go(RAdam),go(Torch)
    close(a, b)
    assert lrs[0] == .05 and lrs[-1] < .01

def test_schedule_goes_on_after_loading():
    def state(n, sd=None, ps=None):
        qs,opt = build(RAdam)
        sched = SCHEDULERS['one_cycle'](opt)
        if sd:
            with torch.no_grad(): torch._foreach_copy_(qs, ps)
            opt.load_state_dict(sd[0])
            sched.load_state_dict(sd[1])
        run(qs, opt, n, after=lambda _: sched.step())
        return qs,copy.deepcopy([opt.state_dict(), sched.state_dict()])
    whole,_ = state(range(15))
    half,sd = state(range(8))
    close(state(range(8, 15), sd, half)[0], whole, 0)

# ---- mixed precision, backward hooks, other libraries

def test_grad_scaler_skips_overflows():
    "The step with an infinite gradient changes nothing and does not count"
    (a,oa),(b,ob) = build(RAdam, dtype=torch.float32),build(Torch, dtype=torch.float32)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**8, growth_interval=1000)
    for t in range(12):
        overflow,before = t in (2, 7),frozen(oa)
        loss = sum((p*numbers(p.shape, 1000*t+i, p.dtype)).sum() for i,p in enumerate(a)) * (math.inf if overflow else 1)
        oa.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(oa)
        scaler.update()
        if overflow: assert identical(frozen(oa), before)
    assert {s['step'].item() for s in oa.state.values()} == {10.} and scaler.get_scale() == 2.**6
    close(a, run(b, ob, [t for t in range(12) if t not in (2, 7)]), 1e-5)

def mlp(dtype=f64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4,8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8,1)).to(dtype)

def loss_of(m, t):
    x = numbers((16,4), t, next(m.parameters()).dtype)
    return (m(x)-x.sum(1, keepdim=True)).pow(2).mean()

def fit(m, opt, steps, backward=torch.Tensor.backward):
    for t in steps:
        opt.zero_grad()
        backward(loss_of(m, t))
        opt.step()
    return list(m.parameters())

def test_optimizer_in_backward():
    "One optimizer per parameter, stepped as its gradient arrives, against one over all"
    a,b = mlp(),mlp()
    opts = {p: RAdam([p], **HYPERS) for p in a.parameters()}
    def step(p):
        opts[p].step()
        opts[p].zero_grad()
    for p in a.parameters(): p.register_post_accumulate_grad_hook(step)
    for t in range(12): loss_of(a, t).backward()
    assert all(p.grad is None for p in a.parameters())
    close(list(a.parameters()), fit(b, Torch(b.parameters(), **HYPERS), range(12)), 1e-10)

@pytest.fixture
def accelerator():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)

def test_accelerate(accelerator, tmp_path):
    def prepared(): return accelerator.prepare(m := mlp(), RAdam(m.parameters(), **HYPERS))
    m,opt = prepared()
    fit(m, opt, range(8), accelerator.backward)
    accelerator.save_state(tmp_path)
    fit(m, opt, range(8, 14), accelerator.backward)
    b = mlp()
    close(list(m.parameters()), fit(b, Torch(b.parameters(), **HYPERS), range(14)), 1e-10)

    whole = copy.deepcopy(list(m.parameters()))
    accelerator.load_state(tmp_path)
    close(fit(m, opt, range(8, 14), accelerator.backward), whole, 0)
    accelerator.free_memory()
    m,opt = prepared()
    accelerator.load_state(tmp_path)
    close(fit(m, opt, range(8, 14), accelerator.backward), whole, 0)

@pytest.mark.parametrize('flatten', [False, True], ids=['nested', 'flattened'])
@pytest.mark.filterwarnings('ignore:torch.distributed is')
def test_distributed_checkpoint(flatten, tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
    opts = StateDictOptions(flatten_optimizer_state_dict=flatten)
    m = mlp()
    opt = RAdam(m.parameters(), **HYPERS)
    fit(m, opt, range(8))
    opt.zero_grad()
    dcp.save({'model': m.state_dict(), 'opt': get_optimizer_state_dict(m, opt, options=opts)}, checkpoint_id=tmp_path, no_dist=True)
    whole = fit(m, opt, range(8, 14))

    b = mlp()
    ob = RAdam(b.parameters(), **HYPERS)
    start = copy.deepcopy(b.state_dict())
    sd = {'model': b.state_dict(), 'opt': get_optimizer_state_dict(b, ob, options=opts)} # starts the state by a step with lr 0
    assert identical(dict(start), dict(b.state_dict()))
    dcp.load(sd, checkpoint_id=tmp_path, no_dist=True)
    b.load_state_dict(sd['model'])
    set_optimizer_state_dict(b, ob, sd['opt'], options=opts)
    assert {s['step'].item() for s in ob.state.values()} == {8.}
    close(fit(b, ob, range(8, 14)), whole, 0)

@pytest.mark.parametrize('n', [4, 12])
def test_schedule_free_wrapper(n):
    "It puts a key of its own into the state before the first step"
    from schedulefree import ScheduleFreeWrapper
    shapes,kw = [(3,4), (5,)],{**HYPERS, 'weight_decay': 0}
    def go(ps, base):
        opt = ScheduleFreeWrapper(base, momentum=.9, weight_decay_at_y=.1)
        opt.train()
        run(ps, opt, range(n))
        opt.eval()
    a,oa = build(RAdam, shapes, **kw)
    b,ob = build(Torch, shapes, **kw)
    for p in b: # torch's class starts its averages in an empty dict only: here that is done for it
        ob.state[p] = dict(step=torch.tensor(0.), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    go(a, oa)
    go(b, ob)
    close(a, b)
    assert all('z' in s and s['step'] == n for s in oa.state.values())
    c,oc = build(RAdam, shapes, **kw)
    oc.load_state_dict(oa.state_dict())
    assert identical(oc.state_dict(), oa.state_dict())
    assert all(oc.state[p]['z'].data_ptr() != oa.state[q]['z'].data_ptr() for p,q in zip(c, a))

# ---- refused

@pytest.mark.parametrize('kw', [dict(capturable=True), dict(differentiable=True)], ids=str)
def test_refused_settings(kw):
    name, = kw
    ps,opt = build(RAdam)
    with pytest.raises(ValueError, match=name): build(RAdam, **kw)
    with pytest.raises(ValueError, match=name): RAdam([dict(params=ps, **kw)])
    refuses(opt, ValueError, name, lambda: opt.add_param_group(dict(params=fresh(), **kw)))

OUT_OF_RANGE = [(dict(lr=-1.), r'lr .*-1\.0'), (dict(lr=math.nan), 'lr .*nan'), (dict(lr=math.inf), 'lr .*inf'), (dict(lr=torch.tensor(-2.)), r'lr .*-2\.0'),
                (dict(betas=(1.,.99)), r'β1.*1\.0'), (dict(betas=(-.1,.99)), r'β1.*-0\.1'), (dict(betas=(.9,1.)), r'β2.*1\.0'), (dict(betas=(.9,-.5)), r'β2.*-0\.5'),
                (dict(betas=(math.nan,.9)), 'β1.*nan'), (dict(eps=-1e-3), r'eps .*-0\.001'), (dict(eps=math.nan), 'eps .*nan'), (dict(weight_decay=-.1), r'wd .*-0\.1')]

@pytest.mark.parametrize('kw,match', OUT_OF_RANGE, ids=lambda o: str(o) if isinstance(o, dict) else '')
def test_hypers_out_of_range(kw, match):
    "At construction, in a new group, and set in `param_groups` before a step"
    with pytest.raises(ValueError, match=match): build(RAdam, **kw)
    with pytest.raises(ValueError, match=match): RAdam([dict(params=fresh(), **kw)], **HYPERS)
    ps = fresh()
    opt = RAdam([dict(params=ps[:1]), dict(params=ps[1:])], **HYPERS)
    run(ps, opt, range(8))
    refuses(opt, ValueError, match, lambda: opt.add_param_group(dict(params=fresh(), **kw)))
    old = dict(opt.param_groups[1])
    opt.param_groups[1].update(kw)
    set_grads(ps, 8)
    values,averages = [p.detach().clone() for p in ps],copy.deepcopy(opt.state_dict()['state'])
    with pytest.raises(ValueError, match=match): opt.step()
    assert identical([p.detach() for p in ps], values) and identical(opt.state_dict()['state'], averages)
    opt.param_groups[1].update({k: old[k] for k in kw})
    close(run(ps, opt, range(8, 12)), run(*build(Torch), range(12)))

def test_tensor_lr_of_several_elements():
    with pytest.raises(ValueError, match='lr .*2'): build(RAdam, lr=torch.tensor([.1,.2]))

def test_no_parameters():
    with pytest.raises(ValueError, match='empty'): RAdam([])

def strange(kind):
    "A parameter whose gradient RAdam cannot use, and that gradient"
    if kind == 'sparse':
        emb = nn.Embedding(6, 2, sparse=True, dtype=f64)
        emb(torch.tensor([1,4])).sum().backward()
        return emb.weight,emb.weight.grad
    p = nn.Parameter(torch.ones(6, 2, dtype=torch.complex128))
    return p,torch.ones_like(p)

@pytest.mark.parametrize('steps', [0, 8])
@pytest.mark.parametrize('kind,match', [('sparse', r'sparse.*parameter 3, shape \(6, 2\)'), ('complex', r'complex128.*parameter 3, shape \(6, 2\)')])
def test_gradients_refused(kind, match, steps):
    "The error names the parameter and no other has moved, in any group; without that gradient the run goes on"
    ps,(odd,grad) = fresh(),strange(kind)
    opt = RAdam([dict(params=ps[:2]), dict(params=[ps[2], odd])], **HYPERS)
    odd.grad = None
    run(ps, opt, range(steps))
    set_grads(ps, steps)
    odd.grad = grad
    refuses(opt, (TypeError, RuntimeError), match, opt.step)
    refuses(opt, (TypeError, RuntimeError), match, opt.step)
    odd.grad = None
    close(run(ps, opt, range(steps, 12)), run(*build(Torch), range(12)))

@pytest.mark.parametrize('joins', ['already trained', 'first gradient'])
def test_dense_gradient_after_a_refused_one(joins):
    "A refused step leaves no trace: once its gradient is dense, the parameter trains like the others"
    def go(cls, refused):
        ps,opt = build(cls)
        run(ps, opt, range(8), missing={0} if joins == 'first gradient' else ())
        if refused:
            set_grads(ps, 8)
            ps[0].grad = ps[0].grad.to_sparse()
            with pytest.raises(TypeError): opt.step()
        return run(ps, opt, range(8, 14))
    close(go(RAdam, True), go(Torch, False))

# ---- dtypes, memory layouts

TOLS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}

def every_other(p): return torch.zeros(*p.shape[:-1], 2*p.shape[-1], dtype=p.dtype)[..., ::2].copy_(p)
LAYOUTS = dict(contiguous=lambda p: p, channels_last=lambda p: p.contiguous(memory_format=torch.channels_last), non_contiguous=every_other,
               transposed=lambda p: p.transpose(0, 1).contiguous().transpose(0, 1), permuted=lambda p: p.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0))

@pytest.mark.parametrize('dtype', TOLS, ids=str)
@pytest.mark.parametrize('name', LAYOUTS)
def test_dtypes_and_layouts(name, dtype):
    def go(cls):
        ps = [nn.Parameter(LAYOUTS[name](numbers(s, i, dtype))) for i,s in enumerate([(4,3,2,5), (2,2,3,3)])]
        lay = [p.stride() for p in ps]
        run(ps, cls(ps, **{**HYPERS, 'eps': 1e-3}), range(12))
        assert [p.stride() for p in ps] == lay
        return ps
    close(go(RAdam), go(Torch), TOLS[dtype])

@pytest.mark.parametrize('dtype', TOLS, ids=str)
def test_zero_size_and_zero_dim(dtype):
    shapes = [(0,), (3,0,2), (), (1,), (1,1,1)]
    close(*(run(*build(cls, shapes, dtype, eps=1e-3), range(12)) for cls in (RAdam, Torch)), TOLS[dtype])

def test_only_zero_size():
    ps,opt = build(RAdam, [(0,), (2,0)])
    run(ps, opt, range(12))
    assert {s['step'].item() for s in opt.state.values()} == {12.}

def test_mixed_dtypes_in_a_group():
    dtypes = torch.float64,torch.float32,torch.float64,torch.bfloat16
    def go(cls):
        ps = [nn.Parameter(numbers((4,3), i, d)) for i,d in enumerate(dtypes)]
        return run(ps, cls(ps, **{**HYPERS, 'eps': 1e-3}), range(12))
    for d,p,q in zip(dtypes, go(RAdam), go(Torch)): close([p], [q], TOLS[d])

@pytest.mark.parametrize('order', ['gradient', 'parameter', 'alternating'])
def test_gradients_in_another_memory_order(order):
    "Elements meet by index, not by place in memory"
    cl = lambda t: t.contiguous(memory_format=torch.channels_last)
    def go(cls):
        p = numbers((4,3,2,5), 0)
        p = nn.Parameter(cl(p) if order == 'parameter' else p)
        opt = cls([p], **HYPERS)
        for t in range(14):
            g = numbers(p.shape, 100+t)
            p.grad = cl(g) if order == 'gradient' or order == 'alternating' and t%3 else g
            old = p.grad.clone()
            opt.step()
            assert p.grad.equal(old)
        return [p]
    close(go(RAdam), go(Torch))

@pytest.mark.parametrize('n', [2, 8])
def test_to_channels_last_mid_run(n):
    "The model is laid out anew between two steps: the numbers do not notice"
    def go(cls, convert):
        torch.manual_seed(0)
        m = nn.Sequential(nn.Conv2d(3,8,3), nn.Conv2d(8,4,1)).double()
        ps = list(m.parameters())
        opt = cls(ps, **HYPERS)
        run(ps, opt, range(n))
        if convert:
            m.to(memory_format=torch.channels_last)
            assert not ps[0].is_contiguous()
        return run(ps, opt, range(n, 14))
    close(go(RAdam, True), go(Torch, False))

def test_transposed_in_place_mid_run():
    "Same memory, another order of dimensions: the averages stay with their elements"
    def go(cls):
        ps,opt = build(cls, [(4,4)])
        run(ps, opt, range(8))
        ps[0].data = ps[0].data.t()
        return run(ps, opt, range(8, 14))
    close(go(RAdam), go(Torch))

@pytest.mark.parametrize('n', [2, 8])
def test_to_double_mid_run(n):
    "The averages are float32 still: an error that says so, nothing changed; loading the state again casts them"
    m = mlp(torch.float32)
    opt = RAdam(m.parameters(), **HYPERS)
    fit(m, opt, range(n))
    m.double()
    loss_of(m, n).backward()
    refuses(opt, TypeError, 'parameter 0.*float64 now, its averages are torch.float32', opt.step)
    opt.load_state_dict(opt.state_dict())
    assert {s['exp_avg'].dtype for s in opt.state.values()} == {f64}
    b = copy.deepcopy(m)
    ob = Torch(b.parameters(), **HYPERS)
    ob.load_state_dict(copy.deepcopy(opt.state_dict())) # torch's class would share the averages
    close(fit(m, opt, range(n, 14)), fit(b, ob, range(n, 14)), 1e-10)

def test_a_capturable_checkpoint_goes_on():
    "How another optimizer was stepped is no obstacle: the state is the same"
    (a,oa),(b,ob) = build(Torch),build(RAdam)
    run(a, oa, range(8))
    sd = copy.deepcopy(oa.state_dict())
    for g in sd['param_groups']: g['capturable'] = True
    with torch.no_grad():
        for p,q in zip(b, a): p.copy_(q)
    ob.load_state_dict(sd)
    close(run(b, ob, range(8, 14)), run(a, oa, range(8, 14)))

def test_the_authors_checkpoint_decouples():
    (a,oa),(b,ob) = build(Torch),build(RAdam)
    run(a, oa, range(3))
    sd = copy.deepcopy(oa.state_dict())
    for g in sd['param_groups']: g.update(buffer=[[None]*3]*10), g.pop('decoupled_weight_decay')
    ob.load_state_dict(sd)
    assert ob.param_groups[0]['decoupled_weight_decay']

def test_wrapper_refuses_arguments_beside_a_built_optimizer():
    opt = RAdam([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match='betas would have no effect'): RAdamWrapper(opt=opt, betas=(.5, .5))

def test_parameters_replaced_mid_run():
    "`p.data = …`, as weight tying and quantisation do: the new memory is what is updated"
    def go(cls):
        ps,opt = build(cls)
        run(ps, opt, range(8))
        for p in ps: p.data = p.data.clone()*2
        return run(ps, opt, range(8, 14))
    close(go(RAdam), go(Torch))

# ---- fastai's wrapper

WRAPPED = dict(eps=0., betas=(.9,.99), weight_decay=.3, decoupled_weight_decay=True)
FASTAI = partial(fo.RAdam, eps=0., sqr_mom=.99, wd=.3)      # with eps 0, torch's rule and fastai's are the same

def learner(opt_func, **kw):
    xs = numbers((32,4), 0)
    dl = DataLoader(list(zip(xs, xs.sum(1, keepdim=True))), bs=8)
    return Learner(DataLoaders(dl, dl, device='cpu'), mlp(), loss_func=MSELossFlat(), opt_func=opt_func, lr=.01,
                   splitter=lambda m: [list(m[:2].parameters()), list(m[2:].parameters())], train_bn=False, **kw)

def trained(learn, f=lambda l: l.fit_one_cycle(3, slice(1e-3,1e-2))):
    with learn.no_bar(), learn.no_logging(): f(learn)
    return list(learn.model.parameters())

@pytest.mark.parametrize('wd_bn_bias', [False, True])
@pytest.mark.parametrize('instance', [False, True], ids=['class', 'instance'])
def test_wrapper_in_a_learner(instance, wd_bn_bias):
    "One-cycle with discriminative lrs, and no decay of norms and biases: fastai's numbers"
    learn = learner(partial(RAdamWrapper, **WRAPPED), wd_bn_bias=wd_bn_bias)
    if instance:
        groups = [dict(params=list(o.parameters())) for o in (learn.model[:2], learn.model[2:])]
        learn.opt_func = RAdamWrapper(opt=RAdam(groups, lr=.01, **WRAPPED))
    got = trained(learn)
    want = trained(learner(FASTAI, wd_bn_bias=wd_bn_bias))
    close(got, want, 1e-9)
    flags = [learn.opt.state[p].get('do_wd', True) for p in learn.model.parameters()]
    assert flags == ([True]*6 if wd_bn_bias else [True, False, False, False, True, False])

def test_wrapper_freeze_unfreeze():
    def go(learn):
        learn.freeze()
        before = learn.model[0].weight.detach().clone()
        learn.fit(2, .01)
        assert learn.model[0].weight.equal(before)
        learn.unfreeze()
        learn.fit(2, slice(1e-3,1e-2), reset_opt=False)
    close(trained(learner(partial(RAdamWrapper, **WRAPPED)), go), trained(learner(FASTAI), go), 1e-9)

@pytest.mark.parametrize('opt_func', [partial(OptimWrapper, opt=RAdam), partial(RAdamWrapper)], ids=['OptimWrapper', 'RAdamWrapper'])
def test_wrappers_without_decay(opt_func):
    kw = dict(eps=0., betas=(.9,.99))
    close(trained(learner(partial(opt_func, **kw))), trained(learner(partial(fo.RAdam, eps=0., sqr_mom=.99))), 1e-9)

def test_wrapper_hypers_write_through():
    ps = fresh()
    opt = RAdamWrapper([ps[:1], ps[1:]], **HYPERS)
    opt.hypers[1]['lr'] = .5
    opt.hypers[1]['mom'] = .7
    opt.hypers[0]['wd'] = .2
    assert [(g['lr'], g['betas'], g['weight_decay']) for g in opt.opt.param_groups] == [(.05, (.9,.99), .2), (.5, (.7,.99), .1)]
    assert (opt.hypers[1]['lr'], opt.hypers[1]['mom'], opt.hypers[0]['wd']) == (.5, .7, .2)
    opt.set_hyper('lr', slice(.001,.1))
    opt.set_hyper('sqr_mom', .95)
    assert [g['lr'] for g in opt.opt.param_groups] == pytest.approx([.001, .1])
    assert [g['betas'] for g in opt.opt.param_groups] == [(.9,.95), (.7,.95)]
    b = fresh()
    ob = Torch([dict(params=b[:1], lr=.001, weight_decay=.2, betas=(.9,.95)), dict(params=b[1:], lr=.1, weight_decay=.1, betas=(.7,.95))])
    close(run(ps, opt, range(12)), run(b, ob, range(12)))

def test_wrapper_flags():
    "`do_wd` and `force_train`, set before the first step or later, work and outlive `clear_state`"
    ps = fresh()
    opt = RAdamWrapper([ps[:2], ps[2:]], **HYPERS)
    opt.state[ps[0]]['do_wd'] = False
    opt.state[ps[1]]['force_train'] = True
    b = fresh()
    groups = [dict(params=b[:1], weight_decay=0), dict(params=b[1:2]), dict(params=b[2:])]
    ob = Torch(groups, **HYPERS)
    close(run(ps, opt, range(8)), run(b, ob, range(8)))
    opt.state[ps[2]]['do_wd'] = False
    ob.param_groups[2]['weight_decay'] = 0
    close(run(ps, opt, range(8, 12)), run(b, ob, range(8, 12)))
    opt.freeze()
    assert [p.requires_grad for p in ps] == [False, True, True]
    opt.clear_state()
    assert [dict(opt.state[p]) for p in ps] == [{'do_wd': False}, {'force_train': True}, {'do_wd': False}] and opt.state is opt.opt.state
    ob.state.clear()
    close(run(ps, opt, range(12)), run(b, ob, range(12)))

def test_wrapper_of_a_built_optimizer():
    ps = fresh()
    base = RAdam(ps, **HYPERS)
    opt = RAdamWrapper(opt=base)
    assert opt.opt is base and opt.param_lists == [ps]
    close(run(ps, opt, range(12)), run(*build(Torch), range(12)))
    with pytest.raises(ValueError, match='built'): RAdamWrapper(fresh(), opt=base)

@pytest.mark.parametrize('other', [Torch, torch.optim.AdamW, torch.optim.SGD], ids=lambda o: o.__name__)
def test_wrapper_refuses_other_optimizers(other):
    with pytest.raises(TypeError, match=f'RAdamWrapper.*{other.__name__}'): RAdamWrapper(opt=other(fresh(), lr=.1))

def test_wrapper_checks_hypers():
    with pytest.raises(ValueError, match='lr .*-1'): RAdamWrapper(fresh(), lr=-1)
    ps = fresh()
    opt = RAdamWrapper(ps, **HYPERS)
    opt.hypers[0]['lr'] = math.nan
    set_grads(ps, 0)
    with pytest.raises(ValueError, match='lr .*nan'): opt.step()
    assert identical([p.detach() for p in ps], [p.detach() for p in fresh()])

@pytest.mark.parametrize('args', [(), ([],)], ids=['none', 'empty list'])
def test_wrapper_without_parameters(args):
    with pytest.raises(ValueError, match='param'): RAdamWrapper(*args, lr=.1)

def test_wrapper_save_load(tmp_path):
    "A Learner saved mid-run under weights_only, without a warning, goes on as if it had not been"
    run_on = lambda l: trained(l, lambda l: l.fit(1, .01, reset_opt=False))
    a,b = (learner(partial(RAdamWrapper, **WRAPPED)) for _ in range(2))
    trained(a, lambda l: l.fit(2, .01))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', 'numpy.core', DeprecationWarning) # fastai's own, whatever the optimizer
        file = a.save(tmp_path/'m')
        b.create_opt()
        b.load(tmp_path/'m')
    torch.load(file, weights_only=True)
    for l in (a, b): torch.manual_seed(1)
    close(run_on(b), run_on(a), 0)
    assert {s['step'].item() for s in b.opt.state.values()} == {12.}

def test_wrapper_hypers_are_numbers_that_a_logger_can_draw():
    opt = RAdamWrapper([nn.Parameter(torch.ones(2))], lr=.1, foreach=True)
    assert set(opt.hypers[0]) == {'lr', 'mom', 'sqr_mom', 'eps', 'wd'} and opt.opt.param_groups[0]['foreach'] is True
    opt.set_hyper('wd', .2)
    assert (opt.hypers[0]['wd'], opt.opt.param_groups[0]['weight_decay']) == (.2, .2)
