"""What may differ on a GPU. Each test runs on the CPU, too, where that makes sense, so that it is known to work before it meets a GPU."""
import random
from contextlib import contextmanager, nullcontext
from functools import partial

import fastai.optimizer as fo
import pytest
import torch
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.test_utils import RegModel, synth_dbunch
from torch import nn

from helpers import plain_adam, plain_step, rel_err
from radam_fastai import functional
from radam_fastai.baselines import SGD, Adam
from radam_fastai.bench.step import profiled, waiter
from radam_fastai.bucket import Buckets, fastai_keys
from radam_fastai.optimizer import RAdam, Ranger
from radam_fastai.recipes import in_memory
from radam_fastai.recipes.in_memory import Window, cut_out
from radam_fastai.recorder import RectifierRecorder
from radam_fastai.torch_optim import RAdam as TorchRAdam, RAdamWrapper

on_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')]
def gpu_only(f): return on_gpu[0](on_gpu[1](f))

@pytest.fixture(params=['cpu', pytest.param('cuda', marks=on_gpu)])
def device(request): return request.param

SHAPES = [(5, 7), (7,), (4, 3, 3, 3), (), (64, 2), *[(9,)]*40] # more tensors than fit into one launch

def numbers(seed, dtype=torch.float64, device='cpu'):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype) for s in SHAPES]

def steps(opt, ps, ts):
    for t in ts:
        for p,g in zip(ps, numbers(t+1, ps[0].dtype, ps[0].device)): p.grad = g
        opt.step()

def trained(opt_func, device, dtype=torch.float32, n=30):
    "Parameters after `n` steps over seeded gradients"
    ps = [nn.Parameter(p) for p in numbers(0, dtype, device)]
    steps(opt_func(ps), ps, range(n))
    return ps

def whole(ps): return torch.cat([p.detach().cpu().double().reshape(-1) for p in ps])

def apart(a, b): return rel_err(whole(a), whole(b))

# ---- the same numbers as others, in all precisions

HYPERS = dict(lr=.01, mom=.9, sqr_mom=.99, eps=1e-5, wd=.01)
TORCH = dict(lr=.01, betas=(.9, .99), eps=1e-5, weight_decay=.01, decoupled_weight_decay=True)
OURS = {'RAdam': partial(RAdam, **HYPERS), 'RAdam, L2': partial(RAdam, **HYPERS, decouple_wd=False), 'Ranger': partial(Ranger, **HYPERS),
        'Adam': partial(Adam, **HYPERS), 'torch': partial(TorchRAdam, **TORCH), 'wrapper': partial(RAdamWrapper, **TORCH)}
THEIRS = {'RAdam': partial(fo.RAdam, **HYPERS), 'RAdam, L2': partial(fo.RAdam, **HYPERS, decouple_wd=False),
          'Ranger': partial(fo.ranger, **HYPERS),
          'Adam': partial(fo.Adam, **HYPERS), 'torch': partial(torch.optim.RAdam, **TORCH), 'wrapper': partial(torch.optim.RAdam, **TORCH)}
TOLS = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: .1, torch.float16: .02} # two implementations round at other places
in_all = pytest.mark.parametrize('dtype,tol', TOLS.items(), ids=[str(o)[6:] for o in TOLS])
each = pytest.mark.parametrize('name', OURS)

@pytest.mark.many
@in_all
@each
def test_same_as_stock(name, dtype, tol, device):
    "In float16, with an eps that hides what vanishes there (the next test but one)"
    eps = {'eps': 1e-3} if dtype == torch.float16 else {}
    assert apart(trained(partial(OURS[name], **eps), device, dtype), trained(partial(THEIRS[name], **eps), device, dtype)) < tol

@in_all
@pytest.mark.parametrize('name', ['RAdam', 'RAdam, L2', 'torch'])
def test_same_as_the_float64_loop(name, dtype, tol, device):
    "From the rounded start and over the rounded gradients, every other number in float64 on the CPU"
    ps,states = [p.double() for p in numbers(0, dtype)],[{} for _ in SHAPES]
    settings = HYPERS | dict(decouple_wd='L2' not in name, eps_debiased=name != 'torch')
    for t in range(30): ps = [plain_step(p, g.double(), s, **settings) for p,g,s in zip(ps, numbers(t+1, dtype), states)]
    assert apart(trained(OURS[name], device, dtype), ps) < tol

