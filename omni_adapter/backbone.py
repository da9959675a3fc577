"""Any causal LM of transformers behind a handful of methods.

Embeddings in, text logits and hidden states out: [B, S, D] -> [B, S, V] and [B, S, D]. The only module that
touches other people's models, through public calls of transformers and PEFT; what a model can do is read from
its signatures and seen by running a few tokens, never from its name. Knows nothing of audio, codes,
tokenizers or prompts.
"""

import copy
import inspect
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from omni_adapter.errors import BackboneError
from omni_adapter.tensor_files import read_safetensors
from omni_adapter.vocab import NO_TEXT

logger = logging.getLogger(__name__)

_VOLATILE = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "_attn_implementation",
)
"""Config keys that say how a model was loaded, not what it is."""

_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
"""Config keys that transformers uses for the number of positions."""

_REPLAY = ("embeddings", "attention_mask", "position_ids")
"""What is kept of an LM without a state of its own."""

Packing = Literal["positions", "mask"]
"""What keeps samples in one row apart: positions that start anew, or a mask of which step sees which."""

_ADAPTER = "default"
_PROBE_STEPS = 6
_RMS_SAMPLES = 1024
_LARGE_LOGIT = 1e3  # where caps show
_TOLERANCE = 1e-4  # of the largest value, for float32 and wider
_TOLERANCE_HALF = 2e-2  # the same for the half-precision types
_CACHE_SLACK = 10.0  # how much further a cached step may be off: it adds up in another order


class BackboneOutput(NamedTuple):
    """What one pass of the LM returns."""

    logits: Tensor  # [B, S or logits_to_keep, V], by the LM's own head
    hidden: Tensor  # [B, S, hidden width], what enters the LM head, at all positions
    cache: "BackboneCache | None"


@dataclass
class BackboneCache:
    """State of an LM after some steps. Opaque to callers: the next ``forward`` that gets it consumes it.

    Args:
        states: what the LM returned, by the argument name under which it takes it back.
        rows: rows B of the batch that it belongs to.
        steps: steps that it has seen, padding included.
    """

    states: dict[str, Any]
    rows: int
    steps: int


@dataclass(frozen=True)
class _Steps:
    """What goes into one pass: embeddings [B, S, D], mask [B, past + S], positions [B, S]."""

    embeddings: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None

    def window(self, past: int, start: int, stop: int) -> "_Steps":
        """The steps from ``start`` to ``stop``, after ``past`` steps and those before ``start``."""
        mask, positions = self.attention_mask, self.position_ids
        return _Steps(
            self.embeddings[:, start:stop],
            None if mask is None else mask[:, : past + stop],
            None if positions is None else positions[:, start:stop],
        )


