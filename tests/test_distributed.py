"""Two processes train the run that one process trains, the first of them writes, and the death of one ends the job."""
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from radam_fastai.recipes.checkpoint import load_checkpoint
from radam_fastai.recipes.records import read_records

pytest.importorskip('accelerate')
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group('distributed')]
root = Path(__file__).resolve().parent.parent

script = '''
import os, sys, torch
from functools import partial
from pathlib import Path
import fastai.callback.schedule
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset
from radam_fastai.recipes import imagenette
from radam_fastai.recipes.jobs import Run, run_job
from radam_fastai.recipes.optims import opt_func

out,images,mode = Path(sys.argv[1]),Path(sys.argv[2]),sys.argv[3]
rank = int(os.environ.get('RANK', 0))
torch.set_num_threads(1)

class Die(Callback):
    def before_batch(self):
        if rank == 1 and self.epoch == 1: os._exit(3)
class Keep(Callback):
    def __init__(self, opt): self.opt_name = opt
    def after_fit(self): torch.save([p.detach() for p in self.learn.model.parameters()], out/f'{self.opt_name}-{rank}.pt')

def make(opt):
    "A network without batch normalisation, and a validation set that two processes cannot share equally"
    d = load_digits()
    x,y = torch.tensor(d.images/16, dtype=torch.float).flatten(1),torch.tensor(d.target)
    train,valid = TensorDataset(x[:1400], y[:1400]),TensorDataset(x[1400:], y[1400:])
    dls = DataLoaders.from_dsets(train, valid, bs=36, num_workers=0) # the last batch has one item
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    dies = [Die()] if (mode, opt) == ('die', 'adam') else []
    return Learner(dls, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=opt_func(opt), cbs=[Keep(opt), *dies])

out.mkdir(exist_ok=True)
def train(learn): learn.fit_one_cycle(2, 1e-2)
runs = [Run(f'{opt}-0', 0, dict(opt=opt), partial(make, opt), train, dict(name='digits')) for opt in ('ranger','adam')]
run_job(runs, out/'digits', 'test', keep=True, resume=mode == 'resume')
if mode == 'all':
    kw = dict(path=images, arch='xresnet18', size=32, bs=16, epochs=1, workers=1, out=out/'images', preset='over9000-radam')
    imagenette.main(**kw)
    imagenette.main(**{**kw, 'runs':2}, resume=True)
    imagenette.main(**{**kw, 'out':out/'memory'}, in_memory=True)
(out/f'done-{rank}').touch()
'''

def launch(tmp_path, images, mode, n=2):
    "What becomes of the script, run by `n` processes"
    (tmp_path/'job.py').write_text(script)
    return accelerate(tmp_path, tmp_path/f'out{n}', images, mode, n=n)

def accelerate(tmp_path, *args, n=2):
    "What becomes of `job.py` with these arguments, run by `n` processes"
    launcher = ['-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', str(n), '--num_machines', '1', 
                '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0']
    env = {**os.environ, 'HOME': str(tmp_path), 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true',
           'CUDA_VISIBLE_DEVICES': ''}
    return subprocess.run([sys.executable, *launcher, str(tmp_path/'job.py'), *map(str, args)], env=env, cwd=tmp_path, capture_output=True,
                          text=True, timeout=300)

@pytest.fixture(scope='module')
def both(tmp_path_factory, images):
    "The same jobs by one process and by two: folders, and the output of the two"
    tmp = tmp_path_factory.mktemp('both')
    two = launch(tmp, images, 'all')
    assert two.returncode == 0, two.stdout + two.stderr
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, 'argv', ['job.py', str(tmp/'out1'), str(images), 'digits'])
        runpy.run_path(str(tmp/'job.py'))
    return tmp/'out1',tmp/'out2',two.stdout