def test_squares_that_vanish_in_float16(device):
    """The first gradient of one weight is -.00156: (1-β2)g² is 2.4e-8, and float16 rounds that to 0. fastai's Adam then divides by eps
    alone: its first step is 150 times too long. The fused kernel rounds only what it stores, and its step is that of float64."""
    ps,states = [p.double() for p in numbers(0, torch.float16)],[{} for _ in SHAPES]
    ps = [plain_adam(p, g.double(), s, **HYPERS) for p,g,s in zip(ps, numbers(1, torch.float16), states)]
    assert min(s['v'].min() for s in states) < 2**-25
    ours,theirs = (trained(o['Adam'], device, torch.float16, n=1) for o in (OURS, THEIRS))
    assert apart(ours, ps) < .001 and apart(theirs, ps) > .1

@each
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_a_gpu_gives_the_numbers_of_the_cpu(name, dtype, device, monkeypatch):
    "On the CPU, what a device without the fused kernel gives"
    expected = trained(OURS[name], 'cpu', dtype)
    if device == 'cpu': monkeypatch.setattr(functional, 'has_fused_kernel', lambda device, dtype: False)
    assert apart(trained(OURS[name], device, dtype), expected) < TOLS[dtype]

@pytest.mark.parametrize('sqr_mom', [.999, .9999, .99999, 1-1e-7])
def test_beta2_near_1(sqr_mom, device):
    "The kernels of a GPU compute 1-β2^t in float32. Adaptive steps are small here, so what they move is looked at alone"
    def moved(device, dtype):
        ps = [nn.Parameter(torch.zeros_like(p)) for p in numbers(0, dtype, device)]
        opt = RAdam(ps, **HYPERS | dict(sqr_mom=sqr_mom))
        steps(opt, ps, range(6))
        before = whole(ps)
        steps(opt, ps, range(6, 30))
        return whole(ps)-before
    assert rel_err(moved(device, torch.float32), moved('cpu', torch.float64)) < 1e-3

def test_sgd_is_the_debiased_average(device):
    "θ ← θ - lr·m̂, in float64 by hand"
    ps,ms = numbers(0),[torch.zeros(s, dtype=torch.float64) for s in SHAPES]
    for t in range(1, 31):
        ms = [.9*m + .1*g for m,g in zip(ms, numbers(t))]
        ps = [p - .01*m/(1-.9**t) for p,m in zip(ps, ms)]
    assert apart(trained(partial(SGD, lr=.01), device, torch.float64), ps) < 1e-12

# ---- memory orders and places

@pytest.mark.parametrize('grads', [torch.channels_last, torch.contiguous_format], ids=['grads too', 'grads row by row'])
@pytest.mark.parametrize('name', ['RAdam', 'Ranger', 'torch'])
def test_channels_last(name, grads, device):
    "Weights that turn to channels last after three steps, in the momentum phase; sixteen follow"
    def go(order, grads):
        w = nn.Parameter(numbers(0, torch.float32, device)[2])
        opt = OURS[name]([w])
        for t in range(1, 20):
            if t == 4: w.data = w.data.to(memory_format=order)
            w.grad = numbers(t, torch.float32, device)[2].to(memory_format=grads)
            opt.step()
        assert w.is_contiguous(memory_format=order)
        return w
    assert apart([go(torch.channels_last, grads)], [go(*[torch.contiguous_format]*2)]) < 1e-6

@each
def test_states_move_between_devices(name, device):
    "Ten steps on the CPU and ten on the device, through a state dict and back, are twenty on the CPU"
    def move(ps, opt, to):
        new = [nn.Parameter(p.detach().to(to, copy=True)) for p in ps]
        res = OURS[name](new)
        res.load_state_dict(opt.state_dict())
        return new,res
    ps = [nn.Parameter(p) for p in numbers(0)]
    opt = OURS[name](ps)
    for i,to in enumerate((device, 'cpu', device)):
        steps(opt, ps, range(7*i, 7*i+7))
        ps,opt = move(ps, opt, to)
    assert apart(ps, trained(OURS[name], 'cpu', torch.float64, 21)) < 1e-12

