"RAdam, Ranger and RAdamWrapper in real Learners: beside fastai's optimizers on the same batches, uninterrupted runs and sums done by hand"
import math
from copy import deepcopy
from functools import partial

import fastai.optimizer as stock
import pytest
import torch
from fastai.basics import Callback, CancelStepException, L, OptimWrapper, load_learner, trainable_params
from fastai.callback.all import (
    AMPMode,
    ChannelsLast,
    GradientAccumulation,
    GradientClip,
    ParamScheduler,
    ReduceLROnPlateau,
    SaveModelCallback,
    SchedLin,
    TerminateOnNaNCallback,
    combined_cos,
)

from helpers import (
    At,
    CPUMixedPrecision,
    all_equal,
    assert_close,
    assert_same,
    flat,
    get_dls,
    get_learner,
    get_model,
    halves,
    hypers,
    no_warnings,
    overflow,
    steps,
    train_both,
    weights,
)
from radam_fastai import torch_optim
from radam_fastai.optimizer import RAdam, RAdamFn, Ranger, RangerFn
from radam_fastai.torch_optim import RAdamWrapper

# --- the contestants

def eps_first_step(p, step, sqr_mom, eps, **kwargs):
    "fastai's step with `eps` where PyTorch has it, before debiasing"
    return stock.radam_step(p, step=step, sqr_mom=sqr_mom, eps=eps/math.sqrt(1-sqr_mom**step), **{**kwargs, 'beta': 0.})

def torch_like(params, lr, mom=.9, sqr_mom=.99, eps=1e-5, wd=0., decouple_wd=True):
    "`torch.optim.RAdam` from fastai's steps, which know `do_wd`"
    cbs = [stock.weight_decay if decouple_wd else stock.l2_reg, partial(stock.average_grad, dampening=True), stock.average_sqr_grad,
           stock.step_stat, eps_first_step]
    return stock.Optimizer(params, cbs, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)

def wrapper(params, lr, mom=.9, sqr_mom=.99, eps=1e-5, wd=0., decouple_wd=True):
    "`RAdamWrapper` with fastai's defaults under fastai's names"
    return RAdamWrapper(params, lr=lr, betas=(mom, sqr_mom), eps=eps, weight_decay=wd, decoupled_weight_decay=decouple_wd)

PAIRS = {'RAdam': (RAdam, stock.RAdam), 'Ranger': (Ranger, stock.ranger), 'RAdamWrapper': (wrapper, torch_like)}

@pytest.fixture(params=PAIRS)
def pair(request):
    "An optimizer of ours, and fastai's"
    return PAIRS[request.param]

@pytest.fixture
def ours(pair): return pair[0]

# --- what a run goes through

def no_gradient(pred, y): return (pred*0).sum().float()

class History(Callback):
    "Parameters, highest step count and gradients after every training batch"
    order = 100
    def before_fit(self): self.weights,self.steps,self.grads = [weights(self.learn)],[max(steps(self.learn))],[]
    def after_batch(self):
        if not self.training: return
        self.weights.append(weights(self.learn))
        self.steps.append(max(steps(self.learn)))
        self.grads.append([p.grad for p in self.model.parameters()])

def get_history(opt_func, *cbs, n_epoch=3, **kwargs):
    "`History` of a fit with `cbs`"
    h = History()
    get_learner(opt_func, **kwargs).fit(n_epoch, .02, wd=.1, cbs=[*cbs, h])
    return h

# --- the same numbers

@pytest.mark.parametrize('cls', [torch.optim.RAdam, torch_optim.RAdam])
def test_reference_is_torch_radam(cls):
    "And so is the torch class in fastai's own wrapper"
    torchs = partial(OptimWrapper, opt=cls, betas=(.9,.99), eps=1e-5, decoupled_weight_decay=True)
    a,b = (get_learner(o, wd_bn_bias=True) for o in (torchs, torch_like))
    for learn in (a, b): learn.fit(4, 1e-2, wd=.1)
    torch.testing.assert_close(flat(a), flat(b), rtol=1e-9, atol=1e-11)

@pytest.mark.many
@pytest.mark.parametrize('decouple_wd', [True, False])
@pytest.mark.parametrize('wd_bn_bias', [True, False])
def test_equals_fastai(pair, decouple_wd, wd_bn_bias):
    pair = [partial(o, decouple_wd=decouple_wd) for o in pair]
    train_both(pair, lambda learn: learn.fit(4, 1e-2, wd=.1), wd_bn_bias=wd_bn_bias)

