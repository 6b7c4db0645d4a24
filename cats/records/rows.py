"""What a row of each experiment's records holds at least: its keys, each with its meaning and unit."""

from typing import TypedDict, get_type_hints


class _Scored(TypedDict):
    model: str  # id
    method: str  # title of the rule
    gate_sparsity: float | None  # target, share of the gate's activations that are zeroed
    model_sparsity: float | None  # target, share of all block weights that a token skips
    realised_sparsity: float | None  # share of the gate's activations that were zero, all phases
    task: str  # name, or "average of 8"
    documents: int
    delta_low: float | None  # 95 % interval of the difference to dense, on the same documents
    delta_high: float | None


class ZeroShot(_Scored):
    acc: float  # share of right answers, the likeliest choice
    acc_se: float  # standard error
    acc_norm: float | None  # the same by likelihood a byte
    acc_norm_se: float | None
    delta_acc: float | None  # acc minus the dense model's


class Generated(_Scored):
    exact_match: float  # share of right answers, written out
    exact_match_se: float


class Perplexity(TypedDict):
    model: str
    method: str
    gate_sparsity: float | None
    corpus: str
    tokens: int  # scored
    nll_nats: float  # mean negative log-likelihood of a token
    perplexity: float  # exp(nll_nats)
    delta_nll: float | None  # nll_nats minus the dense model's
    delta_low: float | None  # 95 % interval, over documents
    delta_high: float | None


class MlpLatency(TypedDict):
    hidden_size: int
    intermediate_size: int
    dtype: str
    batch: int  # sequences
    sparsity: float  # target
    variant: str  # dense_best, dense_<recipe>, cats, cats_<other way>, centred
    latency_us: float  # median, µs
    latency_us_p5: float
    latency_us_p95: float
    bound_share: float | None  # time to read the bytes at the measured bandwidth, over latency
    speedup_over_best_dense: float | None


class Decode(TypedDict):
    geometry: str  # or the model's id
    weights: str  # trained or random
    sparsity: float  # target
    variant: str  # dense_<loop> or cats_<loop>
    prompt_tokens: int
    new_tokens: int
    tokens_per_s: float  # median of the runs, the first token not counted
    speedup_over_best_dense: float
    bound_speedup: float  # by bytes of weights
    peak_memory_gb: float | None


class DecodeStep(TypedDict):
    geometry: str
    weights: str
    sparsity: float
    order: int  # of the kernel in the step
    kernel: str  # name
    us: float  # µs
    gap_us: float  # idle before it, µs


class Check(TypedDict):
    tool: str  # plain, memcheck or racecheck
    file: str
    test: str
    outcome: str  # passed, failed or skipped
    seconds: float
    findings: int | None  # of the tool, over all its tests


class Overlap(TypedDict):
    model: str
    layer: int
    sparsity: float  # target
    rows: int  # tokens whose masks are united
    kind: str  # consecutive tokens, or tokens of different stretches
    union_density: float  # share of neurons that at least one of them keeps
    independent_density: float  # the same of independent masks


class Finetuning(TypedDict):
    model: str
    method: str
    sparsity: float | None
    seed: int
    step: int
    heldout_nll_nats: float  # mean negative log-likelihood of a held-out token
    zero_shot_avg: float | None  # mean accuracy of the tasks
    realised_sparsity: float | None  # on held-out text


class Build(TypedDict):
    step: str  # such as make book; with "again" where it ran before
    seconds: float
    cores: int
    memory_gb: float | None  # most that the step's processes held together


ROWS: dict[str, type] = {
    "mlp_latency": MlpLatency,
    "decode": Decode,
    "decode_step": DecodeStep,
    "checks": Check,
    "zero_shot": ZeroShot,
    "generation": Generated,
    "perplexity": Perplexity,
    "overlap": Overlap,
    "finetuning": Finetuning,
    "build": Build,
}
# The columns that each experiment's rows have at least.
COLUMNS = {experiment: tuple(get_type_hints(row)) for experiment, row in ROWS.items()}
