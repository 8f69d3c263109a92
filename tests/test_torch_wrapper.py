"`RAdamWrapper` by itself: hypers, flags, and what it wraps; `test_learner` has it in a Learner."
import copy
import math
import pickle

import pytest
import torch
from torch import nn

from helpers import TORCH_HYPERS, close, fresh, identical, set_grads, torch_build, torch_run
from radam_fastai.torch_optim import RAdam, RAdamWrapper

Torch = torch.optim.RAdam

def test_wrapper_hypers_write_through():
    ps = fresh()
    opt = RAdamWrapper([ps[:1], ps[1:]], **TORCH_HYPERS)
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
    close(torch_run(ps, opt, range(12)), torch_run(b, ob, range(12)))

def test_a_copy_of_the_hypers_is_of_numbers():
    opt = RAdamWrapper(fresh(), **TORCH_HYPERS)
    h = opt.hypers[0]
    for c in copy.deepcopy(h), pickle.loads(pickle.dumps(h)): assert type(c) is dict and c == h
    assert len(pickle.dumps(h)) < 300 # without the optimizer

def test_the_state_of_a_frozen_body_is_torchs():
    "Its parameters have flags alone"
    ps,qs = fresh(),fresh()
    opt,theirs = RAdamWrapper([ps[:1], ps[1:]], **TORCH_HYPERS),Torch([dict(params=qs[:1]), dict(params=qs[1:])], **TORCH_HYPERS)
    for p in ps: opt.state[p]['do_wd'] = True
    opt.freeze_to(1)
    torch_run(ps, opt, range(8), missing=[0])
    theirs.load_state_dict(copy.deepcopy(opt.state_dict())) # torch would share its tensors
    with torch.no_grad(): torch._foreach_copy_(qs, ps)
    opt.unfreeze()
    close(torch_run(ps, opt, range(8, 16)), torch_run(qs, theirs, range(8, 16)))

def test_wrapper_flags():
    "`do_wd` and `force_train`, set before the first step or later, work and outlive `clear_state`"
    ps = fresh()
    opt = RAdamWrapper([ps[:2], ps[2:]], **TORCH_HYPERS)
    opt.state[ps[0]]['do_wd'] = False
    opt.state[ps[1]]['force_train'] = True
    b = fresh()
    groups = [dict(params=b[:1], weight_decay=0), dict(params=b[1:2]), dict(params=b[2:])]
    ob = Torch(groups, **TORCH_HYPERS)
    close(torch_run(ps, opt, range(8)), torch_run(b, ob, range(8)))
    opt.state[ps[2]]['do_wd'] = False
    ob.param_groups[2]['weight_decay'] = 0
    close(torch_run(ps, opt, range(8, 12)), torch_run(b, ob, range(8, 12)))
    opt.freeze()
    assert [p.requires_grad for p in ps] == [False, True, True]
    opt.clear_state()
    assert [dict(opt.state[p]) for p in ps] == [{'do_wd': False}, {'force_train': True}, {'do_wd': False}] and opt.state is opt.opt.state
    ob.state.clear()
    close(torch_run(ps, opt, range(12)), torch_run(b, ob, range(12)))

def test_wrapper_of_a_built_optimizer():
    ps = fresh()
    base = RAdam(ps, **TORCH_HYPERS)
    opt = RAdamWrapper(opt=base)
    assert opt.opt is base and opt.param_lists == [ps]
    close(torch_run(ps, opt, range(12)), torch_run(*torch_build(Torch), range(12)))
    with pytest.raises(ValueError, match='built'): RAdamWrapper(fresh(), opt=base)

def test_wrapper_of_the_class():
    "As fastai's `OptimWrapper` takes a class"
    ps = fresh()
    opt = RAdamWrapper(ps, opt=RAdam, **TORCH_HYPERS)
    close(torch_run(ps, opt, range(12)), torch_run(*torch_build(Torch), range(12)))

@pytest.mark.parametrize('kw, hint', [(dict(mom=.95), 'for mom use betas'), (dict(mom=.95, sqr_mom=.9), 'for mom, sqr_mom use betas'),
                                      (dict(wd=.1, decouple_wd=True), 'for wd, decouple_wd use weight_decay, decoupled_weight_decay')])
def test_wrapper_names(kw, hint):
    with pytest.raises(TypeError, match=hint): RAdamWrapper(fresh(), lr=.1, **kw)

@pytest.mark.parametrize('other', [Torch, torch.optim.AdamW, torch.optim.SGD], ids=lambda o: o.__name__)
def test_wrapper_refuses_other_optimizers(other):
    with pytest.raises(TypeError, match=f'RAdamWrapper.*{other.__name__}'): RAdamWrapper(opt=other(fresh(), lr=.1))

def test_wrapper_checks_hypers():
    with pytest.raises(ValueError, match='lr .*-1'): RAdamWrapper(fresh(), lr=-1)
    ps = fresh()
    opt = RAdamWrapper(ps, **TORCH_HYPERS)
    opt.hypers[0]['lr'] = math.nan
    set_grads(ps, 0)
    with pytest.raises(ValueError, match='lr .*nan'): opt.step()
    assert identical([p.detach() for p in ps], [p.detach() for p in fresh()])

@pytest.mark.parametrize('args', [(), ([],)], ids=['none', 'empty list'])
def test_wrapper_without_parameters(args):
    with pytest.raises(ValueError, match='param'): RAdamWrapper(*args, lr=.1)

def test_wrapper_hypers_are_numbers_that_a_logger_can_draw():
    opt = RAdamWrapper([nn.Parameter(torch.ones(2))], lr=.1, foreach=True)
    assert set(opt.hypers[0]) == {'lr', 'mom', 'sqr_mom', 'eps', 'wd'} and opt.opt.param_groups[0]['foreach'] is True
    opt.set_hyper('wd', .2)
    assert (opt.hypers[0]['wd'], opt.opt.param_groups[0]['weight_decay']) == (.2, .2)
