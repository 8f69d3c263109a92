"""Algorithm 2 of arXiv:1908.03265 read line by line, in float64, one tensor at a time: what the tests compare with."""
import math
import torch

def plain_rect(step, sqr_mom, threshold):
    "r_t as the paper writes it, or None"
    r_inf = 2/(1-sqr_mom) - 1
    r = r_inf - 2*step*sqr_mom**step/(1-sqr_mom**step)
    return math.sqrt((r-4)*(r-2)*r_inf/((r_inf-4)*(r_inf-2)*r)) if r > threshold else None

def plain_step(p, g, state, *, lr, mom, sqr_mom, eps, wd=0., beta=0., decouple_wd=True, threshold=5, eps_debiased=True,
               sgd_phase='momentum', maximize=False):
    "The new value of `p` after one update with gradient `g`; `state` (m, v, t) moves along"
    if maximize: g = -g
    if not decouple_wd: g = g + wd*p
    m,v,t = state.get('m', torch.zeros_like(p)),state.get('v', torch.zeros_like(p)),state.get('t', 0)+1
    m = mom*m + (1-mom)*g
    v = sqr_mom*v + (1-sqr_mom)*g*g
    state.update(m=m, v=v, t=t)
    r,m_hat = plain_rect(t, sqr_mom, threshold),m/(1-mom**t)
    if r is None and sgd_phase == 'skip': return p
    if decouple_wd: p = p - lr*wd*p
    if r is None: return p - lr*m_hat
    bias = math.sqrt(1-sqr_mom**t)
    denom = v.sqrt()/bias + eps if eps_debiased else (v.sqrt()+eps)/bias
    if beta: denom = torch.logaddexp(torch.zeros_like(denom), denom*beta)/beta # softplus
    return p - lr*r*m_hat/denom

def rel_err(a, b):
    "Largest difference, relative to the largest magnitude of `b`"
    a,b = a.detach().double(),b.detach().double()
    return ((a-b).abs().max()/b.abs().max()).item() if b.numel() else 0.
