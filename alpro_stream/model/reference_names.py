"""Parameter names of the authors' code (salesforce/ALPRO, and LAVIS, which took it over), and ours: pure functions.

The table is in docs/concepts.md. LAVIS, and the authors' question answering model, write no ``bert.`` after
``text_encoder.``.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from alpro_stream.errors import CheckpointError
from alpro_stream.model.alpro import Task
from alpro_stream.model.loading import some

_PREFIXES = {
    "visual_encoder.model.": "dual.video_encoder.",
    "text_encoder.embeddings.": "dual.text_encoder.embeddings.",
    "vision_proj.": "dual.video_projection.",
    "text_proj.": "dual.text_projection.",
    "itm_head.": "vtm_head.",
    "text_encoder.cls.predictions.transform.dense.": "mlm_head.dense.",
    "text_encoder.cls.predictions.transform.LayerNorm.": "mlm_head.norm.",
    "text_encoder.cls.predictions.bias": "mlm_head.bias",
    "mpm_head.": "pem_head.",
    "classifier.": "answer_head.",
    "temp": "dual.raw_temperature",
}
"""Their prefix, without ``bert.``, and ours."""

_LAYER = re.compile(r"text_encoder\.encoder\.layer\.(\d+)\.(.+)")
_OUR_LAYER = re.compile(r"(dual\.text_encoder|multimodal)\.layers\.(\d+)\.(.+)")
_SKIPPED = re.compile(
    r"prompter\..*"  # the frozen prompter inside a pre-training file; `prompter_part` reads it
    r"|(video|image)_prompt_feat"  # the prompt bank is built again from the entities
    r"|visual_encoder\.model\.head\..*"  # ImageNet or Kinetics classes, never used
    r"|text_encoder\.(cls\.predictions\.decoder|pooler)\..*"  # a second name of the word embeddings; never used
    r"|text_encoder\.embeddings\.position_ids"  # 0, 1, 2, ...
)
_HEADS: dict[Task, tuple[str, ...]] = {
    "prompter": (),
    "pretrain": ("multimodal", "vtm_head", "mlm_head", "pem_head"),
    "retrieval": ("multimodal", "vtm_head"),
    "question_answering": ("multimodal", "answer_head"),
}


def reference_task(names: Iterable[str]) -> Task | None:
    """What a file of the authors' names was trained for; None when these are not their names."""
    heads = {name.partition(".")[0] for name in names}
    if not {"visual_encoder", "text_encoder"} <= heads or not {"temp", "classifier"} & heads:
        return None
    if "mpm_head" in heads:
        return "pretrain"
    if "classifier" in heads:
        return "question_answering"
    # The authors' prompters have an unused matching head, ours have none.
    return "prompter" if "video_prompt_feat" in heads or "itm_head" not in heads else "retrieval"


def num_reference_text_layers(names: Iterable[str]) -> int:
    """Layers of the BERT in a file of the authors' names, both halves together.

    Raises:
        CheckpointError: their numbers are not 0, 1, 2, ...
    """
    matches = [_LAYER.fullmatch(without_bert(name)) for name in names]
    numbers = {int(match[1]) for match in matches if match}
    if numbers != set(range(len(numbers))):
        raise CheckpointError(
            f"the text layers are numbered {some([str(n) for n in sorted(numbers)])}, not 0, 1, 2, ..."
        )
    return len(numbers)


