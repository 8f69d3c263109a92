"""Modules:

- `radam_fastai.functional`: The rectified step over lists of tensors: AdamW's fused kernel with another scalar
- `radam_fastai.optimizer`: RAdam and Ranger for `Learner(..., opt_func=...)`: fastai's signatures, hyper-parameters, states and numbers, at the speed of a fused kernel
- `radam_fastai.rectify`: How far Adam's adaptive learning rate can be trusted after `t` gradients, as one number per step
- `radam_fastai.torch_optim`: The same rule as a `torch.optim.Optimizer`, and an `OptimWrapper` that brings it to a `Learner` without losing what fastai knows about its parameters"""

__version__ = "0.1.0"
