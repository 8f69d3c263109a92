"""Before a bad update training stops, with everything as the last good one left it; what was saved is loaded whole or not at all."""
import copy
import math
import os
import re
import warnings
from datetime import timedelta
from functools import partial

import fastai.optimizer as fo
import pytest
import torch
from fastai.basics import Callback, CancelBatchException, CancelFitException, CancelStepException, OptimWrapper
from fastai.callback.all import GradientAccumulation, GradientClip
from torch import nn

import radam_fastai.guard as cb
from helpers import (
    At,
    CPUMixedPrecision,
    all_equal,
    get_learner,
    get_model,
    halves,
    identical,
    no_warnings,
    overflow,
    result_of,
    stable,
    weights,
)
from radam_fastai.all import RAdam, RAdamFn, RAdamWrapper, Ranger, RectifierRecorder, StopOnNonFinite, load_strict

f32 = torch.float32
OPTS = dict(RAdam=RAdam, Ranger=partial(Ranger, k=3), RAdamWrapper=RAdamWrapper, adam=fo.Adam, ranger=fo.ranger)
each = pytest.mark.parametrize('opt', OPTS)

def make(tmp_path, opt='RAdam', *cbs, dtype=f32, **kw):
    "5 batches of 4 an epoch"
    return get_learner(OPTS.get(opt, opt), dtype=dtype, cbs=cbs, path=tmp_path, **kw)

def held(learn): return copy.deepcopy((dict(learn.model.state_dict()), learn.opt.state_dict()))

@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_a_fit_after_an_interrupted_finder_is_guarded(tmp_path, error):
    learn = make(tmp_path, 'RAdam', guard := StopOnNonFinite())
    def interrupt(learn): raise error('out of memory')
    def spoil(learn): learn.loss_grad = learn.loss*math.nan
    with pytest.raises(error), learn.added_cbs(At('before_backward', interrupt)): learn.lr_find(show_plot=False, num_it=10)
    with pytest.warns(UserWarning, match='StopOnNonFinite'): learn.fit(1, .02, cbs=At('before_backward', spoil, [2]))
    assert guard.stopped and all(p.isfinite().all() for p in weights(learn))

def test_validation_makes_no_folder(tmp_path):
    learn = make(tmp_path, 'RAdam', StopOnNonFinite('good'))
    learn.validate()
    assert not list(tmp_path.iterdir())

class StopBefore(Callback):
    "End the fit before batch `n`"
    def __init__(self, n): self.n = n
    def before_batch(self):
        if self.training and self.train_iter == self.n: raise CancelFitException

def undisturbed(tmp_path, opt, n, *cbs, **kw):
    learn = make(tmp_path, opt, **kw)
    learn.fit(3, .02, wd=.1, cbs=[*cbs, StopBefore(n)])
    return learn

def guarded(tmp_path, opt, *cbs, path='good', epochs=3, **kw):
    "A guarded fit: the Learner, the guard, and what was said"
    learn,guard = make(tmp_path, opt, **kw),StopOnNonFinite(path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        learn.fit(epochs, .02, wd=.1, cbs=[*cbs, guard])
    return learn,guard,[str(w.message) for w in said if 'StopOnNonFinite' in str(w.message)]

def spoil_loss(x): return lambda learn: setattr(learn, 'loss_grad', learn.loss_grad*x) or setattr(learn, 'loss', learn.loss_grad.clone())
def spoil_grad(x): return lambda learn: learn.model[1][1].weight.grad.view(-1)[3:4].fill_(x)
def spoil_input(learn): learn.xb = (learn.xb[0]*math.nan,)

BAD = { # at which event what happens, and what is named
    'nan loss':     (lambda n: At('after_loss', spoil_loss(math.nan), [n]), 'the loss of epoch 1, batch 2 is nan'),
    'inf loss':     (lambda n: At('after_loss', spoil_loss(math.inf), [n]), 'the loss of epoch 1, batch 2 is inf'),
    'nan gradient': (lambda n: At('after_backward', spoil_grad(math.nan), [n]), 'the gradient of 1.1.weight has nan'),
    'inf gradient': (lambda n: At('after_backward', spoil_grad(-math.inf), [n]), 'the gradient of 1.1.weight has inf'),
    'huge gradient': (lambda n: At('after_backward', spoil_grad(1e30), [n]),
                      r'the gradient of 1.1.weight \(up to 1e\+30\) is too large to be squared in torch.float32'),
    'nan input':    (lambda n: At('before_batch', spoil_input, [n]), 'the loss of epoch 1, batch 2 is nan')}

# ---- stopped in time

@pytest.mark.many
@each
@pytest.mark.parametrize('bad', BAD)
def test_all_is_as_the_last_good_update_left_it(tmp_path, opt, bad):
    "Weights, batch norm's statistics, averages and step counts, to the bit; the sentence names epoch, batch, culprit and file"
    spoil,names = BAD[bad]
    learn,guard,said = guarded(tmp_path, opt, spoil(7))
    whole = undisturbed(tmp_path, opt, 7)
    assert identical(held(learn), held(whole))
    assert len(said) == 1 and 'in epoch 1, batch 2' in said[0] and guard.stopped in said[0] and str(tmp_path/'models'/'good.pth') in said[0]
    assert re.search(names, said[0])
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters()) # fastai's own write zeros

