"""Training: `run` for configurations in the original's format (`liif-fast train`), `budget` for a folder of pictures.

run.py -> {step.py, state.py, log.py}; budget.py made the weights that come with the package.
"""

from liif_fast.training.run import TrainingError, train
from liif_fast.training.state import ResumeError
from liif_fast.training.step import StepOptions, Stepper

__all__ = ["ResumeError", "StepOptions", "Stepper", "TrainingError", "train"]
