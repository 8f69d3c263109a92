"""Text is read whole and in order, models see no future, and a run is a function of seed and epoch."""
import hashlib
import math
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.torch_core import set_seed

from helpers import Stop, equal_jobs
from radam_fastai.experiments.language import (
    SIZES,
    LSTMSettings,
    Transformer,
    TransformerSettings,
    awd_lstm_learner,
    find_text,
    get_vocab,
    lm_dls,
    markov_text,
    sinusoids,
    transformer_learner,
)
from radam_fastai.optimizer import RAdamFn
from radam_fastai.recipes import data
from radam_fastai.recipes.checkpoint import SeedEpochs, start_at
from radam_fastai.recipes.cli import OptionError
from radam_fastai.recipes.jobs import Run, run_job

pytestmark = pytest.mark.slow

nets = dict(language=dict(emb_sz=8, n_hid=12, n_layers=2, drop_mult=.5, alpha=2., beta=1.),
            **{'adam-2k': dict(d_model=8, n_heads=2, n_layers=2, dropout=.1, norm_first=False)})
makers = dict(language=awd_lstm_learner, **{'adam-2k': transformer_learner})
settings = dict(language=LSTMSettings, **{'adam-2k': TransformerSettings})
both = pytest.mark.parametrize('kind', nets)

@pytest.fixture(scope='module')
def text():
    "Training and validation tokens, and their vocabulary"
    tokens,_ = markov_text(1000, n_words=20)
    return tokens[:700],tokens[700:],get_vocab(tokens[:700], 24)

def learner(text, kind, bs=4, seq_len=5, **o):
    train,valid,vocab = text
    return makers[kind](lm_dls(train, valid, vocab, bs, seq_len), len(vocab), RAdamFn, settings[kind](**{**nets[kind], **o}))

# The text that is written for the purpose

def test_written_text_never_changes():
    tokens,_ = markov_text(5000)
    assert hashlib.sha256(' '.join(tokens).encode()).hexdigest()[:16] == '0d149cf979756efd'
    assert markov_text(5000, seed=1)[0] != tokens

def test_probabilities_are_those_of_the_text():
    "How often a word follows two others, counted, is how probable the author says it is"
    tokens,nats = markov_text(200_000, n_words=8)
    names,ids = np.unique(tokens, return_inverse=True)
    assert len(names) == 8 and len(nats) == len(tokens)
    counts = np.zeros((8,8,8))
    np.add.at(counts, (ids[:-2], ids[1:-1], ids[2:]), 1)
    freq = counts/counts.sum(-1, keepdims=True).clip(1)
    often = counts.sum(-1)[ids[:-2], ids[1:-1]] > 1000
    found,said = freq[ids[:-2], ids[1:-1], ids[2:]][often],np.exp(-nats[2:])[often]
    assert often.mean() > .9 and abs(found-said).max() < .04
    assert nats.mean() == pytest.approx(-np.log(freq[ids[:-2], ids[1:-1], ids[2:]]).mean(), abs=.002)

def test_bound_is_below_what_frequencies_give():
    tokens,nats = markov_text()
    p = np.unique(tokens, return_counts=True)[1]/len(tokens)
    assert len(p) == 1000 and nats.mean() < .6*-(p@np.log(p)) < .6*math.log(1000)
    train,valid,about = find_text()
    assert (train+valid, len(valid)) == (tokens, 20_000) and (about['tokens'], about['valid_tokens']) == (200_000, 20_000)
    assert about['best_perplexity'] == pytest.approx(math.exp(nats[200_000:].mean()), abs=1e-3)

# Files

files = dict(train=' \n = A <unk> = \n \n b c .\n', valid='b .\n')

@pytest.fixture
def folder(tmp_path):
    for k,v in files.items(): (tmp_path/f'{k}.txt').write_text(v)
    return tmp_path

def test_files(folder):
    train,valid,about = find_text(folder)
    assert train == ['<eos>','=','A','<unk>','=','<eos>','<eos>','b','c','.','<eos>'] and valid == ['b','.','<eos>']
    assert {k: about[k] for k in ('name','source','tokens','valid_tokens')} == dict(name=folder.name, source='a folder', tokens=11,
                                                                                    valid_tokens=3)
    digests = {about['digest']}
    for k,v in dict(train=files['train'].replace('b c', 'c b'), valid='b !\n').items():
        (folder/f'{k}.txt').write_text(v)
        digests.add(find_text(folder)[2]['digest'])
        (folder/f'{k}.txt').write_text(files[k])
    assert len(digests) == 3 and find_text(folder)[2] == about