def prompter_part(found: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The frozen prompter that a pre-training file of the authors carries, under the names of a prompter's own file.

    Raises:
        CheckpointError: the file has none.
    """
    prefix = "prompter."
    part = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    if not part:
        raise CheckpointError(f"{source} carries no prompter; only pre-training files of the authors do")
    return part


def from_reference(
    found: Mapping[str, Tensor], task: Task, num_text_layers: int, source: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The parameters that a task uses under our names, and their names that it does not.

    Args:
        found: tensors by the authors' names.
        task: what the model is for; a pre-training file also gives a retrieval model, and so on.
        num_text_layers: layers of the text encoder; those above belong to the multimodal encoder.
        source: for messages.

    Raises:
        CheckpointError: a name that the authors' models do not have, or two names of one parameter that differ.
    """
    _check_tied(found, source)
    ours: dict[str, Tensor] = {}
    skipped: list[str] = []
    unknown: list[str] = []
    for theirs, tensor in found.items():
        plain = without_bert(theirs)
        name = _our_name(plain, num_text_layers)
        if _SKIPPED.fullmatch(plain):
            skipped.append(theirs)
        elif name is None:
            unknown.append(theirs)
        elif name.partition(".")[0] not in ("dual", *_HEADS[task]):
            skipped.append(theirs)
        elif name in ours:
            raise CheckpointError(f"{source}: {plain} is in it twice, with and without `bert.`")
        else:
            ours[name] = tensor.reshape(-1) if plain == "temp" else tensor
    if unknown:
        raise CheckpointError(f"{source}: {some(unknown)} is no parameter of the authors' models")
    if task == "prompter":
        ours = {name.removeprefix("dual."): tensor for name, tensor in ours.items()}
    return ours, skipped


def to_reference(ours: Mapping[str, Tensor], task: Task, num_text_layers: int) -> dict[str, Tensor]:
    """Our parameters under the authors' names, so that their code can read them.

    The second names of the word embeddings and the position ids are written too. What their classes register and we do
    not have is left out, and their loader, which is not strict, starts it fresh: the classes of the visual encoder; of
    a prompter the upper layers, the heads and the prompt bank; of a pre-trained model the prompter inside it; the MLM
    head of a retrieval model; the projections' unused matching head of a question answering model.
    """
    bert = "" if task == "question_answering" else "bert."
    theirs: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        whole = f"dual.{name}" if task == "prompter" else name
        plain = _their_name(whole, num_text_layers)
        theirs[_with_bert(plain, bert)] = tensor.reshape(()) if plain == "temp" else tensor
    embeddings = f"text_encoder.{bert}embeddings."
    num_positions = len(theirs[embeddings + "position_embeddings.weight"])
    theirs[embeddings + "position_ids"] = torch.arange(num_positions)[None]
    if "text_encoder.cls.predictions.bias" in theirs:
        decoder = "text_encoder.cls.predictions.decoder."
        # Copies: a file of safetensors holds no tensor twice.
        theirs[decoder + "weight"] = theirs[embeddings + "word_embeddings.weight"].clone()
        theirs[decoder + "bias"] = theirs["text_encoder.cls.predictions.bias"].clone()
    return theirs


def _check_tied(found: Mapping[str, Tensor], source: str) -> None:
    """The authors store two parameters of the MLM head twice; a file in which they differ was changed by hand."""
    plain = {without_bert(name): tensor for name, tensor in found.items()}
    predictions = "text_encoder.cls.predictions."
    for second, first in (
        ("decoder.weight", "text_encoder.embeddings.word_embeddings.weight"),
        ("decoder.bias", predictions + "bias"),
    ):
        name = predictions + second
        if name in plain and first in plain and not torch.equal(plain[name], plain[first]):
            raise CheckpointError(f"{source}: {name} and {first} are one parameter under two names, and differ")


def without_bert(name: str) -> str:
    """The name as LAVIS, and the authors' question answering model, write it."""
    return name.replace("text_encoder.bert.", "text_encoder.", 1)


def _with_bert(name: str, bert: str) -> str:
    if name.startswith(("text_encoder.embeddings.", "text_encoder.encoder.")):
        return name.replace("text_encoder.", f"text_encoder.{bert}", 1)
    return name


def _our_name(plain: str, num_text_layers: int) -> str | None:
    if match := _LAYER.fullmatch(plain):
        index = int(match[1])
        if index < num_text_layers:
            return f"dual.text_encoder.layers.{index}.{match[2]}"
        return f"multimodal.layers.{index - num_text_layers}.{match[2]}"
    for theirs, ours in _PREFIXES.items():
        if plain.startswith(theirs):
            return ours + plain.removeprefix(theirs)
    return None


def _their_name(ours: str, num_text_layers: int) -> str:
    if match := _OUR_LAYER.fullmatch(ours):
        first = num_text_layers if match[1] == "multimodal" else 0
        return f"text_encoder.encoder.layer.{first + int(match[2])}.{match[3]}"
    for theirs, prefix in _PREFIXES.items():
        if ours.startswith(prefix):
            return theirs + ours.removeprefix(prefix)
    raise CheckpointError(f"{ours} has no name in the authors' models")