@each
def test_training_goes_on_from_the_file(tmp_path, opt):
    "In a new Learner, as the undisturbed one goes on"
    guarded(tmp_path, opt, BAD['nan input'][0](7))
    again,whole = make(tmp_path, opt),undisturbed(tmp_path, opt, 7)
    assert load_strict(again, 'good') is again
    for learn in (again, whole): learn.fit(2, .02, wd=.1)
    assert identical(held(again), held(whole))
    assert os.listdir(tmp_path/'models') == ['good.pth']

def test_the_first_batch(tmp_path):
    learn,guard,said = guarded(tmp_path, 'RAdam', BAD['nan input'][0](0))
    assert all_equal(list(learn.model.state_dict().values()), list(get_model().to(f32).state_dict().values()))
    load_strict(make(tmp_path), 'good')

@each
def test_a_sound_run_is_as_without(tmp_path, opt):
    "And writes nothing, and says nothing"
    learn,guard,said = guarded(tmp_path, opt)
    plain = make(tmp_path, opt)
    plain.fit(3, .02, wd=.1)
    assert identical(held(learn), held(plain)) and guard.stopped is None and not said
    assert not (tmp_path/'models').exists() or not os.listdir(tmp_path/'models')

def test_one_check_an_update(tmp_path, monkeypatch):
    "One norm over all gradients, one answer from the device"
    norms,answers = [],[]
    monkeypatch.setattr(cb, 'get_total_norm', lambda gs, real=cb.get_total_norm: (norms.append(len(gs)), real(gs))[1])
    monkeypatch.setattr(cb, 'all_finite', lambda l, g, real=cb.all_finite: (answers.append(len(l)), real(l, g))[1])
    guarded(tmp_path, 'RAdam', GradientAccumulation(8))
    assert norms == [5]*7 # of 15 batches of 4, each second
    assert len(answers) == 7+3 and sum(map(bool, answers)) == 7+2 # and what is left over at the end of the first epoch and of the last

def test_fastais_events_go_on(tmp_path):
    seen = []
    class Watch(Callback):
        order = 99
        def __call__(self, event): seen.append(event)
    learn,guard,_ = guarded(tmp_path, 'RAdam', Watch(), BAD['nan loss'][0](7))
    assert 'before_fit' in seen
    assert seen[-2:] == ['after_cancel_fit', 'after_fit'] and seen.count('after_step') == 7
    assert seen.count('after_batch') == 7+1 # one to validate
    learn.fit(1, .02) # and can be used again

def test_another_fit_begins_anew(tmp_path):
    learn,guard = make(tmp_path),StopOnNonFinite()
    learn.add_cb(guard)
    with pytest.warns(UserWarning, match='StopOnNonFinite'): learn.fit(1, .02, cbs=BAD['nan loss'][0](3))
    assert 'batch 3' in guard.stopped
    learn.validate()
    assert guard.stopped
    learn.fit(1, .02)
    assert guard.stopped is None

# ---- the file

