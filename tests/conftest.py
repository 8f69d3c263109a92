"""What every test shares: no display, one seed, and the folder of optional data archives."""
import os
import random
from collections import Counter
from pathlib import Path

os.environ.setdefault('MPLBACKEND', 'Agg')

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import run_command, summary, tally

torch.set_num_threads(1) # the tensors here are small: a second thread only waits for the first

def pytest_sessionfinish(session):
    "With pytest-xdist, a worker hands its tally to the process that prints"
    if hasattr(session.config, 'workeroutput'): session.config.workeroutput['tally'] = [(*k, n) for k,n in tally.items()]

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "Of a test marked `many`, every fifth case stays in `make test-fast`"
    seen = Counter()
    for o in items:
        if not o.get_closest_marker('many'): continue
        if seen[o.function] % 5: o.add_marker(pytest.mark.slow)
        seen[o.function] += 1

@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for what,end,n in getattr(node, 'workeroutput', {}).get('tally', []): tally[what,end] += n

def pytest_terminal_summary(terminalreporter):
    if tally: terminalreporter.section('attacks')
    for line in summary(): terminalreporter.line(line)

@pytest.fixture(autouse=True)
def seed():
    "The same random numbers for each test, whichever run before it"
    random.seed(42)
    np.random.seed(42)
    torch.manual_seed(42)

@pytest.fixture(scope='session')
def data_path():
    "The folder of data archives that RADAM_DATA names; tests that ask for it are skipped without one"
    path = Path(os.environ.get('RADAM_DATA') or 'no such folder')
    if not path.is_dir(): pytest.skip('set RADAM_DATA to a folder of data archives to run this')
    return path

@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    "Run a recipe as its console script does, in this process: exit status, what went to stdout and to stderr"
    def _cli(name, *args):
        with pytest.raises(SystemExit) as e: run_command(name, args, monkeypatch, tmp_path)
        return e.value.code or 0, *capsys.readouterr()
    return _cli

@pytest.fixture(scope='session')
def images(tmp_path_factory):
    "Ten classes of 40x32 JPEGs in Imagenette's layout, of 6 or 7 training and 3 or 4 validation images"
    path,rng = tmp_path_factory.mktemp('images'),np.random.default_rng(0)
    for split,n in [('train',6), ('val',3)]:
        for c in range(10):
            d = path/split/f'n{c:02}'
            d.mkdir(parents=True)
            for i in range(n + c%2): Image.fromarray(rng.integers(0, 25*c+25, (40,32,3), dtype='uint8')).save(d/f'{i}.jpg')
    return path

@pytest.fixture
def tiny(monkeypatch):
    "A small XResNet under the name of xresnet18, and figures that are not drawn: for tests of what is around them"
    from fastai.layers import ResBlock
    from fastai.vision.models.xresnet import XResNet

    from radam_fastai.recipes import imagenette, report
    monkeypatch.setitem(imagenette.ARCHS, 'xresnet18', lambda **kw: XResNet(ResBlock, 1, [1,1,1,1], stem_szs=(4,4,64), widen=.25, **kw))
    for f in 'plot_runs','plot_summary','plot_published': monkeypatch.setattr(report, f, lambda *a: None)
    monkeypatch.setattr(report, 'save_figure', lambda fig, path: Path(path).write_bytes(b'figure'))
