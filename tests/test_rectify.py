"""The rectifier against exact numbers, and where it must not break."""
import csv
import math
from decimal import Decimal, localcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from radam_fastai.rectify import (
    adaptive_lr_variance,
    first_adaptive_step,
    implied_warmup,
    rectification,
    rho,
    rho_inf,
    simulated_variance,
    untuned_exponential,
    untuned_linear,
)

rows = list(csv.DictReader((Path(__file__).parent/'oracle/rectifier.csv').open()))

@pytest.mark.parametrize('row', rows, ids=lambda r: f"{r['sqr_mom']}-{r['step']}")
def test_oracle(row):
    sqr_mom,step = float(row['sqr_mom']),int(row['step'])
    # .9999 as a float is off by 1e-16, and 1/(1-β2) by 1e-12
    assert rho_inf(sqr_mom) == pytest.approx(float(row['rho_inf']), rel=1e-11)
    assert rho(step, sqr_mom) == pytest.approx(float(row['rho']), rel=1e-12)
    r = rectification(step, sqr_mom, threshold=4)
    assert r is None if row['rect_if_rho_above_4'] == '' else r == pytest.approx(float(row['rect_if_rho_above_4']), rel=1e-12)

def exact_rho(step, sqr_mom):
    "60 digits, of the very float `sqr_mom`"
    with localcontext() as ctx:
        ctx.prec,b = 60,Decimal(sqr_mom)
        return float(2/(1-b) - 1 - 2*step*b**step/(1-b**step))

@given(st.integers(1, 10**7), st.one_of(st.floats(0, 1, exclude_max=True), st.floats(1, 12).map(lambda k: 1-10**-k)))
def test_rho_is_exact_everywhere(step, sqr_mom):
    assert rho(step, sqr_mom) == pytest.approx(exact_rho(step, sqr_mom), rel=1e-13)

@given(st.integers(1, 10**7), st.floats(0, 1, exclude_max=True), st.sampled_from([4, 4.5, 5, 6]))
def test_rectification_is_none_or_in_0_1(step, sqr_mom, threshold):
    r = rectification(step, sqr_mom, threshold)
    assert (r is None) == (rho(step, sqr_mom) <= threshold)
    assert r is None or 0 <= r <= 1+1e-12

@pytest.mark.parametrize('sqr_mom', [0., .3, .6, 2/3])
def test_never_rectifies(sqr_mom):
    assert first_adaptive_step(sqr_mom) is None
    assert all(rectification(t, sqr_mom) is None for t in (1, 5, 6, 100, 10**7))
    assert np.isnan(implied_warmup(50, sqr_mom)).all()

@pytest.mark.parametrize('sqr_mom,threshold,step', [(.9, 5, 6), (.99, 5, 6), (.999, 5, 6), (.9, 4, 5), (.999, 4, 5), (.7, 5, 10)])
def test_first_adaptive_step(sqr_mom, threshold, step):
    assert exact_rho(step-1, sqr_mom) <= threshold < exact_rho(step, sqr_mom)
    assert first_adaptive_step(sqr_mom, threshold) == step

def test_rectifies_from_the_sixth_step_unless_told_otherwise():
    assert [rectification(t, .99) is None for t in (5, 6)] == [True, False] and first_adaptive_step(.99) == 6
    r = exact_rho(5, .99)
    assert rectification(5, .99, threshold=4) == pytest.approx(math.sqrt((r-4)*(r-2)*199/(195*197*r)))

def test_implied_warmup_rises():
    w = implied_warmup(5000, .99)
    assert np.isnan(w[:5]).all() and (np.diff(w[5:]) > -1e-14).all() and w[-1] == pytest.approx(1, abs=1e-9)

def test_untuned_warmups():
    assert [untuned_linear(t, .99) for t in (1, 100, 200, 300)] == pytest.approx([.005, .5, 1, 1])
    assert [untuned_exponential(t, .99) for t in (1, 100)] == pytest.approx([1-math.exp(-.01), 1-math.exp(-1)])

@pytest.mark.parametrize('rho', [3, 4.5, 6, 20, 199])
def test_variance_against_sampled_averages(rho):
    "1/sqrt of a mean of `rho` squared normals is what the theorem is about, and has that variance"
    chi2 = np.random.default_rng(0).chisquare(rho, 2_000_000)
    assert adaptive_lr_variance(rho, first_order=False) == pytest.approx(np.var(np.sqrt(rho/chi2)), rel=.05)

def test_simulated_variance_of_two_steps():
    "By hand: with β2=.5 the second debiased average is (g1² + 2 g2²)/3"
    g = np.random.default_rng(3)
    g1,g2 = g.standard_normal(1000)**2,g.standard_normal(1000)**2
    assert simulated_variance(2, .5, n=1000, seed=3)[1] == pytest.approx(np.var(np.sqrt(3/(g1+2*g2))))

@pytest.mark.parametrize('f,args,says', [
    (rho_inf, (1.,), 'got 1.0'), (rho_inf, (-.1,), 'got -0.1'), (rho, (5, math.nan), 'got nan'), (rho, (0, .99), 'got 0'),
    (rho, (math.inf, .99), 'got inf'),
    (rectification, (5, .99, 3.9), 'got 3.9'), (untuned_linear, (5, 2.), 'got 2.0'), (adaptive_lr_variance, (4.,), 'above 4, got 4.0'),
    (adaptive_lr_variance, (2., False), 'above 2, got 2.0')])
def test_bad_input_is_named(f, args, says):
    with pytest.raises(ValueError, match=says): f(*args)