@pytest.mark.many
@pytest.mark.parametrize('ours, theirs', [
    (RAdam, stock.RAdam), (Ranger, stock.ranger), (RAdamWrapper, partial(torch_like, sqr_mom=.999, eps=1e-8, decouple_wd=False)),
    (partial(RAdam, mom=.95), partial(stock.RAdam, mom=.95)), (partial(RAdam, lr=.02, beta=50), partial(stock.RAdam, lr=.02, beta=50)),
    (partial(Ranger, k=3, alpha=.8), partial(stock.ranger, k=3, alpha=.8)),
    (RAdamFn, partial(stock.RAdam, sqr_mom=.99, eps=1e-6, wd=1e-2)),
    (partial(RAdamFn, mom=.8), partial(stock.RAdam, sqr_mom=.99, eps=1e-6, wd=1e-2, mom=.8)),
    (RangerFn, partial(stock.ranger, mom=.95, sqr_mom=.99, eps=1e-6, wd=1e-2))])
@pytest.mark.parametrize('splitter', [trainable_params, halves])
def test_ways_to_say_opt_func(ours, theirs, splitter):
    train_both((ours, theirs), lambda learn: learn.fit(3), splitter=splitter)

@pytest.mark.parametrize('dtype, rtol', [(torch.float32, 1e-4), (torch.bfloat16, .1)])
def test_equals_fastai_in_lower_precision(pair, dtype, rtol):
    learn,_ = train_both(pair, lambda learn: learn.fit(4, 1e-2), rtol=rtol, dtype=dtype)
    assert {p.dtype for p in weights(learn)} == {dtype}
    losses = [v[0] for v in learn.recorder.values]
    assert losses[-1] < losses[0]

@pytest.mark.parametrize('before', [0, 2])
def test_channels_last(pair, before):
    "From the start, or with averages that are laid out in the old way"
    def train(learn):
        learn.fit(before, 1e-2)
        learn.add_cb(ChannelsLast)
        learn.fit(3, 1e-2)
    learn,_ = train_both(pair, train)
    assert learn.model[0][0].weight.is_contiguous(memory_format=torch.channels_last)

# --- schedules and hyper-parameters

SCHEDULES = {
    'one_cycle': lambda learn: learn.fit_one_cycle(4, .02),
    'one_cycle_slice': lambda learn: learn.fit_one_cycle(4, slice(.001, .02), moms=(.9,.5,.99), wd=.1),
    'flat_cos': lambda learn: learn.fit_flat_cos(4, .02),
    'sgdr': lambda learn: learn.fit_sgdr(2, 1, .02),
    'fine_tune': lambda learn: learn.fine_tune(3, .02)}

@pytest.mark.many
@pytest.mark.parametrize('schedule', SCHEDULES)
def test_schedule_equals_fastai(pair, schedule):
    train_both(pair, SCHEDULES[schedule])

def test_one_cycle_schedules_momentum(ours):
    "The update must use the momentum of its own step: a run with other momenta ends elsewhere"
    a,b = (get_learner(ours) for _ in range(2))
    a.fit_one_cycle(3, .02, moms=(.95,.5,.95))
    b.fit_one_cycle(3, .02, moms=(.95,.95,.95))
    assert min(a.recorder.hps['mom']) == pytest.approx(.5, abs=.05)
    assert (flat(a)-flat(b)).abs().max() > 1e-3

@pytest.mark.many
@pytest.mark.parametrize('name, start, end', [('lr',.001,.05), ('mom',.5,.99), ('sqr_mom',.999,.8), ('eps',1e-8,1.), ('wd',0.,2.)])
def test_any_hyper_can_be_scheduled(pair, name, start, end):
    learn,_ = train_both(pair, lambda learn: learn.fit(4, .02, cbs=ParamScheduler({name: SchedLin(start, end)})))
    plain = get_learner(pair[0])
    plain.fit(4, .02)
    assert (flat(learn)-flat(plain)).abs().max() > 1e-3

@pytest.mark.parametrize('lr', [slice(.001, .02), slice(.02), [.003, .03]])
def test_discriminative_lrs(pair, lr):
    train_both(pair, lambda learn: learn.fit(3, lr))

