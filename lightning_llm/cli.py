"""The command line: ``lightning-llm fit|validate|test|predict --config FILE``, ``tune``, ``plan``, ``generate``, ...

Heavy imports wait until a command needs them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TRAINER_COMMANDS = {
    "fit": "train a model",
    "validate": "evaluate on the validation documents",
    "test": "evaluate on the test documents",
    "predict": "score every row of the test documents into predictions.jsonl",
}
# transformers imports torchao where it is installed, which then warns of each kernel that is for other machines.
_TALKATIVE = ("torchao", "torch.utils._pytree")
_USAGE = "lightning-llm {fit,validate,test,predict,tune,plan,generate,quantize} ..."


def main(args: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        args: Command-line arguments; those of the process if None.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    command = arguments[0] if arguments else "--help"
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    if command in TRAINER_COMMANDS:
        _run_trainer(None if args is None else arguments)
    elif command == "tune":
        from lightning_llm.tune_command import run_tune

        run_tune(arguments[1:], open_fit)
    elif command == "plan":
        from lightning_llm.plan_command import run_plan

        run_plan(arguments[1:])
    elif command == "generate":
        _generate(arguments[1:])
    elif command == "quantize":
        from lightning_llm.quantize_command import run_quantize

        run_quantize(arguments[1:])
    elif command in ("-h", "--help"):
        print(_help())
    elif command == "--version":
        from lightning_llm import __version__

        print(f"lightning-llm {__version__}")
    else:
        commands = ", ".join([*TRAINER_COMMANDS, "tune", "plan", "generate", "quantize"])
        sys.exit(f"usage: {_USAGE}\nlightning-llm: error: expected one of {commands}, but got {command!r}.")


def _help() -> str:
    lines = [f"  {name:<10} {text}" for name, text in TRAINER_COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {_USAGE}",
            "",
            "Train large language models: large batches, long sequences, gradient accumulation.",
            "",
            "commands:",
            *lines,
            "  tune       search for the best arguments of `fit`, with Optuna",
            "  plan       estimate the memory of training, and choose between checkpointing and windows",
            "  generate   continue a prompt with a trained model",
            "  quantize   write a trained model with int8 weights, for the CPU",
            "",
            "`lightning-llm COMMAND --help` lists a command's arguments; each can stand in a YAML file (--config).",
        ]
    )


def open_fit(arguments: list[str]) -> Any:
    """Make all that ``fit`` would run with, and do not start it.

    Args:
        arguments: ``fit`` and what follows it on the command line.

    Returns:
        An object with ``trainer``, ``model``, ``datamodule``, the ``fit_arguments`` of ``trainer.fit``, and
        ``settings``: all arguments with their values, nested, as in YAML.

    Raises:
        argparse.ArgumentError: For arguments that the parser does not take.
        Exception: Whatever the classes raise as they are made.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        return _run_trainer(arguments, starts=False)


def _run_trainer(arguments: list[str] | None, starts: bool = True) -> Any:
    import yaml
    from lightning import LightningDataModule
    from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
    from transformers.utils.logging import disable_progress_bar

    from lightning_llm.datamodules import TextDataModule
    from lightning_llm.module import LLMModule

    disable_progress_bar()  # type: ignore[no-untyped-call]  # of reading and writing weights: they would cut through the Trainer's

    class TrainingCLI(LightningCLI):
        def before_predict(self) -> None:
            """Refuse what could not be written afterwards."""
            if self.trainer.world_size > 1:
                sys.exit("lightning-llm predict: error: it scores in one process. Add --trainer.devices 1.")

        def after_predict(self) -> None:
            """Write what ``predict`` returned."""
            print(f"predictions  {write_predictions(self.trainer)}")

    class WaitingCLI(TrainingCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            """A parser for one command is made in a fourth of the time."""
            return {"fit": LightningCLI.subcommands()["fit"]}

        def parse_arguments(self, parser: Any, args: Any) -> None:
            """Keep the arguments as they were given, before chance chooses a seed."""
            super().parse_arguments(parser, args)
            dump = self._parser("fit").dump(self.config["fit"], skip_none=False)
            self.settings: dict[str, Any] = yaml.safe_load(dump)

        def fit(self, **fit_arguments: Any) -> None:
            """Keep what ``fit`` would be called with."""
            self.fit_arguments = fit_arguments

    given = sys.argv[1:] if arguments is None else arguments
    names_data, names_model = _names_class("data", given), _names_class("model", given)
    strict = {"allow_abbrev": False, "exit_on_error": starts}  # a misspelt argument is an error, not a guess
    return (TrainingCLI if starts else WaitingCLI)(
        LLMModule,
        LightningDataModule if names_data else TextDataModule,
        subclass_mode_model=names_model,
        subclass_mode_data=names_data,
        args=arguments,
        auto_configure_optimizers=False,
        parser_kwargs={
            "prog": "lightning-llm",
            **strict,
            **dict.fromkeys(TRAINER_COMMANDS if starts else ["fit"], strict),
        },
        save_config_callback=SaveConfigCallback if starts else None,
        save_config_kwargs={"overwrite": True},
    )


def _names_class(part: str, arguments: Sequence[str]) -> bool:
    """Whether ``model`` or ``data`` is given as a class (``class_path``), and not as the arguments of the usual one."""
    import yaml

    values = [*arguments[1:], ""]
    for argument, following in zip(arguments, values, strict=True):
        option, equals, value = argument.partition("=")
        value = value if equals else following
        if option == f"--{part}.class_path":
            return True
        if option == f"--{part}" and not value.endswith((".yaml", ".yml", ".json")):
            return True
        if option in ("--config", "-c") and Path(value).is_file():
            given = (yaml.safe_load(Path(value).read_text()) or {}).get(part)
            if isinstance(given, dict) and "class_path" in given:
                return True
    return False


def write_predictions(trainer: Any) -> Path:
    """Write what ``Trainer.predict`` gave as jsonl: a line per row with ``row_id`` and the task's scores.

    Where rows are windows, a line per question or document that they are of, see the task's ``merged``.

    Returns:
        The file, in the logger's folder.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "predictions.jsonl"
    outputs = trainer.predict_loop.predictions or []
    lines = trainer.lightning_module.task.merged(outputs) if outputs else []
    with path.open("w") as file:
        for line in _lines(outputs) if lines is None else lines:
            file.write(json.dumps(line) + "\n")
    return path


def _lines(outputs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for batch in outputs:
        columns = {
            ("row_id" if key == "row_ids" else key): value.tolist() if hasattr(value, "tolist") else value
            for key, value in batch.items()
        }
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def _generate(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "lightning-llm generate",
        description="Continue a prompt with a Hugging Face model folder, such as HuggingFaceCheckpoint writes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="model folder, or hub id")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="tokens to add at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token each time")
    parser.add_argument("--top_p", type=float, default=0.95, help="sample from this much of the probability")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code that comes with the model")
    options = parser.parse_args(arguments)
    if options.max_new_tokens < 1 or options.temperature < 0 or not 0 < options.top_p <= 1:
        parser.error("--max_new_tokens must be 1 or more, --temperature 0 or more, --top_p above 0 and at most 1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils.logging import disable_progress_bar

    from lightning_llm.generation import continue_text

    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        text = continue_text(
            options.model,
            options.prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            trust_remote_code=options.trust_remote_code,
        )
    except (FileNotFoundError, OSError) as error:
        sys.exit(f"lightning-llm generate: error: {error}")
    print(text)