# ---- what comes around a step

@pytest.mark.parametrize('name', ['RAdam', 'torch'])
def test_a_step_that_the_scaler_skips_is_none(name, device):
    "Infinite gradients at the 4th and the 9th of twelve calls"
    def go(scaled):
        ps = [nn.Parameter(p) for p in numbers(0, torch.float32, device)]
        opt,scaler = OURS[name](ps),torch.amp.GradScaler(device, init_scale=4., enabled=scaled)
        for t in range(12):
            bad = t in (3, 8)
            if bad and not scaled: continue
            for p,g in zip(ps, numbers(t+1, torch.float32, device)): p.grad = g*scaler.get_scale()*(float('inf') if bad else 1)
            scaler.scale(torch.zeros((), device=device)) # as a loss would be: makes its tensors
            scaler.step(opt)
            scaler.update()
        return ps
    assert apart(go(True), go(False)) == 0

@pytest.mark.parametrize('name', ['RAdam', 'torch'])
def test_two_streams(name, device):
    "Two optimizers that step at the same time, each in a stream of its own; on the CPU, in turn"
    ps,gpu = [[nn.Parameter(p) for p in numbers(0, torch.float32, device)] for _ in range(2)],device == 'cuda'
    opts,streams = [OURS[name](o) for o in ps],[torch.cuda.stream(torch.cuda.Stream()) if gpu else nullcontext() for _ in ps]
    if gpu: torch.cuda.synchronize()
    for t in range(30):
        for o,opt,s in zip(ps, opts, streams):
            with s: steps(opt, o, [t])
    if gpu: torch.cuda.synchronize()
    for o in ps: assert apart(o, trained(OURS[name], device)) == 0

def reads(t, *args, **kwargs): raise AssertionError('reads a tensor')

@contextmanager
def never_waiting(device):
    "An error for whatever waits for the GPU; on the CPU, for what reads a tensor"
    with pytest.MonkeyPatch.context() as m:
        if device == 'cuda': torch.cuda.set_sync_debug_mode('error')
        else:
            for f in ('item', 'tolist', '__float__', '__int__', '__bool__', 'numpy'): m.setattr(torch.Tensor, f, reads)
        try: yield
        finally:
            if device == 'cuda': torch.cuda.set_sync_debug_mode('default')

@each
@pytest.mark.parametrize('n', [1, 20], ids=['momentum', 'adaptive'])
def test_a_step_does_not_wait(name, n, device):
    "What is prepared once, such as the look for a kernel, may wait"
    if device == 'cpu' and name in ('torch', 'wrapper'): pytest.skip("PyTorch's step counts are tensors on the CPU, and may be read")
    ps = [nn.Parameter(p) for p in numbers(0, torch.float32, device)]
    opt = OURS[name](ps)
    steps(opt, ps, range(n))
    gs = [numbers(t, torch.float32, device) for t in range(3)]
    with never_waiting(device):
        for g in gs:
            for p,o in zip(ps, g): p.grad = o
            opt.step()

def test_the_recorder_does_not_wait(device):
    rec = RectifierRecorder()
    learn = Learner(synth_dbunch(n_train=2, cuda=device == 'cuda'), RegModel(), loss_func=MSELossFlat(), opt_func=RAdam, cbs=rec)
    after_step = rec.after_step
    def watched():
        with never_waiting(device): after_step()
    rec.after_step = watched
    with learn.no_bar(), learn.no_logging(): learn.fit(4)
    assert learn.rectifier.to_frame().step.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]

@gpu_only
@pytest.mark.parametrize('name', ['RAdam', 'Ranger', 'Adam', 'torch'])
def test_a_graph_is_refused(name):
    ps = [nn.Parameter(p) for p in numbers(0, torch.float32, 'cuda')]
    opt = OURS[name](ps)
    steps(opt, ps, range(7))
    before = [p.detach().clone() for p in ps]
    with pytest.raises(RuntimeError, match='CUDA graph'), torch.cuda.graph(torch.cuda.CUDAGraph()): opt.step()
    assert all(map(torch.equal, ps, before))

