"""The `alpro` command."""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from alpro_launch.forecast.flags import add_forecast_flags
from alpro_launch.processes import noting_requests
from alpro_launch.search import add_search_flags
from alpro_launch.train_command import add_place_flags, add_train_flags, node_of, run_train
from alpro_sharding.flags import add_shard_flags
from alpro_stream.errors import AlproError, ConfigError
from alpro_stream.exit_status import HARDWARE, INTERRUPTED, PREEMPTED, status_of

_SHIPPED_CONFIGS = Path(__file__).parent / "configs"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status."""
    arguments = _parse(argv)
    # Several processes share the cores: spinning threads would take them from each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except (AlproError, OSError) as error:  # A folder that cannot be written, a full disk: the system's text says it.
        print(f"error: {error}", file=sys.stderr)
        return status_of(error)
    except Exception as error:
        traceback.print_exc()
        return status_of(error)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it can", file=sys.stderr)
        return INTERRUPTED


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Argparse takes no more configs and overrides after an option such as `--ranks 2`: they are added here."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "arguments") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.arguments += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="alpro", description="Train ALPRO from streamed WebDataset shards.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    shard = _add(commands, "shard", _shard, "turn a manifest of videos and images into shards")
    _takes_config(shard)
    add_shard_flags(shard)
    train = _add(commands, "train", _train, "train; several configs are trained one after the other")
    _takes_config(train, several=True)
    add_train_flags(train)
    preflight = _add(commands, "preflight", _preflight, "look at machines, data and settings of a run before it starts")
    _takes_config(preflight)
    add_place_flags(preflight)
    preflight.add_argument("--json", metavar="FILE", help="write what was found there too")
    what = "say what a run will take on machines that are not there yet: time, data rate, memory, GPU-hours"
    forecast = _add(commands, "forecast", _forecast, what)
    _takes_config(forecast)
    add_forecast_flags(forecast)
    evaluate = _add(commands, "evaluate", _evaluate, "text-video retrieval from a checkpoint, or a table of results")
    what = "a YAML file, or a result.json to make again, then key=value overrides; with --table several results"
    evaluate.add_argument("arguments", nargs="+", metavar="CONFIG [key=value ...]", help=what)
    evaluate.add_argument("--table", action="store_true", help="print results beside each other; evaluate nothing")
    add_place_flags(evaluate)
    inspect = _add(commands, "inspect", _inspect, "say what a folder of shards, of a run or of a model holds")
    inspect.add_argument("path", type=Path, help="folder of a split, of a run, of a checkpoint or of an exported model")
    inspect.add_argument("--verify", action="store_true", help="compare all shards with their digests")
    inspect.add_argument("--shuffle", action="store_true", help="measure how well a split is mixed in a run")
    page = "write the page of a run as one HTML file (by default report.html in its folder)"
    inspect.add_argument("--page", nargs="?", const="", metavar="FILE", help=page)
    what = "with --shuffle: settings of the order, such as window_shards=16 or ranks=8"
    inspect.add_argument("arguments", nargs="*", metavar="key=value", help=what)
    _add_export(commands)
    embed = _add(commands, "embed", _embed, "the clips of data sets as an index that can be searched")
    _takes_config(embed)
    embed.add_argument("--ranks", type=int, default=1, help="processes on this machine, one a GPU (default 1)")
    what = "train projections on the features of an index, whose encoders stay as they are"
    _takes_config(_add(commands, "fit", _fit, what))
    add_search_flags(_add(commands, "search", _search, "find clips by what a text says"))
    answer = _add(commands, "answer", _answer, "answer a question about a video or an image")
    answer.add_argument("video", help="a file, or an http(s) address")
    answer.add_argument("question", help='such as "what is the man doing?"')
    answer.add_argument("--model", required=True, help="exported model, run, checkpoint, or name on the hub")
    answer.add_argument("--top", type=int, default=5, help="answers shown (default 5)")
    corpus = _add(commands, "corpus", _corpus, "generate a corpus of clips of which everything is known")
    _takes_config(corpus)
    ablate = _add(commands, "ablate", _ablate, "run a grid of runs over several seeds, and compare them")
    _takes_config(ablate)
    only = ablate.add_mutually_exclusive_group()
    only.add_argument("--table", action="store_true", help="make table and page again from what is there; run nothing")
    only.add_argument("--test", action="store_true", help="run what is held back too: look at the test split")
    ablate.add_argument("--dry-run", action="store_true", help="print what would be run")
    what = "train small starting weights on a generated corpus, in place of a ViT and a BERT"
    _takes_config(_add(commands, "starting-weights", _starting_weights, what))
    demo = _add(commands, "demo", _demo, "the whole way on the example clips (in a checkout)")
    demo.add_argument("--work-dir", default="runs/demo", help="folder of everything it makes (default runs/demo)")
    bench = _add(commands, "bench", _bench, "run a benchmark, or list them (in a checkout)")
    bench.add_argument("name", nargs="?", help="name of a script in benchmarks/, or all; without, they are listed")
    bench.add_argument("--list", action="store_true", help="say which benchmarks there are, and run nothing")
    bench.add_argument("rest", nargs=argparse.REMAINDER, help="its arguments, such as --quick or --json FILE")
    return parser


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _add(commands, "export", _export, "write a trained or a released model as a folder for use")
    parser.add_argument("source", type=Path, help="run, checkpoint, exported folder, or a released file")
    parser.add_argument("out", type=Path, help="new folder; with --format authors a new .pt file")
    parser.add_argument("--format", choices=("folder", "authors"), help="authors: a file that their code reads")
    released = parser.add_argument_group("for released files of ALPRO's authors and of LAVIS")
    released.add_argument("--tokenizer", help="folder, or name on the hub: bert-base-uncased")
    released.add_argument("--num-tokens", type=int, help="length of texts (default 30)")
    tasks = ("prompter", "pretrain", "retrieval", "question_answering")
    released.add_argument("--task", choices=tasks, help="by default what the file was trained for")
    released.add_argument(
        "--prompter", action="store_true", default=None, help="the prompter inside a pre-training file"
    )
    released.add_argument("--entities", type=Path, help="file of the entities, for a pre-training file")
    released.add_argument("--answers", type=Path, help="file of the answers, for a question answering file")
    released.add_argument("arguments", nargs="*", metavar="key=value", help="changes such as video.num_frames=8")


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    function: Callable[[argparse.Namespace], int],
    text: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=function)
    return parser


def _takes_config(parser: argparse.ArgumentParser, several: bool = False) -> None:
    what = "YAML files, then key=value overrides" if several else "a YAML file, then key=value overrides"
    parser.add_argument("arguments", nargs="+", metavar="CONFIG [key=value ...]", help=what)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Configuration files and overrides of a command line; a file shipped with the package is found by its name.

    Raises:
        ConfigError: no file is named.
    """
    configs = [argument for argument in arguments if "=" not in argument]
    if not configs:
        raise ConfigError("no configuration file given; name one, such as configs/demo/pretrain.yaml")
    return [find_config(config) for config in configs], [argument for argument in arguments if "=" in argument]


