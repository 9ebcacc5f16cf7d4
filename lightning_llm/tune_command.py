"""``lightning-llm tune``: the best arguments for ``lightning-llm fit``, searched for with Optuna."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_llm.search.space import Parameter, load_yaml, read_space, read_space_file

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_EPILOG = """\
All other arguments are those of `lightning-llm fit`: --config FILE, --trainer.max_epochs 1, ...

The search space maps keys of the configuration to what may be drawn, in a YAML file or as --search.KEY SPEC:
  model.learning_rate:    {log_uniform: [1e-4, 1e-2]}
  model.weight_decay:     {uniform: [0, 0.3]}
  model.warmup:           {choice: ["2%", "10%"]}
  data.global_batch_size: {int: [8, 64], log: true}

The same command again goes on with a study that was stopped, and runs the trials that are missing.
"""


def run_tune(arguments: Sequence[str], open_fit: Callable[[list[str]], Any]) -> None:
    """Search; print a table, the best arguments, and where everything lies.

    Args:
        arguments: Of the command line, after ``tune``.
        open_fit: Makes what ``lightning-llm fit`` would run; see :class:`~lightning_llm.search.running.Fit`.
    """
    inline, others = split_space(arguments)
    options, of_fit = _parser().parse_known_args(others)
    with contextlib.ExitStack() as stack:
        try:
            search = _prepare(options, inline, of_fit, open_fit, stack)
        except (ValueError, TypeError, OSError, ImportError, argparse.ArgumentError) as error:
            sys.exit(f"lightning-llm tune: error: {error}")
        try:
            search.run(options.trials, options.timeout)
        except (KeyboardInterrupt, SystemExit):  # Lightning makes the one of the other
            print("Interrupted. The same command goes on.")
            sys.exit(130)
        print(search.report())


def split_space(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Take the arguments ``--search.KEY SPEC`` out of a command line.

    Returns:
        The specs by their keys, and the other arguments.

    Example:
        >>> split_space(["--trials", "3", "--search.model.warmup", "{int: [0, 9]}", "--search.a.b={choice: [x]}"])
        ({'model.warmup': {'int': [0, 9]}, 'a.b': {'choice': ['x']}}, ['--trials', '3'])
    """
    specs, others, waiting = {}, [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("--search."):
            others.append(argument)
            continue
        key, equals, text = argument.removeprefix("--search.").partition("=")
        if not equals:
            if not waiting:
                sys.exit(f"lightning-llm tune: error: --search.{key} needs what may be drawn: '{{uniform: [0, 1]}}'.")
            text = waiting.pop(0)
        try:
            specs[key] = load_yaml(text, f"--search.{key}")
        except ValueError as error:
            sys.exit(f"lightning-llm tune: error: {error}")
    return specs, others


def seconds(text: str) -> float:
    """A time such as ``90``, ``90s``, ``30m``, ``2h`` or ``1d`` in seconds.

    Example:
        >>> seconds("1.5h")
        5400.0
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([smhd]?)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a time such as 90s, 30m, 2h or 1d, but got {text!r}")
    return float(match[1]) * _SECONDS[match[2]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lightning-llm tune",
        usage="lightning-llm tune --config CONFIG.yaml [--search SEARCH.yaml | --search.KEY SPEC ...] --trials N ...",
        description="Run `lightning-llm fit` with arguments drawn from a search space, and find the best.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--search", type=Path, help="YAML file of the search space")
    add("--trials", type=int, required=True, help="trials in the study when it is done, earlier ones included")
    add("--folder", type=Path, default=Path("runs"), help="the study's folder is made in it; default: runs")
    add("--study", default="tune", help="name of the study, and of its folder; default: tune")
    add("--storage", help="SQLite file, or URL of a database; default: study.db in the study's folder")
    add("--metric", default="val/loss", help="what is logged in validation and judged; default: val/loss")
    add("--direction", choices=("minimize", "maximize"), default="minimize", help="of the metric; default: minimize")
    add("--value", choices=("last", "best"), default="last", help="which validation judges a trial; default: last")
    add("--pruner", choices=("median", "hyperband", "none"), default="median", help="what ends bad trials early")
    add("--prune_after", type=float, default=0.1, help="share of a run before which nothing is pruned; default: 0.1")
    add("--seed", type=int, default=0, help="of the draws, and of trials whose seed_everything is left to chance")
    add("--timeout", type=seconds, default=math.inf, help="begin no further trial after 30m, 2h, ...")
    add("--checkpoints", action="store_true", help="let trials write weights as the configuration says; off else")
    return parser


def _prepare(
    options: argparse.Namespace,
    inline: dict[str, Any],
    of_fit: list[str],
    open_fit: Callable[[list[str]], Any],
    stack: contextlib.ExitStack,
) -> Any:
    """Everything is read and checked before anything is trained or written; the study stays locked for the stack."""
    if options.trials < 1:
        raise ValueError(f"--trials is 1 or more, but got {options.trials}.")
    if not re.fullmatch(r"[\w.-]+", options.study):
        raise ValueError(f"--study is a name that a folder may have, but got {options.study!r}.")
    space = _space(options.search, inline)
    from lightning_llm.search.study import SearchStudy, alone, import_optuna, make_pruner

    import_optuna()
    make_pruner(options.pruner, options.prune_after)
    from lightning_llm.search.search import Search, check_space, read_base
    from lightning_llm.search.summary import counts

    base = read_base(open_fit, of_fit)
    check_space(open_fit, base, space, options.seed)
    folder = options.folder / options.study
    storage = options.storage or str(folder / "study.db")
    stack.enter_context(alone(storage, options.study, folder))
    study = SearchStudy(
        storage,
        options.study,
        options.direction,
        space,
        seed=options.seed,
        pruner=options.pruner,
        prune_after=options.prune_after,
        settings={"config": base, "metric": options.metric, "value": options.value},
    )
    print(f"Search in {folder}: {counts(study)} of {options.trials}")
    return Search(open_fit, base, study, folder, options.metric, options.value, options.checkpoints)


def _space(path: Path | None, inline: dict[str, Any]) -> list[Parameter]:
    """The space of the file, with what the command line adds or replaces."""
    if path is None and not inline:
        raise ValueError("There is nothing to search: add --search SEARCH.yaml or --search.KEY SPEC.")
    named = {parameter.key: parameter for parameter in (read_space(read_space_file(path)) if path else [])}
    named |= {parameter.key: parameter for parameter in (read_space(inline) if inline else [])}
    return list(named.values())
