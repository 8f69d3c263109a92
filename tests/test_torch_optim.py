"The torch class beside `torch.optim.RAdam`, in everything that training loops, schedulers and savers do to an optimizer."
import copy
import inspect
import math
from collections import UserList
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from helpers import (
    TORCH_HYPERS,
    close,
    f64,
    fit_mlp,
    fresh,
    frozen,
    identical,
    loss_of,
    mlp,
    numbers,
    refuses,
    set_grads,
    torch_build,
    torch_run,
)
from radam_fastai.torch_optim import RAdam, RAdamWrapper

Torch = torch.optim.RAdam

# ---- signature and plain steps

def test_signature_is_torchs():
    args = lambda f: [(p.name, p.default, p.kind) for p in inspect.signature(f).parameters.values()]
    assert args(RAdam) == args(Torch)

@pytest.mark.parametrize('foreach', [None, True, False])
def test_foreach_picks_the_implementation(foreach, monkeypatch):
    "The fused kernel unless told otherwise, and with `False` one tensor at a time"
    torch_run(*torch_build(RAdam), range(8)) # whether there is a kernel is tried on first use
    fused,kernel,sizes,lerp = [],torch._fused_adam_,[],torch._foreach_lerp_
    monkeypatch.setattr(torch, '_fused_adam_', lambda ps, *args, **kw: (fused.append(len(ps)), kernel(ps, *args, **kw)))
    monkeypatch.setattr(torch, '_foreach_lerp_', lambda ps, *args: (sizes.append(len(ps)), lerp(ps, *args)))
    torch_run(*torch_build(RAdam, foreach=foreach), range(7)) # five momentum steps, two adaptive ones
    assert (fused, sizes) == {None: ([3]*2, [3]*5), True: ([], [3]*7), False: ([], [1]*21)}[foreach]

@pytest.mark.parametrize('missing', [{0}, {1,2}, {0,1,2}], ids=str)
def test_without_gradient(missing):
    "A parameter without a gradient stands still and does not count; one that joins late starts from step 1"
    (a,oa),(b,ob) = torch_build(RAdam),torch_build(Torch)
    for steps,gone in ((range(4), missing), (range(4, 12), ()), (range(12, 15), missing)):
        close(torch_run(a, oa, steps, gone), torch_run(b, ob, steps, gone))
        assert oa.state_dict()['state'].keys() == ob.state_dict()['state'].keys()
        assert all(s['step'] == ob.state[q]['step'] for s,q in ((oa.state[p], q) for p,q in zip(a, b) if q in ob.state))

def test_all_frozen():
    ps,opt = torch_build(RAdam)
    for p in ps: p.requires_grad_(False)
    before = frozen(opt)
    assert opt.step() is None and identical(frozen(opt), before) and opt.state_dict()['state'] == {}

def test_closure_returns_the_loss():
    "The closure of LBFGS's kind: it clears, computes and backpropagates"
    (a,oa),(b,ob) = torch_build(RAdam),torch_build(Torch)
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
    groups = lambda ps: [dict(params=ps[:1], lr=.01, maximize=True),
                         dict(params=ps[1:], betas=(.8,.9), decoupled_weight_decay=True, foreach=True)]
    a,b = fresh(),fresh()
    close(torch_run(a, RAdam(groups(a), **TORCH_HYPERS), range(15)), torch_run(b, Torch(groups(b), **TORCH_HYPERS), range(15)))

def test_named_parameters():
    m = nn.Linear(3, 2)
    opt = RAdam(m.named_parameters(), lr=.1)
    assert opt.state_dict()['param_groups'][0]['param_names'] == ['weight', 'bias']

@pytest.mark.parametrize('lr', [torch.tensor(.05), torch.tensor([.05]), torch.tensor(.05, dtype=f64)], ids=['0-dim', '1-dim', 'float64'])
def test_tensor_lr(lr):
    "Changed in place between steps, as schedulers do"
    (a,oa),(b,ob) = torch_build(RAdam, lr=lr.clone()),torch_build(Torch, lr=lr.item())
    def halve(_): oa.param_groups[0]['lr'].mul_(.5)
    def halve_too(_): ob.param_groups[0]['lr'] *= .5
    close(torch_run(a, oa, range(10), after=halve), torch_run(b, ob, range(10), after=halve_too))

# ---- refused

