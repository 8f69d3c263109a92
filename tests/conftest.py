"""What every test shares: no display, one seed, and the folder of optional data archives."""
import os, random
from pathlib import Path

os.environ.setdefault('MPLBACKEND', 'Agg')

import numpy as np, pytest, torch

torch.set_num_threads(1) # the tensors here are small: a second thread only waits for the first

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