class Backbone(nn.Module):
    """A causal LM, run on embeddings instead of ids.

    Args:
        lm: any causal LM of transformers; its weights, embeddings and vocabulary stay as they are.
        probe: run a few tokens to see that the model does what its signature promises.

    Attributes:
        width: width D of the embeddings.
        vocab_size: entries V of the text logits.
        accepts: argument names that the LM's forward takes.
        replays: whether all steps are run again at each cached step, for want of a usable state.
        lora_targets: names of the modules that carry LoRA, empty without.

    Raises:
        BackboneError: if the model lacks something that hearing or speaking needs; the text names it.
    """

    def __init__(self, lm: PreTrainedModel, *, probe: bool = True) -> None:
        super().__init__()
        self.accepts = inspect_base(lm)
        self.lm = lm
        self.replays = False
        self.lora_targets: tuple[str, ...] = ()
        self._peft: tuple[PeftModel, ...] = ()  # in a tuple, so that its parameters are not registered twice
        self._position_offset = 0
        with torch.no_grad():
            self.width: int = self.embed(_probe_ids(self)).shape[-1]
        head = _head(lm)
        self.vocab_size: int = (
            lm.config.get_text_config().vocab_size if head is None else int(_weight(head).shape[0])
        )
        if probe and self.device.type != "meta":
            with _quiet(self):
                _check_behaviour(self)

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings."""
        return next(self.lm.get_input_embeddings().parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the input embeddings."""
        return next(self.lm.get_input_embeddings().parameters()).dtype

    @property
    def max_positions(self) -> int | None:
        """Steps that the LM's positions reach, None if they have no end."""
        config = self.lm.config.get_text_config()
        limits = [
            limit for name in _LIMITS if isinstance(limit := getattr(config, name, None), int) and limit > 0
        ]
        return limits[0] - self._position_offset if limits else None

    @property
    def has_lora(self) -> bool:
        """Whether LoRA was added."""
        return bool(self._peft)

    @cached_property
    def embedding_rms(self) -> float:
        """Root mean square of the input embeddings, the scale that embeddings of audio should have."""
        with torch.no_grad():
            count = next(self.lm.get_input_embeddings().parameters()).shape[0]
            ids = torch.arange(0, count, -(-count // _RMS_SAMPLES), device=self.device)
            return float(self.embed(ids[None]).float().square().mean().sqrt())

    @cached_property
    def hidden_width(self) -> int:
        """Width of the hidden states; equal to ``width`` in all but a few LMs."""
        with _quiet(self):
            return int(self(self.embed(_probe_ids(self))).hidden.shape[-1])

    @cached_property
    def padding_is_exact(self) -> bool:
        """Whether rows that are padded on the left come out as they do alone; tried when first asked."""
        with _quiet(self):
            return _padding_is_exact(self)

    @property
    def lora_config(self) -> LoraConfig | None:
        """PEFT's settings of the LoRA that was added, None without."""
        config = self._peft[0].peft_config[_ADAPTER] if self._peft else None
        return config if isinstance(config, LoraConfig) else None

    @property
    def is_quantized(self) -> bool:
        """Whether weights of the LM are stored in less than 16 bits, so that they cannot learn."""
        if getattr(self.lm, "hf_quantizer", None) is not None:
            return True
        return any(not parameter.is_floating_point() for parameter in self.lm.parameters())

    @cached_property
    def packing(self) -> Packing | None:
        """How several samples in one row can be kept apart, None if they cannot; tried when first asked."""
        with _quiet(self):
            return _find_packing(self)

    @property
    def linear_head(self) -> nn.Linear | None:
        """The LM's head if its logits are nothing but this matrix times the hidden state, else None."""
        head: Any = _head(self.lm)
        plain = type(head) is nn.Linear and head.bias is None  # subclasses are quantised or carry LoRA
        return head if plain and self._head_is_linear else None

    @cached_property
    def projects(self) -> bool:
        """Whether ``project`` gives the LM's logits; tried when first asked."""
        same = False
        with _quiet(self), _tolerated():
            whole = self(self.embed(_probe_ids(self, steps=_PROBE_STEPS)))
            same = self._close(self.project(whole.hidden), whole.logits)
        return same

    @cached_property
    def _head_is_linear(self) -> bool:
        """Whether logits, large ones too, are those of the head alone: neither scaled nor capped."""
        with _quiet(self):
            return self.projects and _head_is_linear(self)

    @cached_property
    def _body(self) -> tuple[nn.Module, type[Any]]:
        """The module whose last hidden state enters the head, and the class of its output."""
        with _quiet(self):
            return _find_body(self)

    @cached_property
    def _chunks_are_exact(self) -> bool:
        """Whether several steps at once after a cache come out as they do one by one."""
        with _quiet(self):
            return _chunks_are_exact(self)

    def _close(self, one: Tensor, other: Tensor, *, slack: float = 1.0) -> bool:
        """Whether results differ by no more than rounding of the LM's type does, relative to the largest."""
        if one.shape != other.shape or not bool(torch.isfinite(one).all()):
            return False
        exact = self.dtype in (torch.float32, torch.float64)  # the LM's, since some cast their logits up
        tolerance = slack * (_TOLERANCE if exact else _TOLERANCE_HALF)
        return bool((one - other).abs().max() <= tolerance * other.abs().max())

    def embed(self, ids: Tensor) -> Tensor:
        """Look ids up in the LM's input embedding.

        Args:
            ids: int64 ids, [B, S]; ``NO_TEXT`` gives a zero vector.

        Returns:
            Embeddings as the LM itself looks them up, [B, S, D].
        """
        embeddings: Tensor = self.lm.get_input_embeddings()(ids.clamp(min=0))
        return embeddings.masked_fill((ids == NO_TEXT).unsqueeze(-1), 0)

    def forward(
        self,
        embeddings: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: BackboneCache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> BackboneOutput:
        """Run the LM over ``embeddings``, after the steps that ``cache`` has seen.

        Args:
            embeddings: [B, S, D].
            attention_mask: 1 for steps and 0 for padding, which belongs on the left, [B, past + S]; None if
                nothing is padded; or, where rows hold several samples, which step sees which, bool
                [B, 1, S, S].
            position_ids: position of each step, from 0, [B, S]; derived from the mask if None; dropped where
                the LM takes none.
            cache: what the last call returned; it is consumed.
            use_cache: return a cache for the next call.
            logits_to_keep: compute the logits of the last so many steps; 0 for all.
        """
        steps = _Steps(embeddings, attention_mask, position_ids)
        if attention_mask is not None and attention_mask.dim() > 2:
            return self._run(self._kept_apart(steps), None, use_cache=False, logits_to_keep=logits_to_keep)
        if self.replays:
            return self._run_again(steps, cache, use_cache, logits_to_keep)
        if cache is not None and embeddings.shape[1] > 1 and not self._chunks_are_exact:
            return self._run_one_by_one(steps, cache, logits_to_keep)
        return self._run(steps, cache, use_cache, logits_to_keep)

    def project(self, hidden: Tensor) -> Tensor:
        """Return the LM's own logits of states that enter its head, with its own scales, caps and biases.

        Args:
            hidden: states as ``forward`` returns them, [B, S, hidden width].

        Returns:
            Logits, [B, S, V]; they are the LM's only if ``projects``.
        """
        body, output = self._body
        flags = {"use_cache": False, "return_dict": True}
        arguments = {name: value for name, value in flags.items() if name in self.accepts}
        with _answering(body, output(last_hidden_state=hidden)):
            logits: Tensor = self.lm(inputs_embeds=hidden, **arguments)["logits"]
        return logits

    def select_rows(self, cache: BackboneCache, indices: Tensor) -> BackboneCache:
        """Gather rows of a cache: repeat, reorder or drop them.

        Args:
            cache: stays as it is.
            indices: int64 rows of ``cache``, [n].

        Returns:
            A cache of n rows that shares no memory with ``cache``.
        """
        states = {name: _select(value, cache.rows, indices) for name, value in cache.states.items()}
        return BackboneCache(states, rows=len(indices), steps=cache.steps)

    def add_lora(
        self,
        rank: int = 16,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        targets: str | Sequence[str] = "all-linear",
        use_dora: bool = False,
    ) -> tuple[str, ...]:
        """Add LoRA to the LM's linear layers.

        Args:
            rank: rank of each update.
            alpha: scale times rank; None for twice the rank.
            dropout: dropout before each update.
            targets: names of modules, or ``all-linear`` for every linear layer that the text path runs.
            use_dora: learn the length of each weight vector apart from its direction (DoRA).

        Returns:
            Names of the modules that carry LoRA.

        Raises:
            BackboneError: if LoRA was added before, or nothing fits ``targets``.
        """
        modules = _lora_targets(self) if targets == "all-linear" else _named(self.lm, targets)
        if not modules:
            raise BackboneError(
                f"no linear layer of {_name(self.lm)} fits LoRA targets {targets!r}; name some of its own"
            )
        transposed = all(isinstance(module, Conv1D) for module in modules.values())
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]
            lora_dropout=dropout,
            target_modules=list(modules),
            fan_in_fan_out=transposed,
            use_dora=use_dora,
        )
        self._attach_lora(config)
        logger.info("LoRA of rank %d on %d modules of %s", rank, len(modules), _name(self.lm))
        return self.lora_targets

    def _attach_lora(self, config: LoraConfig) -> None:
        """Let PEFT put LoRA into the LM's modules, in place."""
        if self.has_lora:
            raise BackboneError(
                f"LoRA was added already, to {len(self.lora_targets)} modules of {_name(self.lm)}"
            )
        self._peft = (get_peft_model(self.lm, config, adapter_name=_ADAPTER),)
        self.lora_targets = tuple(sorted(config.target_modules or ()))

    @contextmanager
    def lora_disabled(self) -> Iterator[None]:
        """Run the base's own weights inside: its logits come out bit for bit."""
        flags = [(parameter, parameter.requires_grad) for parameter in self.lm.parameters()]
        with ExitStack() as stack:
            for peft in self._peft:
                stack.enter_context(peft.disable_adapter())
            try:
                yield
            finally:
                stack.close()
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)

    def lora_state_dict(self) -> dict[str, Tensor]:
        """Return the LoRA weights by name, empty without LoRA. They are the live ones, not copies."""
        return {name: weight.detach() for name, weight in self._lora_parameters().items()}

    def load_lora_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        """Load what ``lora_state_dict`` returned, into LoRA added with the same settings.

        Raises:
            BackboneError: if names or shapes differ.
        """
        own = self._lora_parameters()
        wrong = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
        wrong += [name for name in weights if name not in own]
        if wrong:
            raise BackboneError(
                f"{len(wrong)} LoRA weights do not fit {_name(self.lm)}, the first is {wrong[0]}: "
                f"expected {_shape(own.get(wrong[0]))}, got {_shape(weights.get(wrong[0]))}; "
                "add LoRA of the same rank to the same modules first"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])

    def _lora_parameters(self) -> dict[str, nn.Parameter]:
        """LoRA's parameters, under names without that of PEFT's adapter."""
        infix = f".{_ADAPTER}."
        marked = ((name, parameter) for name, parameter in self.lm.named_parameters() if "lora_" in name)
        return {name.replace(infix, "."): parameter for name, parameter in marked if infix in name}

    def save_lora(self, folder: Path) -> None:
        """Write LoRA as PEFT does, so that PEFT alone can put it onto the base as well."""
        folder.mkdir(parents=True, exist_ok=True)
        for peft in self._peft:
            saved = get_peft_model_state_dict(peft, adapter_name=_ADAPTER, save_embedding_layers=False)
            weights = {name: weight.detach().cpu().contiguous() for name, weight in saved.items()}
            save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
            peft.peft_config[_ADAPTER].save_pretrained(str(folder))

    def load_lora(self, folder: Path) -> None:
        """Add the LoRA that ``save_lora`` or PEFT wrote.

        Raises:
            BackboneError: if it is no LoRA, or LoRA was added before.
            CheckpointError: if its file is broken or its tensors do not fit this LM.
        """
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, LoraConfig):
            raise BackboneError(f"{folder} holds {config.peft_type}; LoRA was expected")
        self._attach_lora(config)
        (peft,) = self._peft
        own = get_peft_model_state_dict(peft, adapter_name=_ADAPTER, save_embedding_layers=False)
        expected = {name: tuple(weight.shape) for name, weight in own.items()}
        weights = read_safetensors(folder / SAFETENSORS_WEIGHTS_NAME, expected=expected)
        with (
            torch.no_grad()
        ):  # into the live weights: PEFT's loader renames those of some mixtures of experts
            for name, weight in own.items():
                weight.copy_(weights[name])

    def drop_lora(self) -> None:
        """Take LoRA off again and leave the base's weights as they were."""
        for peft in self._peft:
            peft.unload()
        self._peft, self.lora_targets = (), ()

    def merge_lora(self) -> None:
        """Add the LoRA updates to the base's weights for good, and drop LoRA."""
        for peft in self._peft:
            peft.merge_and_unload()
        self._peft, self.lora_targets = (), ()

    def checkpoint_gradients(self) -> None:
        """Compute the LM's states again in backward passes instead of keeping them.

        Raises:
            BackboneError: if transformers cannot do so for this LM.
        """
        try:
            self.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[no-untyped-call]
        except ValueError as error:
            raise BackboneError(
                f"{_name(self.lm)} cannot checkpoint gradients: {_first_line(error)}; train it without"
            ) from error

    def fingerprint(self) -> dict[str, Any]:
        """Return the facts of the LM's config by which it is recognised, as plain JSON."""
        config: dict[str, Any] = _lasting(json.loads(self.lm.config.to_json_string(use_diff=True)))
        return config

    def _run(
        self, steps: _Steps, cache: BackboneCache | None, use_cache: bool, logits_to_keep: int
    ) -> BackboneOutput:
        """One pass of the LM's own forward."""
        past = 0 if cache is None else cache.steps
        rows, count = steps.embeddings.shape[:2]
        reads_or_writes = use_cache or cache is not None  # some LMs heed no cache that they are not to write
        arguments = self._arguments(steps, past, use_cache=reads_or_writes, logits_to_keep=logits_to_keep)
        arguments |= {} if cache is None else cache.states
        with _captured_hidden(self.lm) as captured:
            # A copy, since some LMs scale their input in place.
            output = self.lm(inputs_embeds=steps.embeddings.clone(), **arguments)
        if not captured:
            raise BackboneError(f"{_name(self.lm)} has no body whose last hidden state enters its head")
        logits = output["logits"]
        logits = logits[:, -logits_to_keep:] if logits_to_keep else logits
        if not use_cache:
            return BackboneOutput(logits, captured[-1], None)
        states = {name: output[name] for name in output if name in self.accepts and output[name] is not None}
        if not states:
            self.replays = True
            states = dict(
                zip(_REPLAY, (steps.embeddings, steps.attention_mask, steps.position_ids), strict=True)
            )
        return BackboneOutput(logits, captured[-1], BackboneCache(states, rows, past + count))

    def _kept_apart(self, steps: _Steps) -> _Steps:
        """Steps of packed samples in the way in which this LM keeps them apart.

        Raises:
            BackboneError: if it does not, or not over so many steps.
        """
        packing, length = self.packing, steps.embeddings.shape[1]
        if packing is None:
            raise BackboneError(
                f"{_name(self.lm)} cannot keep samples in one row apart; train it without packing, or load "
                'it with attn_implementation="sdpa"'
            )
        window = getattr(self.lm.config.get_text_config(), "sliding_window", None)
        if packing == "mask" and isinstance(window, int) and length > window:
            raise BackboneError(
                f"packed rows of {_name(self.lm)} must be no longer than its attention window of {window} "
                f"steps, got {length}; train it without packing"
            )
        return _apart(steps, packing)

    def _arguments(self, steps: _Steps, past: int, *, use_cache: bool, logits_to_keep: int) -> dict[str, Any]:
        """What the LM's forward takes besides embeddings and cache."""
        mask, positions, count = steps.attention_mask, steps.position_ids, steps.embeddings.shape[1]
        if mask is not None and positions is None:
            positions = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -count:]
        elif past and positions is None:
            positions = torch.arange(past, past + count, device=steps.embeddings.device)[None]
        if mask is not None and "past_key_values" not in self.accepts:
            mask = mask[:, -count:]  # a state that is no list of steps has no place for the past's padding
        wanted = {
            "attention_mask": mask,
            "position_ids": None if positions is None else positions + self._position_offset,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            "return_dict": True,
        }
        return {name: value for name, value in wanted.items() if name in self.accepts and value is not None}

    def _run_again(
        self, steps: _Steps, cache: BackboneCache | None, use_cache: bool, logits_to_keep: int
    ) -> BackboneOutput:
        """Run all steps so far, for an LM that keeps no state."""
        count = steps.embeddings.shape[1]
        if cache is not None:
            past, positions = cache.states["embeddings"], cache.states["position_ids"]
            if positions is not None and steps.position_ids is not None:
                positions = torch.cat([positions, steps.position_ids], dim=1)
            steps = _Steps(torch.cat([past, steps.embeddings], dim=1), steps.attention_mask, positions)
        output = self._run(steps, None, use_cache=False, logits_to_keep=logits_to_keep or count)
        states = dict(zip(_REPLAY, (steps.embeddings, steps.attention_mask, steps.position_ids), strict=True))
        rows, total = steps.embeddings.shape[:2]
        kept = BackboneCache(states, rows, total) if use_cache else None
        return BackboneOutput(output.logits, output.hidden[:, -count:], kept)

    def _run_one_by_one(self, steps: _Steps, cache: BackboneCache, logits_to_keep: int) -> BackboneOutput:
        """Feed step after step, for an LM whose state takes only one at a time."""
        outputs: list[BackboneOutput] = []
        last, past = cache, cache.steps
        for index in range(steps.embeddings.shape[1]):
            outputs.append(
                self._run(steps.window(past, index, index + 1), last, use_cache=True, logits_to_keep=0)
            )
            last = outputs[-1].cache or last
        logits = torch.cat([output.logits for output in outputs], dim=1)
        hidden = torch.cat([output.hidden for output in outputs], dim=1)
        return BackboneOutput(logits[:, -logits_to_keep:], hidden, last)


