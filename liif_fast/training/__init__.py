"""Training from configurations in the original's format (`liif-fast train`): run.py, over step.py, state.py, log.py."""

from liif_fast.training.run import TrainingError, train
from liif_fast.training.state import ResumeError
from liif_fast.training.step import StepOptions, Stepper

__all__ = ["ResumeError", "StepOptions", "Stepper", "TrainingError", "train"]