@pytest.mark.parametrize('lr, expected', [(slice(.001, .1), [.001, .1]), (slice(.1), [.01, .1])])
def test_slice_as_constructor_lr(pair, lr, expected):
    learn,_ = train_both(pair, lambda learn: learn.fit(3), lr=lr)
    assert [h['lr'] for h in learn.opt.hypers] == pytest.approx(expected)
    learn.create_opt()
    assert [h['lr'] for h in learn.opt.hypers] == pytest.approx(expected)

GROUP_HYPERS = {'lr': [.001,.02], 'mom': [.5,.95], 'sqr_mom': [.999,.9], 'eps': [1.,1e-6], 'wd': [2.,0.]}
def by_set_hyper(learn, k, vs): learn.opt.set_hyper(k, vs)
def by_hypers(learn, k, vs):
    for h,v in zip(learn.opt.hypers, vs): h[k] = v
def by_param_groups(learn, k, vs): learn.opt.param_groups = [{**pg, k: v} for pg,v in zip(learn.opt.param_groups, vs)]

@pytest.mark.many
@pytest.mark.parametrize('name', GROUP_HYPERS)
@pytest.mark.parametrize('write', [by_hypers, by_param_groups])
def test_hyper_of_a_group_written_during_training(pair, write, name):
    "Read back as written, and the steps after it are fastai's after `set_hyper`"
    def train(learn, write):
        learn.fit(3, .02, cbs=At('before_batch', lambda learn: write(learn, name, GROUP_HYPERS[name]), batches=[7]))
    a,b,plain = get_learner(pair[0]),get_learner(pair[1]),get_learner(pair[0])
    train(a, write)
    train(b, by_set_hyper)
    plain.fit(3, .02)
    assert [h[name] for h in a.opt.hypers] == [pg[name] for pg in a.opt.param_groups] == GROUP_HYPERS[name]
    assert_close(a, b)
    for n in (slice(0,3), slice(3,5)): # either group has been told something new
        if GROUP_HYPERS[name][n.start > 0] != hypers(plain)[0][name]: assert not all_equal(weights(a)[n], weights(plain)[n])

def test_param_groups_are_the_parameters_and_hypers(ours):
    learn = get_learner(ours)
    learn.create_opt()
    groups = learn.opt.param_groups
    assert [[id(p) for p in pg['params']] for pg in groups] == [[id(p) for p in pg] for pg in halves(learn.model)]
    assert all({'lr','mom','sqr_mom','eps','wd'} <= set(pg) for pg in groups)

def test_lr_of_zero_written_in_hypers_stops_a_group(ours):
    learn = get_learner(ours)
    learn.create_opt()
    before = weights(learn)
    def stop(learn): learn.opt.hypers[0]['lr'] = 0.
    learn.fit(3, .02, wd=.1, cbs=At('before_batch', stop))
    assert all_equal(weights(learn)[:3], before[:3])
    assert not any(map(torch.equal, weights(learn)[3:], before[3:]))

def test_reduce_lr_on_plateau(pair):
    "Without improvement after the first epoch, each further one divides the rate by 10, and the updates shrink with it"
    plateau = lambda: ReduceLROnPlateau(min_delta=1e9)
    learn,_ = train_both(pair, lambda learn: learn.fit(4, .02, cbs=plateau()))
    assert [h['lr'] for h in learn.opt.hypers] == pytest.approx([.02/1000]*2)
    w = get_history(pair[0], plateau(), n_epoch=4).weights
    def moved(epoch): return max((a-b).abs().max() for a,b in zip(w[5*epoch], w[5*epoch-5]))
    assert moved(4) < moved(2)/10

# --- which parameters decay, and which train

def hand_decay(opt_func, p, n, f, k=6, alpha=.5):
    "`p` after `n` steps that multiply by `f`, under Lookahead if `opt_func` is Ranger"
    fast,slow = p.clone(),p.clone()
    for i in range(1, n+1):
        fast = fast*f
        if opt_func is Ranger and i%k == 0: fast = slow = slow + alpha*(fast-slow)
    return fast

@pytest.mark.parametrize('wd_bn_bias', [False, True])
def test_decay_by_hand(ours, wd_bn_bias):
    "Without gradients a weight shrinks by (1-lr*wd)^n; norms and biases stay to the last bit unless they are to decay"
    learn = get_learner(ours, loss_func=no_gradient, wd_bn_bias=wd_bn_bias)
    before = weights(learn)
    learn.fit(3, .1, wd=.1)
    assert steps(learn) == [15]*5
    for i,(name,_) in enumerate(learn.model.named_parameters()):
        if wd_bn_bias or name in ('0.0.weight', '1.1.weight'):
            torch.testing.assert_close(weights(learn)[i], hand_decay(ours, before[i], 15, 1-.1*.1), rtol=1e-12, atol=0)
        else: assert torch.equal(weights(learn)[i], before[i]), name