@pytest.mark.parametrize('kw', [dict(capturable=True), dict(differentiable=True)], ids=str)
def test_refused_settings(kw):
    name, = kw
    ps,opt = torch_build(RAdam)
    with pytest.raises(ValueError, match=name): torch_build(RAdam, **kw)
    with pytest.raises(ValueError, match=name): RAdam([dict(params=ps, **kw)])
    refuses(opt, ValueError, name, lambda: opt.add_param_group(dict(params=fresh(), **kw)))

OUT_OF_RANGE = [(dict(lr=-1.), r'lr .*-1\.0'), (dict(lr=math.nan), 'lr .*nan'), (dict(lr=math.inf), 'lr .*inf'),
                (dict(lr=torch.tensor(-2.)), r'lr .*-2\.0'),
                (dict(betas=(1.,.99)), r'β1.*1\.0'), (dict(betas=(-.1,.99)), r'β1.*-0\.1'), (dict(betas=(.9,1.)), r'β2.*1\.0'),
                (dict(betas=(.9,-.5)), r'β2.*-0\.5'),
                (dict(betas=(math.nan,.9)), 'β1.*nan'), (dict(eps=-1e-3), r'eps .*-0\.001'), (dict(eps=math.nan), 'eps .*nan'),
                (dict(weight_decay=-.1), r'wd .*-0\.1')]

@pytest.mark.parametrize('kw,match', OUT_OF_RANGE, ids=lambda o: str(o) if isinstance(o, dict) else '')
def test_hypers_out_of_range(kw, match):
    "At construction, in a new group, and set in `param_groups` before a step"
    with pytest.raises(ValueError, match=match): torch_build(RAdam, **kw)
    with pytest.raises(ValueError, match=match): RAdam([dict(params=fresh(), **kw)], **TORCH_HYPERS)
    ps = fresh()
    opt = RAdam([dict(params=ps[:1]), dict(params=ps[1:])], **TORCH_HYPERS)
    torch_run(ps, opt, range(8))
    refuses(opt, ValueError, match, lambda: opt.add_param_group(dict(params=fresh(), **kw)))
    old = dict(opt.param_groups[1])
    opt.param_groups[1].update(kw)
    set_grads(ps, 8)
    values,averages = [p.detach().clone() for p in ps],copy.deepcopy(opt.state_dict()['state'])
    with pytest.raises(ValueError, match=match): opt.step()
    assert identical([p.detach() for p in ps], values) and identical(opt.state_dict()['state'], averages)
    opt.param_groups[1].update({k: old[k] for k in kw})
    close(torch_run(ps, opt, range(8, 12)), torch_run(*torch_build(Torch), range(12)))

@pytest.mark.parametrize('betas', [[.8, .95], UserList([.8, .95]), np.array([.8, .95]), torch.tensor([.8, .95], dtype=torch.float64)],
                         ids=['list', 'UserList', 'numpy', 'tensor'])
def test_betas_are_any_two_numbers(betas):
    "As configuration files give them; a plain tuple is saved"
    a,b = (torch_run(*torch_build(o, betas=tuple(map(float, betas)) if o is Torch else betas), range(8)) for o in (RAdam, Torch))
    close(a, b)
    opt = RAdam([dict(params=[nn.Parameter(torch.ones(2))], betas=betas)])
    assert type(opt.param_groups[0]['betas']) is tuple

@pytest.mark.parametrize('flag', ['maximize', 'decoupled_weight_decay', 'foreach'])
@pytest.mark.parametrize('yes', [1, np.True_, torch.tensor(True)], ids=['1', 'numpy', 'tensor'])
def test_flags_are_whatever_is_true(flag, yes):
    a,opt = torch_build(RAdam, **{flag: yes})
    close(torch_run(a, opt, range(8)), torch_run(*torch_build(Torch, **{flag: True}), range(8)))
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups[0][flag] is True

def test_a_parameter_in_a_group_twice():
    "PyTorch counts its steps twice and says that this will be an error"
    p,q = (nn.Parameter(torch.ones(2)) for _ in 'pq')
    opt = RAdam([p])
    with pytest.warns(UserWarning, match='duplicate'), pytest.raises(ValueError, match='more than once'):
        opt.add_param_group(dict(params=[q, q]))
    assert len(opt.param_groups) == 1

