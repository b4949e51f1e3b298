"""`alpro evaluate`, and the entry of its ranks, also for `deepspeed --module alpro_launch.evaluate` and `srun`."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alpro_launch.local_ranks import rank_environments
from alpro_launch.processes import end_with_parent, how_ended, run_all
from alpro_launch.rank_entry import leave, run_rank
from alpro_launch.share_tables import answers_table, figures_table, recognition_table, shares_table
from alpro_launch.tables import results_table, retrieval_table
from alpro_launch.topology import take_place
from alpro_launch.train_command import node_of
from alpro_stream.config import load_config, read_config, with_overrides
from alpro_stream.errors import ConfigError, DataError
from alpro_stream.evaluate.masked_words import MaskedWordsConfig, MaskedWordsResult, fill_in
from alpro_stream.evaluate.multiple_choice import ChoiceConfig, ChoiceResult, choose
from alpro_stream.evaluate.opening import EvaluationConfig
from alpro_stream.evaluate.prompter_labels import PrompterLabelsConfig, PrompterLabelsResult, label
from alpro_stream.evaluate.question_answering import AnswerEvaluateConfig, AnswerResult, evaluate_answers
from alpro_stream.evaluate.result import RESULT_FILE, Result, read_result, unlike
from alpro_stream.evaluate.retrieval import RetrievalConfig, RetrievalResult, evaluate
from alpro_stream.evaluate.zero_shot import RecognitionConfig, RecognitionResult, recognise
from alpro_stream.exit_status import HARDWARE


class _Evaluation(NamedTuple):
    """A task: its configuration and its result, what evaluates it, and its tables of one and of several results."""

    config: type[EvaluationConfig]
    result: type[Result]
    evaluate: Callable[..., dict[str, Any]]
    table: Callable[[Mapping[str, Any]], str]
    results_table: Callable[[Mapping[str, Mapping[str, Any]]], str]


_EVALUATIONS = {
    "retrieval": _Evaluation(RetrievalConfig, RetrievalResult, evaluate, retrieval_table, results_table),
    "question_answering": _Evaluation(
        AnswerEvaluateConfig, AnswerResult, evaluate_answers, answers_table, shares_table
    ),
    "multiple_choice": _Evaluation(ChoiceConfig, ChoiceResult, choose, figures_table, shares_table),
    "masked_words": _Evaluation(MaskedWordsConfig, MaskedWordsResult, fill_in, figures_table, shares_table),
    "prompter_labels": _Evaluation(PrompterLabelsConfig, PrompterLabelsResult, label, figures_table, shares_table),
    "recognition": _Evaluation(RecognitionConfig, RecognitionResult, recognise, recognition_table, shares_table),
}


def show_table(paths: Sequence[str]) -> None:
    """Prints results of one task beside each other.

    Raises:
        ConfigError: one is no result, or they are of several tasks.
    """
    path_of = {read_result(Path(path))["task"]: path for path in paths}
    if len(path_of) > 1:
        found = ", ".join(f"{path} of {task}" for task, path in path_of.items())
        raise ConfigError(f"results of several tasks have no table in common: {found}; give those of one task")
    (task,) = path_of
    print(_evaluation_of(task).results_table({path: _read(path) for path in paths}))


def run_evaluate(path: str, overrides: Sequence[str], arguments: argparse.Namespace) -> int:
    """Evaluates, prints the figures and, for a result that is made again, whether it is the same; the exit status.

    Raises:
        DataError: it is another one.
    """
    config = load_evaluation(path, overrides)
    if arguments.ranks == arguments.nodes == 1:
        _tell_progress()
        _EVALUATIONS[config.task].evaluate(config)
    else:
        node = node_of(arguments)
        command = [sys.executable, "-m", "alpro_launch.evaluate", path, *overrides]
        ended = run_all(command, rank_environments(arguments.ranks, node))
        if ended.status < 0:
            print(how_ended(ended), file=sys.stderr)
        if ended.status or node.node_rank:
            return HARDWARE if ended.status < 0 else ended.status
    result = _read(config.out)
    print(_EVALUATIONS[config.task].table(result))
    print(f"written: {config.out / RESULT_FILE}")
    if _is_result(path):
        before = _read(path)
        if lines := unlike(before, result):
            raise DataError(f"not the same as {path} (its own figure first): " + "; ".join(lines))
        print(f"the same as {path}: figures, protocol, split and weights")
    return 0


def load_evaluation(path: str, overrides: Sequence[str]) -> EvaluationConfig:
    """The configuration in a YAML file, or in a result or its folder: of its very checkpoint, into ``again`` beside it.

    Raises:
        ConfigError: see `load_config`; or `out` is the folder of the result itself.
    """
    if not _is_result(path):
        task = read_config(path, overrides).get("task", "retrieval")
        return load_config(_evaluation_of(task).config, path, overrides)
    folder, result = Path(path) if Path(path).is_dir() else Path(path).parent, _read(path)
    values = {**result["config"], "checkpoint": result["checkpoint"]["path"], "out": str(folder / "again")}
    config = with_overrides(_evaluation_of(result["task"]).config, values, overrides, source=path)
    if config.out.resolve() == folder.resolve():
        raise ConfigError(f"out={config.out} holds the result that is to be made again; set another out")
    return config


def _evaluation_of(task: Any) -> _Evaluation:
    if task not in _EVALUATIONS:
        raise ConfigError(f"task={task}: expected one of {', '.join(_EVALUATIONS)}")
    return _EVALUATIONS[task]


def _read(path: str | Path) -> dict[str, Any]:
    """A result with all that a table shows."""
    return read_result(Path(path), _evaluation_of(read_result(Path(path))["task"]).result)


def _is_result(path: str) -> bool:
    return path.endswith(".json") or Path(path).is_dir()


def _tell_progress() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("alpro_stream.evaluate").setLevel(logging.INFO)


def main(argv: Sequence[str]) -> int:
    """Evaluates on one rank; returns the exit status, see docs/training.md."""
    # The launcher passes the rank first; it is in the environment too, where `take_place` reads it.
    arguments = [argument for argument in argv if not argument.startswith("--local_rank")]
    if not arguments or arguments[0].startswith("-"):
        print("usage: python -m alpro_launch.evaluate CONFIG [key=value ...]", file=sys.stderr)
        return 2
    return run_rank(lambda: _evaluate(arguments[0], arguments[1:]))


def _evaluate(path: str, overrides: Sequence[str]) -> int:
    if "CROSS_RANK" in os.environ:  # The launcher of deepspeed leaves its ranks behind when it is killed.
        end_with_parent()
    import torch

    from alpro_stream.train.distributed import join_world

    config = load_evaluation(path, overrides)
    on_gpu = torch.cuda.is_available()
    since = time.monotonic()
    topology = take_place(config.timeout_s, "nccl" if on_gpu else "gloo")
    if not on_gpu:
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if topology.rank == 0:
        _tell_progress()
    run = f"the evaluation into {config.out.absolute()}"
    world = join_world(config.timeout_s, run=run, since=since, timeout_name="timeout_s")
    _EVALUATIONS[config.task].evaluate(config, world)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