def find_config(name: str) -> str:
    """The path itself if it exists, else the file of that name among those the package brings."""
    shipped = _SHIPPED_CONFIGS / name.removeprefix("configs/")
    return str(shipped) if shipped.is_file() and not Path(name).is_file() else name


def _one_config(arguments: argparse.Namespace) -> tuple[str, list[str]]:
    configs, overrides = split_arguments(arguments.arguments)
    if len(configs) > 1:
        raise ConfigError(f"one configuration file is wanted, got {', '.join(configs)}")
    return configs[0], overrides


def _shard(arguments: argparse.Namespace) -> int:
    from alpro_sharding.command import run_shard

    path, overrides = _one_config(arguments)
    return run_shard(path, overrides, arguments)


@noting_requests()
def _train(arguments: argparse.Namespace) -> int:
    configs, overrides = split_arguments(arguments.arguments)
    for number, config in enumerate(configs, start=1):
        outcome = run_train(config, overrides, arguments)
        if outcome.status:
            return outcome.status
        if outcome.was_asked and number < len(configs):  # In its last step; the next one is not begun.
            return PREEMPTED
    return 0


def _preflight(arguments: argparse.Namespace) -> int:
    from alpro_launch.local_ranks import preflight_command, rank_environments
    from alpro_launch.processes import how_ended, run_all
    from alpro_launch.restart import Outcome, tell

    path, overrides = _one_config(arguments)
    command = preflight_command(path, overrides, arguments.json)
    ended = run_all(command, rank_environments(arguments.ranks, node_of(arguments)))
    if ended.status and ended.was_asked:
        tell(Outcome(PREEMPTED, "asked to stop before all checks were made"))
        return PREEMPTED
    if ended.status >= 0:
        return ended.status
    tell(Outcome(HARDWARE, how_ended(ended)))
    return HARDWARE