def test_a_sound_checkpoint_replaces_a_broken_learning_rate():
    a,opt = torch_build(RAdam)
    torch_run(a, opt, range(3))
    good = copy.deepcopy(opt.state_dict())
    opt.param_groups[0]['lr'] = math.nan
    opt.load_state_dict(good)
    assert opt.param_groups[0]['lr'] == good['param_groups'][0]['lr']

@pytest.mark.parametrize('n', [3, 8])
@pytest.mark.parametrize('make', [RAdam, partial(RAdam, foreach=True), Torch])
def test_a_graph_from_before_the_step_is_stale(make, n):
    "Gradients through weights that have changed since would be wrong"
    ps,opt = torch_build(make)
    torch_run(ps, opt, range(n))
    loss = sum(p.pow(2).sum() for p in ps)
    set_grads(ps, n)
    opt.step()
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): loss.backward()

@pytest.mark.parametrize('move', [torch.clone, lambda t: t.clone(memory_format=torch.contiguous_format)], ids=['as it was', 'contiguous'])
def test_a_state_that_was_moved_through_data(move):
    "As `optimizer_to` of the forums does, which takes the state to another device and back"
    def go(o):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 4, 3, dtype=f64).to(memory_format=torch.channels_last)
        ps,opt = list(conv.parameters()),o(conv.parameters(), lr=.1, betas=(.9, .99))
        torch_run(ps, opt, range(8))
        for s in opt.state.values():
            for v in s.values(): v.data = move(v.data)
        torch_run(ps, opt, range(8, 20))
        return [*ps, *torch_run(ps, opt, range(20, 22), {0})],[s['step'].item() for s in opt.state_dict()['state'].values()]
    (a,steps),(b,theirs) = map(go, (RAdam, Torch))
    close(a, b)
    assert steps == theirs == [20, 22]

def test_tensor_lr_of_several_elements():
    with pytest.raises(ValueError, match='lr .*2'): torch_build(RAdam, lr=torch.tensor([.1,.2]))

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
@pytest.mark.parametrize('kind,match', [('sparse', r'sparse.*parameter 3, shape \(6, 2\)'),
                                        ('complex', r'complex128.*parameter 3, shape \(6, 2\)')])
def test_gradients_refused(kind, match, steps):
    "The error names the parameter and no other has moved, in any group; without that gradient the run goes on"
    ps,(odd,grad) = fresh(),strange(kind)
    opt = RAdam([dict(params=ps[:2]), dict(params=[ps[2], odd])], **TORCH_HYPERS)
    odd.grad = None
    torch_run(ps, opt, range(steps))
    set_grads(ps, steps)
    odd.grad = grad
    refuses(opt, (TypeError, RuntimeError), match, opt.step)
    refuses(opt, (TypeError, RuntimeError), match, opt.step)
    odd.grad = None
    close(torch_run(ps, opt, range(steps, 12)), torch_run(*torch_build(Torch), range(12)))

@pytest.mark.parametrize('joins', ['already trained', 'first gradient'])
def test_dense_gradient_after_a_refused_one(joins):
    "A refused step leaves no trace: once its gradient is dense, the parameter trains like the others"
    def go(cls, refused):
        ps,opt = torch_build(cls)
        torch_run(ps, opt, range(8), missing={0} if joins == 'first gradient' else ())
        if refused:
            set_grads(ps, 8)
            ps[0].grad = ps[0].grad.to_sparse()
            with pytest.raises(TypeError): opt.step()
        return torch_run(ps, opt, range(8, 14))
    close(go(RAdam, True), go(Torch, False))

# ---- dtypes, memory layouts

TOLS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}

def every_other(p): return torch.zeros(*p.shape[:-1], 2*p.shape[-1], dtype=p.dtype)[..., ::2].copy_(p)
LAYOUTS = dict(contiguous=lambda p: p, channels_last=lambda p: p.contiguous(memory_format=torch.channels_last), non_contiguous=every_other,
               transposed=lambda p: p.transpose(0, 1).contiguous().transpose(0, 1),
               permuted=lambda p: p.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0))

