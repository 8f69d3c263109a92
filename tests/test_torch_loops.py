"The torch class under schedulers, loss scalers, backward hooks and the libraries that drive an optimizer."
import copy
import math
import warnings

import pytest
import torch
from torch.optim import lr_scheduler

from helpers import TORCH_HYPERS, close, fit_mlp, frozen, identical, loss_of, mlp, numbers, torch_build, torch_run
from radam_fastai.torch_optim import RAdam

Torch = torch.optim.RAdam

# ---- schedulers

SCHEDULERS = dict(
    one_cycle=lambda o: lr_scheduler.OneCycleLR(o, max_lr=.1, total_steps=20, base_momentum=.8, max_momentum=.95),
    cosine=lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=15),
    lambda_lr=lambda o: lr_scheduler.LambdaLR(o, lambda t: 1/(t+1)),
    cyclic=lambda o: lr_scheduler.CyclicLR(o, base_lr=.01, max_lr=.1, step_size_up=4, cycle_momentum=True, base_momentum=.8,
                                           max_momentum=.95))

@pytest.mark.parametrize('lr', [.05, torch.tensor(.05)], ids=['float', 'tensor'])
@pytest.mark.parametrize('name', SCHEDULERS)
def test_schedulers(name, lr):
    def go(cls, lr):
        ps,opt = torch_build(cls, lr=lr)
        sched,seen = SCHEDULERS[name](opt),[]
        def after(_):
            sched.step()
            seen.append((float(opt.param_groups[0]['lr']), float(opt.param_groups[0]['betas'][0])))
        return torch_run(ps, opt, range(15), after=after),seen
    with warnings.catch_warnings():
        warnings.simplefilter('error') # torch warns of steps taken out of order
        (a,seen_a),(b,seen_b) = (go(c, lr.clone() if isinstance(lr, torch.Tensor) else lr) for c in (RAdam, Torch))
    close(a, b, 1e-7 if isinstance(lr, torch.Tensor) else 1e-12)
    assert seen_a == seen_b and len({lr for lr,_ in seen_a}) > 3
    if name in ('one_cycle', 'cyclic'): assert len({mom for _,mom in seen_a}) > 3

def test_reduce_lr_on_plateau():
    def go(cls):
        ps,opt = torch_build(cls)
        sched,lrs = lr_scheduler.ReduceLROnPlateau(opt, patience=1, factor=.5),[]
        def after(_):
            sched.step(1.)
            lrs.append(opt.param_groups[0]['lr'])
        return torch_run(ps, opt, range(10), after=after),lrs
    (a,lrs),(b,_) = go(RAdam),go(Torch)
    close(a, b)
    assert lrs[0] == .05 and lrs[-1] < .01

def test_schedule_goes_on_after_loading():
    def state(n, sd=None, ps=None):
        qs,opt = torch_build(RAdam)
        sched = SCHEDULERS['one_cycle'](opt)
        if sd:
            with torch.no_grad(): torch._foreach_copy_(qs, ps)
            opt.load_state_dict(sd[0])
            sched.load_state_dict(sd[1])
        torch_run(qs, opt, n, after=lambda _: sched.step())
        return qs,copy.deepcopy([opt.state_dict(), sched.state_dict()])
    whole,_ = state(range(15))
    half,sd = state(range(8))
    close(state(range(8, 15), sd, half)[0], whole, 0)

# ---- mixed precision, backward hooks, other libraries

def test_grad_scaler_skips_overflows():
    "The step with an infinite gradient changes nothing and does not count"
    (a,oa),(b,ob) = torch_build(RAdam, dtype=torch.float32),torch_build(Torch, dtype=torch.float32)
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
    close(a, torch_run(b, ob, [t for t in range(12) if t not in (2, 7)]), 1e-5)

