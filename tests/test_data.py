"""Data that is missing, damaged or dangerous is named, and never half-used; augmentation depends on the item alone."""
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from fastai.torch_core import set_seed
from PIL import Image

from helpers import ended, forked, short_header, tar
from radam_fastai.recipes import data, imagenette, in_memory
from radam_fastai.recipes.cli import OptionError, RecipeError
from radam_fastai.recipes.data import balanced, check_sum, digest, split_files, unpack
from radam_fastai.recipes.records import read_records

pytestmark = pytest.mark.slow

def info(name, **kw):
    t = tarfile.TarInfo(name)
    for k,v in kw.items(): setattr(t, k, v)
    return t

def test_archives_become_a_folder(images, tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'UNPACKED', tmp_path/'unpacked')
    for part in 'train','val':
        with tarfile.open(tmp_path/f'imagenette2-160-{part}.tgz', 'w:gz') as t: t.add(images/part, f'imagenette2-160/{part}')
    path,source = imagenette.find_images(tmp_path, 128)
    assert path.name == 'imagenette2-160' and path.is_relative_to(tmp_path/'unpacked') and source == 'archives imagenette2-160 in a folder'
    assert digest(sorted(path.rglob('*.jpg')), path) == digest(sorted(images.rglob('*.jpg')), images)
    with monkeypatch.context() as m:
        m.setattr(data, 'check_sum', lambda archive: pytest.fail('it is unpacked again'))
        assert imagenette.find_images(tmp_path, 128)[0] == path

def test_each_archive_is_unpacked(images, tmp_path, monkeypatch):
    "Others of the same name are other data, and so is one that has got a second half"
    monkeypatch.setattr(data, 'UNPACKED', tmp_path/'unpacked')
    def pack(folder, part):
        folder.mkdir(exist_ok=True)
        with tarfile.open(folder/f'imagenette2-160-{part}.tgz', 'w:gz') as t: t.add(images/'val', f'imagenette2-160/{part}')
    for folder in (a := tmp_path/'a'), (b := tmp_path/'b'): pack(folder, 'train')
    with pytest.raises(OptionError, match='holds no val; it should hold train and val, or archives of imagenette2-160'):
        imagenette.find_images(a, 128)
    for folder in a, b: pack(folder, 'val')
    one,other = (imagenette.find_images(folder, 128)[0] for folder in (a, b))
    assert one != other and (one/'val').exists()

def test_a_folder_has_a_name(images, monkeypatch):
    monkeypatch.chdir(images)
    assert [imagenette.find_images(p, 128)[0] for p in ('.', 'train/..')] == [images]*2

evil = dict(absolute=info('/tmp/evil.txt'), outside=info('x/../../evil.txt'), device=info('x/dev', type=tarfile.CHRTYPE),
            fifo=info('x/fifo', type=tarfile.FIFOTYPE),
    link=info('x/link', type=tarfile.SYMTYPE, linkname='../../../etc'),
    hardlink=info('x/hard', type=tarfile.LNKTYPE, linkname='/etc/passwd'))

@pytest.mark.parametrize('how', evil)
def test_dangerous_archives(tmp_path, how):
    if how == 'absolute': # Python's filter makes such a path relative: it must not end up at the root
        evil[how].name = str(tmp_path/'root'/'evil.txt')
    a = tar(tmp_path/'a.tgz', bad=evil[how])
    try: unpack([a], tmp_path/'data'/'x')
    except RecipeError as e: assert 'a.tgz' in str(e) and len(str(e).splitlines()) == 1
    assert not (tmp_path/'root').exists() and not (tmp_path/'evil.txt').exists() and not (tmp_path/'data'/'evil.txt').exists()
    if how != 'absolute': assert list((tmp_path/'data').glob('[!.]*')) == []

