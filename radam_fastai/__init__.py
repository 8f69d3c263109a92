"""# radam_fastai

> RAdam for fastai: a drop-in optimizer as fast as PyTorch's fused AdamW, callbacks that show what it does to your learning rate, and recipes that reproduce the runs that made it known

Rectified Adam ([Liu et al., ICLR 2020](https://arxiv.org/abs/1908.03265)) is Adam with a built-in warm-up. Adam's first updates divide by an average of very few squared gradients. RAdam takes momentum steps until that average means something, then phases the adaptive learning rate in, by a factor $r_t$ that follows from β2 alone.

Modules:

- `radam_fastai.advisor`: How long will the rectifier hold the learning rate back in *this* run, and is that what you want?
- `radam_fastai.all`: `from radam_fastai.all import *`, after fastai's own, is all that a notebook needs
- `radam_fastai.baselines`: Adam, its warm-ups, Adam-2k, Adam with a large eps and momentum SGD, each as an `opt_func` on the same fused step
- `radam_fastai.callback`: `from radam_fastai.callback import RectifierRecorder`: every callback, from one module
- `radam_fastai.finder`: fastai's finder, over the learning rate that an update actually applies
- `radam_fastai.functional`: The rectified step over lists of tensors: AdamW's fused kernel with another scalar
- `radam_fastai.gradients`: What the gradients look like in the first updates, and how far Adam's denominator can be trusted there: two callbacks that measure it
- `radam_fastai.guard`: Stop before the update that a bad batch would ruin, keep what was good, and load it again completely or not at all
- `radam_fastai.loggers`: Send what the rectifier did to any experiment tracker, and keep a failing logger from ending the run
- `radam_fastai.optimizer`: RAdam and Ranger for `Learner(..., opt_func=...)`: fastai's signatures, hyper-parameters, states and numbers, at the speed of a fused kernel
- `radam_fastai.recorder`: What the rectifier did at every update of a run: `learn.rectifier`
- `radam_fastai.rectify`: How far Adam's adaptive learning rate can be trusted after `t` gradients, as one number per step
- `radam_fastai.schedule_free`: `schedulefree.RAdamScheduleFree` in a `Learner`: no warm-up, no schedule, no length to fix in advance
- `radam_fastai.torch_optim`: The same update as a `torch.optim.Optimizer`, and an `OptimWrapper` that brings it to a `Learner` without losing what fastai knows about its parameters"""

__version__ = "0.1.0"
