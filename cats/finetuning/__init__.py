"""LoRA and full fine-tuning with the mask on, fairly compared (paper fig. 2 and 5)."""

from cats.finetuning.data import TrainingText, load
from cats.finetuning.recipe import Recipe
from cats.finetuning.run import Trained, finetune, save

__all__ = ["Recipe", "Trained", "TrainingText", "finetune", "load", "save"]
