from .. import recipes # noqa: F401 (before fastai, whose import warns)