def test_optimizer_in_backward():
    "One optimizer per parameter, stepped as its gradient arrives, against one over all"
    a,b = mlp(),mlp()
    opts = {p: RAdam([p], **TORCH_HYPERS) for p in a.parameters()}
    def step(p):
        opts[p].step()
        opts[p].zero_grad()
    for p in a.parameters(): p.register_post_accumulate_grad_hook(step)
    for t in range(12): loss_of(a, t).backward()
    assert all(p.grad is None for p in a.parameters())
    close(list(a.parameters()), fit_mlp(b, Torch(b.parameters(), **TORCH_HYPERS), range(12)), 1e-10)

@pytest.fixture
def accelerator():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)

def test_accelerate(accelerator, tmp_path):
    def prepared(): return accelerator.prepare(m := mlp(), RAdam(m.parameters(), **TORCH_HYPERS))
    m,opt = prepared()
    fit_mlp(m, opt, range(8), accelerator.backward)
    accelerator.save_state(tmp_path)
    fit_mlp(m, opt, range(8, 14), accelerator.backward)
    b = mlp()
    close(list(m.parameters()), fit_mlp(b, Torch(b.parameters(), **TORCH_HYPERS), range(14)), 1e-10)

    whole = copy.deepcopy(list(m.parameters()))
    accelerator.load_state(tmp_path)
    close(fit_mlp(m, opt, range(8, 14), accelerator.backward), whole, 0)
    accelerator.free_memory()
    m,opt = prepared()
    accelerator.load_state(tmp_path)
    close(fit_mlp(m, opt, range(8, 14), accelerator.backward), whole, 0)

@pytest.mark.parametrize('flatten', [False, True], ids=['nested', 'flattened'])
@pytest.mark.filterwarnings('ignore:torch.distributed is')
def test_distributed_checkpoint(flatten, tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
    opts = StateDictOptions(flatten_optimizer_state_dict=flatten)
    m = mlp()
    opt = RAdam(m.parameters(), **TORCH_HYPERS)
    fit_mlp(m, opt, range(8))
    opt.zero_grad()
    dcp.save({'model': m.state_dict(), 'opt': get_optimizer_state_dict(m, opt, options=opts)}, checkpoint_id=tmp_path, no_dist=True)
    whole = fit_mlp(m, opt, range(8, 14))

    b = mlp()
    ob = RAdam(b.parameters(), **TORCH_HYPERS)
    start = copy.deepcopy(b.state_dict())
    sd = {'model': b.state_dict(), 'opt': get_optimizer_state_dict(b, ob, options=opts)} # starts the state by a step with lr 0
    assert identical(dict(start), dict(b.state_dict()))
    dcp.load(sd, checkpoint_id=tmp_path, no_dist=True)
    b.load_state_dict(sd['model'])
    set_optimizer_state_dict(b, ob, sd['opt'], options=opts)
    assert {s['step'].item() for s in ob.state.values()} == {8.}
    close(fit_mlp(b, ob, range(8, 14)), whole, 0)

@pytest.mark.parametrize('n', [4, 12])
def test_schedule_free_wrapper(n):
    "It puts a key of its own into the state before the first step"
    from schedulefree import ScheduleFreeWrapper
    shapes,kw = [(3,4), (5,)],{**TORCH_HYPERS, 'weight_decay': 0}
    def go(ps, base):
        opt = ScheduleFreeWrapper(base, momentum=.9, weight_decay_at_y=.1)
        opt.train()
        torch_run(ps, opt, range(n))
        opt.eval()
    a,oa = torch_build(RAdam, shapes, **kw)
    b,ob = torch_build(Torch, shapes, **kw)
    for p in b: # torch's class starts its averages in an empty dict only: here that is done for it
        ob.state[p] = dict(step=torch.tensor(0.), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    go(a, oa)
    go(b, ob)
    close(a, b)
    assert all('z' in s and s['step'] == n for s in oa.state.values())
    c,oc = torch_build(RAdam, shapes, **kw)
    oc.load_state_dict(oa.state_dict())
    assert identical(oc.state_dict(), oa.state_dict())
    assert all(oc.state[p]['z'].data_ptr() != oa.state[q]['z'].data_ptr() for p,q in zip(c, a))