def test_no_path_no_file(tmp_path):
    learn,guard,said = guarded(tmp_path, 'RAdam', BAD['nan loss'][0](7), path=None)
    assert said and not list(tmp_path.iterdir()) and 'saved' not in said[0]

@pytest.mark.parametrize('path', ['taken/good', 'folder', 'no\0name'])
def test_a_path_that_cannot_be_written(tmp_path, path):
    "Is an error before the first batch"
    (tmp_path/'models').mkdir()
    (tmp_path/'models'/'taken').write_text('a file')
    (tmp_path/'models'/'folder.pth').mkdir()
    learn = make(tmp_path)
    before = weights(learn)
    with pytest.raises((OSError, ValueError), match=f'{path[:5]}|null'): learn.fit(1, .02, cbs=StopOnNonFinite(path))
    assert all_equal(before, weights(learn))

def test_a_disk_that_is_full(tmp_path, monkeypatch):
    "Says so; what was there before stays"
    (tmp_path/'models').mkdir()
    (tmp_path/'models'/'good.pth').write_bytes(b'before')
    def full(*a, **kw): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    learn,guard,said = guarded(tmp_path, 'RAdam', BAD['nan loss'][0](7))
    assert 'in memory only' in said[0] and 'No space left' in said[0] and 'good.pth' in said[0]
    assert identical(held(learn), held(undisturbed(tmp_path, 'RAdam', 7))) and (tmp_path/'models'/'good.pth').read_bytes() == b'before'
    assert os.listdir(tmp_path/'models') == ['good.pth']

def test_weights_that_an_update_broke_are_not_saved_as_good(tmp_path):
    "With eps 0, zero gradients make NaN of a weight: the next loss is NaN, and there is nothing to keep"
    dead = At('after_backward', lambda learn: learn.model[0][0].weight.grad.zero_())
    learn,guard,said = guarded(tmp_path, partial(RAdam, eps=0.), dead)
    assert 'But 0.0.weight is not finite either' in said[0] and 'Nothing is saved' in said[0]
    assert not (tmp_path/'models'/'good.pth').exists()

def test_export(tmp_path):
    learn = make(tmp_path, 'RAdam', StopOnNonFinite('good'))
    learn.fit(1, .02)
    learn.export('a.pkl')

@pytest.mark.parametrize('n', [0, -1, 1.5, 'x'])
def test_max_skips_that_cannot_be(n):
    with pytest.raises(ValueError, match='max_skips must be a whole number of at least 1'): StopOnNonFinite(max_skips=n)

# ---- with other callbacks

def test_fp16_overflows_are_normal(tmp_path):
    cbs = lambda: [CPUMixedPrecision(), At('after_backward', overflow, [0, 2, 6, 7])]
    learn,guard,said = guarded(tmp_path, 'RAdam', *cbs())
    plain = make(tmp_path)
    plain.fit(3, .02, wd=.1, cbs=cbs())
    assert not said and identical(held(learn), held(plain))

@pytest.mark.parametrize('bad', ['nan loss', 'nan input'])
def test_fp16_and_a_bad_loss(tmp_path, bad):
    "The scaler would skip this batch and the next and go on for ever"
    learn,guard,said = guarded(tmp_path, 'RAdam', CPUMixedPrecision(), BAD[bad][0](7))
    whole = undisturbed(tmp_path, 'RAdam', 7, CPUMixedPrecision())
    assert identical(held(learn), held(whole)) and 'the loss of epoch 1, batch 2 is nan' in said[0]
    assert not torch.is_autocast_enabled('cpu')

def test_fp16_that_skips_too_often(tmp_path):
    learn,guard = make(tmp_path),StopOnNonFinite('good', max_skips=3)
    with pytest.warns(UserWarning, match='the gradient scaler has skipped 3 updates in a row'):
        learn.fit(3, .02, wd=.1, cbs=[CPUMixedPrecision(), At('after_backward', overflow, [2, 3, 5, 6, 7, 8]), guard])
    whole = make(tmp_path)
    whole.fit(3, .02, wd=.1, cbs=[CPUMixedPrecision(), At('after_backward', overflow, [2, 3, 5, 6, 7, 8]), StopBefore(7)])
    assert identical(held(learn), held(whole)) and 'batch 2' in guard.stopped # 5, 6 and 7

