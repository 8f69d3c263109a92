"""A seeded mutator of what checkpoints are made of: nests of dicts, lists, numbers and tensors, and the files that hold them."""
import io
import math
import os
import pickle
import zipfile

import torch

class RunsCode:
    "Makes the file `path` when it is unpickled"
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f'touch {self.path}',)

def copied(o):
    "A copy of a nest of dicts and lists, its tensors shared"
    if isinstance(o, dict): return {k: copied(v) for k,v in o.items()}
    return [copied(v) for v in o] if isinstance(o, (list, tuple)) or type(o).__name__ == 'L' else o

def places(o, at=()):
    "The path of every item in a nest"
    items = o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, list) else ()
    for k,v in items:
        yield (*at, k)
        yield from places(v, (*at, k))

def get(o, path):
    for k in path: o = o[k]
    return o

def with_one(t, x):
    "A copy of the tensor `t`, its first element `x`"
    t = t.clone()
    t.view(-1)[:1] = x if t.is_floating_point() else 7
    return t

tensors = { # what may stand for a tensor
    'shape':       lambda t, rng: torch.zeros(*t.shape, 2, dtype=t.dtype),
    'transposed':  lambda t, rng: t.reshape(tuple(reversed(t.shape))),
    'flat':        lambda t, rng: t.reshape(-1),
    'broadcasts':  lambda t, rng: torch.ones((1,)*t.dim(), dtype=t.dtype),
    'empty':       lambda t, rng: torch.zeros(0, dtype=t.dtype),
    'integers':    lambda t, rng: t.round().long(),
    'booleans':    lambda t, rng: t > 0,
    'complex':     lambda t, rng: t.to(torch.complex64),
    'half':        lambda t, rng: t.half(),
    'float32':     lambda t, rng: t.float(),
    'bfloat16':    lambda t, rng: t.bfloat16(),
    'float8':      lambda t, rng: t.to(torch.float8_e4m3fn),
    'nan':         lambda t, rng: with_one(t, math.nan),
    'inf':         lambda t, rng: with_one(t, rng.choice([math.inf, -math.inf])),
    'negative':    lambda t, rng: with_one(t, -1.),
    'huge':        lambda t, rng: with_one(t.double(), 1e300),
    'sparse':      lambda t, rng: t.to_sparse() if t.dim() else t.reshape(1).to_sparse(),
    'meta':        lambda t, rng: t.to('meta'),
    'strided':     lambda t, rng: torch.stack([t, t], -1)[..., 0],
    'expanded':    lambda t, rng: torch.ones((), dtype=t.dtype).expand(t.shape),
    'with gradient': lambda t, rng: t.clone().requires_grad_() if t.is_floating_point() else t,
}
numbers = [-1, 0, 1, 2.5, -.5, 1., .5, 10**9, 2**60, 10**400, -10**400, 1e300, 1e-300, math.nan, math.inf, -math.inf, True, False, 1j]
others = [None, '', 'x', '0.1', 'nan', [], {}, [1., 2.], {'x': 1}, (.9, .99, .5), b'x']

def junk(v, rng):
    "Something else in place of `v`, and what"
    if isinstance(v, torch.Tensor) and rng.random() < .8:
        how = rng.choice(list(tensors))
        return tensors[how](v, rng), how
    if isinstance(v, (int, float)) and rng.random() < .2: return torch.tensor(rng.choice([[.1], [1., 2.], 7.])), 'tensor'
    new = rng.choice(numbers if rng.random() < .6 else others)
    return copied(new), repr(new)[:20]

