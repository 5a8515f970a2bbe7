"""The ``dora-lightning`` command: Lightning's verbs with a config file, and verbs that work on finished runs."""

from __future__ import annotations

import importlib
import logging
import math
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli, get_loader, set_loader
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.console import Console
from yaml import YAMLError

import dora_lightning
import dora_lightning.backbones
import dora_lightning.callbacks
from dora_lightning.analyzing.command import analyze
from dora_lightning.backbones import Backbone
from dora_lightning.backbones.backbone import NOT_TRAINED
from dora_lightning.callbacks import DoRA, RunSummary
from dora_lightning.callbacks.run_summary import run_files
from dora_lightning.comparing import compare
from dora_lightning.extract_features import extract_features
from dora_lightning.failures import explain, keep_traceback
from dora_lightning.files.yaml_limits import check_yaml
from dora_lightning.mt_bench.commands import mt_bench, mt_bench_judge, mt_bench_scores
from dora_lightning.offline import generate, merge
from dora_lightning.planning import plan
from dora_lightning.run_start import AgreedFolder, RunStart, start_run
from dora_lightning.runs import BEFORE_FILE, RESULT_FILE, read_result, unfinished_runs, write_result
from dora_lightning.terminal import printable, say
from dora_lightning.training.checkpoint_files import check_training_state, load_checkpoint_file
from dora_lightning.training.run_record import RunRecord
from dora_lightning.training.run_report import held_out_table
from dora_lightning.training.stopping import StopOnSignal

TRACEBACK_VARIABLE = "DORA_LIGHTNING_TRACEBACK"
# of an error: the folder of the run that it ended
_FOLDER = "_dora_lightning_run_folder"

# jsonargparse's own, which "omegaconf+" uses as well
_YAML_LOADER = get_loader("yaml")

TRAINER_VERBS = {
    "fit": "train from a config file: dora-lightning fit --config configs/quickstart.yaml",
    "validate": "evaluate on the validation data",
    "test": "evaluate on the test data: ... test --config run/config.yaml --ckpt_path run/checkpoints/last.ckpt",
    "predict": "generate an answer for each test sample",
    "plan": "memory and speed to expect of fit, without running it: ... plan --config ... --gpus 8 --memory 80",
    "compare": "run a grid of fits, and report tables and plots: ... compare configs/studies/smollm2-samples.yaml",
}
OFFLINE_VERBS: dict[str, Callable[..., Any]] = {
    "merge": merge,
    "generate": generate,
    "analyze": analyze,
    "extract-features": extract_features,
    "mt-bench": mt_bench,
    "mt-bench-judge": mt_bench_judge,
    "mt-bench-scores": mt_bench_scores,
}


class FinalCheckpoint(Callback):
    """Saves ``last.ckpt`` at the end of training: one that is saved every so many steps need not hold the end."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save over the last checkpoint of a ModelCheckpoint that keeps one."""
        for callback in trainer.checkpoint_callbacks:
            if path := getattr(callback, "last_model_path", ""):
                trainer.save_checkpoint(path)