def test_steps_that_others_cancel_are_not_the_scalers(tmp_path):
    def cancel(learn): raise CancelStepException
    learn,guard,said = guarded(tmp_path, 'RAdam', At('before_step', cancel), epochs=8)
    assert not said

def test_bf16(tmp_path):
    learn,guard,said = guarded(tmp_path, 'RAdam', CPUMixedPrecision('bf16'), BAD['inf gradient'][0](7))
    assert identical(held(learn), held(undisturbed(tmp_path, 'RAdam', 7, CPUMixedPrecision('bf16')))) and said

@pytest.mark.parametrize('bad', ['nan loss', 'nan input', 'nan gradient'])
@pytest.mark.parametrize('n', [8, 9])
def test_accumulation(tmp_path, bad, n):
    "The update before the bad one is that of batch 7; whichever of its two batches is bad, nothing of either stays"
    learn,guard,said = guarded(tmp_path, 'RAdam', GradientAccumulation(8), BAD[bad][0](n))
    assert identical(held(learn), held(undisturbed(tmp_path, 'RAdam', 8, GradientAccumulation(8))))
    assert f'epoch 1, batch {n-5} is nan' in said[0] or bad == 'nan gradient'

def test_batches_that_no_update_follows(tmp_path):
    "The last batch of the fit is accumulated and never used, but batch norm has seen it"
    learn,guard,said = guarded(tmp_path, 'RAdam', GradientAccumulation(8), BAD['nan input'][0](14))
    assert 'the loss of epoch 2, batch 4 is nan' in said[0]
    assert identical(held(learn), held(undisturbed(tmp_path, 'RAdam', 14, GradientAccumulation(8))))

def test_clipping_does_not_hide_the_culprit(tmp_path):
    learn,guard,said = guarded(tmp_path, 'RAdam', GradientClip(1.), BAD['nan gradient'][0](7))
    assert 'the gradient of 1.1.weight has nan' in said[0]

def test_the_finder_stops_by_itself(tmp_path):
    "Even where everything becomes NaN it finds what it finds without the guard, and nothing is written or said"
    res = []
    for cbs in ([], [StopOnNonFinite('good')]):
        cbs = [*cbs, BAD['nan gradient'][0](6)]
        learn = make(tmp_path, 'RAdam', *cbs)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            learn.lr_find(num_it=30, end_lr=1e9, show_plot=False)
        res.append((learn.recorder.lrs, [float(l) for l in learn.recorder.losses], weights(learn)))
        assert not [w for w in said if 'StopOnNonFinite' in str(w.message)]
    assert identical(*res) and not (tmp_path/'models'/'good.pth').exists()

def test_with_the_recorder(tmp_path):
    rec = RectifierRecorder()
    guarded(tmp_path, 'RAdam', rec, BAD['nan gradient'][0](7))
    assert rec.to_frame().step.max() == 7

def test_frozen_layers(tmp_path):
    learn,guard = make(tmp_path),StopOnNonFinite()
    learn.freeze()
    with pytest.warns(UserWarning, match='1.1.weight'): learn.fit(1, .02, cbs=[BAD['nan gradient'][0](3), guard])

def rank(n, tmp_path, r):
    "One of `n` processes, of which only the first has a bad batch: why it stopped"
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=r, world_size=n,
                                         timeout=timedelta(seconds=30))
    os.environ.update(RANK=str(r), WORLD_SIZE=str(n))
    learn,guard = make(tmp_path),StopOnNonFinite()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(3, .02, cbs=[guard, *([BAD['nan loss'][0](7)] if r == 0 else [])])
    return guard.stopped

def test_all_processes_stop_together(tmp_path):
    "Or the others would wait for ever for the one that stopped"
    def first():
        if not (pid := os.fork()):
            try: ok = 'of another process' in rank(2, tmp_path, 1)
            except BaseException: ok = False
            os._exit(not ok)
        said = rank(2, tmp_path, 0)
        return said,os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said,status = result_of(lambda: list(first()))
    assert 'the loss of epoch 1, batch 2 is nan' in said and status == 0