def _lasting(value: Any) -> Any:
    """A config's values without those that say how a model was loaded, in nested configs too."""
    if isinstance(value, dict):
        return {key: _lasting(item) for key, item in value.items() if key not in _VOLATILE}
    return [_lasting(item) for item in value] if isinstance(value, list) else value


def inspect_base(lm: PreTrainedModel) -> frozenset[str]:
    """Check from the outside that ``lm`` can be wrapped.

    Returns:
        The argument names that its forward takes, those that it passes on to its body included.

    Raises:
        BackboneError: if it cannot; the text names what it lacks.
    """
    name = _name(lm)
    if not isinstance(lm, PreTrainedModel):
        raise BackboneError(f"expected a causal LM of transformers (PreTrainedModel), got {name}")
    if getattr(lm.config, "is_encoder_decoder", False):
        raise BackboneError(f"{name} is an encoder-decoder; pass a causal LM")
    accepts = _accepted(lm)
    if "inputs_embeds" not in inspect.signature(lm.forward).parameters:
        raise BackboneError(
            f"forward() of {name} takes no inputs_embeds; pass a causal LM that can be fed embeddings"
        )
    try:
        table = lm.get_input_embeddings()
    except NotImplementedError:
        table = None
    if table is None or isinstance(table, (nn.ModuleList, nn.ModuleDict)):
        raise BackboneError(
            f"get_input_embeddings() of {name} gives {_name(table)}; pass a causal LM with one table"
        )
    return accepts


