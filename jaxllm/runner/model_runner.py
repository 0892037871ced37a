"""ModelRunner: the executor that runs plans on the device. It knows nothing of text, queues or policies."""

import dataclasses
import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import EngineConfig
from jaxllm.models.interface import KVPages, Network, Params
from jaxllm.runner import kv_pool, pooling
from jaxllm.runner.executables import Executables, use_persistent_cache
from jaxllm.runner.host_sampling import ControlProgram, HostSampling
from jaxllm.runner.inputs import (
    NO_ENTRY,
    ROW_WIDTH,
    DeviceState,
    InputLayout,
    page_table_entries,
    write_page_table,
)
from jaxllm.runner.logprobs import Logprobs
from jaxllm.runner.pooling import PooledRows
from jaxllm.runner.program_cache import ProgramCache
from jaxllm.runner.prompt_logprobs import PromptProgram, PromptScorer, PromptScores
from jaxllm.runner.sampler import Level, SamplingTable
from jaxllm.runner.shapes import SampleShape, ShapeLadder, StepShape
from jaxllm.runner.step import StepOutputs, make_controlled_sampler, make_decode_loop, make_forward, make_sampler
from jaxllm.scheduling import StepPlan
from jaxllm.scheduling.request import Request

logger = logging.getLogger(__name__)

# Decode steps in one program. On a CPU handing a step over costs little beside the step, and compiling much.
LOOP_STEPS = {"cpu": 1, "gpu": 8}
# Loops are of half as many steps where weights are more than the first, and there are none beyond the second, which a
# GPU reads in 2.5 ms, while for 32 layers' kernels, one by one, the host needs 4 to 6.
LOOP_WEIGHT_BYTES = 4 * 10**9, 10**10
# Each is all decode shapes once more, which take long to compile. A row draws the same token at any level that has its
# bits, so rows that only draw do without a level of their own, at the price of the filters' passes over the logits: 0.1
# ms a step for one row of 64,798 logits on an H200; many rows, for which they are more, step without loops.
LOOP_LEVELS = (Level.GREEDY, Level.FILTER)
# On a CPU compiling is slow, and a padded token cheap compared with it. A GPU reads the weights as long as it computes
# with 16 rows, or with 128 tokens of a step that is not of the shortest. From 256 tokens on it computes for longer than
# it reads, and padding takes time: 257 rows in a step of 512 would take nearly twice as long as they need.
_LADDERS = {
    "cpu": {"few_rows_growth": 2, "smallest_mixed": 32, "mixed_growth": 4},
    "gpu": {
        "few_rows_growth": 4,
        "smallest_mixed": 128,
        "mixed_growth": 2,
        "midway_rows": 256,
        "midway_tokens": 2048,
    },
}
# From so many tokens on cuBLAS's matrix products are the fastest, and XLA need not try its own, which takes most of the
# time that a GPU's programs take to compile.
_MANY_TOKENS = 256
_TABLE_ENTRIES = 1024  # page-table entries that one call of write_page_table takes
_WRITE_TABLE = "page table"  # its key among the executables


class RunnerResult:
    """A plan's outputs, on the host once it is finished; log probabilities are fetched only when somebody looks.

    Attributes:
      prompt_scores: what came of the prompts that are to be scored; None if there are none.
      pooled: the hidden states of prompts that are to be pooled, as sums; None if there are none.
      failed: requests whose sampling failed on the host (logits processors raised); their tokens mean nothing.
    """

    def __init__(
        self,
        outputs: list[StepOutputs],
        plan: StepPlan,
        prompt_scores: PromptScores | None,
        pooled: PooledRows | None,
        failed: list[Request],
    ) -> None:
        self._outputs = outputs
        self._num_steps, self._num_rows = plan.num_steps, len(plan.slots)
        self.prompt_scores, self.pooled, self.failed = prompt_scores, pooled, failed

    @cached_property
    def tokens(self) -> np.ndarray:
        """i32[num_steps, S]; meaningless where a row takes no part in a step. Waits for the device."""
        tokens, start = np.zeros((self._num_steps, self._num_rows), np.int32), 0
        # Rows are sorted, those with the most steps first: later parts may have fewer. The last may have more steps.
        for outputs in self._outputs:
            part = np.asarray(outputs.tokens)[: self._num_steps - start, : self._num_rows]
            tokens[start : start + len(part), : part.shape[1]] = part
            start += len(part)
        return tokens

    @cached_property
    def logprobs(self) -> list[Logprobs]:
        """One logprobs.Logprobs a step, of NumPy arrays."""
        return [jax.tree.map(np.asarray, outputs.logprobs) for outputs in self._outputs]


