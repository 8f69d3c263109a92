"RAdamScheduleFree in a Learner beside the library's own loop, update by update, and at every event at which weights are read"
import math
import warnings
from contextlib import nullcontext
from copy import deepcopy
from functools import partial

import pytest
import torch
from fastai.basics import Callback, CancelBatchException, CancelFitException, CancelStepException, CancelTrainException, Learner
from fastai.callback.all import ActivationStats, GradientAccumulation, SaveModelCallback
from fastai.callback.fp16 import AMPMode
from fastai.data.core import DataLoaders
from fastai.learner import load_learner
from torch import nn

from helpers import At, all_equal, assert_same, flat, get_dls, get_learner as learner_of, get_model, halves, identical, mse
from radam_fastai import schedule_free
from radam_fastai.guard import StopOnNonFinite, load_strict
from radam_fastai.optimizer import RAdamFn
from radam_fastai.recipes.precision import DevicePrecision
from radam_fastai.schedule_free import RAdamScheduleFree, RAdamScheduleFreeFn, ScheduleFree

schedulefree = pytest.importorskip('schedulefree')
HYPERS = dict(mom=.9, sqr_mom=.9, eps=1e-8, wd=.1) # with β2 .9 the rectifier is on from the fifth of 5 batches an epoch

def get_learner(opt_func=partial(RAdamScheduleFree, **HYPERS), cbs=(), bn_batches=50, **kwargs):
    return learner_of(opt_func, cbs=[ScheduleFree(bn_batches), *cbs], **kwargs)

def is_norm(m): return isinstance(m, nn.BatchNorm2d)
def norm_bias(model): return {p for m in model.modules() for n,p in m.named_parameters(recurse=False) if is_norm(m) or n == 'bias'}

class Loop:
    "The library's own loop over the same batches, decay kept off norms and biases as its users do it: by groups"
    def __init__(self, lr, mom=.9, sqr_mom=.9, eps=1e-8, wd=.1, model=None, dtype=torch.float64):
        self.dls,self.model = get_dls(dtype),(model or get_model()).to(dtype)
        free,lrs = norm_bias(self.model),lr if isinstance(lr, list) else [lr]*2
        groups = [dict(params=[p for p in g if (p in free) == f], lr=l, weight_decay=0. if f else wd)
                  for g,l in zip(halves(self.model), lrs) for f in (False, True)]
        self.opt = schedulefree.RAdamScheduleFree([g for g in groups if g['params']], betas=(mom, sqr_mom), eps=eps)
        self.ys,self.xs = [],[]

    def epoch(self, precision=nullcontext):
        self.model.train()
        self.opt.train()
        for x,y in self.dls.train:
            self.opt.zero_grad()
            with precision(): loss = mse(self.model(x), y)
            loss.backward()
            self.opt.step()
            self.ys.append(self.flat())
        self.opt.eval()
        self.xs.append(self.flat())
        return self

    def flat(self): return torch.cat([p.detach().double().flatten().clone() for p in self.model.parameters()])

class Weights(Callback):
    "The model's weights after each update, and when an epoch is validated"
    order = 100
    def __init__(self): self.ys,self.xs = [],[]
    def after_step(self): self.ys.append(flat(self.learn))
    def before_validate(self): self.xs.append(flat(self.learn))

def close(a, b, tol=1e-12): torch.testing.assert_close(a, b, rtol=tol, atol=tol)

@pytest.mark.parametrize('lr', [.05, [.01, .05]], ids=['one lr', 'an lr for each group'])
@pytest.mark.parametrize('wd', [0., .1])
def test_equals_the_librarys_loop(lr, wd):
    "y after every update, x at every validation, decay off norms and biases"
    seen,loop = Weights(),Loop(lr, wd=wd)
    get_learner().fit(3, lr, wd=wd, cbs=seen)
    for _ in range(3): loop.epoch()
    assert len(seen.ys) == 15 and (seen.ys[3] == seen.ys[0]).all() and (seen.ys[4] != seen.ys[3]).any() # the first updates are silent
    close(seen.ys, loop.ys)
    close(seen.xs, loop.xs)