def test_archive(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'UNPACKED', tmp_path/'unpacked')
    (tmp_path/'archives').mkdir()
    with tarfile.open(tmp_path/'archives'/'wikitext-2-small.tgz', 'w:gz') as t:
        for k in files: t.add(folder/f'{k}.txt', f'wikitext-2-small/{k}.txt')
    *texts,about = find_text(tmp_path/'archives')
    assert texts == list(find_text(folder)[:2]) and about['name'] == 'wikitext-2-small' and about['source'].startswith('archive')
    assert about['digest'] == find_text(folder)[2]['digest']

@pytest.mark.parametrize('name', ['train.txt', 'valid.txt'])
@pytest.mark.parametrize('damage,says', [(None,'holds no {}; it should hold train.txt and valid.txt'), (b' \n \n','{} is empty'),
                                         (b'\xff\xfea\n','{} is not text in UTF-8')])
def test_missing_or_damaged_file_is_named(folder, name, damage, says):
    (folder/name).unlink()
    if damage: (folder/name).write_bytes(damage)
    with pytest.raises(OptionError) as e: find_text(folder)
    assert f'--path {folder}: {says.format(name)}' in str(e.value) and len(str(e.value).splitlines()) == 1
    with pytest.raises(OptionError, match='--path .*nowhere: no such folder'): find_text(folder/'nowhere')

@pytest.mark.data
def test_wikitext(data_path):
    "As many tokens as are published for WikiText-2: our training text is its test text"
    *_,about = find_text(data_path)
    assert (about['tokens'], about['valid_tokens']) == (245_569, 217_646)

# Vocabulary and batches

def test_vocabulary():
    words = ['<unk>']*9 + ['<eos>']*8 + sum(([f'w{i}']*(100-i) for i in range(50)), [])
    for n in 8,10,16:
        vocab = get_vocab(words, n)
        known = [o for o in vocab if o != 'xxfake']
        assert known == ['<unk>','xxpad','<eos>', *(f'w{i}' for i in range(n-3))] and len(vocab)%8 == 0 and len(vocab) <= n+8
    ids = next(iter(lm_dls(words, ['w0','w3','new','<unk>','<eos>','w49'], get_vocab(words, 7), 1, 5).valid))[0]
    assert ids.tolist() == [[3, 6, 0, 0, 2]]

def stream(dl):
    "Batches as one array (n_batches, bs, seq_len)"
    x,y = (np.stack([np.asarray(o) for o in b]) for b in zip(*dl))
    return x,y

@pytest.mark.parametrize('bs,seq_len', [(1,1), (3,4), (4,5), (7,10)])
def test_batches_are_the_text(bs, seq_len):
    words = [f'{i:03}' for i in range(150)] # in alphabetical order: a token's number tells its place
    vocab = get_vocab(words, 200)
    first = vocab.index('000')
    dls = lm_dls(words, words[:100], vocab, bs, seq_len)
    for dl,n in (dls.train,150),(dls.valid,100):
        k = (n-1)//(bs*seq_len)
        x,y = stream(dl)
        start = x[0,0,0] - first
        assert dl is dls.train or start == 0
        place = start + np.arange(bs*seq_len*k) # row by row; then cut into batches
        def cut(o): return first + (o % (bs*seq_len*k+1)).reshape(bs, k, seq_len).swapaxes(0, 1)
        assert (x == cut(place)).all() and (y == cut(place+1)).all() and x.shape == (k,bs,seq_len) and len(dl) == k

def test_validation_is_the_same_for_all(text):
    train,valid,vocab = text
    dls = lm_dls(train, valid, vocab, 4, 5, n_valid=50)
    x,_ = stream(dls.valid)
    assert x.size == 40 and (stream(dls.valid)[0] == x).all()
    assert (x.swapaxes(0, 1).ravel() == [vocab.index(o) for o in valid[:40]]).all()
    assert stream(lm_dls(train, valid, vocab, 4, 5).valid)[0].size == 280

class Seen(Callback):
    def __init__(self): self.epochs = {}
    def before_batch(self):
        if self.training: self.epochs.setdefault(self.epoch, []).append(self.x.clone())

def seen(learn, seed, first=0, epochs=3):
    "The batches of each epoch"
    rec = Seen()
    with learn.no_bar(),learn.no_logging(),learn.added_cbs([SeedEpochs(seed), rec]),start_at(learn, first): learn.fit(epochs, 1e-3)
    return {k: torch.stack(v) for k,v in rec.epochs.items()}

