"""The engine: DeepSpeed ZeRO behind five verbs; the only module of the library that imports deepspeed."""

import logging
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch

# DeepSpeed warns on standard output, at import, about what is the normal case on a machine without a GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from pydantic import Field, model_validator
from torch import Tensor, nn

from alpro_stream.config import Config
from alpro_stream.errors import CheckpointError, RankError
from alpro_stream.train.checkpoint import check_files
from alpro_stream.train.distributed import World

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# An operator for inference on CPUs: DeepSpeed would compile it at the first start, which takes a minute and a C++
# compiler, and give its shared memory names that outlive a killed run. Training never calls it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

_TAG = "engine"
BUCKET_ELEMENTS = 50_000_000
"""Gradients that are summed at a time. DeepSpeed takes the memory for a bucket before there are any; its own default of
5e8 is 2 GB, more than all gradients of the published model."""


class EngineConfig(Config):
    """How a step is computed and where its state lives; changes nothing of what is learned."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What ZeRO spreads over the ranks: 1 optimizer state, 2 also gradients, 3 also parameters."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is autocast over fp32 parameters; temperature and similarities stay in fp32."""
    num_micro_batches: int = Field(default=1, ge=1)
    """Parts in which a rank computes its share of the global batch, cut between lanes."""
    num_threads: int | None = Field(default=None, ge=1, le=1024)
    """torch's threads on each rank; null leaves torch's own choice."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the encoders' blocks and compute the blocks again in the backward pass: less memory for
    about a third more time; same values, same gradients."""
    compile: bool = False
    """torch.compile; the first steps then take minutes. Not with ZeRO 3, whose parameters come and go."""

    @model_validator(mode="after")
    def _can_be_compiled(self) -> Self:
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile does not work with zero_stage 3, whose parameters come and go; use zero_stage 0-2"
            )
        return self