def test_discriminative_lrs():
    loop,learn = Loop([.005, .05]),get_learner()
    learn.fit(1, slice(.05))
    close(flat(learn), loop.epoch().flat())

def test_gradient_accumulation():
    "Weights change every other batch, and are at y for all of them"
    learn,loop = get_learner(cbs=[GradientAccumulation(8)]),Loop(.05)
    learn.fit(2, .05)
    loop.opt.train()
    for i,(x,y) in enumerate(list(loop.dls.train)*2):
        (mse(loop.model(x), y)/2).backward()
        if i%2: loop.opt.step(), loop.opt.zero_grad()
    loop.opt.eval()
    assert learn.opt.opt.param_groups[0]['k'] == 5
    close(flat(learn), loop.flat())

def test_a_scheduled_mom():
    "x is worked out with the β1 that y was made with: sequences of their own, in float64"
    moms,lr,b2 = [.9, .8, .95, .85]*3,.05,.6
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(3, dtype=torch.float64))
    grads = torch.randn(12, 3, dtype=torch.float64)
    # plain SGD: ρ stays below 4
    x,z,opt = p.detach().clone(),p.detach().clone(),RAdamScheduleFree([p], lr=lr, sqr_mom=b2, silent_sgd_phase=False)
    for t,(mom,g) in enumerate(zip(moms, grads), 1):
        opt.set_hyper('mom', mom)
        opt.train()
        close(p.detach(), (1-mom)*z + mom*x)
        p.grad = g.clone()
        opt.step()
        z = z - lr*g
        x = x + (z-x)/t
    opt.eval()
    close(p.detach(), x)

def test_one_cycle_trains_at_y():
    "Gradients are taken at y of the β1 that the schedule has just set"
    seen = []
    def check(learn):
        if not learn.model.training: return # batch norm is being computed
        y,moms = flat(learn),[h['mom'] for h in learn.opt.hypers]
        learn.opt.eval()
        zs = [learn.opt.state[p].get('z', p.detach()).flatten() for pg in learn.opt.param_lists for p in pg]
        close(y, (1-moms[0])*torch.cat(zs) + moms[0]*flat(learn))
        learn.opt.train()
        seen.append(moms[0])
    get_learner(cbs=[At('before_batch', check, order=100)]).fit_one_cycle(2, .05)
    assert len(set(seen)) == 10

def test_a_slice_as_lr():
    ps = [[nn.Parameter(torch.ones(2))], [nn.Parameter(torch.ones(3))]]
    assert [h['lr'] for h in RAdamScheduleFree(ps, lr=slice(.1)).hypers] == [.01, .1]

# ---- at x wherever weights are read

ERROR = RuntimeError('out of memory')

class Stop(Callback):
    "Ends the training in the middle of an epoch"
    def __init__(self, error, at=7): self.error,self.at = error,at
    def after_step(self):
        if self.train_iter == self.at: raise self.error

def at_x(learn):
    "Whether the weights are x: as they are after `eval`, and not after `train`"
    assert not learn.opt.opt.param_groups[0]['train_mode']
    now = flat(learn)
    learn.opt.train()
    moved = (flat(learn) != now).any()
    learn.opt.eval()
    close(flat(learn), now)
    return bool(moved)

@pytest.mark.parametrize('error', [KeyboardInterrupt, CancelFitException, ERROR], ids=['Ctrl-C', 'cancelled', 'error'])
@pytest.mark.parametrize('where', ['Learner', 'fit'])
def test_however_training_ends(error, where):
    cb = Stop(error)
    learn = learner_of(partial(RAdamScheduleFree, **HYPERS), cbs=ScheduleFree() if where == 'Learner' else None)
    try: learn.fit(3, .05, cbs=[cb, *[ScheduleFree()]*(where == 'fit')])
    except (KeyboardInterrupt, RuntimeError): pass
    loop = Loop(.05).epoch()
    loop.opt.train()
    for x,y in list(loop.dls.train)[:3]:
        loop.opt.zero_grad()
        mse(loop.model(x), y).backward()
        loop.opt.step()
    loop.opt.eval()
    close(flat(learn), loop.flat())
    assert at_x(learn)
    learn.remove_cb(ScheduleFree)
    assert '_do_epoch_train' not in vars(learn)

