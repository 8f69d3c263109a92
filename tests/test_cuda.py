"""What may differ on a GPU. Each test runs on the CPU, too, as far as that makes sense, so that it is known to work before it meets a GPU."""
import copy
from contextlib import contextmanager, nullcontext
from functools import partial

import fastai.optimizer as fo, pytest, torch
from fastai.callback.channelslast import ChannelsLast
from fastai.test_utils import synth_learner
from torch import nn

from radam_fastai.baselines import Adam, AdamLinearFn, SGD
from radam_fastai.optimizer import RAdam, Ranger
from radam_fastai.recorder import RectifierRecorder
from radam_fastai.torch_optim import RAdam as TorchRAdam, RAdamWrapper
from reference import plain_step, rel_err

on_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')]
gpu_only = lambda f: on_gpu[0](on_gpu[1](f))
DEVICES = [pytest.param('cpu', id='cpu'), pytest.param('cuda', id='cuda', marks=on_gpu)]
DTYPES = dict(float32=1e-5, bfloat16=.03, float16=.004, float64=1e-12) # and how far two implementations may be apart in it, relative

@pytest.fixture(params=DEVICES)
def device(request): return request.param

SHAPES = [(5, 7), (7,), (4, 3, 3, 3), (), (64, 2), *[(9,)]*40] # more tensors than fit into one launch

def numbers(seed, dtype=torch.float64, device='cpu'):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype) for s in SHAPES]

def trained(opt_func, device, dtype=torch.float32, n=30, **kwargs):
    "Parameters after `n` steps over seeded gradients, and the optimizer"
    ps = [nn.Parameter(p) for p in numbers(0, dtype, device)]
    opt = opt_func(ps, **kwargs)
    steps(opt, ps, range(n))
    return ps,opt

def steps(opt, ps, ts):
    for t in ts:
        for p,g in zip(ps, numbers(t+1, ps[0].dtype, ps[0].device)): p.grad = g
        opt.step()

def apart(a, b): return max(rel_err(p.cpu(), q.cpu()) for p,q in zip(a, b))

# ---- the same numbers as others, in all precisions

FASTAI = dict(lr=.01, mom=.9, sqr_mom=.99, eps=1e-5, wd=.01)
TORCH = dict(lr=.01, betas=(.9, .99), eps=1e-5, weight_decay=.01)
PAIRS = {
    'RAdam, fastai':  (partial(RAdam, **FASTAI), partial(fo.RAdam, **FASTAI)),
    'RAdam, L2':      (partial(RAdam, **FASTAI, decouple_wd=False), partial(fo.RAdam, **FASTAI, decouple_wd=False)),
    'Ranger, fastai': (partial(Ranger, **FASTAI), partial(fo.ranger, **FASTAI)),
    'Adam, fastai':   (partial(Adam, **FASTAI), partial(fo.Adam, **FASTAI)),
    'SGD, fastai':    (partial(SGD, lr=.01, mom=.9, wd=.01), None),
    'RAdam, torch':   (partial(TorchRAdam, **TORCH, decoupled_weight_decay=True), partial(torch.optim.RAdam, **TORCH, decoupled_weight_decay=True)),
    'wrapper, torch': (partial(RAdamWrapper, lr=.01, mom=.9, sqr_mom=.99, eps=1e-5, wd=.01), partial(fo.RAdam, **FASTAI))}
