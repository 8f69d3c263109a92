"""What may stand around a step: torch.compile, a CUDA graph's capture, fake and sharded tensors, kernels that debias in float32."""
import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from helpers import build, close, identical, numbers, run
from radam_fastai import functional
from radam_fastai.functional import KERNEL_TOL, debias_error, has_fused_kernel, radam_step_
from radam_fastai.optimizer import RAdam, RAdamFn, Ranger
from radam_fastai.torch_optim import RAdam as TorchRAdam, RAdamWrapper

OPTS = dict(RAdam=RAdam, Ranger=partial(Ranger, k=3), torch=TorchRAdam, wrapper=RAdamWrapper)
each = pytest.mark.parametrize('opt_func', OPTS.values(), ids=OPTS)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')

# ---- torch.compile

def trained(opt_func, rounds, n=9):
    "Weights after `n` rounds; `rounds(backward, step)` makes what is called for each"
    torch.manual_seed(0)
    m,x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)),torch.randn(8, 4)
    opt = opt_func(list(m.parameters()), lr=.01)
    go = rounds(lambda: m(x).square().mean().backward(), opt.step)
    for _ in range(n):
        go()
        opt.zero_grad()
    return [p.detach() for p in m.parameters()]

def eager(backward, step): return lambda: (backward(), step())
def compiled_step(backward, step): return eager(backward, torch.compile(step, backend='eager'))
def compiled_whole(backward, step):
    def whole(): backward(), step()
    return torch.compile(whole, backend='eager')

@pytest.mark.many
@each
@pytest.mark.parametrize('rounds', [compiled_step, compiled_whole])
def test_compiled(opt_func, rounds):
    "Through the momentum phase and behind it"
    torch.compiler.reset()
    assert identical(trained(opt_func, rounds), trained(opt_func, eager))

# ---- CUDA graphs

@pytest.fixture
def capturing(monkeypatch):
    for f in ('is_available', 'is_current_stream_capturing'): monkeypatch.setattr(torch.cuda, f, lambda: True)
    return monkeypatch

@pytest.mark.parametrize('n', [0, 8])
@pytest.mark.parametrize('cls', [RAdam, Ranger, TorchRAdam], ids=['RAdam', 'Ranger', 'torch'])
def test_a_capture_is_refused(cls, n, capturing):
    "Nothing is changed, and nothing tried or remembered for later"
    with capturing.context() as m:
        m.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
        opt = run(build(cls), range(n))
    before = copy.deepcopy(opt.state_dict())
    has_fused_kernel.cache_clear()
    with pytest.raises(RuntimeError, match='CUDA graph'): run(opt, [n])
    assert identical(opt.state_dict(), before) and has_fused_kernel.cache_info().currsize == 0
    with pytest.raises(RuntimeError, match='CUDA graph'): has_fused_kernel(torch.device('cpu'), torch.float32)
    capturing.undo()
    assert has_fused_kernel(torch.device('cpu'), torch.float32)
    close(run(opt, range(n, 12)), run(build(cls), range(12)), 0)

@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize('cls', [RAdam, TorchRAdam], ids=['RAdam', 'torch'])
def test_a_capture_is_refused_on_a_gpu(cls):
    p = nn.Parameter(torch.ones(8, device='cuda'))
    p.grad,opt = torch.ones_like(p),cls([p], lr=.1)
    for _ in range(7): opt.step()
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match='CUDA graph'), torch.cuda.graph(torch.cuda.CUDAGraph()): opt.step()
    assert torch.equal(p, before)

# ---- tensors that are not, or not whole

def test_fake_tensors_say_nothing_about_the_kernels():
    from torch._subclasses.fake_tensor import FakeTensorMode
    has_fused_kernel.cache_clear()
    with FakeTensorMode(): has_fused_kernel(torch.device('cpu'), torch.float32)
    assert has_fused_kernel(torch.device('cpu'), torch.float32)

@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh('cpu', (1,))
    torch.distributed.destroy_process_group()

@pytest.mark.parametrize('opt_func', [RAdam, partial(Ranger, k=3), partial(Ranger, k=3, alpha=.3)], ids=['RAdam', 'Ranger', 'Ranger .3'])
def test_sharded(opt_func, mesh):
    "As FSDP2 shards a model: parameters, gradients and slow weights are `DTensor`s"
    from torch.distributed.tensor import Shard, distribute_tensor
    def go(wrap):
        ps = [nn.Parameter(wrap(numbers(s, i))) for i,s in enumerate([(4, 3), (5,)])]
        opt = opt_func(ps, lr=.05)
        for t in range(14):
            for i,p in enumerate(ps): p.grad = wrap(numbers(p.shape, 10*t+i))
            opt.step()
        return [getattr(p, 'full_tensor', p.clone)().detach() for p in ps]
    sharded,whole = go(lambda t: distribute_tensor(t, mesh, [Shard(0)])),go(lambda t: t)
    for a,b in zip(sharded, whole): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