class DoRACLI(LightningCLI):
    """LightningCLI for any LightningModule and LightningDataModule, with run folders and resuming.

    The optimiser is an argument of the module: Lightning's own ``--optimizer`` would be built from the parameters that
    exist before adapters are injected and would train none of them.
    """

    def __init__(self, args: list[str] | None = None, run: bool = True) -> None:
        self._start: RunStart | None = None
        self._given = sys.argv[1:] if args is None else args
        self._stop = StopOnSignal(self._how_to_go_on)
        try:
            with self._stop:
                self._parse_and_run(args, run)
        finally:
            if self._start is not None:
                self._start.release()

    def _parse_and_run(self, args: list[str] | None, run: bool) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=RunRecord,
            trainer_defaults={"callbacks": FinalCheckpoint()},
            parser_kwargs={
                "prog": "dora-lightning",
                "parser_mode": "omegaconf+",
                # a typo that happens to be the beginning of an option is a typo still
                "allow_abbrev": False,
                "dump_header": [f"dora-lightning {dora_lightning.__version__}"],
            },
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options beside Lightning's own; every verb knows them, so that one config file serves all."""
        # the data module's tokenizer is that of the model, named once
        parser.link_arguments("model.init_args.model_name_or_path", "data.init_args.tokenizer", apply_on="parse")
        parser.add_argument(
            "--dora",
            type=DoRA | None,
            default=None,
            help="Adapters for a module of your own, by the callback DoRA: --dora.rank 32.",
        )
        parser.add_argument(
            "--resume",
            type=bool,
            default=False,
            help="fit: go on with the newest run of trainer.default_root_dir if it was interrupted.",
        )
        parser.add_argument(
            "--evaluate_before",
            type=bool,
            default=False,
            help="fit: validate before the first step too, and print a table of before and after.",
        )
        parser.add_argument(
            "--test_after",
            type=bool,
            default=False,
            help="fit: test what was trained, as the verb test does with the last checkpoint.",
        )
        parser.add_argument(
            "--run_summary",
            type=bool,
            default=True,
            help="fit: say at the end what the run took, in the terminal and with plots in its summary.md.",
        )

    def _parse_ckpt_path(self) -> None:
        """Do not let hyperparameters of a checkpoint override the config and the command line."""

    def before_instantiate_classes(self) -> None:
        """Look at the checkpoint before anything is loaded."""
        if self.subcommand is None:
            return
        config = self.config[self.subcommand]
        if config.weights_only is None:
            config.weights_only = True  # nothing is unpickled, unless asked for
        if config.ckpt_path is not None and Path(config.ckpt_path).is_file():
            # Lightning itself refuses one that is missing
            checkpoint = load_checkpoint_file(config.ckpt_path, weights_only=config.weights_only, mmap=True)
            if self.subcommand == "fit":
                check_training_state(checkpoint, config.ckpt_path)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Choose the run's folder, for a new run or the one to go on with.

        Here and not in the config, so that the config saved beside the run can be run again.
        """
        if self.subcommand is None:
            return super().instantiate_trainer(**kwargs)
        config = self.config_init[self.subcommand]
        root = Path(config.trainer.default_root_dir or "runs")
        callbacks = config.trainer.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if config.dora is not None:
            callbacks = [config.dora, *callbacks]
        if self.subcommand == "fit":
            self._summary = next((c for c in callbacks if isinstance(c, RunSummary)), None) or RunSummary()
            self._summary.waits = True  # for after_fit, which may test
            callbacks = [*(c for c in callbacks if c is not self._summary), self._summary]
        own_folder = config.trainer.logger in (None, True) and not config.trainer.fast_dev_run
        fits = self.subcommand == "fit" and config.ckpt_path is None
        if own_folder or fits:
            saved_to = [Path(path) for c in callbacks if (path := getattr(c, "dirpath", None))]
            self._start = start = start_run(root, self.subcommand, fits and config.resume, saved_to, own_folder)
            if start.checkpoint is not None:
                config.ckpt_path = str(start.checkpoint)
            callbacks = [AgreedFolder(start, own_folder), *callbacks]
            if own_folder:
                # not the root: what Lightning saves when SLURM stops a job is of this run
                kwargs |= {"logger": start.loggers(), "default_root_dir": str(start.folder)}
        kwargs["callbacks"] = [self._stop, *callbacks]
        trainer = super().instantiate_trainer(**kwargs)
        self._stop.launcher = trainer.strategy.launcher
        return trainer

    def _how_to_go_on(self) -> str:
        """The command that goes on after this one was stopped."""
        command = shlex.join(["dora-lightning", *self._given])
        if self._start is None or self.subcommand != "fit":
            return f"Start it again by: {command}"
        run = next((run for run in unfinished_runs(self._start.root) if run.folder == self._start.folder), None)
        saved = run is not None and (run.checkpoints or any(map(_has_saved, self.trainer.checkpoint_callbacks)))
        if not saved:
            return f"No checkpoint was saved yet; start again by: {command}"
        given = self.config.fit
        options = ("" if given.resume else " --resume true") + ("" if given.ckpt_path is None else " --ckpt_path null")
        return f"Go on from the last checkpoint of {self._start.folder} by: {command}{options}"

    def _run_subcommand(self, subcommand: str) -> None:
        """Let an error know the run's folder, where its traceback is kept."""
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            # asking the Trainer for its log folder would wait for the other processes
            setattr(error, _FOLDER, Path(self.trainer.default_root_dir))
            raise

    def before_validate(self) -> None:
        """See that there is a checkpoint to load, or say that there is none."""
        self._check_weights("validate")

    def before_test(self) -> None:
        """As :meth:`before_validate`."""
        self._check_weights("test")

    def before_predict(self) -> None:
        """As :meth:`before_validate`."""
        self._check_weights("predict")

    def _check_weights(self, verb: str) -> None:
        path = self.config[verb].ckpt_path
        if path is None:
            rank_zero_warn(f"{verb} without --ckpt_path: no checkpoint is loaded, and the model is {NOT_TRAINED}")
        elif path == "last":
            # Lightning would go on without
            callbacks = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
            if not any(callback._find_last_checkpoints(self.trainer) for callback in callbacks):
                raise ValueError(f"--ckpt_path last: there is none in this run's folder{self._newest_checkpoint()}")
        elif path in ("best", "hpc"):
            raise ValueError(f"--ckpt_path {path}: only a Trainer that has trained knows it{self._newest_checkpoint()}")

    def _newest_checkpoint(self) -> str:
        """What to give instead."""
        root = self._start.root if self._start is not None else Path(self.trainer.default_root_dir)
        found = root.glob("version_*/checkpoints/*.ckpt")
        newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
        return "; name the file" + (f", such as --ckpt_path {newest}" if newest else "")

    def before_fit(self) -> None:
        """Evaluate the model as it is, unless the run that goes on has done so."""
        if self.config.fit.test_after and isinstance(self.model, Backbone) and self.model.task is None:
            raise ValueError("test_after needs a task that judges the answers; give the backbone one (model.task)")
        folder = self._run_folder()
        if not self.config.fit.evaluate_before or _saved_before(folder) is not None:
            return
        before = self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)[0]
        if self.trainer.is_global_zero and folder is not None:
            # an untrained model's perplexity may be infinite, which no table shows and JSON has no number for
            write_result(folder, BEFORE_FILE, {name: value for name, value in before.items() if math.isfinite(value)})

    def test(self, **kwargs: Any) -> None:
        """Lightning's table of metrics is left out where a backbone prints one of its own."""
        self.trainer.test(**kwargs | ({"verbose": False} if isinstance(self.model, Backbone) else {}))

    def after_fit(self) -> None:
        """Say what came out, and mark the run as finished."""
        folder = self._run_folder()
        if self.trainer.interrupted:
            return
        if not self.trainer.callback_metrics and self._validates():
            # the run was stopped between its last step and its result, so that nothing was left to train
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        after = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        if self.config.fit.test_after:
            self.test(model=self.model, datamodule=self.datamodule, weights_only=True)
            after |= {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        if not self.trainer.is_global_zero:
            return
        before, facts = _saved_before(folder), self._summary.facts
        if folder is not None:
            result = {"steps": self.trainer.global_step, "before": before, "after": after}
            # a launcher that spawns processes leaves no facts in this one
            write_result(folder, RESULT_FILE, result | (facts.measured() if facts is not None else {}))
        if facts is not None and self.config.fit.run_summary:
            self._summary.report(self.trainer, after)
        elif folder is not None:
            if before is not None:
                Console().print(held_out_table(before, after))
            for label, path in run_files(self.trainer, folder, self.model).items():
                say(f"{label}: {path}")

    def _validates(self) -> bool:
        source = self.model if self.datamodule is None else self.datamodule
        return is_overridden("val_dataloader", source) and is_overridden("validation_step", self.model)

    def _run_folder(self) -> Path | None:
        log_dir = self.trainer.log_dir  # asks the first process: to be called on every one
        return Path(log_dir) if log_dir else None


def _has_saved(callback: Any) -> bool:
    return bool(getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", ""))


def _saved_before(folder: Path | None) -> dict[str, float] | None:
    return read_result(folder, BEFORE_FILE) if folder else None


def main(args: list[str] | None = None) -> None:
    """Entry point of the command: bad input is one message on standard error and exit code 1.

    The traceback of any error is kept in a file, which the message names.
    """
    try:
        _run(args)
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        folder: Path | None = getattr(error, _FOLDER, None)
        reason, kept = explain(error, folder), keep_traceback(error, folder)
        where = "" if kept is None else f"the whole traceback: {kept}"
        if reason is None:
            print(where, file=sys.stderr)
            raise
        # exits as the uncaught exception would, so in a run of several processes Lightning ends the others as ever
        rank = os.environ.get("LOCAL_RANK", "0")
        process = "" if rank == "0" else f" in process {rank}"
        sys.exit(f"dora-lightning: error{process}: {printable(reason)}\n{where}".rstrip())


def _run(args: list[str] | None) -> None:
    given = sys.argv[1:] if args is None else args
    _quiet()
    for mode in ("yaml", "omegaconf+"):
        set_loader(mode, _read_yaml, (YAMLError,))
    verb = given[0] if given else "--help"
    if verb in OFFLINE_VERBS:
        auto_cli(
            OFFLINE_VERBS[verb], args=given[1:], prog=f"dora-lightning {verb}", as_positional=True, allow_abbrev=False
        )
    elif verb in TRAINER_VERBS:
        # recipes and the user's own classes are found in the current folder, as `python -m` would; the other verbs run
        # no code that is found there
        sys.path.insert(0, os.getcwd())
        for recipes in ("datamodules", "tasks"):
            # importing them makes their classes known by their short names; elsewhere there need be none
            if importlib.util.find_spec(recipes):
                importlib.import_module(recipes)
        if verb == "plan":
            plan(DoRACLI, given[1:])
        elif verb == "compare":
            compare(DoRACLI, given[1:])
        else:
            DoRACLI(args)
    elif verb == "--version":
        print(dora_lightning.__version__)
    elif verb in ("--help", "-h"):
        print(_usage())
    else:
        sys.exit(f"dora-lightning: unknown verb {verb!r}\n\n{_usage()}")


def _read_yaml(text: str, path: object = None) -> Any:
    """What the command's parsers read of configs and options, whose size is limited; they say which file it is of."""
    check_yaml(text, str(path or "an option"))
    return _YAML_LOADER(text)


def _quiet() -> None:
    """Leave out advertisements and the deprecation warnings of others that a user cannot act on."""
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated")
    warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")
    warnings.filterwarnings("ignore", "The dirpath has changed from .* Only `best_model_path` will be reloaded")
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )


def _usage() -> str:
    verbs = TRAINER_VERBS | {name: (verb.__doc__ or "").partition("\n")[0] for name, verb in OFFLINE_VERBS.items()}
    lines = [f"  {name:<16} {text}" for name, text in verbs.items()]
    return "\n".join(["usage: dora-lightning VERB [options]; dora-lightning VERB --help explains them", "", *lines])