def test_l2_leaves_norms_and_biases_alone(ours):
    learn = get_learner(partial(ours, decouple_wd=False), loss_func=no_gradient)
    before = weights(learn)
    learn.fit(3, .1, wd=.1)
    assert [torch.equal(a, b) for a,b in zip(weights(learn), before)] == [False, True, True, False, True]

def test_built_wrapper_knows_do_wd():
    "`opt_func` may be a wrapper that already exists; a reset keeps its parameters and forgets the rest"
    def learner(opt_func):
        learn = get_learner(opt_func)
        if opt_func is wrapper:
            groups = [{'params': list(pg)} for pg in halves(learn.model)]
            learn.opt_func = RAdamWrapper(opt=torch_optim.RAdam(groups, betas=(.9,.99), eps=1e-5, decoupled_weight_decay=True))
        return learn
    a,b = learner(wrapper),learner(torch_like)
    for learn in (a, b): learn.fit(3, .02, wd=.5)
    assert_close(a, b)
    for learn in (a, b): learn.fit(2, .02, wd=.5, reset_opt=True)
    assert_close(a, b)
    assert steps(a) == [10]*5

@pytest.mark.parametrize('train_bn', [True, False])
def test_frozen_body(pair, train_bn):
    "Of a frozen body the norms train if `train_bn`, and nothing else"
    def train(learn):
        learn.freeze()
        learn.fit(3, .02, wd=.1)
    learn,_ = train_both(pair, train, train_bn=train_bn)
    n = 15 if train_bn else 0
    assert steps(learn) == [0, n, n, 15, 15]
    assert [torch.equal(a, b) for a,b in zip(weights(learn),
                                             get_model().double().parameters())] == [True, not train_bn, not train_bn, False, False]

@pytest.mark.parametrize('whose', ['learn', 'opt'])
def test_frozen_mid_training_stays_put(ours, whose):
    "What has momentum stops at once when frozen, and does not decay; `learn.freeze` also clears the state, `opt.freeze` keeps it"
    learn = get_learner(ours, train_bn=False)
    learn.fit(2, .02, wd=.1)
    (learn if whose == 'learn' else learn.opt).freeze()
    before = weights(learn)
    learn.fit(2, .02, wd=.1)
    assert all_equal(weights(learn)[:3], before[:3])
    assert not any(map(torch.equal, weights(learn)[3:], before[3:]))
    assert steps(learn) == ([0, 0, 0, 10, 10] if whose == 'learn' else [10, 10, 10, 20, 20])

def release(learn):
    for p in learn.model.parameters(): p.grad = None

@pytest.mark.many
@pytest.mark.parametrize('train_bn', [True, False])
@pytest.mark.parametrize('whose', ['learn', 'opt'])
def test_freeze_and_unfreeze_mid_training(pair, whose, train_bn):
    "fastai's numbers, if its gradients are released after each step as ours are; under `opt.freeze` the step counts drift apart"
    def train(learn):
        learn.add_cb(At('after_batch', release))
        learn.fit(6, .01, wd=.1)
        freezer = learn if whose == 'learn' else learn.opt
        freezer.freeze()
        learn.fit(2, .01, wd=.1)
        freezer.unfreeze()
        learn.fit_one_cycle(2, slice(.001, .01), wd=.1)
    learn,_ = train_both(pair, train, train_bn=train_bn)
    if whose == 'learn': assert steps(learn) == [10]*5
    else: assert steps(learn) == ([40, 50, 50, 50, 50] if train_bn else [40, 40, 40, 50, 50])

def test_zero_grad_releases_gradients(ours):
    assert get_history(ours, n_epoch=2).grads == [[None]*5]*10

# --- steps that are not taken

def test_gradient_accumulation(pair):
    learn,_ = train_both(pair, lambda learn: learn.fit(4, .02, cbs=GradientAccumulation(8)))
    assert steps(learn) == [10]*5 # of 20 batches of 4

def test_gradient_clip(pair):
    learn,_ = train_both(pair, lambda learn: learn.fit(3, .02, cbs=GradientClip(.001)))
    plain = get_learner(pair[0])
    plain.fit(3, .02)
    assert (flat(learn)-flat(plain)).abs().max() > 1e-3