# ---- kernels that debias in float32

def updates(n, mom, sqr_mom, debias, rounded=lambda b: b):
    "Adam's updates over `n` random gradients; `debias(t, β)` is 1-β^t, and the averages use `rounded(β)`"
    g,m,v = np.random.default_rng(0).standard_normal((n, 100)),0.,0.
    b1,b2 = rounded(mom),rounded(sqr_mom)
    for t in range(1, n+1):
        m,v = b1*m + (1-b1)*g[t-1],b2*v + (1-b2)*g[t-1]**2
        with np.errstate(all='ignore'): yield t,m/debias(t, mom)/np.sqrt(v/debias(t, sqr_mom))

def exactly(t, b): return -np.expm1(t*np.log(b))
def in_float32(t, b): return float(1 - np.float32(b)**np.float32(t))
def float32(b): return float(np.float32(b))

def kernel_errors(n, mom, sqr_mom, rounded):
    "What debiasing in float32 does to each update, relative to its largest element"
    pairs = zip(updates(n, mom, sqr_mom, in_float32, rounded), updates(n, mom, sqr_mom, exactly))
    return {t: np.abs(a-b).max()/np.abs(b).max() for (t,a),(_,b) in pairs}

@pytest.mark.many
@pytest.mark.parametrize('rounded', [float32, lambda b: b], ids=['β rounded', 'β as it is'])
@pytest.mark.parametrize('mom', [.9, .95, .999])
@pytest.mark.parametrize('sqr_mom', [.9, .98, .99, .995, .999, .9995, .9999, .99999, 1-2**-12, 1-2**-20, 1-1e-7, 1-1e-8])
def test_debias_error_bounds_it(sqr_mom, mom, rounded):
    for t,e in kernel_errors(1500, mom, sqr_mom, rounded).items():
        bound = debias_error(t, mom, sqr_mom)
        assert bound > .01 or e <= bound*1.01 + 1e-12, t # it is of first order

def test_where_the_foreach_path_is_taken():
    "The usual β2 keep the kernel; where an emulated kernel is worse than the tolerance, it is not used"
    assert all(debias_error(t, .95, b2) <= KERNEL_TOL for t in range(6, 3000) for b2 in (.9, .99, .995))
    assert all(debias_error(t, .9, .999) <= KERNEL_TOL for t in range(10, 3000))
    for b2 in (.9999, .99999, .999999, 1-1e-7, 1-3e-8):
        assert not kernel_errors(6, .9, b2, lambda b: b)[6] <= KERNEL_TOL < debias_error(6, .9, b2)

@pytest.mark.parametrize('sqr_mom,kernel', [(.99, True), (.9999, False), (1-1e-7, False)])
@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_the_kernel_of_another_device(device, sqr_mom, kernel, monkeypatch):
    "`meta` stands for it: the CPU's kernel, which debiases in float64, serves every β2"
    calls = []
    monkeypatch.setattr(functional, '_fused_adam_', lambda *a, **k: calls.append(1))
    radam_step_(*([torch.ones(3, device=device)] for _ in range(4)), 7, lr=.1, mom=.9, sqr_mom=sqr_mom, eps=1e-8, fused=True)
    assert bool(calls) == (kernel or device == 'cpu')

@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize('sqr_mom', [.99, .999, .9999, .99999, .999999, 1-1e-7])
def test_float32_on_a_gpu(sqr_mom):
    "Beside float64 on the CPU: within the tolerance of one update, and float32's own error"
    def go(device, dtype):
        p = nn.Parameter(torch.zeros(64, device=device, dtype=dtype))
        opt = RAdamFn([p], lr=.1, sqr_mom=sqr_mom, wd=0.)
        for t in range(30):
            p.grad = numbers((64,), t).to(device, dtype)
            opt.step()
        return p.detach().cpu().double()
    a,b = go('cuda', torch.float32),go('cpu', torch.float64)
    assert (a-b).abs().max() <= 2*KERNEL_TOL*b.abs().max()