class Odd(nn.Module):
    "A model with a buffer that cannot be written to in place, which each batch replaces"
    def __init__(self, make):
        super().__init__()
        self.net = get_model()
        self.register_buffer('odd', make())
    def forward(self, x):
        if self.training: self.odd = self.odd*x.mean().detach()
        return self.net(x)

def dense(sd): return {k: v.to_dense() if isinstance(v, torch.Tensor) else v for k,v in sd.items()}

@pytest.mark.filterwarnings('ignore:Sparse:UserWarning')
@pytest.mark.parametrize('make', [lambda: torch.eye(3).to_sparse(), lambda: torch.eye(3).to_sparse_csr()], ids=['COO', 'CSR'])
def test_buffers_that_cannot_be_written_to(tmp_path, make):
    runs = []
    for cbs in ([BAD['nan input'][0](7), StopOnNonFinite()], [StopBefore(7)]):
        learn = make_odd(tmp_path, make)
        with warnings.catch_warnings(record=True): learn.fit(3, .02, cbs=cbs)
        runs.append((dense(learn.model.state_dict()), learn.opt.state_dict()))
    assert identical(*runs)

def make_odd(tmp_path, buffer): return make(tmp_path, 'RAdam', model=Odd(buffer), splitter=lambda m: halves(m.net))

class Expanded(nn.Module):
    "A buffer that shows one number several times, and changes with it"
    def __init__(self):
        super().__init__()
        self.net,self.base = get_model(),torch.ones(1)
        self.register_buffer('shown', self.base.expand(4))
    def forward(self, x):
        if self.training: self.base.mul_(x.mean().detach())
        return self.net(x)

def test_an_expanded_buffer(tmp_path):
    learn,whole = (make(tmp_path, 'RAdam', model=Expanded(), splitter=lambda m: halves(m.net)) for _ in range(2))
    with pytest.warns(UserWarning, match='StopOnNonFinite'): learn.fit(3, .02, cbs=[BAD['nan input'][0](7), StopOnNonFinite('good')])
    whole.fit(3, .02, cbs=StopBefore(7))
    assert identical(held(learn), held(whole)) and learn.model.shown[3] == learn.model.base != 1

@pytest.mark.parametrize('n', [0, 7])
def test_lazy_batch_norm(tmp_path, n):
    "It has no statistics before the first batch; if that is a bad one, they are as new"
    def lazy():
        m = get_model().to(f32)
        return nn.Sequential(nn.Sequential(nn.LazyBatchNorm2d(affine=False), m[0]), m[1])
    learn,whole = (make(tmp_path, 'RAdam', model=lazy()) for _ in range(2))
    with pytest.warns(UserWarning, match='StopOnNonFinite'): learn.fit(3, .02, cbs=[BAD['nan input'][0](n), StopOnNonFinite('good')])
    with warnings.catch_warnings(record=True): whole.fit(3, .02, cbs=StopBefore(n))
    stats = learn.model[0][0]
    if n: assert identical(held(learn), held(whole))
    else: assert not stats.running_mean.any() and (stats.running_var == 1).all() and stats.num_batches_tracked == 0

def test_half_precision_with_many_units():
    "Gradients that float16 can hold, though not their norm"
    many = torch.full((10_000,), 1000., dtype=torch.half)
    assert torch.linalg.vector_norm(many).isinf() and cb.all_finite([], [many, torch.ones(2, dtype=torch.half)])
    for bad in math.nan, math.inf: assert not cb.all_finite([], [many, torch.tensor([bad], dtype=torch.half)])
    model = nn.Linear(2, 1).half()
    model.weight.grad,model.bias.grad = torch.full((1, 2), 1000., dtype=torch.half),torch.tensor([math.inf], dtype=torch.half)
    assert cb.find_non_finite([], model) == 'the gradient of bias has inf'

def test_statistics_are_those_of_the_last_update_though_another_callback_cancels_behind_it(tmp_path):
    cancel = lambda: At('after_step', cancel_batch)
    learn,guard,said = guarded(tmp_path, 'RAdam', cancel(), BAD['nan input'][0](7))
    assert said and identical(held(learn), held(undisturbed(tmp_path, 'RAdam', 7, cancel())))

