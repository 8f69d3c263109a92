"""What fastai's RAdam promises and ours must keep: signature, hypers, state, errors before any change, and properties of the step."""
import copy
import gc
import inspect
import weakref
from functools import partial

import fastai.optimizer as fo
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import radam_fastai.all
from helpers import frozen, identical, rel_err, set_grads
from radam_fastai.bucket import Buckets
from radam_fastai.functional import can_fuse, has_fused_kernel, radam_step_
from radam_fastai.optimizer import RAdam, RAdamFn, Ranger, RangerFn
from radam_fastai.torch_optim import RAdam as TorchRAdam

def params(*shapes, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64).to(dtype)) for s in shapes]

def run(opt, n, start=1):
    ps = [p for pg in opt.param_groups for p in pg['params']]
    for t in range(start, start+n):
        set_grads(ps, t)
        opt.step()
    return opt

# ---- a drop-in

@pytest.mark.parametrize('ours,theirs', [(RAdam, fo.RAdam), (Ranger, fo.ranger)])
def test_signature(ours, theirs):
    "Every argument of fastai's, in its place, with its default; what is new comes by keyword only"
    a,b = (list(inspect.signature(f).parameters.values()) for f in (ours, theirs))
    if ours is Ranger: b = [p for p in b if p.name in {'params', 'lr', 'mom', 'wd', 'eps', 'k', 'alpha'}]
    assert [(p.name, p.default) for p in a[:len(b)]] == [(p.name, p.default) for p in b]
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in a[len(b):])

@pytest.mark.parametrize('opt_func', ['RAdam', 'RAdamFn', 'Ranger', 'RangerFn', 'ranger', 'AdamFn', 'SGDFn'])
@pytest.mark.parametrize('kw,hint', [(dict(betas=(.9, .99)), 'for betas use mom and sqr_mom'),
                                     (dict(weight_decay=.1), 'for weight_decay use wd'),
                                     (dict(weight_decay=.1, decoupled_weight_decay=True), 'use wd, decouple_wd')],
                                     ids=['betas', 'decay', 'two'])
def test_pytorchs_names(opt_func, kw, hint):
    with pytest.raises(TypeError, match=hint): getattr(radam_fastai.all, opt_func)(params((3,)), lr=.1, **kw)

def test_lower_case_ranger():
    "As forum code writes it, where fastai has a function: the class, whose signature is tested above"
    assert radam_fastai.all.ranger is Ranger

@pytest.mark.parametrize('ours,theirs', [(RAdam, fo.RAdam), (Ranger, fo.ranger)])
def test_hypers_and_state_keys(ours, theirs):
    a,b = (run(f(params((3,), (2,)), lr=.1), 2) for f in (ours, theirs))
    assert dict(a.hypers[0]) == dict(b.hypers[0]) and a.state_dict().keys() == b.state_dict().keys()
    for s,t in zip(a.state_dict()['state'], b.state_dict()['state']):
        assert s.keys() == t.keys() and type(s['step']) is type(t['step']) is int

def test_factories():
    o,r = RAdamFn(params((3,)), lr=.1),RangerFn(params((3,)), lr=.1)
    assert {k: o.hypers[0][k] for k in ('mom', 'sqr_mom', 'eps', 'wd')} == dict(mom=.9, sqr_mom=.99, eps=1e-6, wd=1e-2)
    assert {k: r.hypers[0][k] for k in ('mom', 'sqr_mom', 'eps', 'wd')} == dict(mom=.95, sqr_mom=.99, eps=1e-6, wd=1e-2)
    assert partial(RAdam, mom=.95)(params((3,)), lr=.1).hypers[0]['mom'] == .95

def test_slice_as_lr():
    a,b = (f([params((2,)), params((3,)), params((2,))], lr=slice(1e-4, 1e-2)) for f in (RAdam, fo.RAdam))
    assert [h['lr'] for h in a.hypers] == [h['lr'] for h in b.hypers] == pytest.approx([1e-4, 1e-3, 1e-2])

@pytest.mark.parametrize('o', [RAdam, Ranger, TorchRAdam])
def test_gradients_are_not_kept(o):
    "Their memory is free as soon as `zero_grad` lets go of them"
    ps = params((3,), (4, 2))
    opt = o(ps, lr=.1)
    for t in range(8):
        set_grads(ps, t)
        held = [weakref.ref(p.grad) for p in ps]
        opt.step()
        opt.zero_grad()
    gc.collect() # after an adaptive step
    assert [h() for h in held] == [None]*2

