"Names of modules that were split: imports and pickles from before still work"
import pickle

import pytest

import radam_fastai.advisor
import radam_fastai.all
import radam_fastai.baselines
import radam_fastai.callback

CALLBACKS = 'RectifierRecorder LogTo KeepGoing GradientHistogram AdaptiveLRVariance StopOnNonFinite'.split()
BASELINES = 'no_warmup linear_warmup after never Adam SGD AdamWarmupFn Adam2kFn'.split()

def pickled(module, name):
    "What a pickle says of a class or function: where it was"
    return pickle.PROTO + b'\x02' + pickle.GLOBAL + f'{module}\n{name}\n'.encode() + pickle.STOP

@pytest.mark.parametrize('module, name, now', [
    *(('callback', o, radam_fastai.all) for o in CALLBACKS), *(('warmup', o, radam_fastai.baselines) for o in BASELINES),
    *(('warmup', o, radam_fastai.advisor) for o in ('WarmupAdvisor', 'WarmupReport'))])
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
