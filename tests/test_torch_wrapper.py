"`RAdamWrapper` in a Learner: hypers, flags, freezing, files."
import math
import warnings
from functools import partial

import fastai.optimizer as fo
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.optimizer import OptimWrapper
from torch import nn

from helpers import TORCH_HYPERS, close, fresh, identical, mlp, numbers, set_grads, torch_build, torch_run
from radam_fastai.torch_optim import RAdam, RAdamWrapper

Torch = torch.optim.RAdam

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