def test_no_more_memory_than_fastai():
    "Two averages a parameter, for Ranger a third copy, and nothing else that grows"
    def tensors(o):
        opt = run(o(params((100,), (50,)), lr=.1), 8)
        found = [v for s in opt.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        found += [p for pg in getattr(opt, 'slow_weights', None) or [] for p in pg]
        return sum({t.data_ptr(): t.nbytes for t in found}.values())
    assert tensors(RAdam) == tensors(fo.RAdam) == 2*150*4
    assert tensors(Ranger) == tensors(fo.ranger) == 3*150*4

# ---- refusals

hypers_out_of_range = [('lr', -.1), ('lr', float('nan')), ('lr', float('inf')), ('mom', 1.), ('mom', -.1), ('sqr_mom', 1.),
                       ('sqr_mom', 1.5), ('eps', -1e-8), ('wd', -.1), ('beta', -1.)]

@pytest.mark.parametrize('name,value', hypers_out_of_range)
def test_hypers_out_of_range_at_construction(name, value):
    with pytest.raises(ValueError, match=f'^{name}.*got {value}'): RAdam(params((3,)), **{'lr': .1, name: value})

@pytest.mark.parametrize('name,value', hypers_out_of_range)
def test_hypers_out_of_range_at_a_step(name, value):
    "In the second group: the first must not have moved"
    opt = run(RAdam([params((3,)), params((2,))], lr=.1), 8)
    before,good = frozen(opt),opt.hypers[1][name]
    opt.hypers[1][name] = value
    with pytest.raises(ValueError, match=f'^{name}.*got {value}'): opt.step()
    opt.hypers[1][name] = good
    assert identical(frozen(opt), before)

def test_sparse_and_complex_gradients():
    emb = nn.Embedding(4, 2, sparse=True)
    c = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    for bad,says in ((emb.weight, 'sparse.*parameter 1.*shape \\(4, 2\\)'), (c, 'complex64.*parameter 1.*shape \\(2,\\)')):
        opt = run(RAdam([ps := params((3,)), [bad]], lr=.1), 0)
        set_grads(ps, 1)
        if bad is c: c.grad = torch.ones_like(c)
        else: emb(torch.tensor([1])).sum().backward()
        before = frozen(opt)
        for _ in range(2): # a refusal is no reason to step without it next time
            with pytest.raises(TypeError, match=says): opt.step()
        assert identical(frozen(opt), before)

@pytest.mark.parametrize('bad,error,says',
                         [([], ValueError, 'empty'), ([[]], ValueError, 'empty'), ([{'params': []}], TypeError, 'dict'),
                          (['x'], TypeError, 'str')])
def test_parameters_that_are_none(bad, error, says):
    with pytest.raises(error, match=says): RAdam(bad, lr=.1)

@pytest.mark.parametrize('kw,says', [(dict(threshold=3), 'got 3'), (dict(sgd_phase='sgd'), "got 'sgd'")])
def test_settings_unknown(kw, says):
    with pytest.raises(ValueError, match=says): RAdam(params((3,)), lr=.1, **kw)

@pytest.mark.parametrize('kw', [dict(k=0), dict(k=1.5), dict(alpha=-.1), dict(alpha=1.1)])
def test_lookahead_out_of_range(kw):
    with pytest.raises(ValueError, match=f'^{next(iter(kw))} must be.*got {next(iter(kw.values()))}'): Ranger(params((3,)), lr=.1, **kw)

@pytest.mark.parametrize('opt', [RAdam, Ranger])
def test_closure(opt):
    with pytest.raises(NotImplementedError, match='closure'): opt(params((3,)), lr=.1).step(lambda: 0)

# ---- what may change between two steps

def against_fastai(change, n=10, shapes=((3,), (4, 2), (2,)), opts=(RAdam, fo.RAdam)):
    "Both take `n` steps, suffer `change`, take `n` more: they must still agree"
    for o in (res := [run(o(params(*shapes), lr=.05, wd=.1), n) for o in opts]):
        change(o)
        run(o, n, start=n+1)
    for a,b in zip(*(o.param_lists[0] for o in res)): assert rel_err(a, b) < 1e-6

@pytest.mark.parametrize('what', ['flag', 'unflag', 'state', 'average', 'count', 'delete', 'clear', 'data', 'all states'])
def test_changes_are_noticed(what):
    def change(opt):
        p = opt.param_lists[0][1]
        s = opt.state[p]
        if what == 'flag': s['do_wd'] = False
        elif what == 'unflag': s['do_wd'] = True
        elif what == 'state': opt.state[p] = {k: v/2 if isinstance(v, torch.Tensor) else v for k,v in s.items()}
        elif what == 'average': s.update(grad_avg=torch.ones_like(p), sqr_avg=torch.ones_like(p))
        elif what == 'count': s['step'] = 3
        elif what == 'delete': del opt.state[p]
        elif what == 'clear': opt.clear_state()
        elif what == 'data': p.data = torch.ones_like(p)
        elif what == 'all states': opt.state = type(opt.state)(dict, {q: dict(t) for q,t in opt.state.items()})
    against_fastai(change)

def test_a_flag_that_flips_back():
    opt = run(RAdam(ps := params((3,), (2,)), lr=.1), 3)
    opt.state[ps[0]]['do_wd'] = False
    run(opt, 1)
    opt.state[ps[0]]['do_wd'] = True
    ref = run(fo.RAdam(qs := params((3,), (2,)), lr=.1), 3)
    for _ in range(2): run(ref, 1)
    run(opt, 1)
    for a,b in zip(ps, qs): assert rel_err(a, b) < 1e-6

def test_part_of_a_model_becomes_double():
    "Its averages would stay behind: that is an error that names it, and no other group has moved"
    opt = run(RAdam([params((3,)), bad := params((2,))], lr=.1), 8)
    bad[0].data,bad[0].grad = bad[0].data.double(),torch.ones(2, dtype=torch.float64)
    before = frozen(opt)
    for _ in range(2):
        with pytest.raises(TypeError, match='parameter 1.*float64 now.*averages are torch.float32'): opt.step()
    assert identical(frozen(opt), before)

def test_averages_follow_the_memory_order():
    "A model that turns to channels_last keeps the fused kernel, and its numbers"
    a,b = RAdam(ps := params((4, 3, 2, 2)), lr=.1),fo.RAdam(qs := params((4, 3, 2, 2)), lr=.1)
    run(a, 8), run(b, 8)
    ps[0].data = ps[0].data.to(memory_format=torch.channels_last)
    run(a, 8, start=9), run(b, 8, start=9)
    assert a._buckets.buckets[0].fused and a.state[ps[0]]['grad_avg'].stride() == ps[0].stride()
    assert rel_err(ps[0], qs[0]) < 1e-6

def test_transposed_in_place_with_gradients_by_hand():
    "Same address, same gradients' layout, another order of the parameter's elements"
    ps,qs = params((3, 3)),params((3, 3))
    a,b = RAdam(ps, lr=.1),fo.RAdam(qs, lr=.1)
    run(a, 8), run(b, 8)
    ps[0].data,qs[0].data = ps[0].data.t(),qs[0].data.t()
    run(a, 8, start=9), run(b, 8, start=9)
    # fastai's averages keep their own order and are read through it, as ours must be
    assert rel_err(ps[0], qs[0]) < 1e-6

@pytest.mark.parametrize('o', [RAdam, Ranger, TorchRAdam])
def test_same_address_another_stride(o):
    "A vector that is read with gaps from now on: what lies between stays as it is"
    def go(cls):
        wide = torch.arange(12.)
        p = nn.Parameter(wide[:6])
        opt = cls([p], lr=.1)
        for t in range(16):
            if t == 8: p.data,between = wide[::2],wide[1::2].clone()
            p.grad = torch.ones(6)
            opt.step()
        return p.detach(),torch.equal(wide[1::2], between)
    got,untouched = go(o)
    theirs = {RAdam: fo.RAdam, Ranger: partial(fo.ranger, wd=.01), TorchRAdam: torch.optim.RAdam}[o]
    assert untouched and rel_err(got, go(theirs)[0]) < 1e-6

@pytest.mark.skipif(not hasattr(torch.Tensor, 'grad_dtype'), reason='PyTorch keeps gradients in the dtype of their parameter')
@pytest.mark.parametrize('o', [RAdam, Ranger, TorchRAdam])
@pytest.mark.parametrize('n', [0, 2, 8])
def test_gradients_of_another_dtype(o, n):
    "From the first step on, or later"
    ps = params((3,), (2,))
    opt = run(o(ps, lr=.1), n)
    ps[1].grad,ps[1].grad_dtype = None,torch.float64
    for p in ps: p.grad = torch.ones_like(p, dtype=p.grad_dtype)
    before = [p.detach().clone() for p in ps]
    for _ in range(2):
        with pytest.raises(TypeError, match=r'parameter 1, shape \(2,\) is torch.float32, its gradient torch.float64'): opt.step()
    assert all(map(torch.equal, ps, before))

@pytest.mark.parametrize('o', [RAdam, TorchRAdam])
@pytest.mark.parametrize('n', [2, 8])
@pytest.mark.parametrize('rows, now', [(4, 8), (8, 4)])
def test_a_parameter_of_another_size(o, n, rows, now):
    "At the same address, as a view of more or of less of its memory"
    memory = torch.ones(8, 3)
    p = nn.Parameter(memory[:rows])
    opt = run(o([p], lr=.1), n)
    p.data = memory[:now]
    p.grad,before = torch.ones_like(p),memory.clone()
    with pytest.raises(TypeError, match=rf'averages are torch.float32 of shape \({rows}, 3\)'): opt.step()
    assert torch.equal(memory, before)

@pytest.mark.parametrize('o, key', [(RAdam, 'grad_avg'), (RAdam, 'sqr_avg'), (TorchRAdam, 'exp_avg'), (TorchRAdam, 'exp_avg_sq')])
def test_averages_of_another_shape(o, key):
    p, = ps = params((8, 3))
    opt = run(o(ps, lr=.1), 8)
    opt.state[p][key] = torch.ones(4, 3)
    p.grad,before = torch.ones_like(p),p.detach().clone()
    with pytest.raises(TypeError, match=r'shape \(8, 3\) is .* now, its averages are torch.float32 of shape \(4, 3\)'): opt.step()
    assert torch.equal(p, before)

def test_other_shapes_are_not_fused():
    a,b = torch.zeros(8, 3),torch.zeros(4, 3)
    assert can_fuse(a, a) and not can_fuse(a, a, b) and not can_fuse(b, b, a)

def test_other_devices_are_not_fused():
    p = torch.ones(3)
    assert can_fuse(p, torch.zeros(3), torch.zeros(3)) and not can_fuse(p, torch.zeros(3, device='meta'), torch.zeros(3))

def test_memory_orders_are_told_apart():
    "For who calls the step directly: numbers in other orders are paired by their place in the tensor"
    def last(t): return t.clone(memory_format=torch.channels_last)
    p,g,m,v = torch.rand(4, 2, 3, 3, 3).unbind()
    assert can_fuse(last(p), last(m)) and not can_fuse(p.clone(), last(m))
    lists = (p.clone(), last(g), last(m), v.clone()),(p.clone(), g, m.clone(), v.clone())
    for o in lists: radam_step_(*([t] for t in o), 9, lr=.1, mom=.9, sqr_mom=.99, eps=1e-5)
    assert all(torch.allclose(a, b) for a,b in zip(*lists))

def test_gaps_in_memory_are_not_fused():
    wide = torch.arange(12.).reshape(2, 6)
    p,g,m,v = (wide.clone()[:, ::2] for _ in range(4))
    rest = p._base.clone()
    expect = [t.clone() for t in (p, g, m, v)]
    for lists in ((p, g, m, v), expect): radam_step_(*([t] for t in lists), 9, lr=.1, mom=.9, sqr_mom=.99, eps=1e-5)
    assert torch.allclose(p, expect[0]) and torch.equal(p._base[:, 1::2], rest[:, 1::2])

@pytest.mark.parametrize('drop', ['clear', 'load'])
def test_old_averages_are_let_go(drop):
    "Not when the next step happens to come: a Learner clears the state of a large model to make room"
    opt = run(RAdam(ps := params((3,), (2,)), lr=.1), 8)
    sd = copy.deepcopy(opt.state_dict())
    old = weakref.ref(opt.state[ps[0]]['grad_avg'])
    if drop == 'clear': opt.clear_state()
    else: opt.load_state_dict(sd)
    gc.collect()
    assert old() is None

def test_ranger_has_not_begun_after_an_error():
    opt = Ranger(ps := params((3,)), lr=.1)
    opt.hypers[0]['lr'] = float('nan')
    set_grads(ps, 0)
    with pytest.raises(ValueError): opt.step()
    assert opt.slow_weights is None and opt.count == 0

def test_sorted_once_for_a_run_that_does_not_change(monkeypatch):
    "Two kernel calls a step for the usual model, and no sorting but the first"
    calls,sorts = [],[]
    has_fused_kernel(torch.device('cpu'), torch.float32) # its trial is no step
    monkeypatch.setattr(torch, '_fused_adamw_', lambda *a, real=torch._fused_adamw_, **k: (calls.append(len(a[0])), real(*a, **k)))
    monkeypatch.setattr(Buckets, '_sort', lambda self, *a, real=Buckets._sort: (sorts.append(1), real(self, *a)))
    opt = RAdam(ps := params(*[(3, 2), (3,)]*20), lr=.1, wd=.1)
    for p in ps[1::2]: opt.state[p]['do_wd'] = False
    run(opt, 25)
    assert len(sorts) == 1 and calls == [20, 20]*20

@pytest.mark.parametrize('o', [RAdam, TorchRAdam])
def test_one_step_tensor_for_the_kernel(o, monkeypatch):
    "Kept and filled, not made anew, and one for all members"
    seen = []
    kernel = '_fused_adamw_' if o is RAdam else '_fused_adam_'
    def watch(*a, real=getattr(torch, kernel), **k):
        seen.append(a[5])
        assert {s.item() for s in a[5]} == {5. + len(seen)}
        return real(*a, **k)
    monkeypatch.setattr(torch, kernel, watch)
    run(o(params((3,), (2,)), lr=.1), 9)
    assert len(seen) == 4 and len({id(s) for steps in seen for s in steps}) == 1

# ---- without the fused kernels

def test_without_private_kernels(monkeypatch):
    "A PyTorch without the private functions still gives the numbers"
    expect = run(RAdam(params((3,), (4, 2)), lr=.1, wd=.1), 20)
    monkeypatch.delattr(torch, '_fused_adamw_')
    has_fused_kernel.cache_clear()
    try:
        assert not has_fused_kernel(torch.device('cpu'), torch.float32)
        for a,b in zip(run(RAdam(params((3,), (4, 2)), lr=.1, wd=.1), 20).param_lists[0], expect.param_lists[0]):
            assert rel_err(a, b) < 1e-6
    finally: has_fused_kernel.cache_clear()

# ---- properties

shape = st.sampled_from([(1,), (3,), (2, 5), (4, 3, 2, 2), (), (0, 2), (33,)])
hypers = st.fixed_dictionaries(dict(lr=st.floats(0, .1), mom=st.floats(0, .99), sqr_mom=st.floats(0, .9999), eps=st.floats(1e-8, 1e-2),
                                    wd=st.floats(0, .5)))
choices = st.fixed_dictionaries(dict(decouple_wd=st.booleans(), threshold=st.sampled_from([4, 5, 7.]), eps_debiased=st.booleans(),
                                   sgd_phase=st.sampled_from(['momentum', 'skip']), maximize=st.booleans()))

@settings(max_examples=40, deadline=None)
@given(st.lists(shape, min_size=2, max_size=6), hypers, choices, st.integers(1, 15), st.data())
def test_splitting_a_group_changes_nothing(shapes, hypers, choices, n, data):
    cut = data.draw(st.integers(1, len(shapes)-1))
    ps = params(*shapes)
    one,two = RAdam(params(*shapes), **hypers, **choices),RAdam([ps[:cut], ps[cut:]], **hypers, **choices)
    run(one, n), run(two, n)
    assert all(torch.equal(a, b) for a,b in zip(one.param_lists[0], ps))

@settings(max_examples=60, deadline=None)
@given(st.lists(shape, min_size=1, max_size=5), hypers, choices, st.integers(1, 12))
def test_fused_foreach_and_loop_agree(shapes, hypers, choices, n):
    "From the same start along three paths, in float64"
    def path(fused, loop):
        ps,ms,vs = (params(*shapes, seed=i, dtype=torch.float64) for i in (0, 1, 2))
        vs = [v.detach()**2 for v in vs]
        for t in range(n, n+3):
            lists = [list(o) for o in (ps, [g.data for g in params(*shapes, seed=t+9, dtype=torch.float64)], [m.data for m in ms], vs)]
            for part in ([[o] for o in one] for one in zip(*lists)) if loop else [lists]:
                radam_step_(*part, t, fused=fused, **hypers, **choices)
        return ps
    expect = path(False, True)
    for got in (path(True, False), path(False, False), path(None, False)):
        for a,b in zip(got, expect): assert torch.allclose(a, b, rtol=1e-11, atol=1e-13)
