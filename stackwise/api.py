"""StackWise from Python and notebooks, without an engine: racks that grow, their data, their weights, their texts.

Everything here goes through the code that the pipeline's stages run: the same parameters give the same bytes.
"""

from stackwise.config.generation import GenerationParams
from stackwise.errors import UserError
from stackwise.generation.generator import TextGenerator
from stackwise.interactive.building import ProgressiveRackBuilder
from stackwise.interactive.configuring import StackWiseConfig
from stackwise.interactive.finetuning import FineTuner, TextClassifier
from stackwise.interactive.growing import ProgressiveTrainer
from stackwise.interactive.loading import ProgressiveDataLoader
from stackwise.interactive.tuning import UnifiedTrainer

__all__ = [
    "FineTuner",
    "GenerationParams",
    "ProgressiveDataLoader",
    "ProgressiveRackBuilder",
    "ProgressiveTrainer",
    "StackWiseConfig",
    "TextClassifier",
    "TextGenerator",
    "UnifiedTrainer",
    "UserError",
]