def _forecast(arguments: argparse.Namespace) -> int:
    from alpro_launch.forecast.command import run_forecast

    path, overrides = _one_config(arguments)
    return run_forecast(path, overrides, arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    from alpro_launch.evaluate import run_evaluate, show_table

    if arguments.table:
        show_table(arguments.arguments)
        return 0
    path, overrides = _one_config(arguments)
    return run_evaluate(path, overrides, arguments)


def _inspect(arguments: argparse.Namespace) -> int:
    if arguments.page is not None:
        if arguments.shuffle or arguments.verify or arguments.arguments:
            raise ConfigError("--page goes with no other option or setting: it takes the folder of a run alone")
        from alpro_launch.training_page import write_training_page

        page = Path(arguments.page) if arguments.page else None
        print(f"written: {write_training_page(arguments.path, page)}")
        return 0
    if arguments.shuffle:
        from alpro_launch.shuffle_view import shuffle_view
        from alpro_stream.config import with_overrides
        from alpro_stream.stream.mixing import MixingConfig

        config = with_overrides(MixingConfig, {}, arguments.arguments, source="alpro inspect --shuffle")
        view = shuffle_view(arguments.path, config)
    elif arguments.arguments:
        raise ConfigError(f"{' '.join(arguments.arguments)}: settings of the order need --shuffle")
    else:
        from alpro_launch.inspection import inspect

        view = inspect(arguments.path, verify=arguments.verify)
    print(json.dumps(view, indent=1, ensure_ascii=False))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from alpro_launch.export import ExportOptions, export
    from alpro_stream.config import validate

    names = ("format", "tokenizer", "num_tokens", "task", "prompter", "entities", "answers")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    options = validate(ExportOptions, {**given, "sizes": arguments.arguments}, source="alpro export")
    for line in export(arguments.source, arguments.out, options):
        print(line)
    return 0


def _embed(arguments: argparse.Namespace) -> int:
    from alpro_launch.embed import run_embed

    path, overrides = _one_config(arguments)
    return run_embed(path, overrides, arguments.ranks)


def _fit(arguments: argparse.Namespace) -> int:
    import logging

    from alpro_stream.config import load_config
    from alpro_stream.evaluate.offline_features import OfflineConfig, learn_offline

    path, overrides = _one_config(arguments)
    config = load_config(OfflineConfig, path, overrides)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("alpro_stream.evaluate").setLevel(logging.INFO)
    losses = learn_offline(config)
    print(f"{len(losses)} steps, loss {losses[0]:.3f} at first and {losses[-1]:.3f} in the end")
    print(f"written: {config.out}")
    return 0


def _search(arguments: argparse.Namespace) -> int:
    from alpro_launch.search import run_search

    return run_search(arguments)


def _answer(arguments: argparse.Namespace) -> int:
    from alpro_stream.pretrained import Alpro

    if arguments.top < 1:
        raise ConfigError(f"--top {arguments.top}: at least 1 is needed")
    model = Alpro.from_pretrained(arguments.model)
    for text, probability in model.answer(arguments.video, arguments.question, top=arguments.top):
        print(f"{100 * probability:5.1f} %  {text}")
    return 0


def _corpus(arguments: argparse.Namespace) -> int:
    from alpro_stream.config import load_config
    from alpro_stream.testing.glyphs.corpus import CorpusConfig, write_corpus

    path, overrides = _one_config(arguments)
    print(f"written: {write_corpus(load_config(CorpusConfig, path, overrides))}")
    return 0


def _ablate(arguments: argparse.Namespace) -> int:
    from alpro_launch.ablate.command import run_ablate

    path, overrides = _one_config(arguments)
    return run_ablate(path, overrides, arguments, find_config)


def _starting_weights(arguments: argparse.Namespace) -> int:
    from alpro_launch.starting_weights import StartingWeightsConfig, train_starting_weights
    from alpro_stream.config import load_config

    path, overrides = _one_config(arguments)
    train_starting_weights(load_config(StartingWeightsConfig, path, overrides))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from alpro_launch.demo import run_demo

    return run_demo(arguments.work_dir)


def _bench(arguments: argparse.Namespace) -> int:
    from alpro_launch.bench import run_bench

    return run_bench(None if arguments.list else arguments.name, arguments.rest)


if __name__ == "__main__":
    sys.exit(main())