_DecayRate = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """AdamW as published, with the weight decay that the published code configures but does not apply."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak of the schedule."""
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    """Share of the run that is warm-up."""
    betas: tuple[_DecayRate, _DecayRate] = (0.9, 0.98)
    """Decay rates of the moments."""
    eps: float = Field(default=1e-6, ge=0)
    """Added to the root of the bias-corrected second moment; the authors add it before the correction."""
    weight_decay: float = Field(default=1e-3, ge=0)
    """Not applied to biases, LayerNorm and other one-dimensional parameters."""
    max_grad_norm: float = Field(default=20.0, gt=0)
    """Gradients are scaled down to this global norm."""


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices, which decay, and biases, norms and scalars, which do not."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def deepspeed_config(engine: EngineConfig, max_grad_norm: float, rank_batch: int) -> dict[str, Any]:
    """The dictionary DeepSpeed wants, made from our own settings so that no number is written twice."""
    return {
        "train_micro_batch_size_per_gpu": rank_batch // engine.num_micro_batches,
        "gradient_accumulation_steps": engine.num_micro_batches,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": {"stage": engine.zero_stage, "reduce_bucket_size": BUCKET_ELEMENTS},
        # AdamW of torch: correct under ZeRO, which DeepSpeed only checked for its own optimizers.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class Engine:
    """Runs micro-batches, takes steps, saves and restores; every method is called on all ranks.

    Args:
        module: the objective with its model.
        config: how to compute.
        optimizer: AdamW's settings.
        world: the ranks.
        rank_batch: samples of one rank in a step.
    """

    def __init__(
        self, module: nn.Module, config: EngineConfig, optimizer: OptimizerConfig, world: World, rank_batch: int
    ) -> None:
        self._config = config
        self._world = world
        self._module = module.to(world.device)
        self._norm: float | Tensor = float("nan")
        self._adamw = torch.optim.AdamW(
            parameter_groups(module, optimizer.weight_decay),
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            eps=optimizer.eps,
            # On a CPU too: in a sixth of the time that one operation after the other takes.
            fused=True,
        )
        self._settings = [{k: v for k, v in group.items() if k != "params"} for group in self._adamw.param_groups]
        with world.waiting("all ranks to build the engine", at_work=True):
            self._engine, *_ = deepspeed.initialize(
                model=_Autocast(module, world.device, enabled=config.precision == "bf16"),
                optimizer=self._adamw,
                config=deepspeed_config(config, optimizer.max_grad_norm, rank_batch),
                dist_init_required=False,
            )
        self._engine.checkpoint_engine = self._files = _PatientWriter()
        # Two scripts that turn the engine's files into a model, which is saved beside them; one more write to fail.
        self._engine._copy_recovery_script = lambda path: None

    @property
    def module(self) -> nn.Module:
        """The objective that was given."""
        return self._module

    def __call__(self, *arguments: Any) -> Any:
        """One forward pass of the objective, under autocast when the precision asks for it."""
        return self._engine(*arguments)

    def features(self, *arguments: Any) -> Any:
        """A forward pass without a graph."""
        with torch.no_grad():
            return self._engine(*arguments)

    @contextmanager
    def evaluating(self, *, whole: bool = False) -> Iterator[None]:
        """Inside, the module computes without dropout and gradients.

        Args:
            whole: its parameters are there as a whole, for code that calls parts of the module; ZeRO 3 gathers them.
        """
        self._engine.eval()
        parameters = list(self._module.parameters())
        try:
            with (
                torch.no_grad(),
                deepspeed.zero.GatheredParameters(parameters, enabled=whole and self._config.zero_stage == 3),
            ):
                yield
        finally:
            self._engine.train()
            self._forget_order()

    def _forget_order(self) -> None:
        """After parameters were gathered outside of a step: ZeRO 3 notes anew in which order a step needs them.

        DeepSpeed 0.19.8 goes by the order of the steps before, finds parameters there that it does not expect, and
        ends the run with a "tracing error".
        """
        if self._config.zero_stage == 3:
            coordinator = self._engine.optimizer._get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()

    def close(self) -> None:
        """Lets go of the module: its parameters are of no use to another engine afterwards."""
        self._engine.destroy()

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradients of a micro-batch."""
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> None:
        """After each backward; updates the parameters once the last micro-batch of a step is in."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._config.zero_stage == 0 and self._engine.is_gradient_accumulation_boundary():
            # Stage 0 does not keep the norm that it clips with; its gradients are whole on every rank.
            gradients = [p.grad for p in self._module.parameters() if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(gradients)
        self._engine.step()
        if self._config.zero_stage > 0:
            self._norm = self._engine.get_global_grad_norm()

    def gradient_norm(self) -> float:
        """Global norm of the last update's gradients, before clipping; infinite where ZeRO refused the update."""
        return float(self._norm)

    def save(self, directory: Path) -> None:
        """Writes parameters and optimizer state of all ranks.

        Raises:
            Exception: this rank could not write; raised when no rank waits for it any more.
        """
        self._files.failure = None
        self._engine.save_checkpoint(str(directory), tag=_TAG, save_latest=False)
        if self._files.failure:
            raise self._files.failure

    def load(self, directory: Path) -> None:
        """Restores what `save` wrote with the same ZeRO stage, on as many ranks or on others.

        DeepSpeed's files are pickles, which can do anything when they are read: the first rank finds all their
        digests to be those of the completion mark before any rank reads one.

        Args:
            directory: a complete checkpoint, on a file system that all ranks share.

        Raises:
            AlproError: the files are damaged or do not fit this engine, on this rank or on another.
        """
        with self._world.all_or_none("rank 0, which checks the files of the checkpoint"):
            if self._world.is_first:
                check_files(directory, [f"{_TAG}/"])
        num_saved = len(list((directory / _TAG).glob("*_optim_states.pt")))
        # Without ZeRO there are none, and every rank takes the whole state.
        if num_saved in (0, self._world.size):
            self._load(directory)
            return
        converted = directory.with_name(f".universal-{directory.name}")
        try:
            with self._world.all_or_none("rank 0, which converts the optimizer's state"):
                if self._world.is_first:
                    shutil.rmtree(converted, ignore_errors=True)
                    _convert(directory / _TAG, converted / _TAG)
            self._load(converted, universal=True)
        finally:
            if self._world.is_first:
                shutil.rmtree(converted, ignore_errors=True)

    def _load(self, directory: Path, *, universal: bool = False) -> None:
        with self._world.all_or_none("all ranks to have loaded the engine's state"):
            self._engine._config.load_universal_checkpoint = universal
            try:
                with self._world.waiting("what all ranks load", at_work=True):
                    path, _ = self._engine.load_checkpoint(str(directory), tag=_TAG)
                if path is None:
                    raise CheckpointError("there is none")
                # Those of the configuration hold; a universal checkpoint of ZeRO 3 gives the first group's to all.
                for group, settings in zip(self._adamw.param_groups, self._settings, strict=True):
                    group.update(settings)
                if universal:
                    self._part_counters()
                self._forget_order()
            except RankError:
                raise
            except Exception as error:  # DeepSpeed raises anything from KeyError to AssertionError here.
                raise CheckpointError(f"the engine state in {directory} cannot be loaded: {error}") from error
            finally:
                self._engine._config.load_universal_checkpoint = False

    def _part_counters(self) -> None:
        """Gives each group its own counter of steps: ZeRO 3 lets them share one, which each then counts up."""
        for parameter, state in self._adamw.state.items():
            state["step"] = state["step"].to(parameter.device, copy=True)  # where a fused optimizer wants it
        made = self._engine.global_steps - self._engine.skipped_steps
        counted = {state["step"].item() for state in self._adamw.state.values()}
        if counted != {made}:
            raise CheckpointError(f"the optimizer counts {sorted(counted)} steps where {made} were made")

    def full_parameters(self) -> dict[str, Tensor]:
        """Whole parameters by name on the first rank, nothing on the others; ZeRO 3 gathers each from all ranks."""
        found = {}
        for name, parameter in self._module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._config.zero_stage == 3):
                if self._world.is_first:
                    found[name] = parameter.detach().cpu().clone()
        self._forget_order()
        return found


def _convert(source: Path, target: Path) -> None:
    """Writes the state that is spread over files of ranks by parameter, which any number of ranks can read."""
    target.mkdir(parents=True)
    arguments = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        # In this process: forked ones would share its GPU and its process group.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # It reports each of its files.
            ds_to_universal.main(arguments)
    except Exception as error:
        raise CheckpointError(
            f"the engine state in {source} cannot be converted for another number of ranks: {error}; its folder needs "
            "room for three times its size, or go on with as many ranks as wrote it"
        ) from error


class _Autocast(nn.Module):
    """Computes in bf16 from inside the engine, which switches off an autocast that it finds around itself."""

    def __init__(self, module: nn.Module, device: torch.device, enabled: bool) -> None:
        super().__init__()
        self.module = module
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=enabled)

    def forward(self, *arguments: Any) -> Any:
        with self._autocast:
            return self.module(*arguments)


class _PatientWriter(TorchCheckpointEngine):  # type: ignore[misc]
    """Notes that a write failed, where DeepSpeed's own raises and leaves the other ranks waiting at its barriers."""

    failure: Exception | None = None

    def save(self, state_dict: Any, path: str) -> None:
        try:
            super().save(state_dict, path)
        except Exception as error:
            self.failure = self.failure or error
