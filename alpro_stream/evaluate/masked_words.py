"""Masked words: hides a word in a sentence about a video, and counts how often the model fills it in.

With the captions of held-out videos this is the accuracy of masked language modelling in words that can be seen; with
sentences that say one thing alone, a cloze. Legend: Q questions, L tokens, V vocabulary, W words.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from alpro_stream.errors import ConfigError, DataError
from alpro_stream.evaluate.embed import StoredClip, embed_videos
from alpro_stream.evaluate.features import Encoding
from alpro_stream.evaluate.lines import ClipLine, by_clip, read_lines
from alpro_stream.evaluate.opening import EvaluationConfig, Opened, encoding
from alpro_stream.evaluate.progress import in_parts
from alpro_stream.evaluate.queries import captions_of
from alpro_stream.evaluate.result import Result, Split, digest_of
from alpro_stream.evaluate.runner import Outcome, run_task
from alpro_stream.evaluate.words import load_words
from alpro_stream.model.alpro import AlproModel
from alpro_stream.stream.text import Tokenizer
from alpro_stream.train.distributed import World
from alpro_stream.train.restore import Trained


class MaskedWordsConfig(EvaluationConfig):
    """Masked words over the videos of some data sets; docs/evaluation.md."""

    task: Literal["masked_words"]
    """What is evaluated; see the other modules of `alpro_stream.evaluate`."""
    words: Path
    """Words that are hidden, wherever they occur: such as entities.json of a shard set; see `load_words`."""
    sentences: Path | None = None
    """JSON lines in place of the captions: `id` of a clip, `text`, and `word`, the one to hide."""


class Sentence(ClipLine):
    """A sentence that is true of a clip."""

    text: str
    word: str


class _Question(NamedTuple):
    """A text, the position of the token that is hidden in it, and that token."""

    key: str
    text: str
    position: int
    token: int


class MaskedWordsResult(Result):
    """What `result.json` of this task holds."""

    chance: dict[str, float]
    split: Split


def fill_in(config: MaskedWordsConfig, world: World | None = None) -> dict[str, Any]:
    """Hides, fills in, counts and writes `result.json`; see `run_task`."""
    return run_task(_fill_in, config, world)


def _fill_in(config: MaskedWordsConfig, data: Opened, world: World) -> Outcome:
    """Each rank looks at its part of the videos."""
    trained = data.trained
    with world.all_or_none():
        model = _check(config, trained)
        token_of = {word: trained.tokenizer.token_of(word) for word in load_words(config.words)}
        tokens = {word: token for word, token in token_of.items() if token is not None}
        without = sorted(set(token_of) - set(tokens))
        sentences, num_elsewhere = _sentences(config, data.clips)
        questions = _questions(sentences, tokens, trained.tokenizer, config.num_tokens)
        if not questions:
            raise DataError(
                f"no word of {config.words} occurs in the {len(sentences)} sentences as one token of the model's "
                f"tokenizer ({len(without)} of the words are several or none): take words of these captions"
            )
    world.stage.enter("the hidden words")
    rows_of = by_clip([one.key for one in questions])
    clips = [clip for clip in data.clips if clip.key in rows_of]
    among = torch.tensor(sorted(set(tokens.values())), device=world.device)
    # Every rank fills in its own, and the sum is the whole.
    is_right_Q2 = torch.zeros(len(questions), 2, dtype=torch.int64, device=world.device)
    with world.all_or_none("the words of all ranks"), encoding(config, trained, world) as how:
        for part in in_parts(clips[world.rank :: world.size], how.batch_size, "videos"):
            rows = [row for clip in part for row in rows_of[clip.key]]
            is_right_Q2[rows] = _right(model, part, [questions[row] for row in rows], among, how)
    share = 100 * world.sum(is_right_Q2).cpu().double().mean(dim=0)
    counts = torch.tensor([one.token for one in questions]).bincount()
    return Outcome(
        metrics={"accuracy": float(share[0]), "accuracy_among_words": float(share[1])},
        chance={"most_frequent_word": 100 * float(counts.max()) / len(questions)},
        protocol={
            "hidden": "one word at a time, by the mask token; the rest of the sentence is seen",
            "accuracy": "the likeliest of all tokens is the word",
            "accuracy_among_words": f"the likeliest of {len(among)} words is the word",
        },
        split={
            "digest": digest_of([sorted(questions), sorted(tokens)]),
            "num_videos": len(clips),
            "num_questions": len(questions),
            "num_elsewhere": num_elsewhere,
            # Their word is not in the list, no single token, or cut off.
            "num_sentences_without_question": _num_without(sentences, questions),
            "num_words": len(tokens),
            "words_without_token": without,
        },
    )


@torch.inference_mode()
def _right(
    model: AlproModel, clips: Sequence[StoredClip], questions: Sequence[_Question], among_W: Tensor, how: Encoding
) -> Tensor:
    """Whether each word is filled in: as the likeliest token, and as the likeliest of the words; (Q, 2)."""
    device, video_of = among_W.device, {clip.key: number for number, clip in enumerate(clips)}
    videos = embed_videos(model.dual, clips, how.choice, how.decoder, how.batch_size)
    right = []
    for some in in_parts(questions, how.batch_size, "hidden words of these videos"):
        ids_BL, mask_BL = (tensor.to(device) for tensor in how.tokenizer([one.text for one in some], how.num_tokens))
        row = torch.arange(len(some), device=device)
        position = torch.tensor([one.position for one in some], device=device)
        token_B = torch.tensor([one.token for one in some], device=device)
        ids_BL[row, position] = how.tokenizer.mask_id
        text_BLD, _ = model.dual.encode_text(ids_BL, mask_BL)
        video_BND = videos.tokens_VND[[video_of[one.key] for one in some]]
        fused_BLD = model.multimodal(text_BLD, mask_BL, video_BND, num_tokens=text_BLD.shape[1])
        logits_BV = model.word_logits(fused_BLD[row, position][:, None])[:, 0]
        best = logits_BV.argmax(dim=1), among_W[logits_BV[:, among_W].argmax(dim=1)]
        right.append(torch.stack([one == token_B for one in best], dim=1).long())
    return torch.cat(right)


def _num_without(sentences: Sequence[Sentence], questions: Sequence[_Question]) -> int:
    asked = {(one.key, one.text) for one in questions}
    return sum((sentence.id, sentence.text) not in asked for sentence in sentences)


def _sentences(config: MaskedWordsConfig, clips: Sequence[StoredClip]) -> tuple[list[Sentence], int]:
    """Of the file, and how many are about other clips; or all captions, in which every word may be hidden."""
    if config.sentences:
        return read_lines(config.sentences, Sentence, {clip.key for clip in clips})
    return [Sentence(id=clip.key, text=caption, word="") for clip in clips for caption in captions_of(clip)], 0


def _questions(
    sentences: Sequence[Sentence], tokens: dict[str, int], tokenizer: Tokenizer, num_tokens: int | None
) -> list[_Question]:
    """One for each place where a word stands."""
    known, found = set(tokens.values()), list[_Question]()
    for sentence in sentences:
        wanted = {tokens.get(sentence.word)} if sentence.word else known
        ids, _ = tokenizer([sentence.text], num_tokens)
        for position, token in enumerate(ids[0].tolist()):
            if token in wanted:
                found.append(_Question(sentence.id, sentence.text, position, token))
    return found


def _check(config: MaskedWordsConfig, trained: Trained) -> AlproModel:
    """Refuses in the first seconds what would say nothing; returns the model that fills in."""
    if config.num_clips > 1:
        raise ConfigError(f"num_clips={config.num_clips}: words are filled in about one clip; set num_clips=1")
    model = trained.model
    if not isinstance(model, AlproModel) or model.mlm_head is None:
        raise ConfigError(
            f"{trained.path} was trained for {trained.description.task}: it has no head for masked words. Set "
            "checkpoint to one of task pretrain"
        )
    return model
