"""Text-to-video search over an index: by features, and the first of them by VTM."""

from dataclasses import dataclass
from pathlib import Path

import torch

from alpro_stream.errors import CheckpointError, ConfigError
from alpro_stream.evaluate.embed import TextEmbeddings, embed_texts
from alpro_stream.evaluate.index import Index
from alpro_stream.evaluate.index_clips import IndexClips
from alpro_stream.evaluate.index_files import IndexRow
from alpro_stream.evaluate.matching import matching_scores
from alpro_stream.evaluate.nearest import FaissIndex, nearest
from alpro_stream.model.alpro import AlproModel
from alpro_stream.model.folder import LoadedModel
from alpro_stream.train.restore import describe_prompter, load_trained

MAX_QUERY_CHARS = 1000
_BATCH_SIZE = 16


@dataclass(frozen=True, slots=True)
class Hit:
    """A clip that was found.

    Attributes:
        number: its row in the index.
        row: what is known of it.
        similarity: cosine of the features (VTC).
        match: probability that query and clip match (VTM); None where it was not asked for.
    """

    number: int
    row: IndexRow
    similarity: float
    match: float | None


class Searcher:
    """A model with an index of its features; used by one thread.

    Attributes:
        index: what is searched.
        clips: the clips themselves, for matching and for pictures; None where they are not needed.

    Args:
        index: what is searched.
        model: the one that the index is of.
        clips: needed to match.
        use_faiss: searches by FAISS.
    """

    def __init__(
        self, index: Index, model: LoadedModel, clips: IndexClips | None = None, use_faiss: bool = False
    ) -> None:
        self.index = index
        self.clips = clips
        self._model = model
        self._faiss = FaissIndex(index.features) if use_faiss else None

    def search(self, query: str, top: int, rerank: int = 0) -> list[Hit]:
        """The best clips for a text, best first.

        Args:
            query: see `check_query`.
            top: hits wanted, at least 1; all clips, where there are fewer.
            rerank: so many of the best by VTC are put in the order of VTM; the others follow in that of VTC.

        Raises:
            ConfigError: the query is none.
            AlproError: with `rerank`, a clip cannot be read.
        """
        texts = embed_query(self._model, check_query(query))
        query_E = texts.feature_CE[0].cpu()
        count = max(top, rerank)
        faiss, features = self._faiss, self.index.features
        numbers, similarities = faiss.nearest(query_E, count) if faiss else nearest(features, query_E, count)
        order = list(range(len(numbers)))
        matches: list[float | None] = [None] * len(numbers)
        if rerank:
            assert self.clips is not None
            model = model_that_matches(self._model)
            videos = self.clips.videos(numbers[:rerank], self._model.dual, _BATCH_SIZE)
            scores_K = matching_scores(model, texts, videos, _BATCH_SIZE)[0]
            order[: len(scores_K)] = scores_K.argsort(descending=True, stable=True).tolist()
            matches[: len(scores_K)] = scores_K.tolist()
        return [Hit(numbers[i], self.index.row(numbers[i]), similarities[i], matches[i]) for i in order[:top]]

    def close(self) -> None:
        """Closes what was opened for it."""
        if self.clips is not None:
            self.clips.close()


def embed_query(model: LoadedModel, query: str) -> TextEmbeddings:
    """Without padding, which changes nothing and would take most of the time."""
    _, mask_1L = model.tokenizer([query])
    return embed_texts(model.dual, [query], model.tokenizer, 1, num_tokens=max(3, int(mask_1L.sum())))


def open_searcher(
    directory: Path, model: Path, *, needs_clips: bool = False, needs_match: bool = False, use_faiss: bool = False
) -> Searcher:
    """Opens an index and the model that it is of.

    Args:
        directory: of the index.
        model: run, checkpoint or exported model.
        needs_clips: whether the clips are looked at.
        needs_match: whether hits are put in the order of VTM; needs the clips too.
        use_faiss: searches by FAISS.

    Raises:
        CheckpointError: the index is of another model.
        ConfigError: the model cannot match, or FAISS is not installed.
        ShardError: the index, or the data sets of its clips, are damaged or not there.
    """
    index = Index(directory)
    trained = load_trained(model_of_index(index, model), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if needs_match:
        model_that_matches(trained)
    return Searcher(index, trained, IndexClips(index) if needs_clips or needs_match else None, use_faiss)


def model_of_index(index: Index, model: Path) -> Path:
    """The folder of a model that is the one of an index.

    Raises:
        CheckpointError: it is another one.
    """
    folder, _, digest = describe_prompter(model)
    known = index.description
    if digest != known.weights_sha256:
        raise CheckpointError(
            f"{index.directory} was made by {known.checkpoint} with weights {known.weights_sha256}, and {folder} has "
            f"weights {digest}: name the former (--model), or embed with the latter into another folder"
        )
    return folder


def model_that_matches(model: LoadedModel) -> AlproModel:
    """The model, if it has a matching head.

    Raises:
        ConfigError: it has none.
    """
    if isinstance(model.model, AlproModel) and model.model.vtm_head is not None:
        return model.model
    raise ConfigError(
        f"a {model.description.task} model has no matching head, so nothing can be put in the order of VTM: leave out "
        "--rerank, or use a model that was trained for pretrain or retrieval"
    )


def check_query(query: str) -> str:
    """The query as it is searched for; of what is longer than in training, the model sees the beginning.

    Raises:
        ConfigError: it is empty, or too long.
    """
    # Bytes of the command line that are no UTF-8 come as surrogates, which no tokenizer takes.
    text = query.encode("utf-8", "replace").decode("utf-8").strip()
    if not text:
        raise ConfigError('the query is empty: say what to look for, such as "a dog on a beach"')
    if len(text) > MAX_QUERY_CHARS:
        raise ConfigError(f"the query has {len(text)} characters; at most {MAX_QUERY_CHARS} are taken")
    return text
