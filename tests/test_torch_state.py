"The torch class's state: saved, copied, loaded by the other class, and changed in the middle of a run."
import copy

import pytest
import torch

from helpers import TORCH_HYPERS, close, fresh, params_of, torch_build, torch_run
from radam_fastai.torch_optim import RAdam

Torch = torch.optim.RAdam

def test_state_dict_has_torchs_keys():
    (a,oa),(b,ob) = torch_build(RAdam),torch_build(Torch)
    assert oa.state_dict() == ob.state_dict()
    torch_run(a, oa, range(8)), torch_run(b, ob, range(8))
    sa,sb = oa.state_dict(),ob.state_dict()
    assert sa['param_groups'] == sb['param_groups'] and sa['state'].keys() == sb['state'].keys()
    for i in sb['state']:
        assert set(sa['state'][i]) == set(sb['state'][i])
        for k,v in sb['state'][i].items():
            assert (sa['state'][i][k].dtype, sa['state'][i][k].shape) == (v.dtype, v.shape)
            close([sa['state'][i][k]], [v])

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_counts_whatever_the_default_dtype(dtype):
    a,oa = torch_build(RAdam)
    torch_run(a, oa, range(1))
    sd = oa.state_dict()
    for s in sd['state'].values(): s['step'].fill_(70001)
    torch.set_default_dtype(dtype)
    try:
        b,ob = torch_build(RAdam)
        ob.load_state_dict(sd)
        assert {(s['step'].item(), s['step'].dtype) for s in ob.state.values()} == {(70001., torch.float32)}
    finally: torch.set_default_dtype(torch.float32)

def test_a_list_is_no_group():
    opt = RAdam(fresh())
    with pytest.raises(TypeError, match='must be a dict'): opt.add_param_group(fresh())

@pytest.mark.parametrize('n', [0, 3, 8])
@pytest.mark.parametrize('first,second', [(RAdam, Torch), (Torch, RAdam)], ids=['ours to torch', 'torch to ours'])
def test_runs_go_on_in_the_other_class(first, second, n):
    a,oa = torch_build(first)
    torch_run(a, oa, range(n))
    b,ob = torch_build(second, lr=1., weight_decay=0, decoupled_weight_decay=True)
    with torch.no_grad(): torch._foreach_copy_(b, a)
    ob.load_state_dict(copy.deepcopy(oa.state_dict()))
    close(torch_run(b, ob, range(n, 20)), torch_run(a, oa, range(n, 20)))
    close(b, torch_run(*torch_build(Torch), range(20)))

def test_step_counts_of_a_saved_state_stand_alone():
    "What is saved is a count per parameter: one that is changed moves no other"
    a,oa = torch_build(RAdam)
    torch_run(a, oa, range(3))
    saved = oa.state_dict()
    saved['state'][0]['step'] += 1
    assert [s['step'].item() for s in saved['state'].values()] == [4., 3., 3.]

@pytest.mark.parametrize('reset', [lambda s: s.update(step=torch.tensor(0.)), lambda s: s['step'].zero_()], ids=['replaced', 'in place'])
def test_restart_of_one_step_count(reset):
    "The rectifier of one parameter starts over, that of the others goes on"
    def go(cls):
        ps,opt = torch_build(cls)
        torch_run(ps, opt, range(8))
        reset(opt.state[ps[1]])
        torch_run(ps, opt, range(8, 12))
        return ps+[opt.state[p]['step'] for p in ps]
    close(go(RAdam), go(Torch))

def test_counts_that_float32_cannot_hold(monkeypatch):
    "Beyond 2²⁴ updates: the count goes on, in the nearest numbers, and nothing is sorted anew at each step"
    from radam_fastai.bucket import Buckets
    sorts,sort = [],Buckets._sort
    monkeypatch.setattr(Buckets, '_sort', lambda *a: (sorts.append(1), sort(*a)))
    ps,opt = torch_build(RAdam, [(3,)])
    torch_run(ps, opt, range(1))
    opt.state[ps[0]]['step'].fill_(2**24-2)
    torch_run(ps, opt, range(1, 9))
    assert len(sorts) == 2 and opt.state[ps[0]]['step'] == 2**24+6

def test_unpickled_from_an_older_class():
    "A group pickled before a setting existed has its default"
    a,oa = torch_build(RAdam)
    torch_run(a, oa, range(3))
    for k in ('foreach', 'maximize', 'decoupled_weight_decay'): del oa.param_groups[0][k]
    ob = copy.deepcopy(oa)
    close(torch_run(params_of(ob), ob, range(3, 12)), torch_run(*torch_build(Torch), range(12)))

def test_add_param_group_mid_run():
    "The newcomer is at step 1 while the others are adaptive"
    def go(cls):
        ps = fresh()
        opt = cls(ps[:2], **TORCH_HYPERS)
        torch_run(ps[:2], opt, range(8))
        opt.add_param_group(dict(params=ps[2:], lr=.2))
        return torch_run(ps, opt, range(8, 20))
    close(go(RAdam), go(Torch))

@pytest.mark.parametrize('move', [
    lambda g: g[1]['params'].append(g[0]['params'].pop()),
    lambda g: g[0]['params'].append(g[1]['params'].pop(0)),
    lambda g: g[0]['params'].extend(g.pop(1)['params'])], ids=['to the next', 'to the one before', 'merge'])
def test_parameters_moved_between_groups(move):
    "Each takes the hyper-parameters of the group that it is in now"
    def go(cls):
        ps = fresh()
        opt = cls([dict(params=ps[:1]), dict(params=ps[1:], lr=.5, weight_decay=0)], **TORCH_HYPERS)
        torch_run(ps, opt, range(8))
        move(opt.param_groups)
        return torch_run(ps, opt, range(8, 12))
    close(go(RAdam), go(Torch))

def test_load_hooks():
    "A pre-hook may adapt a state that would not fit (here: parameters in another order), as torch documents it"
    def reorder(opt, sd):
        sd = copy.deepcopy(sd)
        sd['state'] = {2-i: s for i,s in sd['state'].items()}
        return sd
    def go(cls):
        a,oa = torch_build(cls)
        torch_run(a, oa, range(8))
        opt = cls(a[::-1], **TORCH_HYPERS)
        opt.register_load_state_dict_pre_hook(reorder)
        opt.load_state_dict(oa.state_dict())
        return torch_run(a, opt, range(8, 12))
    close(go(RAdam), go(Torch))

def test_step_hooks():
    ps,opt = torch_build(RAdam)
    seen = []
    opt.register_step_pre_hook(lambda *a: seen.append('pre'))
    opt.register_step_post_hook(lambda *a: seen.append('post'))
    torch_run(ps, opt, range(2))
    assert seen == ['pre', 'post']*2
