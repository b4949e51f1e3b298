"""What VTM of all pairs costs, and re-ranking beside it: `python benchmarks/evaluate.py`.

1,000 captions by 1,000 videos of a tiny untrained model, from the outputs of its encoders to metrics in both
directions; they are made up, as time does not depend on what they are. Exact and re-ranked take turns. The limit is
what the multimodal encoder's operations for these pairs take at the rate of a plain matrix product in the same sitting:
those of the method, so what the implementation saves of them (all tokens but one in the last layer) shows.

Whether re-ranking finds the same needs a trained model: that of `make demo`, on its own clips, and that of a row of
`alpro ablate configs/ablate/losses.yaml`, on its held-out clips, where they were made. The demo's are few: of 26 videos
k = 16 leaves out 10, so it is asked with k = 4 too.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from alpro_stream.config import load_config, validate
from alpro_stream.evaluate.embed import TextEmbeddings, VideoEmbeddings
from alpro_stream.evaluate.features import Features
from alpro_stream.evaluate.ranking import metrics_both_ways
from alpro_stream.evaluate.retrieval import RetrievalConfig, evaluate
from alpro_stream.evaluate.scoring import Scoring, score_all
from alpro_stream.model.alpro import AlproModel, Heads, ModelConfig
from alpro_stream.model.operations import pretraining_operations
from alpro_stream.testing.configs import TINY_MODEL
from alpro_stream.train.distributed import World
from benchmarks.harness import Measurement, Row, Target, main, measure, quotients
from benchmarks.timing import matrix_product_rate

SIZE, QUICK_SIZE = 1000, 300
TOP_K, FEW = 16, 4
BATCH, TEXT_LENGTH, VOCAB_SIZE = 256, 12, 100
DEMO = Path("runs/demo")
ABLATION = Path("runs/ablate/losses/seed0")


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Times both ways of scoring; then compares what they find."""
    size = QUICK_SIZE if arguments.quick else SIZE
    model = _model()
    exact, reranked = _variants(model, size)
    variants = {"exact": exact, "rerank": reranked, "product": matrix_product_rate}
    found = measure(variants, repetitions=1 if arguments.quick else 3, warmup=0)
    pair_s = _pair_operations(model) / found["product"].median
    # For each text its videos and for each video its texts; few pairs are in both.
    fewest = 2 * size * TOP_K * pair_s
    product = "matrix product"
    rates = Measurement(tuple(size * size / seconds for seconds in found["exact"].samples))
    faster = quotients(found["exact"], found["rerank"])
    # With fewer queries each has a larger share of all pairs: nothing is promised then.
    target = None if arguments.quick else Target(at_least=20)
    return [
        Row.of(f"exact, {size:,} x {size:,}", found["exact"], "s", size**2 * pair_s, limit_of=product),
        Row.of(f"re-ranked, k = {TOP_K}", found["rerank"], "s", fewest, limit_of=product),
        Row.of("exact", rates, "pairs/s", 1 / pair_s, limit_of=product),
        Row.of("re-ranked over exact", faster, "x", target=target),
        *_recall_rows("the demo", DEMO / "pretrain", "configs/demo/evaluate.yaml", []),
        *_recall_rows(
            "512 generated clips",
            ABLATION / "rows/all-four/pretrain",
            "configs/ablate/retrieval.yaml",
            [f"work_dir={ABLATION}", f"row_dir={ABLATION}/rows/all-four", "split=test"],
        ),
    ]


def _sizes() -> ModelConfig:
    return validate(ModelConfig, TINY_MODEL, source="benchmarks/evaluate.py")


def _model() -> AlproModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    return AlproModel(_sizes(), VOCAB_SIZE, Heads(vtm=True)).eval().to(device)


def _describe(arguments: argparse.Namespace) -> dict[str, Any]:
    size, sizes = QUICK_SIZE if arguments.quick else SIZE, _sizes()
    return {
        "captions": size,
        "videos": size,
        "image_size": sizes.video.image_size,
        "width": sizes.text.width,
        "multimodal_layers": sizes.text.num_multimodal_layers,
        "tokens": TEXT_LENGTH,
        "batch": BATCH,
        "precision": "fp32",
    }


def _variants(model: AlproModel, size: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """Exact and re-ranked scoring of the same features, both giving seconds."""
    sizes, device = model.config, next(model.parameters()).device
    width, num_tokens = sizes.text.width, 1 + (sizes.video.image_size // sizes.video.patch_size) ** 2
    features = normalize(torch.randn(2, size, sizes.projection_size, device=device), dim=2)
    videos = VideoEmbeddings(torch.randn(size, num_tokens, width, device=device), features[0])
    mask_CL = torch.ones(size, TEXT_LENGTH, dtype=torch.int64, device=device)
    texts = TextEmbeddings(torch.randn(size, TEXT_LENGTH, width, device=device), mask_CL, features[1])
    alone, truth_C = World(0, 0, 1, device), torch.arange(size)

    def seconds(top_k: int | None) -> float:
        started = time.perf_counter()
        how = Scoring(("vtm",), top_k, batch_size=BATCH)
        scores = score_all(model, Features(videos, texts), truth_C, size, how, alone)
        metrics_both_ways(scores["vtm"], truth_C)
        return time.perf_counter() - started

    return lambda: seconds(None), lambda: seconds(TOP_K)


def _pair_operations(model: AlproModel) -> float:
    """Operations of the multimodal encoder for one pair; a step of pre-training fuses four."""
    return pretraining_operations(model.config, TEXT_LENGTH, VOCAB_SIZE, Heads(vtm=True)).fusion / 4


def _recall_rows(name: str, model: Path, config: str, overrides: list[str]) -> list[Row]:
    """R@1 of exact and re-ranked VTM of a trained model; none where it was not made."""
    if not model.is_dir():
        print(f"no {model}: recall is not compared on {name}")
        return []
    with tempfile.TemporaryDirectory(prefix="alpro-bench-") as folder:
        own = [*overrides, f"out={folder}/out", f"cache_dir={folder}/cache", "scores=[vtm]"]
        exact, *others = (
            evaluate(load_config(RetrievalConfig, config, [*own, *mode]))
            for mode in ([], *(["mode=rerank", f"top_k={top_k}"] for top_k in (TOP_K, FEW)))
        )
    rows = []
    for way, figures in exact["metrics"]["vtm"].items():
        counts = {count: float(figures[count]) for count in ("num_queries", "num_candidates")}
        what = f"R@1 of {name}, {way.replace('_', ' ')}"
        rows.append(Row(name=f"{what}, exact", value=figures["recall_at_1"], unit="%", details=counts))
        for top_k, result in zip((TOP_K, FEW), others, strict=True):
            found = result["metrics"]["vtm"][way]["recall_at_1"]
            # It may gain too: where VTC leaves out a clip that VTM takes for a match.
            off = {"R@1": found, "gained": found - figures["recall_at_1"]}
            target = Target(at_most=0.5) if top_k == TOP_K else None
            name_k = f"{what}, off by, k = {top_k}"
            rows.append(Row(name=name_k, value=abs(off["gained"]), unit="points", target=target, details=off))
    return rows


if __name__ == "__main__":
    main("evaluate", rows, describe_content=_describe)