@both
def test_an_epoch_depends_on_seed_and_epoch_alone(text, kind):
    learn = learner(text, kind, bs=10)
    a = seen(learn, 1)
    b = seen(learn, 1, first=1) # the same loader, in another state
    c = seen(learner(text, kind, bs=10), 2)
    assert list(b) == [1,2] and all(torch.equal(a[k], b[k]) for k in b)
    assert not torch.equal(a[0], a[1]) and not torch.equal(a[1], a[2]) and not torch.equal(a[0], c[0])

# Models and learners

@pytest.mark.parametrize('norm_first', [False, True])
@pytest.mark.parametrize('train', [False, True])
def test_no_future(norm_first, train):
    model,x = Transformer(30, 8, 2, 3, norm_first=norm_first).train(train),torch.randint(30, (2,9))
    with torch.set_grad_enabled(train):
        before = model(x)
        for t in range(9):
            changed = x.clone()
            changed[:,t] = (x[:,t]+1)%30
            after = model(changed)
            assert torch.equal(after[:,:t], before[:,:t]) and (after[:,t:] != before[:,t:]).any(-1).all()

def norm(h): return (h - h.mean(-1, keepdims=True))/np.sqrt(h.var(-1, keepdims=True) + 1e-5) # with the weights it has at the start

def by_hand(model, x, n_heads, norm_first):
    "The network in numpy, after arXiv:1706.03762"
    w = {k: v.detach().double().numpy() for k,v in model.named_parameters()}
    d,n = w['emb.weight'].shape[1],x.shape[1]
    h = w['emb.weight'][x]*math.sqrt(d) + [[(math.sin,math.cos)[i%2](t/10_000**((i-i%2)/d)) for i in range(d)] for t in range(n)]
    def linear(h, name, sep='.'): return h@w[f'{name}{sep}weight'].T + w[f'{name}{sep}bias']
    def attend(h, at):
        q,k,v = linear(h, f'{at}self_attn.in_proj', '_').reshape(*x.shape, 3, n_heads, d//n_heads).transpose(2,0,3,1,4)
        score = np.exp(q@k.swapaxes(-1,-2)/math.sqrt(d//n_heads))*np.tri(n)
        return linear((score/score.sum(-1, keepdims=True)@v).swapaxes(1,2).reshape(h.shape), f'{at}self_attn.out_proj')
    for l in range(len(model.layers)):
        at = f'layers.{l}.'
        for branch in (lambda h: attend(h, at)),(lambda h: linear(linear(h, at+'linear1').clip(0), at+'linear2')):
            h = h + branch(norm(h)) if norm_first else norm(h + branch(h))
    return (norm(h) if norm_first else h)@w['emb.weight'].T

@pytest.mark.parametrize('norm_first', [False, True])
def test_network_by_hand(text, norm_first):
    model,x = learner(text, 'adam-2k', norm_first=norm_first, dropout=0.).model,torch.randint(24, (3,7))
    for k,p in model.named_parameters():
        if k.endswith('bias') and 'norm' not in k: torch.nn.init.normal_(p)
    want = by_hand(model, x.numpy(), 2, norm_first)
    for grad in True,False: # PyTorch has a path of its own for networks that are not trained
        with torch.set_grad_enabled(grad): np.testing.assert_allclose(model.train(grad)(x).detach(), want, atol=1e-4, rtol=1e-4)

def test_places():
    n,d = 300,8
    np.testing.assert_allclose(sinusoids(n, d), [[(np.sin,np.cos)[i%2](t/10_000**(2*(i//2)/d)) for i in range(d)] for t in range(n)],
                               atol=1e-4)

def test_weights_begin_as_they_should():
    "Xavier's uniform distribution for matrices, that of the original for the vectors of tokens"
    model = Transformer(1000, 16, 2, 3)
    assert model.emb.weight.std().item() == pytest.approx(.25, rel=.03)
    ratios = [p.abs().max().item()/math.sqrt(6/sum(p.shape)) for p in model.layers.parameters() if p.dim() > 1]
    assert len(ratios) == 12 and all(.95 < r <= 1 for r in ratios)

def test_layers_begin_different():
    layers = Transformer(30, 8, 2, 3).layers
    assert not any(torch.equal(p, q) for p,q in zip(layers[0].parameters(), layers[1].parameters()) if p.dim() > 1)

def n_transformer(v, d, l, norm_first): return v*d + l*(12*d*d + 13*d) + 2*d*norm_first

def n_awd_lstm(v, e, h, l):
    sizes = [e, *[h]*(l-1), e]
    return v*e + v + sum(4*o*(i+o+2) for i,o in zip(sizes, sizes[1:]))

@pytest.mark.parametrize('size', ['small', 'paper'])
def test_sizes(text, size):
    "As many weights as counted by hand; nothing is filled with numbers"
    dls = lm_dls(*text, 4, 5)
    for kind,make in makers.items():
        o = SIZES[kind][size]
        v = o['max_vocab']+8
        with torch.device('meta'): model = make(dls, v, RAdamFn, settings[kind](**o)).model
        n = sum(p.numel() for p in model.parameters())
        assert n == (n_awd_lstm(v, o['emb_sz'], o['n_hid'], o['n_layers']) if kind=='language'
                     else n_transformer(v, o['d_model'], o['n_layers'], o['norm_first']))
    with torch.device('meta'):
        assert sum(p.numel() for p in Transformer(50, 8, 2, 3, norm_first=True).parameters()) == n_transformer(50, 8, 3, True)

@both
def test_loss_and_perplexity_are_means_over_tokens(text, kind):
    learn = learner(text, kind)
    with learn.no_bar(): loss,acc,perplexity = learn.validate()
    model,losses,right = learn.model.eval(),[],[]
    if kind == 'language': model.reset()
    with torch.no_grad():
        for x,y in learn.dls.valid:
            out = model(x)
            logits = (out[0] if kind=='language' else out).as_subclass(torch.Tensor).double()
            losses += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction='none').tolist()
            right += (logits.argmax(-1) == y).flatten().tolist()
    assert len(losses) == 280 and loss == pytest.approx(np.mean(losses), rel=1e-5) and acc == pytest.approx(np.mean(right))
    assert perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)

@both
def test_weights_depend_on_the_seed(text, kind):
    def weights(seed):
        set_seed(seed)
        return [*learner(text, kind).model.state_dict().values()]
    a,b,c = map(weights, (1,1,2))
    assert all(map(torch.equal, a, b)) and not all(map(torch.equal, a, c))

@both
def test_settings_arrive(text, kind):
    learn = learner(text, kind)
    learn.create_opt()
    kept = {n for n,p in learn.model.named_parameters() if not learn.opt.state[p].get('do_wd', True)}
    if kind == 'language':
        core = learn.model[0]
        assert (core.input_dp.p, core.rnns[0].weight_p, learn.model[1].output_dp.p) == pytest.approx((.125, .1, .05))
        assert (learn.rnn_regularizer.alpha, learn.rnn_regularizer.beta) == (2., 1.) and kept == {'1.decoder.bias'}
    else:
        assert learn.model.drop.p == learn.model.layers[0].dropout.p == learn.model.layers[0].self_attn.dropout == .1
        assert {n for n in kept if 'norm' in n} == {n for n,_ in learn.model.named_parameters() if 'norm' in n} != set()

@both
def test_resumed_equals_uninterrupted(text, tiny, kind, tmp_path):
    "Also what the hidden state would tell an epoch of the one before"
    def job(out, *cbs, **kw):
        def make(): return learner(text, kind, bs=8).add_cbs(cbs)
        return run_job([Run(f'{kind}-1', 1, dict(opt='radam'), make, lambda l: l.fit_flat_cos(3, 1e-2), dict(name='markov_text'))], out,
                       kind, keep=True, **kw)
    n = len(learner(text, kind, bs=8).dls.train)
    job(tmp_path/'whole')
    with pytest.raises(KeyboardInterrupt): job(tmp_path/'part', Stop(n+n//2))
    record, = job(tmp_path/'part', resume=True)
    assert [s['epoch'] for s in record['sittings']] == [0,1] and record['epochs'][-1]['perplexity'] > 1
    equal_jobs(tmp_path/'whole', tmp_path/'part')

# Options

@pytest.mark.parametrize('n_train,n_valid,which', [(20,21,'training'), (21,20,'validation')])
def test_text_too_short(text, n_train, n_valid, which):
    train,valid,vocab = text
    assert [len(o) for o in lm_dls(train[:21], valid, vocab, 4, 5, 21).loaders] == [1,1]
    with pytest.raises(OptionError, match=f'--bs 4: a batch with 5 tokens in a row needs 21 tokens, the {which} text has 20'):
        lm_dls(train[:n_train], valid, vocab, 4, 5, n_valid)