def assert_skipped(h, skipped):
    "Batches numbered in `skipped` moved neither parameters nor step count, the others both"
    for i,(a,b) in enumerate(zip(h.weights, h.weights[1:])):
        assert h.steps[i+1]-h.steps[i] == (i not in skipped)
        assert all_equal(a, b) == (i in skipped)

def cancel_step(learn): raise CancelStepException()

def test_cancelled_step_is_not_a_step(pair):
    skipped = [2, 6, 7]
    learn,_ = train_both(pair, lambda learn: learn.fit(3, .02, wd=.1, cbs=At('before_step', cancel_step, skipped)))
    assert steps(learn) == [12]*5
    assert_skipped(get_history(pair[0], At('before_step', cancel_step, skipped)), skipped)

@pytest.mark.many
@pytest.mark.parametrize('skipped', [[], [0], [2,6,7]])
def test_fp16_overflow_is_not_a_step(pair, skipped):
    cbs = lambda: [CPUMixedPrecision(), At('after_backward', overflow, skipped)]
    learn,_ = train_both(pair, lambda learn: learn.fit(3, .02, wd=.1, cbs=cbs()), rtol=.01, dtype=torch.float32)
    assert steps(learn) == [15-len(skipped)]*5
    assert_skipped(get_history(pair[0], *cbs(), dtype=torch.float32), skipped)

def test_bf16(pair):
    learn,_ = train_both(pair, lambda learn: learn.fit(3, .02, wd=.1, cbs=CPUMixedPrecision(AMPMode.BF16)), rtol=.02, dtype=torch.float32)
    assert {p.dtype for p in weights(learn)} == {torch.float32}
    plain = get_learner(pair[0], dtype=torch.float32)
    plain.fit(3, .02, wd=.1)
    assert not torch.equal(flat(learn), flat(plain)) # autocast was on

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('to', ['to_fp16', 'to_bf16'])
def test_mixed_precision_on_gpu(ours, to):
    learn = get_learner(ours, dtype=torch.float32)
    learn.dls.cuda()
    getattr(learn, to)()
    learn.fit_one_cycle(8, .02)
    losses = [v[0] for v in learn.recorder.values]
    assert losses[-1] < losses[0] and 30 <= steps(learn)[0] <= 40 and learn.model[1][1].weight.is_cuda

@pytest.mark.parametrize('ours', [RAdam, Ranger])
@pytest.mark.parametrize('fresh', [True, False])
def test_a_hyper_of_the_users_own(ours, fresh, tmp_path):
    "Is no reason to go on without the optimizer's state"
    a = get_learner(ours, path=tmp_path)
    a.create_opt()
    a.opt.set_hyper('mine', 3.)
    a.fit(2, .02)
    a.save('a')
    b = get_learner(ours, path=tmp_path) if fresh else a
    if not fresh: a.fit(1, .02)
    with no_warnings(): b.load('a')
    assert steps(b) == [10]*5 and [h['mine'] for h in b.opt.hypers] == [3.]*2

def spoil(learn): learn.loss = learn.loss_grad = learn.loss_grad*math.nan

def test_terminate_on_nan_then_load(pair, tmp_path):
    "A fit that ended in nan is undone by loading what was saved before, running averages and slow weights included"
    def train(learn, name):
        learn.fit(2, .02)
        learn.save(name)
        learn.fit(3, .02, cbs=[TerminateOnNaNCallback(), At('after_loss', spoil, [7])])
    a,b = (get_learner(o, path=tmp_path) for o in pair)
    train(a, 'good')
    train(b, 'theirs')
    assert steps(a) == steps(b) == [18]*5 and flat(a).isnan().all()
    a.load('good')
    a.fit(2, .02)
    uninterrupted = get_learner(pair[0])
    for _ in range(2): uninterrupted.fit(2, .02)
    assert_same(a, uninterrupted)

# --- starting again, and going on

