"""A disk that is full or cannot be written: an error that says so, what was there before untouched, and the same end once there is room."""
import os
import random
import shutil
import subprocess
import tempfile
import warnings
from functools import partial
from pathlib import Path

import pytest

from helpers import FULL, Stop, ended, equal_jobs, forked, one, small_job, tally, tar, without_times
from radam_fastai.recipes.cli import OptionError, RecipeError
from radam_fastai.recipes.data import unpack
from radam_fastai.recipes.records import read_records

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('tiny')]

def mount(path, *options):
    return shutil.which('mount') and not subprocess.run(['mount', *options, str(path)], capture_output=True).returncode

@pytest.fixture
def disk(tmp_path):
    "A disk of 4 MB"
    path = tmp_path/'disk'
    path.mkdir()
    if not mount(path, '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs'): pytest.skip('needs the right to mount a file system')
    yield path
    subprocess.run(['umount', '-l', str(path)])

def fill(disk, room):
    "Leave `room` bytes: the file to delete afterwards"
    s,ballast = os.statvfs(disk),disk/'ballast'
    ballast.write_bytes(bytes(max(0, s.f_bavail*s.f_frsize - room)))
    return ballast

@pytest.mark.slow
def test_full_at_any_moment(disk, tmp_path):
    whole,out = tmp_path/'whole',disk/'out'
    small_job(whole)
    records,need = without_times(read_records(whole/'records.jsonl')),sum(p.stat().st_size for p in whole.iterdir())
    rng = random.Random(0)
    for i in range(100 if FULL else 12):
        ballast = fill(disk, room=int(rng.uniform(0, .95)*need))
        with pytest.raises(OSError, match='could not write .*: No space left on device; what was there before is unchanged'):
            small_job(out)
        with warnings.catch_warnings():
            warnings.simplefilter('error') # a part of a record
            found = without_times(read_records(out/'records.jsonl')) if (out/'records.jsonl').exists() else []
        assert found == records[:len(found)]
        ballast.unlink()
        small_job(out, resume=True)
        equal_jobs(whole, out)
        shutil.rmtree(out)
        tally['full disks', 'gone on from to the same bits'] += 1

def test_read_only(disk, tmp_path):
    "As a file system is after an error: nothing is trained, nothing is changed"
    with pytest.raises(KeyboardInterrupt): one(disk/'out', cbs=Stop(7), keep=True)
    before = {p.name: p.read_bytes() for p in (disk/'out').iterdir()}
    assert mount(disk, '-o', 'remount,ro')
    with pytest.raises(OptionError, match='--out .*out: no permission to write there'): one(disk/'out', resume=True)
    with pytest.raises(OptionError, match='--out .*new: Read-only file system'): one(disk/'new')
    assert {p.name: p.read_bytes() for p in (disk/'out').iterdir()} == before
    assert mount(disk, '-o', 'remount,rw')
    one(disk/'out', resume=True, keep=True)
    one(tmp_path/'whole', keep=True)
    equal_jobs(tmp_path/'whole', disk/'out')

def test_an_unwritable_folder(tmp_path):
    "Before anything is trained; what is in it stays as it is"
    with tempfile.TemporaryDirectory() as d:
        out = Path(d)/'out'
        one(out)
        before = {p.name: p.read_bytes() for p in out.iterdir()}
        for p in (Path(d), out): p.chmod(0o555)
        def job(out):
            if os.geteuid() == 0: os.setuid(65534) # root may write anywhere
            one(out)
        for o in (out, out/'new'): assert ended(forked(partial(job, o))) == 2 # an `OptionError`
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before
        for p in (Path(d), out): p.chmod(0o755)

def test_no_room_to_unpack(disk, tmp_path):
    (tmp_path/'big').mkdir()
    (tmp_path/'big'/'a.bin').write_bytes(random.Random(0).randbytes(2_000_000))
    a,ballast = tar(tmp_path/'a.tgz', x=tmp_path/'big'),fill(disk, 1_000_000)
    with pytest.raises(RecipeError, match='a.tgz could not be unpacked .*No space left on device.*nothing of it is used'):
        unpack([a], disk/'x')
    assert {p.name for p in disk.iterdir()} <= {'ballast', '.making-x.lock'}
    ballast.unlink()
    assert (unpack([a], disk/'x')/'a.bin').read_bytes() == (tmp_path/'big'/'a.bin').read_bytes()

def test_nowhere_to_unpack(tmp_path):
    a = tar(tmp_path/'a.tgz', x=Path(__file__).parent/'oracle')
    (tmp_path/'file').write_text('no folder')
    with pytest.raises(OSError, match='could not write .*x: '): unpack([a], tmp_path/'file'/'x')