def _accepted(lm: PreTrainedModel) -> frozenset[str]:
    """Argument names of the LM's forward, and of its body's where the LM passes further ones on."""
    parameters = inspect.signature(lm.forward).parameters
    names = set(parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for body in _bodies(lm):
            names |= set(inspect.signature(body.forward).parameters)
    return frozenset(names - {"args", "kwargs", "input_ids", "labels"})


def _bodies(lm: PreTrainedModel) -> list[nn.Module]:
    """Modules that may compute the last hidden state that enters the head."""
    head = _head(lm)
    inside = {lm, *(() if head is None else head.modules())}
    decoder: nn.Module = lm.get_decoder()  # type: ignore[no-untyped-call]
    candidates = (lm.base_model, decoder, *lm.children())
    return [body for body in dict.fromkeys(candidates) if body not in inside]


def _head(lm: PreTrainedModel) -> nn.Module | None:
    """The module that turns hidden states into logits, if the LM tells."""
    head: nn.Module | None = lm.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head


def _weight(module: nn.Module) -> Tensor:
    """Weight of a linear layer."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _name(lm: object) -> str:
    """Name of a model's class, for messages."""
    return type(lm).__name__


def _shape(weight: Tensor | None) -> str:
    """Shape of a weight that may be missing, for messages."""
    return "none" if weight is None else str(list(weight.shape))


@contextmanager
def _captured_hidden(lm: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the last hidden states that the LM's body returns inside; the outermost body's comes last."""
    captured: list[Tensor] = []

    def collect(module: nn.Module, inputs: Any, output: Any) -> None:
        if hasattr(output, "last_hidden_state"):
            captured.append(output.last_hidden_state)

    handles = [body.register_forward_hook(collect) for body in _bodies(lm)]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _quiet(backbone: Backbone) -> Iterator[None]:
    """Evaluation mode without gradients inside; each module's mode as before afterwards."""
    training = [module for module in backbone.modules() if module.training]
    backbone.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _probe_ids(backbone: Backbone, steps: int = 1) -> Tensor:
    """Ordinary ids, spread over the vocabulary, [1, steps]."""
    config = backbone.lm.config.to_dict()
    special = {value for key, value in config.items() if key.endswith(("_token_id", "_token_index"))}
    count = next(backbone.lm.get_input_embeddings().parameters()).shape[0]
    ordinary = [index for index in range(count) if index not in special]
    stride = max(1, len(ordinary) // (steps + 1))
    ids = [ordinary[(index + 1) * stride % len(ordinary)] for index in range(steps)]
    return torch.tensor([ids], device=backbone.device)


def _check_behaviour(backbone: Backbone) -> None:
    """Run a few tokens and refuse a model that does not treat them as a causal LM on embeddings must.

    Raises:
        BackboneError: naming what the model lacks.
    """
    ids = _probe_ids(backbone, steps=_PROBE_STEPS)
    embeddings = backbone.embed(ids)
    whole = _check_embeddings(backbone, ids, embeddings)
    pair, pair_whole = _check_causal(backbone, embeddings, whole)
    _find_position_offset(backbone, embeddings, whole)
    _check_cache(backbone, pair, pair_whole)


def _check_embeddings(backbone: Backbone, ids: Tensor, embeddings: Tensor) -> BackboneOutput:
    """Embeddings of ids must give the logits of the ids."""
    lm, name = backbone.lm, _name(backbone.lm)
    flags = {
        key: value
        for key, value in {"use_cache": False, "return_dict": True}.items()
        if key in backbone.accepts
    }
    try:
        with _lookups(lm) as by_ids:
            expected = lm(input_ids=ids, **flags)["logits"]
    except Exception as error:  # other people's code may raise anything
        raise BackboneError(f"{name} does not run on input_ids alone: {_first_line(error)}") from error
    try:
        with _lookups(lm) as by_embeddings:
            whole: BackboneOutput = backbone(embeddings)
    except BackboneError:
        raise
    except Exception as error:  # as above
        needs = sorted(by_ids - by_embeddings)
        reason = f"; it looks ids up in {', '.join(needs)}" if needs else ""
        raise BackboneError(
            f"{name} does not run on inputs_embeds alone, it needs input_ids: {_first_line(error)}{reason}"
        ) from error
    if needs := sorted(by_ids - by_embeddings):
        raise BackboneError(f"{name} builds per-layer inputs from input_ids, in {', '.join(needs)}")
    if not backbone._close(whole.logits, expected):
        raise BackboneError(
            f"{name} gives other logits for embeddings than for the input_ids that they stand for"
        )
    return whole


def _check_causal(
    backbone: Backbone, embeddings: Tensor, whole: BackboneOutput
) -> tuple[Tensor, BackboneOutput]:
    """A step must not see the steps after it, and must take an embedding that stands for no id.

    Returns:
        Two rows of embeddings, [2, S, D], of which the first differs from ``embeddings`` in its last step,
        and what the LM makes of them.
    """
    name = _name(backbone.lm)
    foreign = embeddings[:, :2].mean(dim=1, keepdim=True)
    pair = torch.cat([torch.cat([embeddings[:, :-1], foreign], dim=1), embeddings.flip(1)])
    try:
        output = backbone(pair)
    except Exception as error:  # other people's code may raise anything
        raise BackboneError(
            f"{name} takes no embeddings but those of its own ids: {_first_line(error)}"
        ) from error
    if backbone._close(output.hidden[:1, :-1], whole.hidden[:, :-1]):
        return pair, output
    if getattr(backbone.lm.config, "is_decoder", True):
        raise BackboneError(f"{name} is bidirectional: steps see those after them; pass a causal LM")
    raise BackboneError(f"{name} is bidirectional: set is_decoder=True in its config")


def _find_position_offset(backbone: Backbone, embeddings: Tensor, whole: BackboneOutput) -> None:
    """Learn which position ids mean 0, 1, 2, … to this LM; pass none if they cannot be told."""
    if "position_ids" not in backbone.accepts:
        return
    positions = torch.arange(_PROBE_STEPS, device=embeddings.device)[None]
    padding_id = getattr(backbone.lm.config.get_text_config(), "pad_token_id", None)
    for offset in (0, *([] if padding_id is None else [padding_id + 1])):
        backbone._position_offset = offset
        with _tolerated():
            if backbone._close(backbone(embeddings, position_ids=positions).logits, whole.logits):
                return
    backbone._position_offset = 0
    backbone.accepts -= {"position_ids"}


def _check_cache(backbone: Backbone, embeddings: Tensor, whole: BackboneOutput) -> None:
    """A prefix must not depend on what follows it, and cached steps must come out as uncached ones do.

    An LM whose cache fails runs from the start again at each step.
    """
    with _tolerated():
        first = backbone(embeddings[:, :-1], use_cache=True)
        second = backbone(embeddings[:, -1:], cache=first.cache, use_cache=True)
        if backbone._close(second.logits, whole.logits[:, -1:], slack=_CACHE_SLACK):
            return
    name = _name(backbone.lm)
    if not backbone._close(backbone(embeddings[:, :-1]).logits, whole.logits[:, :-1], slack=_CACHE_SLACK):
        raise BackboneError(f"{name} gives steps another result when more steps follow; pass a causal LM")
    backbone.replays = True
    logger.warning(
        "%s has no cache that gives the logits of a full pass; each step will run all before it", name
    )


def _padding_is_exact(backbone: Backbone) -> bool:
    """Compare a padded row with the same row alone, in a full pass and in a cached step."""
    ids = _probe_ids(backbone, steps=_PROBE_STEPS)
    padding = _PROBE_STEPS // 2
    row = backbone.embed(ids)
    short = torch.cat([torch.zeros_like(row[:, :padding]), row[:, padding:]], dim=1)
    mask = torch.ones_like(ids).repeat(2, 1)
    mask[0, :padding] = 0
    step = row[:, :1].repeat(2, 1, 1)
    same: list[bool] = []
    exact = False
    with _tolerated():
        batch = backbone(torch.cat([short, row]), attention_mask=mask, use_cache=True)
        after = backbone(step, attention_mask=torch.cat([mask, mask[:, -1:]], dim=1), cache=batch.cache)
        for index, start in enumerate((padding, 0)):
            alone = backbone(row[:, start:], use_cache=True)
            after_alone = backbone(step[:1], cache=alone.cache)
            same.append(backbone._close(batch.hidden[index : index + 1, start:], alone.hidden))
            same.append(
                backbone._close(after.hidden[index : index + 1], after_alone.hidden, slack=_CACHE_SLACK)
            )
        exact = all(same)
    return exact


def _apart(steps: _Steps, packing: Packing) -> _Steps:
    """Packed steps with a mask [B, 1, S, S] as an LM takes them: positions alone, or with a mask to add."""
    if packing == "positions" or steps.attention_mask is None:
        return _Steps(steps.embeddings, None, steps.position_ids)
    dtype = steps.embeddings.dtype
    hidden_from = torch.zeros_like(steps.attention_mask, dtype=dtype).masked_fill(
        ~steps.attention_mask.bool(), torch.finfo(dtype).min
    )
    return _Steps(steps.embeddings, hidden_from, steps.position_ids)


def _find_packing(backbone: Backbone) -> Packing | None:
    """Compare two samples in one row with the same samples alone; two rows, as some kernels know only one."""
    half = _PROBE_STEPS // 2
    row = backbone.embed(_probe_ids(backbone, steps=_PROBE_STEPS)).repeat(2, 1, 1)
    alone = torch.cat([backbone(row[:, :half]).hidden, backbone(row[:, half:]).hidden], dim=1)
    steps = torch.arange(_PROBE_STEPS, device=row.device)
    visible = (steps[:, None] >= steps) & (steps[:, None] // half == steps // half)
    packed = _Steps(row, visible.expand(2, 1, -1, -1), (steps % half).expand(2, -1))
    ways: tuple[Packing, ...] = ("positions", "mask")
    found: list[Packing] = []
    for way in ways:
        with _tolerated():
            output = backbone._run(_apart(packed, way), None, use_cache=False, logits_to_keep=0)
            found += [way] if backbone._close(output.hidden, alone) else []
    return found[0] if found else None


def _head_is_linear(backbone: Backbone) -> bool:
    """Compare the LM's logits with those of its head alone, as they come and where they are large."""
    head: Any = _head(backbone.lm)
    hidden = backbone(backbone.embed(_probe_ids(backbone, steps=_PROBE_STEPS))).hidden
    scale = _LARGE_LOGIT / float(F.linear(hidden, head.weight).abs().max())
    return all(
        backbone._close(backbone.project(states), F.linear(states, head.weight))
        for states in (hidden, scale * hidden)
    )


def _find_body(backbone: Backbone) -> tuple[nn.Module, type[Any]]:
    """Run a step and see which module's last hidden state enters the head."""
    found: list[tuple[nn.Module, type[Any]]] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if hasattr(output, "last_hidden_state"):
            found.append((module, type(output)))

    handles = [body.register_forward_hook(note) for body in _bodies(backbone.lm)]
    try:
        backbone(backbone.embed(_probe_ids(backbone)))
    finally:
        for handle in handles:
            handle.remove()
    return found[-1]


@contextmanager
def _answering(module: nn.Module, answer: Any) -> Iterator[None]:
    """Let a module answer ``answer`` to every call inside, hooks included."""
    own = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: answer
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _chunks_are_exact(backbone: Backbone) -> bool:
    """Compare steps that follow a cache together with the same steps in a full pass."""
    embeddings = backbone.embed(_probe_ids(backbone, steps=_PROBE_STEPS))
    whole = backbone(embeddings)
    half = _PROBE_STEPS // 2
    same = False
    with _tolerated():
        first = backbone(embeddings[:, :half], use_cache=True)
        steps = _Steps(embeddings[:, half:], None, None)
        second = backbone._run(steps, first.cache, use_cache=True, logits_to_keep=0)
        same = backbone._close(second.hidden, whole.hidden[:, half:], slack=_CACHE_SLACK)
    return same


@contextmanager
def _tolerated() -> Iterator[None]:
    """Take an exception of the LM inside for a no."""
    try:
        yield
    except Exception as error:  # other people's code may raise anything
        logger.debug("probe failed: %s", _first_line(error))


def _first_line(error: Exception) -> str:
    """Type and first line of an exception."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


@contextmanager
def _lookups(lm: PreTrainedModel) -> Iterator[set[str]]:
    """Collect the names of the embedding tables that are used inside, the input embedding excepted."""
    used: set[str] = set()
    tables = {
        name: module
        for name, module in lm.named_modules()
        if isinstance(module, nn.Embedding) and module is not lm.get_input_embeddings()
    }
    handles = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: used.add(name))
        for name, module in tables.items()
    ]
    try:
        yield used
    finally:
        for handle in handles:
            handle.remove()


def _select(value: Any, rows: int, indices: Tensor) -> Any:
    """Copy a cache of any kind, taking ``indices`` of its ``rows``."""
    memo: dict[int, Any] = {}
    clone = _clone(value, memo)
    if isinstance(clone, Cache):
        clone.reorder_cache(indices)  # type: ignore[arg-type]  # knows where its own layers keep the batch
    return _gather(clone, rows, indices, moved=memo, seen={})


def _clone(value: Any, memo: dict[int, Any]) -> Any:
    """Copy the containers of a cache, not its tensors. ``memo`` collects what was met, by id."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, (list, tuple)):
        items = [_clone(item, memo) for item in value]
        clone: Any = items if isinstance(value, list) else tuple(items)
    elif isinstance(value, dict):
        clone = {key: _clone(item, memo) for key, item in value.items()}
    elif _is_container(value):
        clone = copy.copy(value)
        memo[id(value)] = clone
        vars(clone).update({key: _clone(item, memo) for key, item in vars(value).items()})
    else:
        clone = value
    memo[id(value)] = clone
    return clone


def _gather(value: Any, rows: int, indices: Tensor, *, moved: dict[int, Any], seen: dict[int, Any]) -> Any:
    """Take ``indices`` of each tensor that is still as it was when it was cloned."""
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, Tensor):
        result: Any = _take(value, rows, indices) if id(value) in moved else value
    elif isinstance(value, (list, tuple)):
        items = [_gather(item, rows, indices, moved=moved, seen=seen) for item in value]
        result = items if isinstance(value, list) else tuple(items)
    elif isinstance(value, dict):
        result = {key: _gather(item, rows, indices, moved=moved, seen=seen) for key, item in value.items()}
    else:
        result = seen[id(value)] = value
        if _is_container(value):
            changed = {
                key: _gather(item, rows, indices, moved=moved, seen=seen) for key, item in vars(value).items()
            }
            vars(value).update(changed)
    seen[id(value)] = result
    return result


def _take(tensor: Tensor, rows: int, indices: Tensor) -> Tensor:
    """Take ``indices`` along the batch, the first dimension of that size; a copy if there is none."""
    for dimension, size in enumerate(tensor.shape):
        if size == rows:
            return tensor.index_select(dimension, indices.to(tensor.device))
    return tensor.clone()


def _is_container(value: Any) -> bool:
    """Whether ``value`` is an object that may hold tensors of a cache."""
    foreign = (nn.Module, PreTrainedConfig, Tensor, type)
    return hasattr(value, "__dict__") and not isinstance(value, foreign) and not callable(value)


def _lora_targets(backbone: Backbone) -> dict[str, nn.Module]:
    """Linear layers that LoRA can train, by name.

    Those that the text path runs through their own forward, that a gradient reaches, and whose weight is
    theirs alone: merging would add to a shared one several times.
    """
    modules = dict(backbone.lm.named_modules())
    linear = {name: module for name, module in modules.items() if isinstance(module, (nn.Linear, Conv1D))}
    learning = _learning(backbone, modules)
    owners = Counter(id(_weight(module)) for module in linear.values())
    head = _head(backbone.lm)
    return {
        name: module
        for name, module in linear.items()
        if module is not head
        and owners[id(_weight(module))] == 1
        and _is_used(name, modules, learning)
        and not _weight_is_read(name, modules)
    }


def _learning(backbone: Backbone, modules: Mapping[str, nn.Module]) -> set[str]:
    """Names of the modules that a few tokens run through and whose output gets a gradient."""
    outputs: dict[str, Tensor] = {}

    def collect(module: nn.Module, inputs: Any, output: Any, *, name: str) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            outputs[name] = output

    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_hook(partial(collect, name=name))
            stack.callback(handle.remove)
        stack.enter_context(_quiet(backbone))
        stack.enter_context(torch.enable_grad())
        embeddings = backbone.embed(_probe_ids(backbone, steps=_PROBE_STEPS)).detach().requires_grad_()
        logits = backbone(embeddings).logits
        gradients = torch.autograd.grad(
            logits.float().square().mean(), list(outputs.values()), allow_unused=True
        )
    return {name for name, gradient in zip(outputs, gradients, strict=True) if gradient is not None}


def _is_used(name: str, modules: Mapping[str, nn.Module], learning: set[str]) -> bool:
    """Whether a module learns, or belongs to a list of which other members do (experts of a mixture)."""
    if name in learning:
        return True
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        member, parent = ".".join(parts[:length]), ".".join(parts[: length - 1])
        if isinstance(modules[parent], nn.ModuleList):
            siblings = {f"{parent}.{key}" for key, _ in modules[parent].named_children()}
            return member not in learning and bool(siblings & learning)
    return False


def _weight_is_read(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the parent's code reads the module's weight past its forward, as fused kernels do."""
    parent, _, attribute = name.rpartition(".")
    pattern = re.compile(rf"self\.{re.escape(attribute)}\.weight\b(?!\.(dtype|device|shape))")
    for kind in type(modules[parent]).__mro__:
        if kind in (nn.Module, PreTrainedModel):
            break
        try:
            if pattern.search(inspect.getsource(kind)):
                return True
        except (OSError, TypeError):
            logger.debug("no source of %s", kind.__name__)
    return False


def _named(lm: PreTrainedModel, targets: str | Sequence[str]) -> dict[str, nn.Module]:
    """Linear layers whose name is, or ends with, one of ``targets``."""
    suffixes = (targets,) if isinstance(targets, str) else tuple(targets)
    return {
        name: module
        for name, module in lm.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)
    }