@pytest.mark.many
@pytest.mark.parametrize('before', [0, 2])
def test_lr_find_leaves_no_trace(pair, tmp_path, before):
    "Whether it comes first or in the middle: the fit after it is, to the last bit, the fit without it"
    found,plain,theirs = get_learner(pair[0], path=tmp_path),get_learner(pair[0]),get_learner(pair[1], path=tmp_path)
    for learn in (found, plain, theirs):
        if before: learn.fit_one_cycle(before, .02)
    for learn in (found, theirs): learn.lr_find(num_it=13, show_plot=False, suggest_funcs=None, stop_div=False)
    assert found.recorder.lrs[-1] > 1 and len(found.recorder.lrs) >= 13
    assert steps(found) == [5*before]*5 and hypers(found) == hypers(theirs)
    assert all(p.grad is None for p in found.model.parameters())
    for learn in (found, plain): learn.fit(3, .02, wd=.1)
    assert_same(found, plain)

def test_reset_opt_starts_afresh(pair):
    "As a new Learner on the same model would"
    def train(learn):
        learn.fit_one_cycle(2, .02)
        learn.fit(2, .02, reset_opt=True)
    learn,_ = train_both(pair, train)
    assert steps(learn) == [10]*5
    again = get_learner(pair[0])
    again.fit_one_cycle(2, .02)
    new = get_learner(pair[0], again.model)
    new.fit(2, .02)
    assert_same(learn, new)

@pytest.mark.parametrize('warm', ['fit', 'fit_one_cycle'])
def test_save_and_load_go_on_as_if_never_stopped(ours, tmp_path, warm):
    "Into a new Learner, without a warning, to the last bit; hyper-parameters that a schedule left behind (NumPy's floats) included"
    def start(learn): getattr(learn, warm)(2, slice(.002, .02), wd=.1)
    def go_on(learn): learn.fit(2, slice(.002, .02), wd=.1)
    a,b,uninterrupted = (get_learner(ours, path=tmp_path) for _ in range(3))
    start(a)
    with no_warnings():
        a.save('run')
        b.load('run')
    assert_same(a, b)
    start(uninterrupted)
    for learn in (a, b, uninterrupted): go_on(learn)
    assert_same(a, uninterrupted)
    assert_same(b, uninterrupted)
    assert steps(b) == [20]*5

@pytest.mark.parametrize('opt_func', [RAdam, Ranger])
def test_file_needs_no_safe_globals(opt_func, tmp_path):
    "Plain PyTorch reads it under `weights_only`: a schedule's NumPy floats are saved as floats"
    learn = get_learner(opt_func, path=tmp_path)
    learn.fit_one_cycle(1, .02)
    with no_warnings(): sd = torch.load(learn.save('plain'), weights_only=True)
    assert {type(v) for h in sd['opt']['hypers'] for v in h.values()} == {float}

def test_load_of_a_frozen_run(ours, tmp_path):
    "Parameters that were never updated come without averages, even into a Learner that has some, and count their own steps later"
    a,b,uninterrupted = (get_learner(ours, path=tmp_path, train_bn=False) for _ in range(3))
    for learn in (a, uninterrupted):
        learn.create_opt()
        learn.opt.freeze()
        learn.fit(2, .02)
    b.fit_one_cycle(1, .01)
    with no_warnings():
        a.save('frozen')
        b.load('frozen')
    assert steps(b) == [0, 0, 0, 10, 10]
    uninterrupted.opt.unfreeze()
    for learn in (b, uninterrupted): learn.fit(2, .02)
    assert_same(b, uninterrupted)
    assert steps(b) == [10, 10, 10, 20, 20]

@pytest.mark.parametrize('fit', ['fit_one_cycle', 'fit_sgdr', 'flat_cos'])
def test_resume_at_an_epoch(ours, tmp_path, fit):
    "A checkpoint of every epoch, and `start_epoch`: the end is that of the uninterrupted run"
    def train(learn, **kwargs):
        if fit == 'fit_one_cycle': learn.fit_one_cycle(4, .02, **kwargs)
        elif fit == 'fit_sgdr': learn.fit_sgdr(2, 1, .02, **kwargs)
        else: # fastai's `fit_flat_cos` drops its `start_epoch`, so its schedule by hand
            cbs = L(kwargs.pop('cbs', None)) + ParamScheduler({'lr': combined_cos(.75, .02, .02, 2e-7)})
            learn.fit(4, .02, cbs=cbs, **kwargs)
    a,b = (get_learner(ours, path=tmp_path, wd=.1) for _ in range(2))
    train(a, cbs=SaveModelCallback(fname='epoch', every_epoch=True, with_opt=True))
    with no_warnings(): b.load('epoch_1')
    assert steps(b) == [10]*5
    train(b, start_epoch=2)
    assert_same(b, a)