def mutate(o, rng):
    "A nest with one change, the path of what was changed, and how"
    o = copied(o)
    path = rng.choice(list(places(o)))
    holder,k = get(o, path[:-1]),path[-1]
    how = rng.choice(['junk', 'junk', 'junk', 'junk', 'cut', 'add', 'rename', 'twice', 'swap'])
    if how == 'junk': holder[k],how = junk(holder[k], rng)
    elif how == 'cut': del holder[k]
    elif how == 'add' and isinstance(holder, dict):
        holder[rng.choice(['x', 99, 'slow_weights', 'exp_avg', 'grad_avg', 'do_wd', 'waited'])] = junk(1, rng)[0]
    elif how == 'rename' and isinstance(holder, dict): holder[rng.choice(['x', f'{k}_', 99])] = holder.pop(k)
    elif how == 'twice' and isinstance(holder, list): holder.insert(k, holder[k])
    else:
        how,(a,b) = 'swap',(rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder)) for _ in 'ab')
        holder[a],holder[b] = holder[b],holder[a]
    return o,path,how

def damage(data, rng):
    "Bytes with one damage, and which"
    b,how = bytearray(data),rng.choice(['cut', 'flip', 'zero', 'append', 'prepend', 'swap', 'gone'])
    i = rng.randrange(len(b))
    if how == 'cut': b = b[:i]
    if how == 'flip': b[i] ^= 1 << rng.randrange(8)
    if how == 'zero': b[i:i+64] = bytes(len(b[i:i+64]))
    if how == 'append': b += rng.randbytes(99)
    if how == 'prepend': b = rng.randbytes(9) + b
    if how == 'swap': b[i:i+200] = b[i:i+200][::-1]
    if how == 'gone': b[i:i+rng.randrange(1, 99)] = b''
    return bytes(b),how

def forge(data, rng):
    "A zip archive whose parts were changed by someone who knows about checksums, and how"
    old,out,how = zipfile.ZipFile(io.BytesIO(data)),io.BytesIO(),''
    names = [i.filename for i in old.infolist()]
    target = next(n for n in names if n.endswith('data.pkl')) if rng.random() < .7 else rng.choice(names)
    with zipfile.ZipFile(out, 'w') as new:
        for n in names:
            part = old.read(n)
            if n == target and (how := rng.choice(['damaged', 'damaged', 'damaged', 'missing', 'twice', 'outside'])) == 'damaged':
                part,how = damage(part, rng)
            if n == target and how == 'missing': continue
            if n == target and how == 'twice': new.writestr(n + '.', part)
            new.writestr(f'../{n}' if n == target and how == 'outside' else n, part)
    return out.getvalue(),f'{target.partition("/")[2]}: {how}'

def evil_pickles(path):
    "Pickles that make the file `path` when they are read without care, by name"
    cmd = f'touch {path}'
    code = f"open({str(path)!r}, 'w')"
    return {
        'reduce, protocol 0': pickle.dumps(RunsCode(path), 0), 'reduce, protocol 2': pickle.dumps(RunsCode(path), 2),
        'reduce, protocol 5': pickle.dumps(RunsCode(path), 5),
        'system':  f"cposix\nsystem\n(S'{cmd}'\ntR.".encode(), 'eval': b"cbuiltins\neval\n(V" + code.encode() + b"\ntR.",
        'exec':    b"cbuiltins\nexec\n(V" + code.encode() + b"\ntR.", 'inst': b"(V" + code.encode() + b"\nibuiltins\neval\n.",
        'object':  b"(cbuiltins\neval\nV" + code.encode() + b"\no.",
        'getattr': b"cbuiltins\ngetattr\n(cos\n__dict__\nV" + cmd.encode() + b"\ntR.",
        'partial': b"cfunctools\npartial\n(cos\nsystem\nV" + cmd.encode() + b"\ntR)R.",
        'torch.load': b"ctorch\nload\n(V" + code.encode() + b"\ntR.",
        'build':   b"ccollections\nOrderedDict\n)R}V__setstate__\ncos\nsystem\nsbV" + cmd.encode() + b"\nb.",
        'numpy':   b"cnumpy.testing._private.utils\nrunstring\n(V" + code.encode() + b"\n}tR.",
        'inline': b"ctorch._inductor.codecache\n_reload_python_module\n(VX\nVY\ntR."}

def archive(pickled):
    "A file as `torch.save` writes it, around any pickle"
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as z:
        z.writestr('archive/data.pkl', pickled)
        z.writestr('archive/byteorder', 'little')
        z.writestr('archive/version', '3\n')
    return out.getvalue()
