"""Greedy decoding whose every step, embedding to argmax, is one CUDA graph without host synchronisation."""

import copy
import time
from dataclasses import dataclass

import torch
from cats_kernels.crossover import sparse_pays
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from cats.core import compilation
from cats.core.activation import CatsMLP
from cats.decoding import attention
from cats.errors import CatsError

# The compile recipe that made dense decoding fastest on an H100: matrix-vector products as tuned reductions.
# Without coordinate descent Inductor keeps cuBLAS for one row, 7 to 17 % slower in the MLP.
FASTEST = {"coordinate_descent_tuning": True}
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # layers of keys and values alone
ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")  # settings of PEFT's layers
_KEPT = "_cats_decoder"  # where a model keeps its decoder
# What generate() passes along with every text: what the loop does itself, or checks.
TEXT = ("attention_mask", "position_ids", "cache_position", "past_key_values", "use_cache", "logits_to_keep")
CHUNK = 16  # steps between two looks for an end-of-sequence token: one host synchronisation in 16 tokens


@dataclass
class Generation:
    """Tokens and the times of one call; `tokens` [B, prompt + new], times in seconds, memory in bytes."""

    tokens: torch.Tensor
    prompt_tokens: int
    first_token_s: float
    decode_s: float

    @property
    def new_tokens(self) -> int:
        return self.tokens.shape[1] - self.prompt_tokens

    @property
    def tokens_per_s(self) -> float:
        """Decoding rate of one row; the first token belongs to prefill and is not counted."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 else float("nan")


class Decoder:
    """A model with a static cache and one captured decoding step, for up to `length` tokens a row.

    On a GPU the step is compiled whole (`options`: Inductor's; None leaves it eager) and captured; elsewhere
    it runs as it is. Thresholds may change between calls (they are buffers); swapping modules, or a sparsity
    of 0 that becomes another, needs a new Decoder. Raises CatsError where `length` exceeds what the model was
    made for, for models whose layers keep more than keys and values (recurrent, convolutional), and for flex
    and flash attention.
    """

    def __init__(self, model: nn.Module, length: int, *, batch: int = 1, options: dict | None = FASTEST):
        _check_attention(model)
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", length)
        if length > limit:
            raise CatsError(
                f"{length} tokens were asked for but the model takes {limit}: shorten prompt or output."
            )
        attention.tie(model)
        self.model, self.length, self.batch = model, length, batch
        self.device = next(model.parameters()).device
        self.cache = attention.DecodeCache(model.config, length, device=self.device)
        self.tokens = torch.zeros(batch, length + 1, dtype=torch.int64, device=self.device)
        self.on_gpu = self.device.type == "cuda"
        self._step = self._decode_one
        if self.on_gpu and options is not None:
            compilation.allow(256)  # one for each model that a process decodes with
            self._step = torch.compile(self._decode_one, fullgraph=True, dynamic=False, options=options)
        self.graph: torch.cuda.CUDAGraph | None = None

    def __reduce__(self):
        """A copied or saved model starts without a decoder: a captured graph belongs to its own weights."""
        return type(None), ()

    def _decode_one(self) -> None:
        """On the device: read the token at `position`, write its successor behind it, advance `position`."""
        here = self.cache.position.clone().view(1)
        token = self.tokens.index_select(1, here)
        logits = self.model(
            input_ids=token, position_ids=here[None], past_key_values=self.cache, use_cache=True
        ).logits
        self.tokens.index_copy_(1, here + 1, logits[:, -1:].argmax(-1))

    @torch.no_grad()
    def prefill(self, input_ids: torch.Tensor) -> None:
        """Fill the cache from a prompt [B, T] and write the first new token."""
        prompt = input_ids.shape[1]
        self.cache.reset()
        self.tokens[:, :prompt] = input_ids
        out = self.model(input_ids=input_ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.tokens[:, prompt] = out.logits[:, -1].argmax(-1)

    @torch.no_grad()
    def step(self) -> None:
        """One new token a row: a graph replay on a GPU."""
        if self.graph is not None:
            self.graph.replay()
        elif self.on_gpu:
            self._capture()
            self.graph.replay()
        else:
            self._step()

    def _capture(self) -> None:
        """Compile on a side stream, then capture; the cache and tokens are put back as they were."""
        position, tokens = self.cache.position.clone(), self.tokens.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
                self.cache.position.copy_(position)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()
        self.cache.position.copy_(position)
        self.tokens.copy_(tokens)

    @torch.no_grad()  # with gradients the attention modules would keep the path of Transformers
    def generate(self, input_ids: torch.Tensor, new_tokens: int, *, eos: tuple[int, ...] = ()) -> Generation:
        """Greedy continuation of a prompt [B, T] by `new_tokens`, or until each row has met a token of `eos`.

        Rows that end early are padded with the last of `eos`. Raises CatsError where prompt and output do not
        fit.
        """
        batch, prompt = input_ids.shape
        if batch != self.batch or prompt + new_tokens > self.length or new_tokens < 1:
            raise CatsError(
                f"A prompt of {batch} x {prompt} tokens and {new_tokens} new ones do not fit a decoder "
                f"made for {self.batch} x {self.length}: make a larger one."
            )
        if self.on_gpu and self.graph is None:
            self.prefill(input_ids)
            self._capture()
        self._wait()
        begin = time.perf_counter()
        self.prefill(input_ids)
        self._wait()
        first = time.perf_counter()
        done = 1
        while done < new_tokens:
            for _ in range(min(CHUNK, new_tokens - done) if eos else new_tokens - done):
                self.step()
                done += 1
            if eos and self._ended(prompt, done, eos):
                break
        self._wait()
        last = time.perf_counter()
        tokens = self.tokens[:, : prompt + done].clone()
        return Generation(_cut(tokens, prompt, eos) if eos else tokens, prompt, first - begin, last - first)

    def _ended(self, prompt: int, done: int, eos: tuple[int, ...]) -> bool:
        new = self.tokens[:, prompt : prompt + done]
        return bool(torch.isin(new, torch.tensor(eos, device=new.device)).any(dim=1).all())

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def _check_attention(model: nn.Module) -> None:
    """Raise CatsError for layers or implementations of attention that the decoder's cache does not serve."""
    config = model.config.get_text_config(decoder=True)
    implementation = str(getattr(config, "_attn_implementation", None))
    if "flex" in implementation or "flash" in implementation:  # they read rows that are not written yet
        raise CatsError(
            f"cats.decoding does not do {implementation}: call model.set_attn_implementation('sdpa') before."
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - ATTENTION
    if kinds or getattr(model, "_is_stateful", False):
        raise CatsError(
            f"{type(model).__name__} has layers that keep more than keys and values "
            f"({', '.join(sorted(kinds)) or 'a recurrent state'}): call generate() without cats.decoding."
        )


def _cut(tokens: torch.Tensor, prompt: int, eos: tuple[int, ...]) -> torch.Tensor:
    """Tokens [B, T] without what was decoded past the end of a row, cut where the longest row ends."""
    ends = torch.isin(tokens[:, prompt:], torch.tensor(eos, device=tokens.device))
    after = ends.cumsum(1) - ends.int() > 0  # strictly behind the first end
    tokens[:, prompt:] = tokens[:, prompt:].masked_fill(after, eos[-1])
    return tokens[:, : prompt + int((~after).sum(1).max())]


def greedy(model, input_ids, **given):
    """`model.generate(..., custom_generate=cats.decoding.greedy)`: greedy search by this module's loop.

    Returns tokens [B, prompt + new]. Raises CatsError for what the loop cannot do: sampling, beams, logits
    processors, stop strings and other criteria, padded or empty prompts, inputs that are no tokens (images,
    embeddings, soft prompts), other positions, a cache with tokens, streaming, or outputs other than tokens.
    """
    return timed_greedy(model, input_ids, **given).tokens


def timed_greedy(
    model, input_ids, *, logits_processor, stopping_criteria, generation_config, **model_kwargs
) -> Generation:
    """`greedy` with its times."""
    config = generation_config
    batch, prompt = input_ids.shape
    mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
    others = [name for name, value in model_kwargs.items() if not _is_text(name, value)]
    prepare = getattr(model, "prepare_inputs_for_generation", None)
    wrong = {
        "sampling or beams": config.do_sample or config.num_beams > 1,
        "logits processors": len(logits_processor) > 0,
        "stopping criteria but the length and the end token": not all(
            isinstance(each, MaxLengthCriteria | EosTokenCriteria) for each in stopping_criteria
        ),
        "padded prompts": mask is not None and not bool(mask.all()),
        "a streamer": model_kwargs.get("streamer") is not None,
        "dictionary outputs": config.return_dict_in_generate,
        f"other inputs than tokens ({', '.join(others)})": bool(others),
        "soft prompts of PEFT": getattr(prepare, "__self__", model) is not model,
        "empty prompts": prompt == 0,
        "caches that hold tokens already": isinstance(cache, Cache) and cache.get_seq_length() > 0,
        "positions other than 0, 1, 2, …": not _counts(model_kwargs.get("position_ids"), prompt),
    }
    for what, present in wrong.items():
        if present:
            raise CatsError(
                f"cats.decoding.greedy does not do {what}: call generate() without custom_generate."
            )
    new_tokens = config.max_length - prompt
    eos = config._eos_token_tensor
    eos = () if eos is None else tuple(eos.tolist())
    return decoder_for(model, prompt + new_tokens, batch).generate(input_ids, new_tokens, eos=eos)


def _is_text(name: str, value) -> bool:
    """Whether an input of `generate` adds nothing to the tokens: one of TEXT, absent or empty."""
    if name.endswith("token_type_ids") and isinstance(value, torch.Tensor):
        return not value.any()  # some tokenizers give zeros with every text
    empty = value is None or value is False or (isinstance(value, dict) and not value)
    return name in TEXT or empty


def _counts(positions: torch.Tensor | None, prompt: int) -> bool:
    """Whether positions [..., T] are 0 … prompt - 1 in every row; None is."""
    if positions is None:
        return True
    expected = torch.arange(prompt, device=positions.device)
    return positions.shape[-1] == prompt and bool((positions == expected).all())


def decoder_for(model: nn.Module, length: int, batch: int = 1) -> Decoder:
    """The decoder kept with `model`; made again where it is too short, or modules or weights were changed."""
    attention.tie(model)  # before the pointers are read
    state = [_frozen(module, batch) for module in model.modules()]
    state += [(t.data_ptr(), t.shape, t.dtype) for t in (*model.parameters(), *model.buffers())]
    known = model.__dict__.get(_KEPT)
    if known is None or known.state != state or known.batch != batch or known.length < length:
        rounded = 256 * -(-length // 256)  # so that a slightly longer prompt finds the same graph
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", rounded)
        known = Decoder(model, max(length, min(rounded, limit)), batch=batch)
        known.state = state
        model.__dict__[_KEPT] = known  # kept here, so that it goes when the model goes
    return known


def _frozen(module: nn.Module, batch: int) -> tuple:
    """What of a module, besides its tensors, a captured step of `batch` rows cannot take up any more."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    adapters = [copy.copy(vars(module).get(name)) for name in ADAPTERS]
    kind = (type(module), module.training, hooks, adapters)
    if not isinstance(module, CatsMLP):
        return kind
    sparse = module.sparsity > 0 and sparse_pays(batch, module.sparsity, module.hidden_size)
    return *kind, module.prefill, module.observer, module.combine, sparse


def release(model: nn.Module) -> None:
    """Drop the decoder kept with `model`: its cache, and the memory of its graph."""
    model.__dict__.pop(_KEPT, None)
