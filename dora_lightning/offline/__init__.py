"""What can be done with a finished run: merge its adapter into the base, and talk to the model."""

from dora_lightning.offline.commands import generate, merge
from dora_lightning.offline.models import load_finished

__all__ = ["generate", "load_finished", "merge"]