def test_validate_and_predict_at_x():
    seen = Weights()
    learn = get_learner()
    learn.fit(2, .05)
    x = flat(learn)
    learn.validate(cbs=seen), learn.get_preds(cbs=seen)
    close(seen.xs, [x, x], 0)
    assert at_x(learn)

def test_save_in_the_middle_of_an_epoch(tmp_path):
    "What is saved is x, and training goes on from y"
    learn = get_learner(cbs=[At('after_step', lambda l: l.save('now'), {6})], path=tmp_path)
    learn.fit(2, .05)
    loop = Loop(.05)
    for _ in range(2): loop.epoch()
    close(flat(learn), loop.flat())
    sd = torch.load(tmp_path/'models/now.pth', weights_only=True)
    other = get_learner(path=tmp_path).load('now')
    assert not sd['opt']['param_groups'][0]['train_mode'] and at_x(other)

@pytest.mark.parametrize('load', [Learner.load, load_strict])
def test_resume(load, tmp_path):
    whole,half = get_learner(),get_learner(path=tmp_path)
    whole.fit(4, .05)
    half.fit(2, .05)
    half.save('half')
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*optimizer state')
        rest = load(get_learner(path=tmp_path), 'half')
    rest.fit(2, .05)
    close(flat(rest), flat(whole))

@pytest.mark.parametrize('train', [False, True], ids=['saved at x', 'saved at y'])
def test_goes_on_from_the_library(train):
    "A checkpoint of the library's loop (in groups as here), in either mode"
    learn,loop = get_learner(wd_bn_bias=True),Loop(.05, wd=0.)
    loop.opt = schedulefree.RAdamScheduleFree([dict(params=list(g)) for g in halves(loop.model)], lr=.05, betas=(.8, .9), weight_decay=.1)
    loop.epoch().epoch() # after one, x is still z
    if train: loop.opt.train()
    learn.create_opt()
    learn.model.load_state_dict(loop.model.state_dict())
    learn.opt.load_state_dict(loop.opt.state_dict())
    assert learn.opt.opt.param_groups[0]['train_mode'] == train
    learn.fit(1, .05, wd=.1)
    close(flat(learn), loop.epoch().flat())

def test_loaded_states_are_copies():
    a,b = get_learner(),get_learner()
    a.fit(2, .05)
    b.create_opt()
    b.opt.load_state_dict(a.opt.state_dict())
    before = deepcopy(a.opt.state_dict())
    b.fit(1, .05)
    for s,t in zip(before['state'].values(), a.opt.state_dict()['state'].values()): assert torch.equal(s['z'], t['z'])

def test_flags_survive_loading_and_freezing():
    learn = get_learner()
    learn.create_opt()
    flags = lambda: [{k: s.get(k) for k in ('do_wd', 'force_train')}
                     for s in (learn.opt.state[p] for pg in learn.opt.param_lists for p in pg)]
    own = flags()
    learn.opt.load_state_dict(library_state(learn))
    assert flags() == own and any(f['do_wd'] is False for f in own)
    learn.fit(2, .05)
    x = flat(learn)
    learn.opt.train()
    learn.freeze()
    group = learn.opt.opt.param_groups[0]
    assert flags() == own and (group['k'], group['weight_sum'], group['lr_max']) == (0, 0., -1.)
    close(flat(learn), x)

def library_state(learn):
    "A state without fastai's flags"
    return schedulefree.RAdamScheduleFree([dict(params=list(pg)) for pg in learn.opt.param_lists]).state_dict()

