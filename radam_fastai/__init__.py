"""# radam_fastai

> RAdam for fastai: a fast, faithful optimizer, callbacks that show its rectifier, and recipes anyone can run

Rectified Adam ([Liu et al., ICLR 2020](https://arxiv.org/abs/1908.03265)) is Adam with a built-in warm-up. Adam's first
updates divide by an average of very few squared gradients. RAdam takes momentum steps until that average means something, then phases the
adaptive learning rate in, by a factor $r_t$ that follows from β2 alone.

Modules:

- `radam_fastai.advisor`: How long will the rectifier hold the learning rate back in *this* run, and is that what you want?
- `radam_fastai.all`: `from radam_fastai.all import *`, after fastai's own, is all that a notebook needs
- `radam_fastai.baselines`: Adam, its warm-ups, Adam-2k, Adam with a large eps and momentum SGD, each an `opt_func` on the same fused step
- `radam_fastai.bench.callbacks`: The time of a training step with none, each and all of the callbacks
- `radam_fastai.bench.gpu`: Tests, measurements and training, the most wanted first, in the minutes that there are
- `radam_fastai.bench.growth`: One step over 10 to 10,000 tensors of 64 to 10 million numbers each
- `radam_fastai.bench.main`: One command: an optimizer step, the callbacks, a training step, and all of them on a GPU
- `radam_fastai.bench.step`: Every optimizer's step beside the others', timed in turn on your machine
- `radam_fastai.bench.train`: The recipe's settings beside those of fastai's own training script, in images a second
- `radam_fastai.bucket`: Sort parameters into lists that one kernel call can update, and remember the sorting until something changes
- `radam_fastai.callback`: `from radam_fastai.callback import RectifierRecorder`: every callback, from one module
- `radam_fastai.checkpoint`: One reading of the states that fastai, PyTorch and RAdam's authors save, with errors that say what does not fit
- `radam_fastai.experiments.images`: ResNet-20 on CIFAR-10: does RAdam forgive a wrong learning rate, and does it replace a tuned warm-up?
- `radam_fastai.experiments.language`: Two experiments on text: an AWD-LSTM, and a transformer trained without a warm-up
- `radam_fastai.experiments.main`: `radam-experiment NAME`: each claim about RAdam as one command, beside its alternatives
- `radam_fastai.experiments.sweep`: A question, the runs that answer it, and the tables and figures that show the answer
- `radam_fastai.experiments.theory`: The variance that RAdam tames, and the β2 up to which it stays momentum SGD
- `radam_fastai.files`: Files that are whole, or as they were before
- `radam_fastai.finder`: fastai's finder, over the learning rate that an update actually applies
- `radam_fastai.functional`: The rectified step over lists of tensors: AdamW's fused kernel with another scalar
- `radam_fastai.gradients`: What the first gradients look like, and how far Adam's denominator can be trusted: two callbacks that measure it
- `radam_fastai.guard`: Stop before the update that a bad batch would ruin, keep what was good, and load it again completely or not at all
- `radam_fastai.introspect`: What the rectifier of any optimizer in a `Learner` is doing right now
- `radam_fastai.loggers`: Send what the rectifier did to any experiment tracker, and keep a failing logger from ending the run
- `radam_fastai.optimizer`: RAdam and Ranger for a `Learner`: fastai's signatures, states and numbers, at the speed of a fused kernel
- `radam_fastai.plot`: Every figure of the package, drawn from plain data
- `radam_fastai.readout`: For Learners that were exported when `introspect` had this name
- `radam_fastai.recipes.checkpoint`: A killed run continues with the epoch it was in, and ends with the numbers of an uninterrupted run
- `radam_fastai.recipes.cli`: How the commands of this package read their options, and how they end
- `radam_fastai.recipes.data`: Archives and folders that are checked before use, and crops that do not depend on who reads an image
- `radam_fastai.recipes.demo`: What RAdam is for, on handwritten digits: `radam-demo` needs no download, no GPU and no patience
- `radam_fastai.recipes.distributed`: `accelerate launch` shares the batches of a run among processes, and the run stays the same run
- `radam_fastai.recipes.imagenette`: XResNets on ten classes of ImageNet, the 5-epoch leaderboard run of fastai: `radam-imagenette`
- `radam_fastai.recipes.in_memory`: Decoded once, then cropped and resized in batches, on the device that trains
- `radam_fastai.recipes.jobs`: One runner for all recipes: records, checkpoints, and a job that can be killed at any moment
- `radam_fastai.recipes.optims`: The settings of a run: an optimizer and a schedule by name, and their numbers
- `radam_fastai.recipes.parallel`: Runs side by side: on the cores and GPUs of one machine, or on a Ray or Dask cluster
- `radam_fastai.recipes.precision`: Mixed precision on the device that has the batches, a CPU included, and what this machine does fastest
- `radam_fastai.recipes.presets`: The settings of published Imagenette runs, as data, each with its published figure and its source
- `radam_fastai.recipes.records`: A line of JSON for every run: its settings, what it ran on, and every number that came out
- `radam_fastai.recipes.report`: Tables and figures from records alone, beside what others have published
- `radam_fastai.recorder`: What the rectifier did at every update of a run: `learn.rectifier`
- `radam_fastai.rectify`: How far Adam's adaptive learning rate can be trusted after `t` gradients, as one number per step
- `radam_fastai.schedule_free`: `schedulefree.RAdamScheduleFree` in a `Learner`: no warm-up, no schedule, no length to fix in advance
- `radam_fastai.torch_optim`: The same update as a `torch.optim.Optimizer`, and an `OptimWrapper` that brings it to a `Learner`
- `radam_fastai.warmup`: For Learners that were exported when the baselines and the advisor were one module
- `radam_fastai.watching`: For callbacks that watch: when to begin, when an update is over, and what to do if looking fails"""

__version__ = "0.1.0"