def cancel_batch(learn): raise CancelBatchException

# ---- all or nothing

def saved(tmp_path, opt='RAdam', name='a', **kw):
    "A Learner whose state is in a file, and has moved on since"
    learn = make(tmp_path, opt, **kw)
    learn.fit_one_cycle(2, .02)
    learn.save(name)
    state = held(learn)
    learn.fit(1, .02)
    return learn,state

@pytest.mark.many
@pytest.mark.parametrize('opt', [*OPTS, fo.SGD, partial(OptimWrapper, opt=torch.optim.SGD), RAdamFn], ids=stable)
def test_loads_what_learner_load_loads(tmp_path, opt):
    "Without a warning, even of an optimizer whose hyper-parameters NumPy made"
    learn,state = saved(tmp_path, opt)
    with no_warnings(): load_strict(learn, 'a')
    assert identical(held(learn), state)
    fresh = make(tmp_path, opt)
    fresh.load('a')
    for l in (learn, fresh): l.fit(1, .02)
    assert identical(held(learn), held(fresh))

def test_model_alone(tmp_path):
    learn,state = saved(tmp_path)
    opt = copy.deepcopy(learn.opt.state_dict())
    load_strict(learn, 'a', with_opt=False)
    assert identical(learn.model.state_dict(), state[0]) and identical(learn.opt.state_dict(), opt)
    learn.save('b', with_opt=False)
    load_strict(fresh := make(tmp_path), 'b', with_opt=False)
    assert identical(fresh.model.state_dict(), state[0]) and fresh.opt is None

def replace(f):
    "A function that puts `f` of what is in the file in its place"
    def _inner(tmp_path): torch.save(f(torch.load(tmp_path/'models'/'a.pth', weights_only=False)), tmp_path/'models'/'a.pth')
    return _inner

def alter(f): return replace(lambda sd: (f(sd), sd)[1])

def one(sd, x): sd['model']['0.1.running_mean'][0] = x
REFUSED = {
    'no optimizer':       (replace(lambda sd: sd['model']), 'a.pth has no optimizer state: with_opt=False'),
    'another optimizer':  (alter(lambda sd: sd.update(opt=torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.).state_dict())),
                           'no betas, eps|Lookahead'),
    'fewer groups':       (alter(lambda sd: sd['opt']['hypers'].pop()), '1 parameter groups, this optimizer 2|optimizer'),
    'an average':         (alter(lambda sd: sd['opt']['state'][0].update(sqr_avg=torch.ones(1))), r'parameter 0.*sqr_avg'),
    'nan in an average':  (alter(lambda sd: sd['opt']['state'][0]['grad_avg'].fill_(math.nan)),
                           r'parameter 0.*grad_avg in the checkpoint has nan or inf'),
    'a weight missing':   (alter(lambda sd: sd['model'].pop('0.0.weight')), 'the file has no 0.0.weight'),
    'a weight more':      (alter(lambda sd: sd['model'].update(x=torch.ones(1))), 'the file has x, which the model does not have'),
    'a shape':            (alter(lambda sd: sd['model'].update({'1.1.bias': torch.ones(3)})),
                           r'1.1.bias has shape \(3,\) in the file, \(2,\) in the model'),
    'integers':           (alter(lambda sd: sd['model'].update({'1.1.bias': torch.ones(2).long()})),
                           '1.1.bias is torch.int64 in the file, torch.float32'),
    'too large':          (alter(lambda sd: sd['model'].update({'1.1.bias': torch.tensor([1., 1e300], dtype=torch.float64)})),
                           r'1.1.bias has nan or inf in the file \(as torch.float32\)'),
    'inf in a weight':    (alter(lambda sd: sd['model']['1.1.bias'].fill_(math.inf)), '1.1.bias has nan or inf'),
    'nan in a statistic': (alter(lambda sd: one(sd, math.nan)), '0.1.running_mean has nan'),
    'half a file':        (lambda p: os.truncate(p/'models'/'a.pth', 3000), 'a.pth is not a whole checkpoint'),
    'a text':             (lambda p: (p/'models'/'a.pth').write_text('hello'), 'a.pth is not a whole checkpoint'),
    'a list':             (replace(lambda sd: [1]), 'a.pth'),
}