def test_same_losses_as_one_process(both):
    "Every step's loss and every epoch's metrics; sums are taken in another order, so they agree to rounding"
    for a,b in zip(*(read_records(o/'digits'/'records.jsonl') for o in both[:2])):
        assert a['n_steps'] == b['n_steps'] == 2*(1400//36) and a['data'] == b['data']
        for k in 'step','rect': assert a['steps'][k] == b['steps'][k]
        for k in 'loss','lr','mom': assert b['steps'][k] == pytest.approx(a['steps'][k], rel=1e-4)
        for e,f in zip(a['epochs'], b['epochs']):
            assert f['accuracy'] == pytest.approx(e['accuracy'], abs=1.01/397) # one image may fall on the other side
            for k in 'train_loss','valid_loss': assert f[k] == pytest.approx(e[k], rel=1e-4)
        assert (a['device']['processes'], b['device']['processes']) == (1, 2)

@pytest.mark.parametrize('opt', ['ranger', 'adam'])
def test_same_parameters_in_all_processes(both, opt):
    "To the bit in the two, after 76 updates; to rounding those of one process"
    alone,a,b = (torch.load(o/f'{opt}-{rank}.pt') for o,rank in [(both[0], 0), (both[1], 0), (both[1], 1)])
    assert all(torch.equal(x, y) for x,y in zip(a, b))
    for x,y in zip(a, alone): torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)
    kept = load_checkpoint(both[1]/'digits'/f'{opt}-0.pth')
    assert all(torch.equal(x, y) for x,y in zip(a, kept['model'].values())) and len(kept['steps']) == 76

def test_the_first_process_writes_and_prints(both):
    out = both[2]
    assert out.count('ranger-0\n') == 1 and out.count('xresnet18-radam-42: finished before') == 1
    assert [r['run'] for r in read_records(both[1]/'images'/'records.jsonl')] == ['xresnet18-radam-42','xresnet18-radam-43']
    assert sorted(p.name for p in (both[1]/'digits').iterdir()) == sorted(p.name for p in (both[0]/'digits').iterdir())
    assert all((both[1]/f'done-{rank}').exists() for rank in (0, 1))

def test_processes_share_images_in_memory(both):
    "One of two decodes them; the first losses are those of images from files, but for what Pillow rounds"
    files,memory = (read_records(both[1]/name/'records.jsonl')[0] for name in ('images', 'memory'))
    assert memory['options'] == files['options'] | dict(in_memory=True)
    assert memory['steps']['loss'][:2] == pytest.approx(files['steps']['loss'][:2], rel=.02)
    assert len(list((both[1].parent/'.radam_data').glob('decoded-*'))) == 1

def test_an_error_of_one_process_is_said_by_it(tmp_path, images):
    "Of two processes, the second reads the image that is damaged: its line is the one that names the file"
    path = shutil.copytree(images, tmp_path/'images')
    for f in path.glob('train/*/*.jpg'): f.write_bytes(b'no image')
    (tmp_path/'job.py').write_text("""import os
from pathlib import Path
from PIL import Image
from radam_fastai.recipes import data, imagenette
from radam_fastai.recipes.cli import command
if os.environ['RANK'] == '0': data.PILImage.create = classmethod(lambda cls, path: cls(Image.new('RGB', (32,32)))) # it reads other images
@command
def main(path:Path=None, out:Path=None): imagenette.main(path=path, arch='xresnet18', size=32, bs=16, epochs=1, workers=0, out=out)""")
    res = accelerate(tmp_path, '--path', path, '--out', tmp_path/'out')
    assert res.returncode != 0 and res.stderr.count('is no image that can be read') == 1 and f'job.py: {path}' in res.stderr, res.stderr

@pytest.mark.slow
def test_the_death_of_a_process_ends_the_job(tmp_path, images):
    out = tmp_path/'out2'/'digits'
    res = launch(tmp_path, images, 'die') # in half the time for which a process would wait for one that does not answer
    assert res.returncode != 0
    assert 'exitcode  : 3' in res.stderr and 'rank' in res.stderr # the launcher says which, and how
    record, = read_records(out/'records.jsonl')
    # what was done is there
    assert record['run'] == 'ranger-0' and len(record['epochs']) == 2 and load_checkpoint(out/'adam-0.pth')['epoch'] == 1
    assert launch(tmp_path, images, 'resume').returncode == 0
    assert [r['run'] for r in read_records(out/'records.jsonl')] == ['ranger-0', 'adam-0']
    assert read_records(out/'records.jsonl')[0] == record