@pytest.mark.parametrize('n_epoch', [0, 2], ids=['untrained', 'trained'])
def test_lr_find_leaves_no_trace(n_epoch, tmp_path):
    a,b = get_learner(path=tmp_path),get_learner()
    for learn in (a, b): learn.fit(n_epoch, .05)
    a.lr_find(num_it=10, show_plot=False)
    assert all_equal(list(a.model.state_dict().values()), list(b.model.state_dict().values()))
    for learn in (a, b): learn.fit(2, .05)
    assert_same(a, b)

def test_save_model_callback(tmp_path):
    "Its best epoch, loaded without the optimizer at the end of the fit, is x of that epoch"
    learn,loop = get_learner(path=tmp_path),Loop(.05)
    learn.fit(3, .05, cbs=SaveModelCallback(every_epoch=True))
    saved = torch.load(tmp_path/'models/model_1.pth', weights_only=True)
    loop.epoch().epoch()
    close(torch.cat([saved[n].flatten() for n,_ in learn.model.named_parameters()]), loop.flat())

def test_export(tmp_path):
    learn = get_learner(path=tmp_path)
    learn.fit(2, .05)
    x,preds = flat(learn),learn.get_preds()[0]
    learn.export()
    close(flat(learn), x, 0)
    assert at_x(learn)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'export.pkl')
    close(again.get_preds(dl=learn.dls.valid)[0], preds)

def test_mixed_precision_skips():
    "A step that a gradient scaler skips is no step"
    def skip(l): raise CancelStepException
    learn = get_learner(cbs=[At('before_step', skip, {0, 6})])
    learn.fit(2, .05)
    assert learn.opt.opt.param_groups[0]['k'] == 8 and at_x(learn)

def test_bfloat16_equals_the_librarys_loop():
    "Under autocast the weights stay in single precision, at y and at x"
    seen,loop,learn = Weights(),Loop(.05, dtype=torch.float32),get_learner(dtype=torch.float32)
    learn.fit(3, .05, wd=.1, cbs=[seen, DevicePrecision(AMPMode.BF16)])
    for _ in range(3): loop.epoch(partial(torch.autocast, 'cpu', torch.bfloat16))
    close(seen.ys, loop.ys, 1e-5)
    close(seen.xs, loop.xs, 1e-5)

# ---- batch norm

def is_of_x(learn):
    "Whether batch norm's statistics are the mean over the training batches at the weights as they are"
    conv,norm = learn.model[0][:2]
    with torch.no_grad(): acts = [conv(x) for x,_ in learn.dls.train]
    close(norm.running_mean, torch.stack([a.mean((0,2,3)) for a in acts]).mean(0))
    close(norm.running_var, torch.stack([a.var((0,2,3)) for a in acts]).mean(0))
    return norm.momentum == .1

def test_batch_norm_is_of_x():
    learn = get_learner()
    learn.fit(2, .05)
    assert is_of_x(learn)

@pytest.mark.parametrize('error,evaluate', [
    (KeyboardInterrupt, Learner.validate), (KeyboardInterrupt, Learner.get_preds), (CancelFitException, lambda learn: None)],
    ids=['Ctrl-C, validate', 'Ctrl-C, get_preds', 'cancelled'])
def test_batch_norm_after_an_interruption(error, evaluate):
    learn = get_learner(cbs=[Stop(error)])
    try: learn.fit(3, .05)
    except KeyboardInterrupt: pass
    evaluate(learn)
    assert is_of_x(learn)

def test_dropout_rests_while_batch_norm_is_computed():
    "Even after a fit that was cancelled, which leaves the model in training mode"
    learn = get_learner(cbs=[Stop(CancelFitException)])
    learn.model[0].insert(1, nn.Dropout(.5))
    learn.fit(3, .05)
    conv,_,norm = learn.model[0][:3]
    with torch.no_grad(): acts = [conv(x) for x,_ in learn.dls.train]
    close(norm.running_var, torch.stack([a.var((0,2,3)) for a in acts]).mean(0))

def stats(learn): return [b.clone() for b in learn.model[0][1].buffers()]

