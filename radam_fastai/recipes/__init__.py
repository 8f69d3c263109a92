"Recipes; the first import is of a filter: fastai 2.8 uses `torch.jit.script`, whose deprecation is no news to who runs a command"
import warnings

warnings.filterwarnings('ignore', '`torch.jit.script`', FutureWarning)