@pytest.mark.many
@pytest.mark.parametrize('opt', ['RAdam', 'Ranger', 'adam'])
@pytest.mark.parametrize('name', REFUSED)
def test_refused_with_nothing_changed(tmp_path, opt, name):
    spoil,says = REFUSED[name]
    learn,_ = saved(tmp_path, opt)
    spoil(tmp_path)
    before = held(learn)
    with pytest.raises(ValueError, match=says) as e: load_strict(learn, 'a')
    assert str(tmp_path/'models'/'a.pth') in str(e.value)
    assert identical(held(learn), before)
    twin = make(tmp_path, opt)
    twin.fit_one_cycle(2, .02)
    twin.fit(1, .02)
    for l in (learn, twin): l.fit(1, .02)
    assert identical(held(learn), held(twin)) # and it goes on as if nothing had been

def test_a_refusal_leaves_no_optimizer_where_there_was_none(tmp_path):
    saved(tmp_path)
    REFUSED['an average'][0](tmp_path)
    fresh = make(tmp_path)
    with pytest.raises(ValueError): load_strict(fresh, 'a')
    assert fresh.opt is None

class Extra(nn.Module):
    "A model with extra state that it may refuse, and a buffer that may be one number seen many times"
    def __init__(self, expanded=False):
        super().__init__()
        self.register_buffer('seen', torch.zeros(1).expand(3) if expanded else torch.zeros(3))
        self.net,self.known,self.refuses = get_model(),0,False
    def forward(self, x): return self.net(x)
    def get_extra_state(self): return {'known': self.known}
    def set_extra_state(self, state):
        self.known = state['known']
        if state['known'] and self.refuses: raise KeyError('half-way')

@pytest.mark.many
@each
@pytest.mark.parametrize('what', ['extra state', 'expanded buffer'])
def test_a_model_that_cannot_take_it(tmp_path, opt, what):
    "Found out by loading: the optimizer, which came first, and the model are put back"
    def one(**kw): return make(tmp_path, opt, model=Extra(**kw), splitter=lambda m: halves(m.net))
    learn,other = one(),one(expanded=what == 'expanded buffer')
    learn.fit(2, .02)
    learn.model.known,learn.model.seen[:] = 5,torch.arange(3.)
    learn.save('a')
    other.fit(1, .02)
    other.model.refuses = what == 'extra state'
    before = held(other)
    with pytest.raises(ValueError, match="a.pth is not loaded: the model's state does not fit"): load_strict(other, 'a')
    assert identical(held(other), before) and other.model.known == 0
    other.fit(1, .02)

def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.pth'): load_strict(make(tmp_path), 'nowhere')

class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = get_model()
        self.register_buffer('mask', torch.full((2, 2), -math.inf).triu(1))
    def forward(self, x): return self.net(x)

def test_masks_may_be_infinite(tmp_path):
    learn = make(tmp_path, 'RAdam', model=Masked(), splitter=lambda m: halves(m.net))
    learn.fit(1, .02)
    learn.save('a')
    load_strict(learn, 'a')

def lookahead_sgd(params, lr): return fo.Lookahead(fo.SGD(params, lr, mom=.9))

@pytest.mark.parametrize('opt', [fo.SGD, fo.RMSProp, partial(OptimWrapper, opt=torch.optim.SGD), fo.ranger, lookahead_sgd], ids=stable)
def test_other_optimizers_are_put_back(tmp_path, opt):
    "When their own loading fails half-way: fastai's Lookahead has lost its slow weights by then"
    learn,_ = saved(tmp_path, opt)
    def fewer(sd):
        for k in ('state', 'hypers', 'param_groups'):
            if isinstance(sd['opt'].get(k), (list, fo.L)): sd['opt'][k] = list(sd['opt'][k])[:-1]
    alter(fewer)(tmp_path)
    before = held(learn)
    with pytest.raises(ValueError, match='is not loaded'): load_strict(learn, 'a')
    assert identical(held(learn), before)
    learn.fit(1, .02)