@pytest.mark.many
@each
@pytest.mark.parametrize('phase,most', [('momentum', 5), ('adaptive', 2)])
def test_launches_of_a_step(name, phase, most, device):
    "On the CPU, operations called: as many for a thousand tensors as for ten; on a GPU, kernels, each for some thirty tensors"
    if name in ('torch', 'wrapper'): most += 4 # its step counts, two of them compared
    for n in (10, 1000):
        ps = [nn.Parameter(torch.ones(8, device=device)) for _ in range(n)]
        opt = OURS[name](ps)
        for p in ps: p.grad = torch.ones_like(p)
        for _ in range(2 if phase == 'momentum' else 12): opt.step() # of Ranger's steps, every sixth is another matter
        calls = profiled(opt.step, waiter(device))['calls']
        assert 0 < calls <= (most if device == 'cpu' else most*(1+n//20)), calls

def test_crops_do_not_wait(device):
    "Images in memory: every operation is one of the device that has them ('meta' has no values to read)"
    pixels,g = torch.randint(256, (60*50, 3), dtype=torch.uint8),random.Random(0)
    windows = [Window((60, 50)) for _ in range(9)]
    for w in windows: w.flip_lr().crop_pad((g.randint(9, 40), g.randint(9, 40)), (g.randint(0, 20), g.randint(0, 10)), resize_to=(32, 32))
    there = pixels.to('meta' if device == 'cpu' else device)
    with never_waiting(device) if device == 'cuda' else nullcontext(): x = cut_out(there, windows)
    assert (x.shape, x.device, x.is_contiguous()) == ((9, 3, 32, 32), there.device, True)
    if device == 'cuda': assert (x.cpu()-cut_out(pixels, windows)).abs().max() < 1e-2

def test_one_large_image_among_small_ones(monkeypatch):
    "What is gathered does not grow to the number of images times the largest of them"
    pixels,gathered = torch.randint(256, (300*200 + 30*100, 3), dtype=torch.uint8),[]
    bilinear = in_memory._bilinear
    monkeypatch.setattr(in_memory, '_bilinear', lambda part, *args: gathered.append(len(part)*args[3]) or bilinear(part, *args))
    windows = [Window((300, 200)), *(Window((10, 10), 300*200 + 100*i) for i in range(30))]
    for w in windows: w.crop_pad(w.size, (0, 0), resize_to=(16, 16))
    together = cut_out(pixels, windows)
    assert max(gathered) == 300 and len(together) == 31
    assert torch.equal(together, torch.cat([cut_out(pixels, [w]) for w in windows]))

def test_a_bucket_has_one_device(monkeypatch):
    monkeypatch.setattr(functional, 'has_fused_kernel', lambda device, dtype: False) # or the kernel would tell them apart
    ps = [nn.Parameter(torch.ones(3, device=d)) for d in ('cpu', 'meta', 'cpu')]
    for p in ps: p.grad = torch.ones_like(p)
    buckets = Buckets(fastai_keys)([ps], {p: {} for p in ps})
    assert [[p.device.type for p in b.params] for b in buckets] == [['cpu', 'cpu'], ['meta']]

two_gpus = [*on_gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')]

@pytest.mark.many
@pytest.mark.parametrize('others', ['meta', pytest.param('cuda:1', marks=two_gpus)])
@each
def test_parameters_on_two_devices(name, others, monkeypatch):
    "Every second parameter is elsewhere; on 'meta' it has no numbers, and the others must not notice"
    first = 'cuda:0' if others == 'cuda:1' else 'cpu'
    if others == 'meta': monkeypatch.setattr(functional, 'has_fused_kernel', lambda device, dtype: False) # 'meta' has none
    def go(devices):
        ps = [nn.Parameter(p.to(devices[i%2])) for i,p in enumerate(numbers(0))]
        opt = OURS[name](ps)
        for t in range(20):
            for p,g in zip(ps, numbers(t+1)): p.grad = g.to(p.device)
            opt.step()
        assert all(o.device == p.device for p in ps for o in opt.state[p].values() if torch.is_tensor(o) and o.dim())
        return ps[::2] if others == 'meta' else ps
    assert apart(go([first, others]), go(['cpu', 'cpu'])) < 1e-12