def test_several_processes_unpack_one_archive(images, tmp_path, monkeypatch):
    "One of them does, the others wait for it; what a killed one left is no hindrance"
    a,dest = tar(tmp_path/'a.tgz', x=images/'train'),tmp_path/'data'/'x'
    (tmp_path/'data'/'.making-x'/'x'/'n00').mkdir(parents=True)
    (tmp_path/'data'/'.making-x'/'x'/'n00'/'half.jpg').write_bytes(b'half')
    monkeypatch.setattr(data, 'check_sum', lambda a: time.sleep(.3)) # so that all have come before the first is done
    assert [ended(pid) for pid in [forked(partial(unpack, [a], dest)) for _ in range(4)]] == [0]*4
    assert digest(sorted(dest.rglob('*.jpg')), dest) == digest(sorted((images/'train').rglob('*.jpg')), images/'train')
    assert [p.name for p in (tmp_path/'data').glob('[!.]*')] == ['x'] and not (tmp_path/'data'/'.making-x').exists()

@pytest.mark.parametrize('damage', ['cut', 'flipped', 'text', 'empty'])
def test_damaged_archives(images, tmp_path, damage):
    a = tar(tmp_path/'a.tgz', x=images/'train')
    b = bytearray(a.read_bytes())
    if damage == 'flipped': b[len(b)//2] ^= 255
    a.write_bytes(dict(cut=b[:len(b)//2], flipped=b, text=b'no archive', empty=b'')[damage])
    with pytest.raises(RecipeError, match='a.tgz could not be unpacked'): unpack([a], tmp_path/'data'/'x')
    assert list((tmp_path/'data').glob('[!.]*')) == []

def test_sums(tmp_path):
    a = tmp_path/'a.tgz'
    a.write_bytes(b'abc')
    check_sum(a) # nothing to compare with
    for star in '','*':
        (tmp_path/'SHA256SUMS').write_text(f"{hashlib.sha256(b'abc').hexdigest()}  {star}a.tgz\n")
        check_sum(a)
    (tmp_path/'SHA256SUMS').write_text(f"{hashlib.sha256(b'abd').hexdigest()}  a.tgz\n")
    with pytest.raises(RecipeError, match='a.tgz is damaged'): check_sum(a)

@pytest.mark.parametrize('line', ['{}  a.tgz', '{} *a.tgz', '{}  ./a.tgz', '{} *./a.tgz', '\n\nword\n{}  a.tgz\r', '{}  a b.tgz\n{}  a.tgz',
                                  '\xff\n{}\ta.tgz'])
def test_sums_as_others_write_them(tmp_path, line):
    (tmp_path/'a.tgz').write_bytes(b'abc')
    def check(of, case):
        (tmp_path/'SHA256SUMS').write_bytes(line.format(*[case(hashlib.sha256(of).hexdigest())]*2).encode('latin1'))
        check_sum(tmp_path/'a.tgz')
    for case in str.lower,str.upper:
        check(b'abc', case)
        with pytest.raises(RecipeError, match='a.tgz is damaged'): check(b'abd', case)

def test_sums_that_are_none(tmp_path):
    (tmp_path/'a.tgz').write_bytes(b'abc')
    (tmp_path/'SHA256SUMS').mkdir()
    check_sum(tmp_path/'a.tgz')

def member(**pax):
    t = info('x/a.txt')
    t.pax_headers = pax
    return t

STRANGE = {'a name with a zero byte': member(path='x/a\0b'), 'a time that is no number': member(mtime='nan'),
           'a time without end': member(mtime='1e300')}

@pytest.mark.parametrize('what', [*STRANGE, 'damaged xz'])
def test_strange_archives(tmp_path, what):
    "One line that names the archive, and nothing of it is used"
    if what == 'damaged xz':
        with tarfile.open(tmp_path/'a.tgz', 'w:xz') as t: t.add(Path(__file__).parent, 'x')
        b = bytearray((tmp_path/'a.tgz').read_bytes())
        b[len(b)//2] ^= 255
        (tmp_path/'a.tgz').write_bytes(b)
    else:
        with tarfile.open(tmp_path/'a.tgz', 'w:gz', format=tarfile.PAX_FORMAT) as t: t.addfile(STRANGE[what])
    with pytest.raises(RecipeError, match='a.tgz could not be unpacked') as e: unpack([tmp_path/'a.tgz'], tmp_path/'data'/'x')
    assert len(str(e.value).splitlines()) == 1 and list((tmp_path/'data').glob('[!.]*')) == []

def test_no_home(images, tmp_path):
    "A user without an entry in the list of users, as in many containers: data in a folder are read, an archive needs HOME"
    code = """import os, pwd, sys
def nobody(uid): raise KeyError(uid)
pwd.getpwuid = nobody
from pathlib import Path
from radam_fastai.recipes import imagenette
print(imagenette.find_images(Path(sys.argv[1]))[1])
try: imagenette.find_images(Path(sys.argv[2]))
except ValueError as e: print(e)"""
    tar(tmp_path/'imagenette2-160.tgz', x=images/'train')
    env = {k: v for k,v in os.environ.items() if k != 'HOME'} | dict(MPLCONFIGDIR=str(tmp_path/'mpl'),
                                                                     PYTHONPATH=str(Path(__file__).resolve().parent.parent))
    res = subprocess.run([sys.executable, '-c', code, str(images), str(tmp_path)], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert res.stdout.splitlines() == ['a folder',
                                       '--path ~/.radam_data: the system knows no folder that ~ stands for; set HOME'], res.stderr

def test_half_an_official_copy_is_noticed(images, monkeypatch):
    monkeypatch.setattr(imagenette, 'download', lambda url: images)
    with pytest.raises(RecipeError, match='holds 65 training and 35 validation images, not \\(9469, 3925\\)'): imagenette.find_images()

@pytest.mark.parametrize('size,woof,name',
                         [(128,False,'imagenette2-160'), (129,False,'imagenette2-320'), (225,False,'imagenette2'),
                          (64,True,'imagewoof2-160'), (256,True,'imagewoof2')])
def test_the_right_archive(monkeypatch, size, woof, name):
    asked = []
    def offline(url):
        asked.append(url)
        raise OSError('no network')
    monkeypatch.setattr(data.FastDownload, 'download', lambda self, url: offline(url))
    monkeypatch.setattr(data.FastDownload, 'data_path', lambda self, **kw: Path('no such folder'))
    with pytest.raises(RecipeError, match=f'could not download .*/{name}.tgz'): imagenette.find_images(None, size, woof)
    assert asked == [f'https://s3.amazonaws.com/fast-ai-imageclas/{name}.tgz']

def test_balanced_subset(images):
    tr,va = balanced(*split_files(images), n_items=42, seed=3)
    count = Counter((f.parent.parent.name, f.parent.name) for f in tr+va)
    assert len(set(tr+va)) == len(tr+va)
    assert [count['train',f'n{c:02}'] for c in range(10)] == [5,5] + [4]*8
    assert [count['val',f'n{c:02}'] for c in range(10)] == [round((3+c%2)*42/65) for c in range(10)]
    assert (tr,va) == balanced(*split_files(images), 42, 3) != balanced(*split_files(images), 42, 4)
    assert [len(o) for o in balanced(*split_files(images))] == [65, 35]

@pytest.fixture
def named(images, tmp_path):
    "Images under ImageNet's names, those of its validation set in both folders"
    some,rng = sorted(images.rglob('*.jpg')),random.Random(0)
    for c in range(10):
        names = [f'ILSVRC2012_val_{c:03}{i:05}.JPEG' for i in range(50)] + [f'n{c:08}_{i}.JPEG' for i in range(6)]
        for name in names:
            d = tmp_path/'named'/rng.choice(['train','val'])/f'n{c:08}'
            d.mkdir(parents=True, exist_ok=True)
            shutil.copy(some[c], d/name)
    return tmp_path/'named'

def test_first_split(cli, tiny, named, tmp_path, monkeypatch):
    "ImageNet's validation images are held out, wherever they lie; the record says so, and another split is another run"
    monkeypatch.setitem(imagenette.OFFICIAL, 'imagenette2', (500, 60))
    train,valid = imagenette.first_split(*split_files(named), 560)
    assert {f.name for fs in valid.values() for f in fs} == {f.name for f in named.rglob('ILSVRC*')}
    assert {f.name for fs in train.values() for f in fs} == {f.name for f in named.rglob('n0*.JPEG')}
    args = ['--path', named, *'--arch xresnet18 --size 32 --bs 16 --epochs 1 --workers 0 --preset article --resume --out'.split(),
            tmp_path/'out']
    assert cli('imagenette', *args)[0] == 0
    data = read_records(tmp_path/'out'/'records.jsonl')[0]['data']
    assert (data['split'], data['train'], data['valid']) == ('v1', 60, 500)
    status,_,err = cli('imagenette', *args, '--split', 'v2')
    assert status == 2 and 'data with split v1, not v2' in err

@pytest.mark.parametrize('what', ['one is missing', 'another name'])
def test_first_split_needs_all_images(named, what):
    f = next(named.rglob('ILSVRC*'))
    f.unlink() if what == 'one is missing' else f.rename(f.with_name('n1_77.JPEG'))
    with pytest.raises(RecipeError, match='--split v1: .* 499 of them'): imagenette.first_split(*split_files(named))

@pytest.mark.data
def test_first_split_of_the_archives(data_path):
    train,valid = imagenette.first_split(*split_files(imagenette.find_images(data_path)[0]), 13394)
    assert (sum(map(len, train.values())), sum(map(len, valid.values()))) == (12894, 500)

def batches(path, seed, workers=0, aug='crop', valid=False, **kwargs):
    set_seed(seed)
    dl = imagenette.get_dls(*balanced(*split_files(path)), 32, 16, aug, workers=workers, **kwargs)[valid]
    dl.rng = random.Random(seed)
    return list(dl) if kwargs else [x for x,_ in dl]

@pytest.mark.parametrize('aug', imagenette.AUGS)
def test_augmentation_does_not_depend_on_workers(images, aug):
    a,b,c,d = (batches(images, *o, aug) for o in [(1,0), (1,1), (1,3), (2,0)])
    assert len(a) == 4
    for x,y,z,other in zip(a, b, c, d): assert torch.equal(x, y) and torch.equal(x, z) and not torch.equal(x, other)

def test_augmentation_leaves_the_generator_alone(images):
    "What is drawn after a batch must not follow from its last item"
    dl = imagenette.get_dls(*balanced(*split_files(images)), 32, 16, workers=0).train
    it = iter(dl)
    next(it)
    random.seed(5)
    next(it)
    after = random.random()
    random.seed(5)
    assert after == random.random()

@pytest.mark.parametrize('damage', ['cut', 'text', 'empty', 'header'])
# fastai reads the first by itself
@pytest.mark.parametrize('workers,name', [(0,'val/n03/1.jpg'), (2,'val/n03/1.jpg'), (0,'train/n00/0.jpg')])
def test_unreadable_image_is_named(cli, images, tmp_path, damage, workers, name):
    path = shutil.copytree(images, tmp_path/'images')
    f = path/name
    b = f.read_bytes()
    f.write_bytes(dict(cut=b[:len(b)//2], text=b'no image', empty=b'', header=short_header())[damage])
    status,out,err = cli('imagenette', '--path', path, '--out', tmp_path/'out', '--workers', workers,
                         *'--arch xresnet18 --size 32 --bs 32 --epochs 1'.split())
    assert status == 2 and len(err.splitlines()) == 1 and f'{f} is no image that can be read' in err, err

# Images in memory

@pytest.fixture
def unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'UNPACKED', tmp_path/'unpacked')
    return tmp_path/'unpacked'

@pytest.fixture
def sized(images, tmp_path, unpacked):
    "The images, in sizes of their own"
    path,rng = shutil.copytree(images, tmp_path/'sized'),random.Random(0)
    for f in path.rglob('*.jpg'): Image.open(f).resize((rng.randint(33, 90), rng.randint(33, 90))).save(f, quality=95)
    return path

def all_files(path): return [f for part in split_files(path) for fs in part.values() for f in fs]

@pytest.mark.parametrize('aug', imagenette.AUGS)
@pytest.mark.parametrize('valid', [False, True])
def test_images_in_memory_are_those_of_the_files(sized, aug, valid):
    "The same items in the same order, the same crops, mirrored or not; every pixel as Pillow has it, before it rounds, twice"
    slow,fast = (batches(sized, 5, aug=aug, valid=valid, norm=False, images=o) for o in (None, in_memory.decoded(all_files(sized))))
    assert len(slow) == len(fast) == (3 if valid else 4)
    for (x,y),(u,v) in zip(slow, fast):
        assert torch.equal(y, v) and type(u) is type(x) and type(v) is type(y)
        assert 255*(x-u).abs().max() < 1.01 and (x-u).abs().mean() < .4/255

def test_crops_in_memory_depend_on_item_and_epoch_alone(sized):
    images = in_memory.decoded(all_files(sized))
    a,b,other = (batches(sized, seed, images=images) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for (x,_),(y,_) in zip(a, b)) and not torch.equal(a[0][0], other[0][0])
    random.seed(5)
    dl = imagenette.get_dls(*balanced(*split_files(sized)), 32, 16, images=images).train
    before = random.getstate()
    list(dl)
    assert random.getstate() == before

def test_images_are_decoded_once(sized, unpacked, monkeypatch):
    "For all runs, splits and processes; those that have changed, again"
    files,read = all_files(sized),[]
    monkeypatch.setattr(in_memory, 'read_image', lambda f: read.append(f) or Image.open(f).convert('RGB'))
    a,b = in_memory.decoded(files, 2),in_memory.decoded(files[::-1], 0)
    assert sorted(read) == sorted(files) and torch.equal(a.pixels, b.pixels) and len(a.pixels) == sum(w*h for (w,h),_ in a.places.values())
    old = files[7].read_bytes()
    Image.new('RGB', (50, 40), 'red').save(files[7])
    files[7].write_bytes(files[7].read_bytes().ljust(len(old), b'\0')) # as long as it was
    assert files[7].stat().st_size == len(old)
    changed = in_memory.decoded(files)
    size,first = changed.places[files[7]]
    assert len(read) == 2*len(files) and size == [50,40]
    assert (changed.pixels[first:first+50*40].float().mean(0) > 250).tolist() == [True, False, False]

def test_several_processes_decode_at_once(sized, unpacked, monkeypatch):
    raw = in_memory._raw
    monkeypatch.setattr(in_memory, '_raw', lambda f: time.sleep(.005) or raw(f)) # so that all have come before the first is done
    assert [ended(pid) for pid in [forked(partial(in_memory.decoded, all_files(sized), 1)) for _ in range(4)]] == [0]*4
    folder, = unpacked.glob('[!.]*')
    assert sorted(f.name for f in folder.iterdir()) == ['pixels', 'sizes.json'] and not list(unpacked.glob('.making-*[!k]'))

@pytest.mark.parametrize('damage', ['pixels cut', 'no sizes', 'other sizes'])
def test_damaged_memory_is_named(sized, unpacked, damage):
    in_memory.decoded(all_files(sized))
    folder, = unpacked.glob('[!.]*')
    if damage == 'pixels cut': os.truncate(folder/'pixels', 300)
    if damage == 'no sizes': (folder/'sizes.json').unlink()
    if damage == 'other sizes': (folder/'sizes.json').write_text('[[1, 2]]')
    with pytest.raises(RecipeError, match=f'{folder} is damaged .*: delete it'): in_memory.decoded(all_files(sized))

def test_unreadable_image_is_named_when_it_is_decoded(cli, sized, unpacked, tmp_path):
    (f := sized/'train'/'n03'/'1.jpg').write_bytes(b'no image')
    status,_,err = cli('imagenette', '--path', sized, '--out', tmp_path/'out', '--in-memory', *'--arch xresnet18 --size 32 --bs 32'.split())
    assert status == 2 and len(err.splitlines()) == 1 and f'{f} is no image that can be read' in err and not list(unpacked.glob('[!.]*'))

@pytest.mark.data
@pytest.mark.parametrize('aug', imagenette.AUGS)
def test_photographs_in_memory_are_those_of_the_files(data_path, unpacked, aug):
    train,valid = ([fs[i] for fs in part.values() for i in (0, 7)] for part in split_files(imagenette.find_images(data_path)[0]))
    def first(**kwargs):
        dl = imagenette.get_dls(train, valid, 128, 16, aug, norm=False, workers=0, **kwargs).train
        dl.rng = random.Random(0)
        return dl.one_batch()[0]
    assert 255*(first() - first(images=in_memory.decoded(train+valid))).abs().max() < 1.01
