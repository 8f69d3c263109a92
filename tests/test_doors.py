"Names of modules that were split: imports and pickles from before still work"
import pickle

import pytest
import torch
from torch import nn

import radam_fastai.advisor
import radam_fastai.all
import radam_fastai.baselines
import radam_fastai.callback
import radam_fastai.introspect
from radam_fastai.baselines import AdamFn
from radam_fastai.functional import radam_step_
from radam_fastai.introspect import find_rectifier
from radam_fastai.optimizer import AdamBase
from radam_fastai.recipes.demo import get_learner

CALLBACKS = 'RectifierRecorder LogTo KeepGoing GradientHistogram AdaptiveLRVariance StopOnNonFinite'.split()
BASELINES = 'no_warmup linear_warmup after never Adam SGD AdamWarmupFn Adam2kFn'.split()

def pickled(module, name):
    "What a pickle says of a class or function: where it was"
    return pickle.PROTO + b'\x02' + pickle.GLOBAL + f'{module}\n{name}\n'.encode() + pickle.STOP

@pytest.mark.parametrize('module, name, now', [
    *(('callback', o, radam_fastai.all) for o in CALLBACKS), *(('warmup', o, radam_fastai.baselines) for o in BASELINES),
    *(('warmup', o, radam_fastai.advisor) for o in ('WarmupAdvisor', 'WarmupReport')), ('readout', 'Rectifier', radam_fastai.introspect)])
def test_exported_learners_find_their_classes(module, name, now):
    assert pickle.loads(pickled(f'radam_fastai.{module}', name)) is getattr(now, name)

@pytest.mark.parametrize('module', ['callback', 'all'])
def test_callbacks_come_from_one_module(module):
    names = {}
    exec(f'from radam_fastai.{module} import RectifierRecorder, GradientHistogram, StopOnNonFinite, rectified_lr_find', names)
    assert all(names[o] is getattr(radam_fastai.all, o) for o in names if o != '__builtins__')

def test_former_callbacks_are_the_new_ones():
    for name,now in (('LogTo', 'LogRectifier'), ('KeepGoing', 'FailSafe')):
        former,cls = getattr(radam_fastai.callback, name),getattr(radam_fastai.callback, now)
        arg = radam_fastai.all.WarmupAdvisor() if now == 'FailSafe' else print
        with pytest.warns(DeprecationWarning, match=f'{name} is called {now} now'): cb = former(arg)
        assert isinstance(cb, cls) and isinstance(pickle.loads(pickle.dumps(cb)), cls)

def old(f, *args, **kwargs):
    "What `f` gives for a former name, once it has warned"
    with pytest.warns(DeprecationWarning, match='rule is called lr_factor now'): return f(*args, **kwargs)

def half(step, sqr_mom): return .5

def test_rule_is_now_called_lr_factor():
    def p(): return [nn.Parameter(torch.ones(1))]
    hypers = dict(lr=.1, mom=.9, sqr_mom=.99, eps=1e-5, wd=0., beta=0.)
    for opt in (old(AdamBase, p(), rule=half, **hypers), old(AdamFn, p(), lr=.1, rule=half)):
        assert opt.settings['lr_factor'] is old(opt.settings.__getitem__, 'rule') is old(getattr, find_rectifier(opt), 'rule') is half
    ps = torch.ones(1),torch.ones(1),torch.zeros(1),torch.zeros(1)
    old(radam_step_, *([o] for o in ps), 1, lr=.1, mom=.9, sqr_mom=.99, eps=0., rule=half)
    assert ps[0].item() == pytest.approx(1-.1*.5)
    with pytest.raises(KeyError): opt.settings['threshold']

def test_an_optimizer_pickled_with_a_rule_steps():
    opt = AdamFn([nn.Parameter(torch.ones(1))], lr=.1, wd=0., lr_factor=half)
    opt.settings = {('rule' if k == 'lr_factor' else k): v for k,v in opt.settings.items()}
    opt = old(pickle.loads, pickle.dumps(opt))
    (p,), = opt.param_lists
    p.grad = torch.ones(1)
    opt.step()
    assert p.item() == pytest.approx(1-.1*.5)

def test_a_recorder_that_was_exported_before_continues():
    "It kept the step counts of each group in a list"
    learn = get_learner('radam')
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'rectifier'])
    learn.add_cb(radam_fastai.all.RectifierRecorder(table=False)).rectifier.last = {0: [3]}
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert learn.rectifier.to_frame().step.tolist() == [*range(1, 1+len(learn.dls.train))]
