"""The actors' sections of the configuration. Nothing heavy is imported here: the help reads it."""

from typing import Literal, Self

from pydantic import Field, model_validator

from reward_server.config import Section


class MissingEos(Section):
    """What becomes of the score of a response that was cut off before its EOS."""

    rule: Literal["replace", "subtract", "none"] = "replace"
    """replace: `value` is the score; subtract: `value` is taken off the score; none: the score stays."""
    value: float = -1.0
    """The score, or the positive penalty, of the rule."""

    @model_validator(mode="after")
    def _penalty_is_positive(self) -> Self:
        if self.rule == "subtract" and self.value <= 0:
            raise ValueError(f"missing_eos.value is {self.value}: the rule 'subtract' needs a positive penalty")
        return self

    def apply(self, score: float, ended: bool) -> float:
        """Return the score of a response."""
        if ended or self.rule == "none":
            return score
        return self.value if self.rule == "replace" else score - self.value


class RolloutConfig(Section):
    """How responses are sampled."""

    prompts_per_wave: int = Field(default=32, ge=1)
    """Prompts that a generator is given at once; each is scored when its responses are complete."""
    waves_in_flight: int = Field(default=1, ge=1)
    """Waves that one generator has at the same time. With 1, it rests while the last of its wave are scored."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """Responses to each prompt."""
    max_prompt_tokens: int = Field(default=1024, ge=1)
    """Longest prompt, in tokens; a longer one is refused before the run starts."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """Longest response, in tokens, its EOS included; it is cut off there."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; training divides its logits by the same number."""
    missing_eos: MissingEos = MissingEos()
    """What a cut-off response scores."""
    wave_deadline_s: float = Field(default=600.0, gt=0)
    """Seconds in which a wave must be sampled; what is not complete by then counts as lost."""
    max_attempts: int = Field(default=3, ge=1)
    """Times that a prompt is tried, for any use, before the run stops; the last time alone, which finds the guilty."""


class GeneratorConfig(Section):
    """One vLLM engine."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the weights; take the learner's, or their log-probabilities drift apart."""
    max_model_len: int = Field(default=2048, ge=2)
    """Longest query plus response, in tokens."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Most sequences that are decoded at once; further ones wait."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """Memory for keys and values on a CPU, in GiB; on a GPU, gpu_memory_utilization decides."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0, le=1)
    """Part of a GPU's memory that the engine may take."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Devices that share one copy of the weights."""
    enforce_eager: bool = True
    """Skip compilation: starts in seconds instead of a minute, decodes some 10 % slower."""
    threads: int = Field(default=1, ge=1)
    """Threads of a worker on a CPU; all processes that compute at once share the cores."""
    start_deadline_s: float = Field(default=300.0, gt=0)
    """Seconds that starting the engine may take."""
    call_deadline_s: float = Field(default=60.0, gt=0)
    """Seconds that a control call may take, such as pausing, or loading received weights."""
    progress_deadline_s: float = Field(default=120.0, gt=0)
    """Seconds without a single new token, while not paused, after which the engine counts as hung."""