def test_calibration_sees_what_callbacks_make_of_a_batch():
    "As fastai's `before_batch_cb` makes callbacks; one may leave a batch out"
    class Prepare(Callback):
        def before_batch(self):
            if self.training and self.xb[0][0,0,0,0] > 0: raise CancelBatchException
            self.learn.xb = (self.xb[0]*10 + 50,)
    learn = get_learner(cbs=[Prepare()])
    learn.fit(2, .05)
    conv,norm = learn.model[0][:2]
    with torch.no_grad(): acts = [conv(x*10 + 50) for x,_ in learn.dls.train if x[0,0,0,0] <= 0]
    close(norm.running_mean, torch.stack([a.mean((0,2,3)) for a in acts]).mean(0))
    assert not learn.training

@pytest.mark.parametrize('n', [0, 1], ids=['no batch', 'a batch of NaN'])
def test_a_calibration_without_result_changes_nothing(n):
    learn = get_learner()
    learn.fit(1, .05)
    before,model = stats(learn),learn.model.train()
    x = next(iter(learn.dls.train))[0]
    schedule_free._recalibrate(model, [model[0][1]], [(torch.full_like(x, math.nan),)]*n)
    assert identical(stats(learn), before) and model.training and model[0][1].momentum == .1

def test_a_stop_at_nan_leaves_sound_statistics():
    "The batch that stopped the fit is a training batch, too"
    class Spoil(Callback):
        order = 60
        def before_batch(self): self.learn.xb = (self.xb[0]*math.nan,)
    learn = get_learner(cbs=[StopOnNonFinite()])
    learn.fit(1, .05)
    with pytest.warns(UserWarning): learn.fit(1, .05, cbs=Spoil())
    assert learn.stop_on_non_finite.stopped and all(b.isfinite().all() for b in stats(learn))

def test_an_interrupted_calibration_is_repeated():
    learn = get_learner()
    batches = learn.schedule_free._batches
    def interrupted():
        yield next(batches())
        raise KeyboardInterrupt
    learn.schedule_free._batches = interrupted
    with pytest.raises(KeyboardInterrupt): learn.fit(2, .05)
    assert learn.model[0][1].momentum == .1
    learn.schedule_free._batches = batches
    learn.validate()
    assert is_of_x(learn)

def test_recalibration_changes_nothing_else():
    "No random number moves on: shuffled batches and dropout are the same with and without"
    def go(bn_batches):
        torch.manual_seed(0)
        model = get_model()
        model[1].insert(0, nn.Dropout(.5))
        learn = get_learner(bn_batches=bn_batches, model=model)
        learn.dls.train.shuffle = True
        learn.dls.train.rng.seed(1)
        torch.manual_seed(1)
        learn.fit(3, .05)
        return flat(learn)
    close(go(0), go(50), 0)

def test_a_callback_that_limits_the_batches():
    "Limits the calibration, too"
    class Limit(Callback):
        def before_batch(self):
            if self.training and self.iter >= 2: raise CancelTrainException
    learn = get_learner(cbs=[Limit()])
    learn.fit(2, .05)
    conv,norm = learn.model[0][:2]
    with torch.no_grad(): acts = [conv(x) for x,_ in list(learn.dls.train)[:2]]
    close(norm.running_mean, torch.stack([a.mean((0,2,3)) for a in acts]).mean(0))
    assert len(learn.recorder.values) == 2 and learn.iter == 0 # of the validation

def test_calibration_leaves_no_hooks():
    learn = get_learner(cbs=[ActivationStats(every=2)])
    learn.fit(2, .05)
    assert not any(m._forward_hooks for m in learn.model.modules())

def test_calibration_inputs_are_no_ones_predictions():
    learn = get_learner()
    with pytest.raises(KeyboardInterrupt): learn.fit(2, .05, cbs=Stop(KeyboardInterrupt(), 2))
    items = learn.dls.train_ds[8:]
    xs,preds,_ = learn.get_preds(dl=learn.dls.valid.new(items), with_input=True)
    assert len(preds) == 12 and torch.equal(xs, torch.stack([x for x,_ in items]))

