"""A causal LM, run on embeddings instead of ids.

Embeddings in, text logits and hidden states out: [B, S, D] -> [B, S, V] and [B, S, hidden width]. Puts the
files beside it together: each pass goes the way that this LM takes, and what must be found out by running it
is found out when first asked for. Knows nothing of audio, codes, tokenizers or prompts.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from omni_adapter.backbone import caches, inspection, probes, projection, static
from omni_adapter.backbone.caches import BackboneCache
from omni_adapter.backbone.carried import Carried, check_carried, check_unshared, without_copies
from omni_adapter.backbone.fixed import CachePlan
from omni_adapter.backbone.inspection import class_name
from omni_adapter.backbone.lora import (
    CARRIED,
    Lora,
    copy_weights,
    find_targets,
    make_config,
    read_config,
)
from omni_adapter.backbone.packing import Packing, find_packing, keep_apart
from omni_adapter.backbone.runner import BackboneOutput, Runner, Steps
from omni_adapter.errors import BackboneError, CheckpointError

logger = logging.getLogger(__name__)

_RMS_SAMPLES = 1024


class Backbone(Runner):
    """A causal LM, run on embeddings instead of ids.

    Args:
        lm: any causal LM of transformers; its weights, embeddings and vocabulary stay as they are.
        probe: run a few tokens to see that the model does what its signature promises.

    Attributes:
        width: width D of the embeddings.
        vocab_size: entries V of the text logits.
        accepts: argument names that the LM's forward takes.
        replays: whether all steps are run again at each cached step, for want of a usable state.

    Raises:
        BackboneError: if the model lacks something that hearing or speaking needs; the text names it.
    """

    def __init__(self, lm: PreTrainedModel, *, probe: bool = True) -> None:
        super().__init__(lm)
        self._lora: Lora | None = None
        self._beside: Lora | None = None
        self._carried: Carried | None = None
        self._fixes_shapes = False
        self._plan_found: tuple[tuple[torch.device, torch.dtype], CachePlan | None] | None = None
        self._is_settled = False
        with torch.no_grad():
            self.width: int = probes.sample(self, steps=1).shape[-1]
        self.vocab_size = inspection.vocab_size(lm)
        if probe and self.device.type != "meta":
            probes.learn_behaviour(self)

    # --- running ---

    def forward(
        self,
        embeddings: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: BackboneCache | None = None,
        use_cache: bool = False,
        logits_to_keep: int | None = 0,
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
            logits_to_keep: compute the logits of the last so many steps; 0 for all, None for none: the head,
                which is a good part of an LM with a large vocabulary, is not run where the LM lets its body
                run alone.
        """
        steps = Steps(embeddings, attention_mask, position_ids)
        if attention_mask is not None and attention_mask.dim() > 2:
            steps, cache, use_cache = keep_apart(steps, self, packing=self.packing), None, False
        if (
            cache is not None
            and logits_to_keep is None
            and embeddings.shape[1] == 1
            and static.is_static(cache)
        ):
            return self._run_static(steps, cache)
        if cache is not None and cache.steps and embeddings.shape[1] > 1 and not self.takes_chunks:
            output = self._run_one_by_one(steps, cache, logits_to_keep=logits_to_keep)
        else:
            alone = self._body_alone if logits_to_keep is None else None
            output = self.run(steps, cache, use_cache=use_cache, logits_to_keep=logits_to_keep, alone=alone)
        if logits_to_keep is not None:
            return output
        return output._replace(logits=output.hidden.new_empty(embeddings.shape[0], 0, self.vocab_size))

    def _run_static(self, steps: Steps, cache: BackboneCache) -> BackboneOutput:
        """Run a step in shapes that never change."""
        body = self._body_alone
        assert body is not None
        after, hidden, tapped = static.step(self, body, cache, steps)
        return BackboneOutput(hidden.new_empty(hidden.shape[0], 0, self.vocab_size), hidden, after, tapped)

    @property
    def takes_chunks(self) -> bool:
        """Whether several steps can follow a cache at once."""
        return self.replays or self._chunks_are_exact

    def _run_one_by_one(
        self, steps: Steps, cache: BackboneCache, *, logits_to_keep: int | None
    ) -> BackboneOutput:
        """Feed step after step, for an LM whose state takes only one at a time."""
        past, last = cache.steps, cache
        outputs: list[BackboneOutput] = []
        for index in range(steps.embeddings.shape[1]):
            outputs.append(self.run(steps.one(index, past=past), last, use_cache=True))
            last = outputs[-1].cache or last
        logits = torch.cat([output.logits for output in outputs], dim=1)
        hidden = torch.cat([output.hidden for output in outputs], dim=1)
        tapped = torch.cat([output.tapped for output in outputs], dim=1)
        return BackboneOutput(logits[:, -(logits_to_keep or 0) :], hidden, last, tapped)

    def project(self, hidden: Tensor) -> Tensor:
        """Return the LM's own logits of states that enter its head, with its own scales, caps and biases.

        Args:
            hidden: states as ``forward`` returns them, [B, S, hidden width].

        Returns:
            Logits, [B, S, V]; they are the LM's only if ``projects``.
        """
        if self._head_gives_logits:
            head = inspection.find_head(self.lm)
            assert head is not None
            logits: Tensor = head(hidden)
            return logits
        return projection.project(self, hidden, body=self._body)

    def select_rows(self, cache: BackboneCache, indices: Tensor) -> BackboneCache:
        """Gather rows of a cache: repeat, reorder or drop them.

        Args:
            cache: stays as it is.
            indices: int64 rows of ``cache``, [n].

        Returns:
            A cache of n rows that shares no memory with ``cache``.
        """
        return caches.select_rows(cache, indices)

    def new_cache(self, rows: int, capacity: int) -> BackboneCache | None:
        """Return an empty cache whose memory is taken once, for ``forward`` with ``use_cache``.

        What the LM computes with it is what it computes with the cache that it makes itself.

        Args:
            rows: rows to take memory for; more can join.
            capacity: steps to take memory for, padding included; more raise ``ContextOverflowError``.

        Returns:
            None if the LM keeps no state, or one whose memory cannot be fixed.
        """
        plan = self._cache_plan
        if plan is not None and self._fixes_shapes:
            return static.static_cache(self, name=plan.name, rows=rows, capacity=capacity)
        return None if plan is None else caches.make(plan, rows=rows, capacity=capacity)

    def fix_shapes(self) -> None:
        """Let steps have shapes that never change, so that an accelerator records them once and plays them.

        Steps without logits after a cache of ``new_cache`` are run so; on a CPU unrecorded, which is slower
        than the ordinary way. Recording was never executed, for want of an accelerator: try it before use.
        Rows cannot join such caches.

        Raises:
            BackboneError: if this LM's steps cannot be run so.
        """
        plan, body = self._cache_plan, self._body_alone
        if plan is not None:
            static.static_cache(self, name=plan.name, rows=1, capacity=1)  # raises with the reason
        if plan is None or body is None or not static.is_exact(self, body, name=plan.name):
            raise BackboneError(f"steps of {class_name(self.lm)} come out otherwise in fixed shapes")
        self._fixes_shapes = True

    def cache_nbytes(self, rows: int, capacity: int) -> int | None:
        """Bytes that ``new_cache`` takes at most, known before it is made; None where that gives None."""
        plan = self._cache_plan
        return None if plan is None else plan.nbytes(rows, capacity)

    @property
    def _cache_plan(self) -> CachePlan | None:
        """How caches of fixed size are made, found anew when the LM changed its place or type."""
        key = (self.device, self.dtype)
        if self._plan_found is None or self._plan_found[0] != key:
            if self._is_settled and self._plan_found is not None:
                plan = probes.read_cache_plan(self) if self._plan_found[1] else None
            else:
                plan = None if self.replays else probes.find_cache_plan(self)
            self._plan_found = key, plan
        return self._plan_found[1]

    def settle(self) -> None:
        """Find out now what decoding asks for, and keep the answers.

        Coarser weights would blur them: results that are equal by construction then differ by more than
        rounding.
        """
        facts = (self.hidden_width, self.embedding_rms, self.padding_is_exact, self._chunks_are_exact)
        ways = (self.projects, bool(self._bodies_alone), self._cache_plan is not None)
        self._is_settled = True
        logger.debug("%s: %s, %s", class_name(self.lm), facts, ways)

    def tap_final_norm(self) -> None:
        """Let every pass from now on also return what enters the LM's final norm, as ``tapped``.

        Raises:
            BackboneError: if no norm makes the LM's last hidden state.
        """
        self.tapped_norm = (probes.find_final_norm(self),)

    def checkpoint_gradients(self) -> None:
        """Compute the LM's states again in backward passes instead of keeping them.

        Raises:
            BackboneError: if transformers cannot do so for this LM.
        """
        try:
            self.lm.activation_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise BackboneError(
                f"{class_name(self.lm)} cannot checkpoint gradients: {probes.first_line(error)}; "
                "train it without"
            ) from error

    # --- what is known of the LM ---

    @property
    def max_positions(self) -> int | None:
        """Steps that the LM's positions reach, None if they have no end."""
        limit = inspection.max_positions(self.lm)
        return None if limit is None else limit - self.position_offset

    @property
    def is_quantized(self) -> bool:
        """Whether weights of the LM are stored in less than 16 bits, so that they cannot learn."""
        return inspection.is_quantized(self.lm)

    @property
    def can_be_saved(self) -> bool:
        """Whether the LM's weights can be written as they are."""
        return not inspection.is_rearranged(self.lm)

    def fingerprint(self) -> dict[str, Any]:
        """Return the facts of the LM's config by which it is recognised, as plain JSON."""
        return inspection.fingerprint(self.lm)

    @cached_property
    def embedding_rms(self) -> float:
        """Root mean square of the input embeddings, the scale that embeddings of audio should have."""
        with torch.no_grad():
            count = self.embedding_table.shape[0]
            ids = torch.arange(0, count, -(-count // _RMS_SAMPLES), device=self.device)
            return float(self.embed(ids[None]).float().square().mean().sqrt())

    @cached_property
    def hidden_width(self) -> int:
        """Width of the hidden states; equal to ``width`` in all but a few LMs."""
        return probes.hidden_width(self)

    @cached_property
    def padding_is_exact(self) -> bool:
        """Whether rows that are padded on the left come out as they do alone; tried when first asked."""
        return probes.padding_is_exact(self)

    @property
    def rows_can_join(self) -> bool:
        """Whether rows that join others in a cache of fixed size go on as they do alone; tried when asked."""
        plan = self._cache_plan
        if plan is None or self._fixes_shapes:
            return False
        return self._joins_are_exact

    @cached_property
    def _joins_are_exact(self) -> bool:
        """What ``rows_can_join`` says of caches of fixed size."""
        plan = self._cache_plan
        return self.padding_is_exact and plan is not None and probes.joins_are_exact(self, plan)

    @cached_property
    def packing(self) -> Packing | None:
        """How several samples in one row can be kept apart, None if they cannot; tried when first asked."""
        return find_packing(self)

    @cached_property
    def projects(self) -> bool:
        """Whether ``project`` gives the LM's logits; tried when first asked."""
        return projection.gives_logits(self, self.project)

    @cached_property
    def _head_gives_logits(self) -> bool:
        """Whether the module of the head is all that makes logits: nothing scales or caps them after it."""
        return projection.head_gives_logits(
            self, lambda hidden: projection.project(self, hidden, body=self._body)
        )

    @property
    def linear_head(self) -> nn.Linear | None:
        """The LM's head if its logits are nothing but this matrix times the hidden state, else None."""
        head: Any = inspection.find_head(self.lm)
        plain = type(head) is nn.Linear and head.bias is None  # subclasses are quantised or carry LoRA
        return head if plain and self._head_is_linear else None

    @cached_property
    def _head_is_linear(self) -> bool:
        """Whether logits, large ones too, are those of the head alone: neither scaled nor capped."""
        return self.projects and projection.head_is_linear(self, self.project)

    @cached_property
    def _body(self) -> projection.Body:
        """The module whose last hidden state enters the head."""
        return projection.find_body(self)

    @property
    def reads_in_pieces(self) -> bool:
        """Whether a prompt can be read piece by piece at about the cost of reading it at once."""
        return not self.replays and self._chunks_are_exact

    @cached_property
    def _bodies_alone(self) -> tuple[nn.Module, ...]:
        """The LM's body if running it alone gives the LM's hidden states, else nothing."""
        return (self._body.module,) if projection.runs_alone(self, self._body.module) else ()

    @property
    def _body_alone(self) -> nn.Module | None:
        return next(iter(self._bodies_alone), None)

    @cached_property
    def _chunks_are_exact(self) -> bool:
        """Whether several steps at once after a cache come out as they do one by one."""
        return probes.chunks_are_exact(self)

    # --- an adapter of others ---

    @property
    def carried(self) -> Carried | None:
        """The adapter that the base came with, None if it had none."""
        return self._carried

    @property
    def stacks(self) -> bool:
        """Whether that adapter lies beside the base's weights, where it never learns, and not in them."""
        return self._beside is not None

    def carry(self, adapter: Carried, *, merge: bool = False) -> Carried:
        """Put an adapter of others onto the base, before any LoRA of ours.

        Args:
            adapter: what ``take_adapter`` or ``read_carried`` gave.
            merge: add it to the base's weights for good; otherwise it stays beside them, frozen, and the LM
                computes what PEFT does.

        Returns:
            The adapter, without copies of the base's weights that it brought along.

        Raises:
            BackboneError: if it cannot be carried so, or does not fit the base; the text says what to do.
        """
        assert self._lora is None
        assert self._carried is None
        check_carried(adapter, self.lm, merge=merge, quantized=self.is_quantized)
        adapter = without_copies(adapter, self.lm)
        try:
            carried = Lora(self.lm, copy.deepcopy(adapter.config), name=CARRIED)
        except ValueError as error:  # what PEFT says of settings that fit no layer
            raise BackboneError(f"the adapter does not fit {class_name(self.lm)}: {error}") from error
        try:
            carried.load(adapter.weights)
            if merge:
                check_unshared(self.lm, carried.targets)
        except BackboneError:
            carried.drop()
            raise
        if merge:
            carried.merge()
        else:
            carried.freeze()
            self._beside = carried
        self._carried = adapter
        return adapter

    def drop_carried(self) -> None:
        """Take the adapter of others off again; without effect if it was merged."""
        assert self._lora is None
        if self._beside:
            self._beside.drop()
        self._beside = None

    # --- LoRA ---

    @property
    def has_lora(self) -> bool:
        """Whether LoRA was added."""
        return self._lora is not None

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Names of the modules that carry LoRA, empty without."""
        return self._lora.targets if self._lora else ()

    @property
    def lora_config(self) -> LoraConfig | None:
        """PEFT's settings of the LoRA that was added, None without."""
        return self._lora.config if self._lora else None

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
        if use_dora and self._beside:
            raise BackboneError(
                "DoRA rescales whole weights, so that it cannot learn beside the adapter that the base came "
                "with; use plain LoRA, or wrap the base with merge_base_adapter=True"
            )
        modules = find_targets(self, targets)
        self._attach_lora(make_config(modules, rank=rank, alpha=alpha, dropout=dropout, use_dora=use_dora))
        logger.info("LoRA of rank %d on %d modules of %s", rank, len(modules), class_name(self.lm))
        return self.lora_targets

    def _attach_lora(self, config: LoraConfig) -> Lora:
        """Put LoRA into the LM's modules, in place."""
        if self._lora:
            raise BackboneError(
                f"LoRA was added already, to {len(self._lora.targets)} modules of {class_name(self.lm)}"
            )
        self._lora = Lora(self.lm, config, beside=self._beside)
        return self._lora

    @contextmanager
    def lora_disabled(self) -> Iterator[None]:
        """Run the base's own weights inside: its logits come out bit for bit."""
        if self._lora is None:
            yield
            return
        with self._lora.disabled():
            yield

    def lora_state_dict(self) -> dict[str, Tensor]:
        """Return the LoRA weights by name, empty without LoRA. They are the live ones, not copies."""
        return self._lora.weights() if self._lora else {}

    def load_lora_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        """Load what ``lora_state_dict`` returned, into LoRA added with the same settings.

        Raises:
            BackboneError: if names or shapes differ.
        """
        copy_weights(weights, into=self.lora_state_dict(), name=class_name(self.lm))

    def save_lora(self, folder: Path, *, base: str | None = None, revision: str | None = None) -> None:
        """Write LoRA as PEFT does, so that PEFT alone can put it onto the base as well.

        Args:
            folder: made if missing.
            base: Hub id of the base, if it has one.
            revision: commit of the base there.
        """
        if self._lora:
            self._lora.save(folder, base=base, revision=revision)

    def load_lora(self, folder: Path) -> None:
        """Add the LoRA that ``save_lora`` or PEFT wrote.

        Raises:
            BackboneError: if it is no LoRA, or LoRA was added before.
            CheckpointError: if its file is broken or its tensors do not fit this LM.
        """
        lora = self._attach_lora(read_config(folder))
        try:
            lora.read(folder)
        except (BackboneError, CheckpointError):
            self.drop_lora()
            raise

    def drop_lora(self) -> None:
        """Take LoRA off again and leave the base's weights as they were."""
        if self._lora:
            self._lora.drop()
        self._lora = None

    def merge_lora(self) -> None:
        """Add all LoRA, that of others too, to the base's weights for good, and drop it.

        Raises:
            BackboneError: if the base is quantised, or a weight that several modules share would change.
        """
        lora = self._lora or self._beside
        if lora is None:
            return
        if self.is_quantized:
            raise BackboneError(
                f"{class_name(self.lm)} is quantised: merging LoRA would round it to the base's few bits; "
                "keep it beside the base, or load the talker on the unquantised base first"
            )
        check_unshared(self.lm, [*lora.targets, *(self._beside.targets if self._beside else ())])
        lora.merge()
        self._lora = self._beside = None