@dataclass
class RunnerPending:
    _result: RunnerResult

    def result(self) -> RunnerResult:
        _ = self._result.tokens  # an error of the device's belongs here
        return self._result


class ModelRunner:
    """Owns the weights, the KV pages and the device state, and runs one step at a time on them.

    Args:
      network, params: the model.
      config: the engine's configuration, resolved (no field left open).
      shrink_model_len: lower max_model_len to what the KV pages hold, rather than refuse.
    """

    def __init__(self, network: Network, params: Params, config: EngineConfig, shrink_model_len: bool = False) -> None:
        self._cache_folder = None if config.enforce_eager else use_persistent_cache()
        self.network, self.params, self.config = network, params, config
        self.max_pages = -(-config.max_model_len // config.block_size)
        platform = _device_of(params).platform
        growth = _LADDERS.get(platform, _LADDERS["gpu"])
        self.ladder = ShapeLadder.of(
            config.max_num_seqs,
            config.max_num_batched_tokens,
            **growth,
            loop_steps=self._choose_loop_steps(platform),
            loop_levels=LOOP_LEVELS,
        )
        self.sampling = SamplingTable(config.max_num_seqs)
        self._host_sampling = HostSampling(
            config.max_num_seqs, network.config.vocab_size, lambda key: self.executables[key]
        )
        self._prompt_scorer = PromptScorer(network, config.max_logprobs, lambda key: self.executables[key])
        self._prompt_scores: PromptScores | None = None  # of the plan that is being submitted, as is the next
        self._classify = jax.jit(network.classify)
        self._pooled: PooledRows | None = None
        self._failed: list[Request] = []
        self._tenancies = np.full(config.max_num_seqs, -1, np.int64)
        self._kv_dtype = kv_pool.kv_dtype(network, config.kv_cache_dtype)
        self._page_bytes = kv_pool.page_bytes(network, config.block_size, self._kv_dtype)
        self.num_pages, measured = self._count_pages()
        if shrink_model_len:
            self._shrink_model_len()
        kv_pool.check_holds_one_sequence(self.num_pages, config.block_size, self.config.max_model_len, self._page_bytes)
        self.executables = self._programs()
        if measured is not None:
            self.executables.adopt(measured, self._keys_without_pages)
        del measured  # the others, before memory is tight
        if not config.enforce_eager:  # before the KV pages: tuning a matrix product takes memory of its own
            self._warm_up()
        self.reset()

    @property
    def kv_bytes(self) -> int:
        return self.num_pages * self._page_bytes

    def reset(self) -> None:
        """Fresh KV pages and device state: at the start, and after a failed step has taken the donated ones with it."""
        self.release()  # first, or there would be two
        kv, state = self._abstract_state(self.num_pages)
        self._kv = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kv)
        self._state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
        self._host_sampling.reset()

    def classify(self, vector: np.ndarray) -> np.ndarray:
        """f32[num_labels] of a pooled vector f32[D]."""
        hidden = jnp.asarray(vector[None], self.network.dtype)
        return np.asarray(self._classify(self.params, hidden))[0]

    def release(self) -> None:
        """Frees the KV pages and the device state; `reset` makes new ones."""
        self._kv = self._state = None
        self._host_sampling.release()

    def submit(self, plan: StepPlan) -> RunnerPending:
        """Hands a plan to the device and returns without waiting for it."""
        self._meet_new_requests(plan)
        self._prompt_scores, self._pooled, self._failed = None, None, []
        level = self.sampling.level(plan.slots)
        loop = None if level.controls else self.ladder.fit_loop(len(plan.slots), level)
        outputs = [self._submit_part(part, level, loop) for part in plan.split(_sizes_of_parts(plan.num_steps, loop))]
        for one in outputs:
            one.tokens.copy_to_host_async()
        return RunnerPending(RunnerResult(outputs, plan, self._prompt_scores, self._pooled, self._failed))

    def _submit_part(self, plan: StepPlan, level: Level, loop: StepShape | None) -> StepOutputs:
        """One program's work: a step, or `loop`'s."""
        decode_only = plan.num_decodes == len(plan.slots)
        if loop is not None and plan.num_steps > 1:
            shape = loop
        else:
            shape = self.ladder.fit(len(plan.tokens), len(plan.slots), decode_only)
        layout = self._layout(shape)
        updates = self._send_surplus(page_table_entries(plan, self.max_pages), layout.num_updates)
        packed = layout.pack(plan, self.sampling, updates)
        if shape.num_steps > 1:
            self._kv, self._state, outputs = self.executables[shape](self.params, self._kv, self._state, packed)
            return outputs
        forward = self.executables[shape]
        self._kv, state, outputs, logits, rows, hidden = forward(self.params, self._kv, self._state, packed)
        if (pooled := np.flatnonzero(self.sampling.pools[plan.slots])).size:
            self._pooled = pooling.submit(plan, pooled, hidden, shape.num_rows)
        # In a step of decode rows alone no row has more than its last token, after which no prompt token follows.
        if not decode_only and (scored := np.flatnonzero(self.sampling.scores_prompt[plan.slots])).size:
            self._prompt_scores = self._prompt_scorer.submit(self.params, plan, scored, hidden)
        if level > Level.GREEDY:
            sample = self.executables[SampleShape(shape.num_rows, level)]
            if level.controls:
                last_token, outputs = self._sample_controlled(sample, plan, state.last_token, logits, rows)
            else:
                last_token, outputs = sample(state.last_token, logits, rows)
            state = state._replace(last_token=last_token)
        self._state = state
        return outputs

    def _sample_controlled(
        self, sample: Any, plan: StepPlan, last_token: jax.Array, logits: jax.Array, rows: jax.Array
    ):
        """(last_token, StepOutputs). What the host has to say it says while the device computes."""
        host = self._host_sampling
        stepwise = np.flatnonzero(self.sampling.stepwise[plan.slots] & plan.samples).tolist()
        logits, mask, failed = host.say(plan, stepwise, logits)
        self._failed += failed
        last_token, host.tables, outputs = sample(last_token, host.tables, logits, rows, mask)
        return last_token, outputs

    def _meet_new_requests(self, plan: StepPlan) -> None:
        """Notes the sampling parameters of requests that have just come into their slots."""
        for row in np.flatnonzero(self._tenancies[plan.slots] != plan.generations).tolist():
            request, slot = plan.requests[row], int(plan.slots[row])
            self.sampling.fill(slot, request.sampling, request.prompt_len, request.stop_token_ids)
            self._host_sampling.admit(slot, request)
            self._tenancies[slot] = plan.generations[row]

    def _send_surplus(self, entries: np.ndarray, room: int) -> np.ndarray:
        """Writes what the step cannot carry (long prefix-cache hits) ahead of it; returns the rest."""
        while len(entries) > room:
            surplus, entries = entries[:_TABLE_ENTRIES], entries[_TABLE_ENTRIES:]
            padded = np.full((_TABLE_ENTRIES, 2), NO_ENTRY, np.int32)
            padded[: len(surplus)] = surplus
            self._state = self.executables[_WRITE_TABLE](self._state, padded)
        return entries

    # --- start-up

    def _choose_loop_steps(self, platform: str) -> int:
        """1 where a step is so long that the host hands over the next one meanwhile."""
        steps = LOOP_STEPS.get(platform, LOOP_STEPS["gpu"])
        if platform != "cpu":
            weights = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))
            half, none = LOOP_WEIGHT_BYTES
            steps = 1 if weights > none else steps // 2 if weights > half else steps
        return min(steps, self.config.num_scheduler_steps)

    def _programs(self) -> Executables:
        """The programs for the present number of pages."""
        # A CPU's program that came from JAX's cache cannot be written again. (It is soon traced.)
        if self._cache_folder is None or _device_of(self.params).platform == "cpu":
            return Executables(self._lower)
        # Whatever has no part in a program, or no repr of its own.
        config = dataclasses.replace(
            self.config,
            model=None,
            tokenizer=None,
            chat_template=None,
            hf_overrides=None,
            override_generation_config=None,
            scheduling_policy="fcfs",
            seed=0,
            profiler_dir=None,
            pooler_config=None,
        )
        shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), self.params)
        ingredients = (self.network.config, self._kv_dtype, config, self.max_pages, self.num_pages, shapes)
        cache = ProgramCache(self._cache_folder / "programs", ingredients, [self.network.module_class])
        return Executables(self._lower, cache)

    def _layout(self, shape: StepShape) -> InputLayout:
        return InputLayout(shape, self.config.block_size, self.config.max_num_seqs, self.max_pages)

    def _abstract_state(self, num_pages: int) -> tuple[KVPages, DeviceState]:
        """What a step is given and returns, as shapes."""
        seqs = self.config.max_num_seqs
        kv = kv_pool.abstract_pages(self.network, num_pages, self.config.block_size, self._kv_dtype)
        table = jax.ShapeDtypeStruct((seqs, self.max_pages), jnp.int32)
        return kv, DeviceState(table, jax.ShapeDtypeStruct((seqs,), jnp.int32))

    def _lower(self, key: Any) -> jax.stages.Lowered:
        _, state = self._abstract_state(self.num_pages)
        if key == _WRITE_TABLE:
            entries = jax.ShapeDtypeStruct((_TABLE_ENTRIES, 2), jnp.int32)
            return jax.jit(write_page_table, donate_argnums=0).lower(state, entries)
        if isinstance(key, ControlProgram):
            return self._host_sampling.lower(key)
        if isinstance(key, PromptProgram):
            return self._prompt_scorer.lower(key, _shapes_of(self.params))
        if isinstance(key, SampleShape):
            return self._lower_sampler(key, state.last_token)
        return self._lower_forward(key)

    def _lower_sampler(self, key: SampleShape, last_token: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
        seqs, host = self.config.max_num_seqs, self._host_sampling
        logits = jax.ShapeDtypeStruct((key.num_rows, host.vocab_size), jnp.float32)
        rows = jax.ShapeDtypeStruct((key.num_rows, ROW_WIDTH), jnp.int32)
        level = Level(key.level)
        if not level.controls:
            return jax.jit(make_sampler(level, seqs), donate_argnums=0).lower(last_token, logits, rows)
        sampler = jax.jit(make_controlled_sampler(level, seqs, self.config.max_logprobs), donate_argnums=(0, 1))
        return sampler.lower(last_token, host.abstract_tables, logits, rows, _shapes_of(host.all_allowed(key.num_rows)))

    def _lower_forward(self, shape: StepShape) -> jax.stages.Lowered:
        kv, state = self._abstract_state(self.num_pages)
        layout = self._layout(shape)
        make = make_decode_loop if shape.num_steps > 1 else make_forward
        forward = make(self.network, layout)
        forward.__name__ = str(shape).replace(", ", "_").replace(" ", "_")
        packed = jax.ShapeDtypeStruct((layout.size,), jnp.int32)
        program = jax.jit(forward, donate_argnums=(1, 2), compiler_options=self._compiler_options(shape))
        return program.lower(_shapes_of(self.params), kv, state, packed)

    def _compiler_options(self, shape: StepShape) -> dict[str, Any]:
        if _device_of(self.params).platform != "gpu":
            return {}
        # Kernels that do not need one another's results run side by side, as a layer's writes of keys and of values do.
        options: dict[str, Any] = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
        if shape.num_tokens >= _MANY_TOKENS:
            options["xla_gpu_enable_triton_gemm"] = False
        return options

    @property
    def program_keys(self) -> list[Any]:
        """Everything that the runner may ever run; first what takes longest to compile."""
        # A GPU has most kernels to choose from for products of few rows.
        forwards = sorted(self.ladder.all, key=lambda shape: shape.num_tokens)
        return [*forwards, *self._keys_without_pages, _WRITE_TABLE]

    @property
    def _keys_without_pages(self) -> list[Any]:
        """Of programs that do not depend on how many pages there are."""
        rows = sorted({shape.num_rows for shape in self.ladder.all})
        samplers = [SampleShape(count, level) for count in rows for level in Level if level > Level.GREEDY]
        scorers = [PromptProgram(), *(PromptProgram(shape.num_tokens) for shape in self.ladder.mixed)]
        return [*samplers, *scorers, *self._host_sampling.programs(rows)]

    def _warm_up(self) -> None:
        seconds = self.executables.warm_up(self.program_keys, self.config.use_tqdm_on_load)
        logger.info("compiled or loaded %d programs in %.1f s", len(self.program_keys), seconds)

    def _count_pages(self) -> tuple[int, Executables | None]:
        """Pages of the KV pool, and the programs that it took to count them, if any."""
        config = self.config
        if config.num_gpu_blocks_override is not None:
            return config.num_gpu_blocks_override, None
        if config.kv_cache_memory_bytes is not None:
            return kv_pool.pages_in(config.kv_cache_memory_bytes, self._page_bytes), None
        if kv_pool.device_memory(_device_of(self.params)) is None:
            return kv_pool.pages_in(kv_pool.CPU_KV_BYTES, self._page_bytes), None
        return self._measure_pages()

    def _shrink_model_len(self) -> None:
        held = self.num_pages * self.config.block_size
        if 0 < held < self.config.max_model_len:
            logger.warning(
                "max_model_len lowered from %d to %d, which is what the KV cache holds", self.config.max_model_len, held
            )
            self.config = dataclasses.replace(self.config, max_model_len=held)
            self.max_pages = self.num_pages

    def _measure_pages(self) -> tuple[int, Executables]:
        """Pages that fit beside the weights and the largest step's working memory; one such step is run to measure."""
        shape = self.ladder.mixed[-1]
        self.num_pages = self.max_pages
        self.reset()
        programs, largest = self._programs(), [shape, SampleShape(shape.num_rows, Level.FULL), PromptProgram()]
        # While the step is compiled, which takes long, so is what will be the same for any number of pages.
        others = [] if self.config.enforce_eager else self._keys_without_pages
        programs.warm_up([*largest, *(key for key in others if key not in largest)], progress=False)
        forward, sampler, scorer = (programs[key] for key in largest)
        idle = self._layout(shape).pack(StepPlan(0), self.sampling, np.zeros((0, 2), np.int32))
        self._kv, state, _, logits, rows, hidden = forward(self.params, self._kv, self._state, idle)
        sampled = self._sample_controlled(sampler, StepPlan(0), state.last_token, logits, rows)
        sizes = [program.memory_analysis() for program in (forward, sampler, scorer)]
        step_bytes = max(size.temp_size_in_bytes for size in sizes) + sizes[2].output_size_in_bytes
        kept = jax.tree.leaves(jax.block_until_ready((logits, hidden, sampled)))
        step_bytes += 2 * sum(array.nbytes for array in kept)  # of this step and of the one ahead
        self._kv = self._state = state = logits = hidden = sampled = kept = None
        limit, in_use, _ = kv_pool.device_memory(_device_of(self.params))
        spare = limit // 64  # for fragments, and for what the libraries allocate as they go
        pages = kv_pool.pages_in(limit - in_use - step_bytes - spare, self._page_bytes)
        logger.info(
            "device memory for the engine: %.2f GiB; weights %.2f, largest step %.2f, KV %.2f = %d pages",
            *(size / 2**30 for size in (limit, in_use, step_bytes, pages * self._page_bytes)), pages,
        )  # fmt: skip
        return pages, programs


def _sizes_of_parts(num_steps: int, loop: StepShape | None) -> list[int]:
    """A plan's steps by program: whole loops, and what is left. Half of a loop and more is a loop too, in whose other
    steps no row takes part: they take less time than handing over the steps one by one."""
    if loop is None:
        return [1] * num_steps
    loops, rest = divmod(num_steps, loop.num_steps)
    return [loop.num_steps] * loops + ([rest] if 2 * rest >= loop.num_steps else [1] * rest)


def _shapes_of(arrays: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)


def _device_of(params: Params) -> jax.Device:
    return next(iter(jax.tree.leaves(params)[0].devices()))