def test_deepcopy_goes_on_by_itself(ours):
    a = get_learner(ours, wd=.1)
    a.fit_one_cycle(2, .02)
    b = deepcopy(a)
    assert_same(a, b)
    a.fit(2, .02)
    assert steps(b) == [10]*5
    b.fit(2, .02)
    assert_same(a, b)

@pytest.mark.parametrize('warm', ['fit', 'fit_one_cycle'])
def test_goes_on_from_fastai_checkpoint(pair, tmp_path, warm):
    a,b = (get_learner(o, path=tmp_path, wd=.1) for o in pair)
    getattr(b, warm)(2, slice(.002, .02))
    with no_warnings():
        b.save('stock')
        a.load('stock')
    assert_close(a, b)
    for learn in (a, b): learn.fit_one_cycle(2, slice(.002, .02))
    assert_close(a, b)
    assert steps(a) == [20]*5

@pytest.mark.parametrize('name', ['RAdam', 'Ranger'])
def test_fastai_goes_on_from_our_checkpoint(name, tmp_path):
    a,b = (get_learner(o, path=tmp_path, wd=.1) for o in PAIRS[name])
    a.fit_one_cycle(2, slice(.002, .02))
    a.save('ours')
    b.load('ours')
    for learn in (a, b): learn.fit_one_cycle(2, slice(.002, .02))
    assert_close(a, b)
    assert steps(b) == [20]*5

def test_checkpoint_of_another_model_changes_nothing(ours, tmp_path):
    "fastai turns the error into a warning; a run under way goes on with its own state"
    other = get_learner(ours, path=tmp_path)
    other.fit(1, .02)
    state = torch.load(other.save('other'), weights_only=True)
    a,b = (get_learner(ours, path=tmp_path, splitter=trainable_params) for _ in range(2))
    for learn in (a, b): learn.fit(2, .02)
    torch.save({'model': a.model.state_dict(), 'opt': state['opt']}, tmp_path/'models'/'other.pth')
    with pytest.warns(UserWarning, match='Could not load the optimizer state'): a.load('other')
    for learn in (a, b): learn.fit(2, .02)
    assert_same(a, b)

def test_export_goes_on(ours, tmp_path):
    "The exported Learner keeps its state"
    a,b = (get_learner(ours, path=tmp_path, wd=.1) for _ in range(2))
    for learn in (a, b): learn.fit_one_cycle(2, .02)
    a.export()
    for learn in (a, b): learn.fit(2, .02)
    assert_same(a, b)
    assert steps(a) == [20]*5

@pytest.mark.filterwarnings("ignore:load_learner")
@pytest.mark.parametrize('opt_func', [RAdam, RAdamFn, Ranger, RangerFn, wrapper, partial(RAdamWrapper, betas=(.9,.99))])
def test_load_learner_and_fit_again(opt_func, tmp_path):
    "The file brings model and opt_func but no state: as a new Learner on the same model would"
    a = get_learner(opt_func, path=tmp_path, wd=.1)
    a.fit(2, .02)
    a.export('learner.pkl')
    b,new = load_learner(tmp_path/'learner.pkl'),get_learner(opt_func, deepcopy(a.model), wd=.1)
    assert b.opt is None
    b.dls = get_dls(torch.float64)
    for learn in (b, new): learn.fit(2, .02)
    assert_same(b, new)
    assert steps(b) == [10]*5

# --- the rest of the house

@pytest.mark.slow
def test_compiled_model(pair):
    "Its parameters keep their flags, and end where fastai's end without compiling"
    torch._dynamo.reset()
    a = get_learner(pair[0], torch.compile(get_model(), backend='eager'), splitter=trainable_params)
    b = get_learner(pair[1], splitter=trainable_params)
    for learn in (a, b): learn.fit_one_cycle(3, .02, wd=.5)
    assert_close(a, b)

def test_summary(ours):
    learn = get_learner(ours)
    assert f'Optimizer used: {ours}' in str(learn.summary())
    learn.freeze()
    learn.fit(1, .01)
    text = str(learn.summary())
    assert 'frozen up to parameter group #1' in text and 'Total trainable params: 62' in text # a linear layer of 27x2+2 and a norm of 3+3

def test_model_without_trainable_parameters(ours):
    learn = get_learner(ours, splitter=trainable_params)
    learn.model.requires_grad_(False)
    with pytest.raises(ValueError, match='empty|no parameters'): learn.fit(1)
