"""`alpro search`: clips for a text, printed, as a page, or served."""

import argparse
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

from alpro_stream.errors import ConfigError

_TOP = 10
_HOST, _PORT = "127.0.0.1", 8000


def add_search_flags(parser: argparse.ArgumentParser) -> None:
    """What is searched, by what, and where the result goes."""
    parser.add_argument("query", nargs="?", help='what should be seen in the clips, such as "a dog on a beach"')
    parser.add_argument("--index", type=Path, required=True, help="folder of `alpro embed`")
    parser.add_argument("--model", type=Path, required=True, help="the run, checkpoint or exported model that it is of")
    parser.add_argument("--top", type=int, default=_TOP, help=f"clips shown (default {_TOP})")
    rerank = "put so many of the best in the order of VTM, which looks at query and clip together (reads the shards)"
    parser.add_argument("--rerank", type=int, default=0, metavar="COUNT", help=rerank)
    parser.add_argument("--faiss", action="store_true", help="search by FAISS, if that is installed; the same results")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the results with their clips as one HTML file")
    served = parser.add_argument_group("as a web page with a search box")
    served.add_argument("--serve", action="store_true", help="until Ctrl-C")
    served.add_argument("--port", type=int, default=_PORT, help=f"default {_PORT}; 0 takes one that is free")
    served.add_argument("--host", default=_HOST, help=f"address to listen at (default {_HOST}: this machine alone)")


def run_search(arguments: argparse.Namespace) -> int:
    """Searches or serves; returns the exit status.

    Raises:
        AlproError: see `alpro_stream.evaluate.search`.
    """
    # Before anything that takes seconds to import or to read.
    if arguments.serve and (arguments.query is not None or arguments.page):
        raise ConfigError("--serve takes no query and no --page: type the query into the page it serves")
    if not arguments.serve and arguments.query is None:
        raise ConfigError('what to search for? Give a text, such as "a dog on a beach", or --serve')
    for name, least in (("top", 1), ("rerank", 0)):
        if getattr(arguments, name) < least:
            raise ConfigError(f"--{name} {getattr(arguments, name)}: at least {least} is needed")
    return _serve(arguments) if arguments.serve else _search(arguments)


def _search(arguments: argparse.Namespace) -> int:
    from alpro_launch.page_parts import write_page
    from alpro_launch.search_view import embedded, hit_lines, search_page
    from alpro_stream.evaluate.search import check_query, open_searcher
    from alpro_stream.pages import render_search

    query = check_query(arguments.query)
    searcher = open_searcher(
        arguments.index,
        arguments.model,
        needs_clips=arguments.page is not None,
        needs_match=arguments.rerank > 0,
        use_faiss=arguments.faiss,
    )
    with closing(searcher):
        hits = searcher.search(query, arguments.top, arguments.rerank)
        print("\n".join(hit_lines(hits)))
        print(f"the best {len(hits)} of {len(searcher.index)} clips")
        if arguments.page is not None:
            assert searcher.clips is not None
            look_up = partial(embedded, searcher.clips)
            write_page(arguments.page, render_search(search_page(searcher, query, hits, look_up)))
            print(f"written: {arguments.page}")
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    from alpro_launch.search_server import is_loopback, listen, serve
    from alpro_stream.evaluate.search import open_searcher

    with listen(arguments.host, arguments.port) as listener:
        if not is_loopback(arguments.host):
            print(
                f"warning: whoever can reach {arguments.host} can search this index and see its clips; there is no "
                "password",
                file=sys.stderr,
            )
        open_it = partial(
            open_searcher,
            arguments.index,
            arguments.model,
            needs_clips=True,
            needs_match=arguments.rerank > 0,
            use_faiss=arguments.faiss,
        )
        serve(listener, arguments.host, open_it, arguments.top, arguments.rerank)
    return 0
