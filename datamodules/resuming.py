"""Going on in the middle of an epoch with exactly the batches that an uninterrupted run would have seen."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from datamodules.sampling import LengthGroupedSampler


def resume_sampler(trainer: Trainer, sampler: LengthGroupedSampler) -> None:
    """Put the sampler where training goes on: its epoch, and the batches of it that were seen.

    Lightning restores the counters of its loops from a checkpoint, but starts the loader of the resumed epoch at its
    first batch, and makes that loader's iterator before it sets the sampler's epoch. So both are read from the loops
    when the loader is made (lightning 2.6, ``FitLoop.setup_data`` and ``_TrainingEpochLoop.reset``).

    Args:
        trainer: The trainer, its loops restored from the checkpoint if there is one.
        sampler: The sampler of a new training loader.
    """
    fit_loop = trainer.fit_loop
    progress = fit_loop.epoch_loop.batch_progress
    # Any: both are declared as a class that lacks `processed`
    epochs: Any = fit_loop.epoch_progress.current
    batches: Any = progress.current
    if not fit_loop.restarting:
        sampler.set_epoch(epochs.processed)
        return
    # 0, unless a checkpoint was saved in `on_train_epoch_end` of a run with `max_steps`: each restart from such a one
    # counts the finished epoch as processed a second time, for good
    sampler.epoch_offset = epochs.completed - epochs.processed
    if not progress.is_last_batch:
        sampler.set_epoch(epochs.processed)
        sampler.skip_batches = batches.processed
    elif batches.completed < batches.processed:
        # saved in the last `on_train_batch_end`: Lightning ends that epoch itself and takes this loader for the next
        sampler.set_epoch(epochs.processed + 1)
    else:
        # saved after the last batch: Lightning asks this loader for one more, and must find that none is left
        sampler.set_epoch(epochs.processed)
        sampler.skip_batches = len(sampler)


class ResumableDataLoader(DataLoader):
    """A DataLoader over a :class:`~datamodules.sampling.LengthGroupedSampler` that tells Lightning it can be resumed.

    The position itself comes from Lightning's own counters (:func:`resume_sampler`). The state that Lightning keeps in
    a checkpoint is what the batches depend on, so that resuming with other data or batch sizes is noticed.
    """

    def state_dict(self) -> dict[str, Any]:
        """What decides which samples a batch holds."""
        if not isinstance(self.sampler, LengthGroupedSampler):
            return {}  # Lightning put another one in, as it does for `overfit_batches`
        size, replicas = self.sampler.batch_size, self.sampler.num_replicas
        return {
            "samples": len(self.sampler.lengths),
            "global_batch_size": {str(name): replicas * own for name, own in size.items()}
            if isinstance(size, Mapping)
            else replicas * size,
            "seed": self.sampler.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Warn if the batches of this epoch are not the ones that the checkpoint's run went through."""
        changed = [
            f"{name} was {state[name]} and is {value}"
            for name, value in self.state_dict().items()
            if name in state and state[name] != value
        ]
        if changed:
            rank_zero_warn(
                f"resuming in the middle of an epoch whose batches have changed ({'; '.join(changed)}): "
                "in this epoch some samples may be seen twice and others not at all"
            )
