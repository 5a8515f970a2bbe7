"""Ends a run that is asked to stop: before a batch, the same one on all processes, with an exit code that says so.

Lightning ends a run at SIGTERM with exit code 0, as if it were done; with several processes its handler starts a
broadcast in the midst of whatever they are at, and they wait for one another for good.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

EXIT_CODE = 128 + signal.SIGTERM
"""What a shell reports of a process that SIGTERM has ended."""


class StopOnSignal(Callback):
    """Stops at SIGTERM, and says how to go on; at Ctrl-C, which Lightning handles, it says so too.

    Use it as a context around all that the command does: outside of Lightning's loops it ends the command at once, as
    SIGTERM would without a handler, but for what has to be cleaned up.

    Args:
        advice: makes the sentence that says how to go on.
    """

    def __init__(self, advice: Callable[[], str]) -> None:
        self.advice = advice
        self.launcher: Any = None
        """Of the Trainer: what it started is to end too."""
        self._asked = False
        self._in_loop = False
        self._before: Any = None
        self._seen = 0
        self._shared = 0

    def __enter__(self) -> StopOnSignal:
        """Handle SIGTERM."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        """Let who handled it before handle it again."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def __getstate__(self) -> dict[str, Any]:
        """For processes that are spawned: the one that started them says how to go on."""
        return {**vars(self), "advice": str, "launcher": None, "_before": None}

    # Loops -------------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signal over from Lightning, which has just set its own handler."""
        self._enter_loop()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop here, if any process was asked to."""
        if self._any_asked(trainer):
            self._stop(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for training; processes may have different numbers of batches, and agree only while all have one."""
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._enter_evaluation(trainer, batches)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in validation."""
        self._enter_evaluation(trainer, trainer.num_test_batches)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in validation."""
        self._enter_evaluation(trainer, trainer.num_predict_batches)

    @override
    def on_validation_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Stop here, if any process was asked to."""
        self._evaluation_batch(trainer)

    @override
    def on_test_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Stop here, if any process was asked to."""
        self._evaluation_batch(trainer)

    @override
    def on_predict_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Stop here, if any process was asked to."""
        self._evaluation_batch(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """From here on there is no batch to stop at."""
        self._in_loop = False

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say how to go on after Ctrl-C too."""
        self._in_loop = False
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            self._say("Ctrl-C")

    # The signal --------------------------------------------------------------------------------------------------

    def _on_signal(self, *_: object) -> None:
        self._asked = True
        if self._in_loop:
            return
        if self.launcher is not None:
            self.launcher.kill(signal.SIGTERM)
        self._say("SIGTERM")
        raise SIGTERMException(EXIT_CODE)

    def _enter_loop(self) -> None:
        self._in_loop = True
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_signal)

    def _enter_evaluation(self, trainer: Trainer, batches: list[int | float]) -> None:
        self._enter_loop()
        own = torch.tensor(float(sum(batches)), device=trainer.strategy.root_device)
        fewest = float(trainer.strategy.reduce(own, reduce_op="min"))
        self._seen, self._shared = 0, int(fewest) if fewest < float("inf") else 0

    def _evaluation_batch(self, trainer: Trainer) -> None:
        self._seen += 1
        alone = trainer.world_size == 1
        if (alone or self._seen <= self._shared) and self._any_asked(trainer):
            self._stop(trainer)

    def _any_asked(self, trainer: Trainer) -> bool:
        return bool(trainer.strategy.reduce_boolean_decision(self._asked, all=False))

    def _stop(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            self._say("SIGTERM")
        environment = getattr(trainer.strategy, "cluster_environment", None)
        # of a process that Lightning started, the one that started it would take another code for a crash and be killed
        helper = isinstance(environment, LightningEnvironment) and environment.local_rank() != 0
        raise SIGTERMException(0 if helper else EXIT_CODE)

    def _say(self, cause: str) -> None:
        print(f"dora-lightning: stopped by {cause}. {self.advice()}".rstrip(), file=sys.stderr, flush=True)