@pytest.mark.parametrize('wrapped', [False, True])
def test_calibration_draws_no_batches_of_pytorchs(wrapped):
    "With a generator of its own, also where another DataLoader wraps it"
    def go(bn_batches):
        learn = get_learner(bn_batches=bn_batches)
        class Wrapper:
            def __init__(self, dl): self.dl,self.dataset,self.device = dl,dl.dataset,None
            def __iter__(self): return iter(self.dl)
            def __len__(self): return len(self.dl)
        dl = torch.utils.data.DataLoader(learn.dls.train_ds, 4, shuffle=True, generator=torch.Generator().manual_seed(0))
        learn.dls = DataLoaders(Wrapper(dl) if wrapped else dl, learn.dls.valid)
        learn.fit(3, .05)
        return flat(learn)
    close(go(0), go(50), 0)

def test_a_compiled_model_is_compiled_for_training_and_validation_alone():
    graphs = []
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch._dynamo.reset()
    learn,eager = get_learner(),get_learner()
    learn.model.compile(backend=backend)
    for l in (learn, eager): l.fit(2, .05)
    assert len(graphs) == 2 and identical(stats(learn), stats(eager))

def test_frozen_norms_keep_their_statistics():
    class Frozen(Callback):
        def before_train(self): self.model[0][1].eval()
    learn = get_learner(cbs=[Frozen()])
    learn.fit(2, .05)
    assert (learn.model[0][1].running_mean == 0).all()

# ---- said at once

def test_without_the_callback():
    with pytest.raises(RuntimeError, match=r'cbs=ScheduleFree\(\)'): learner_of(RAdamScheduleFreeFn).fit(1)

def test_with_another_optimizer():
    with pytest.raises(TypeError, match="this Learner's optimizer is RAdam"): get_learner(RAdamFn).fit(1)
    with pytest.raises(TypeError, match='for betas use mom and sqr_mom'): RAdamScheduleFreeFn([torch.ones(1)], lr=.1, betas=(.9, .99))

def test_without_the_package(monkeypatch):
    monkeypatch.setattr('radam_fastai.schedule_free.find_spec', lambda _: None)
    with pytest.raises(ImportError, match=r"pip install 'radam_fastai\[schedulefree\]'"): get_learner().fit(1)

@pytest.mark.parametrize('kw,match', [(dict(mom=0.), 'above 0'), (dict(mom=1.), 'mom .* got 1.0'), (dict(sqr_mom=1.), 'sqr_mom'),
                                      (dict(lr=-1.), 'lr'),
                                      (dict(eps=-1.), 'eps'), (dict(wd=-1.), 'wd')], ids=str)
def test_hypers_out_of_range(kw, match):
    ps = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=match): RAdamScheduleFree(ps, **{'lr': .1, **kw})
    opt = RAdamScheduleFree(ps, lr=.1)
    opt.train()
    k,v = *kw,*kw.values()
    opt.hypers[0][k] = v
    with pytest.raises(ValueError, match=match): opt.step()

@pytest.mark.parametrize('change,match', [
    (lambda sd: {'hypers': []}, 'not the state of a PyTorch optimizer'),
    (lambda sd: torch.optim.RAdam([nn.Parameter(torch.ones(2))]).state_dict(), 'have no k, '),
    (lambda sd: {**sd, 'param_groups': sd['param_groups']*2}, r'\[1, 1\] parameters, .* \[1\]'),
    (lambda sd: {**sd, 'state': {0: dict(z=torch.ones(3))}}, r'z of parameter 0 has shape \(3,\)')],
    ids=['fastai', 'torch', 'groups', 'shape'])
def test_states_that_do_not_fit(change, match):
    opt = RAdamScheduleFree([nn.Parameter(torch.ones(2))], lr=.1)
    before = deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=match): opt.load_state_dict(change(deepcopy(before)))
    assert opt.state_dict() == before
