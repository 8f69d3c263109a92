"""RAdam's other settings, put down to Algorithm 2 as `radam_reference` has it, in float64: what the tests compare with."""
import math
import torch

from radam_fastai.functional import radam_reference

def plain_rect(step, sqr_mom, threshold):
    "r_t as the paper writes it, or None"
    r_inf = 2/(1-sqr_mom) - 1
    r = r_inf - 2*step*sqr_mom**step/(1-sqr_mom**step)
    return math.sqrt((r-4)*(r-2)*r_inf/((r_inf-4)*(r_inf-2)*r)) if r > threshold else None

def plain_step(p, g, state, *, lr, mom, sqr_mom, eps, wd=0., beta=0., decouple_wd=True, threshold=5, eps_debiased=True,
               sgd_phase='momentum', maximize=False):
    "The new value of `p` after one update with gradient `g`; `state` (m, v, t) moves along"
    if maximize: g = -g
    if not decouple_wd: g,wd = g + wd*p,0.
    m,v,t = state.get('m', torch.zeros_like(p)),state.get('v', torch.zeros_like(p)),state.get('t', 0)+1
    bias,r = math.sqrt(1-sqr_mom**t),plain_rect(t, sqr_mom, threshold)
    if not eps_debiased: eps = eps/bias
    new,m,v = radam_reference(p, g, m, v, t, lr, mom, sqr_mom, eps, wd, threshold)
    state.update(m=m, v=v, t=t)
    if r is None: return p if sgd_phase == 'skip' else new
    if not beta: return new
    softplus = torch.logaddexp(torch.zeros_like(p), (v.sqrt()/bias + eps)*beta)/beta
    return p - lr*wd*p - lr*r*m/(1-mom**t)/softplus

def rel_err(a, b):
    "Largest difference, relative to the largest magnitude of `b`"
    a,b = a.detach().double(),b.detach().double()
    return ((a-b).abs().max()/b.abs().max()).item() if b.numel() else 0.