@pytest.mark.parametrize('dtype', TOLS, ids=str)
@pytest.mark.parametrize('name', LAYOUTS)
def test_dtypes_and_layouts(name, dtype):
    def go(cls):
        ps = [nn.Parameter(LAYOUTS[name](numbers(s, i, dtype))) for i,s in enumerate([(4,3,2,5), (2,2,3,3)])]
        lay = [p.stride() for p in ps]
        torch_run(ps, cls(ps, **{**TORCH_HYPERS, 'eps': 1e-3}), range(12))
        assert [p.stride() for p in ps] == lay
        return ps
    close(go(RAdam), go(Torch), TOLS[dtype])

@pytest.mark.parametrize('dtype', TOLS, ids=str)
def test_zero_size_and_zero_dim(dtype):
    shapes = [(0,), (3,0,2), (), (1,), (1,1,1)]
    close(*(torch_run(*torch_build(cls, shapes, dtype, eps=1e-3), range(12)) for cls in (RAdam, Torch)), TOLS[dtype])

def test_only_zero_size():
    ps,opt = torch_build(RAdam, [(0,), (2,0)])
    torch_run(ps, opt, range(12))
    assert {s['step'].item() for s in opt.state.values()} == {12.}

def test_mixed_dtypes_in_a_group():
    dtypes = torch.float64,torch.float32,torch.float64,torch.bfloat16
    def go(cls):
        ps = [nn.Parameter(numbers((4,3), i, d)) for i,d in enumerate(dtypes)]
        return torch_run(ps, cls(ps, **{**TORCH_HYPERS, 'eps': 1e-3}), range(12))
    for d,p,q in zip(dtypes, go(RAdam), go(Torch)): close([p], [q], TOLS[d])

@pytest.mark.parametrize('n', [2, 8])
def test_to_channels_last_mid_run(n):
    "The model is laid out anew between two steps: the numbers do not notice"
    def go(cls, convert):
        torch.manual_seed(0)
        m = nn.Sequential(nn.Conv2d(3,8,3), nn.Conv2d(8,4,1)).double()
        ps = list(m.parameters())
        opt = cls(ps, **TORCH_HYPERS)
        torch_run(ps, opt, range(n))
        if convert:
            m.to(memory_format=torch.channels_last)
            assert not ps[0].is_contiguous()
        return torch_run(ps, opt, range(n, 14))
    close(go(RAdam, True), go(Torch, False))

@pytest.mark.parametrize('n', [2, 8])
def test_to_double_mid_run(n):
    "The averages are float32 still: an error that says so, nothing changed; loading the state again casts them"
    m = mlp(torch.float32)
    opt = RAdam(m.parameters(), **TORCH_HYPERS)
    fit_mlp(m, opt, range(n))
    m.double()
    loss_of(m, n).backward()
    refuses(opt, TypeError, 'parameter 0.*float64 now, its averages are torch.float32', opt.step)
    opt.load_state_dict(opt.state_dict())
    assert {s['exp_avg'].dtype for s in opt.state.values()} == {f64}
    b = copy.deepcopy(m)
    ob = Torch(b.parameters(), **TORCH_HYPERS)
    ob.load_state_dict(copy.deepcopy(opt.state_dict())) # torch's class would share the averages
    close(fit_mlp(m, opt, range(n, 14)), fit_mlp(b, ob, range(n, 14)), 1e-10)

def test_a_capturable_checkpoint_goes_on():
    "How another optimizer was stepped is no obstacle: the state is the same"
    (a,oa),(b,ob) = torch_build(Torch),torch_build(RAdam)
    torch_run(a, oa, range(8))
    sd = copy.deepcopy(oa.state_dict())
    for g in sd['param_groups']: g['capturable'] = True
    with torch.no_grad():
        for p,q in zip(b, a): p.copy_(q)
    ob.load_state_dict(sd)
    close(torch_run(b, ob, range(8, 14)), torch_run(a, oa, range(8, 14)))

def test_the_authors_checkpoint_decouples():
    (a,oa),(_,ob) = torch_build(Torch),torch_build(RAdam)
    torch_run(a, oa, range(3))
    sd = copy.deepcopy(oa.state_dict())
    for g in sd['param_groups']: g.update(buffer=[[None]*3]*10), g.pop('decoupled_weight_decay')
    ob.load_state_dict(sd)
    assert ob.param_groups[0]['decoupled_weight_decay']

def test_wrapper_refuses_arguments_beside_a_built_optimizer():
    opt = RAdam([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match='betas would have no effect'): RAdamWrapper(opt=opt, betas=(.5, .5))
