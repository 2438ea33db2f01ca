"""The reward server's sections of the configuration. Nothing heavy is imported here: the help reads it."""

from dataclasses import dataclass
from datetime import date
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, model_validator

from reward_server.bearer import TOKEN_VARIABLE
from reward_server.redaction import SECRET_NAME

_T = TypeVar("_T")
CommaSeparated = Annotated[
    tuple[_T, ...], BeforeValidator(lambda given: given.split(",") * bool(given) if isinstance(given, str) else given)
]
"""A list that may be given as a text with commas; an empty text is an empty list."""


@dataclass(frozen=True)
class NameOrPath:
    """Marks a text that is the path of a folder where it looks like one or is there, else a name, as of a model hub."""

    kind: str | None = None
    """of the rows of a list in which that is so; None in any"""


class Section(BaseModel):
    """A section of the configuration: cannot be changed, refuses unknown keys, and its docstrings are its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class LoadingConfig(Section):
    """How the folders of models are read."""

    trust_remote_code: bool = False
    """Run the Python code that a model's folder brings along (auto_map), with all your rights: read it first. What was
    made so is marked in the lineage."""
    chat_date: date = date(2024, 7, 26)
    """Day that a chat template is given which prints the current one (strftime_now), so that a prompt is the same on
    every day and machine; written into the templates of the run's models."""


UNTRUSTED = LoadingConfig()
"""Nothing that a folder brings along is run."""


class GateConfig(Section):
    """Turns a part into a condition: outside its bounds, `otherwise` is the whole score."""

    at_least: FiniteFloat | None = None
    """Lowest score of the part that passes."""
    at_most: FiniteFloat | None = None
    """Highest score of the part that passes."""
    otherwise: FiniteFloat = -1.0
    """The score of a response that does not pass, whatever the other parts say."""

    @model_validator(mode="after")
    def _has_a_bound(self) -> Self:
        if self.at_least is None and self.at_most is None:
            raise ValueError("a gate without a bound lets everything pass; set at_least or at_most")
        return self

    def passes(self, score: float) -> bool:
        """Whether a score of the part is within the bounds."""
        low, high = self.at_least, self.at_most
        return (low is None or score >= low) and (high is None or score <= high)


class PartConfig(Section):
    """One source of a mix."""

    name: str = Field(default="reward_model", min_length=1)
    """How its scores are called in the parts of a reply and in the metrics."""
    kind: Literal["model", "function", "url", "length", "regex"] = "model"
    """A reward model's folder, a Python function, another reward server, or a rule on the response."""
    target: Annotated[str | None, NameOrPath("model")] = None
    """The folder, module:function, URL or pattern. Without one, a model is the run's own reward model. `length` counts
    words; `regex` is 1 where the pattern is found and 0 elsewhere."""
    token_variable: str | None = None
    """Environment variable, where the service runs, with the bearer token of a url. RAYWARD_REWARD_TOKEN is this
    service's own, and goes nowhere else."""
    raw: bool = False
    """Take a model's output as it is: its folder then needs no normalisation."""
    weight: FiniteFloat = 1.0
    """Factor of its score in the sum."""
    gate: GateConfig | None = None
    """Makes it a condition that a response has to pass, instead of a summand."""

    @model_validator(mode="after")
    def _has_a_target(self) -> Self:
        if self.kind in ("function", "url", "regex") and not self.target:
            raise ValueError(f"the reward source {self.name!r} is a {self.kind} without a target; set target")
        if self.kind == "length" and self.target:
            raise ValueError(f"the reward source {self.name!r} counts words and takes no target; remove it")
        if self.raw and self.kind != "model":
            raise ValueError(
                f"the reward source {self.name!r} is a {self.kind}, whose scores are raw anyway; remove raw"
            )
        variable = self.token_variable
        if variable is not None and (
            self.kind != "url" or variable == TOKEN_VARIABLE or not SECRET_NAME.search(variable.upper())
        ):
            raise ValueError(
                f"the reward source {self.name!r} cannot have token_variable = {variable!r}: only a url has one, it is "
                f"not {TOKEN_VARIABLE}, and it ends in TOKEN, so that its value is never shown"
            )
        if self.kind == "regex":
            import regex

            try:
                regex.compile(self.target or "")
            except regex.error as error:
                raise ValueError(f"the reward source {self.name!r}: {self.target!r} is no pattern ({error})") from error
        return self


class SourceConfig(Section):
    """What scores a response: the weighted sum of one or more parts, if it passes the gates among them."""

    parts: tuple[PartConfig, ...] = Field(default=(PartConfig(),), min_length=1)
    """The sources to sum. By default the run's own reward model alone."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Numbers that reward models compute in; the head is always float32."""
    max_batch_tokens: int = Field(default=8192, ge=1)
    """Tokens of a forward."""
    compile: bool = False
    """Fuse the element-wise work of reward models with torch.compile; needs a C++ compiler, and a minute at first."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Longest prompt with response, in tokens. By default what the model has positions for."""
    truncate_prompt: bool = False
    """Cut a prompt that is too long from its left, instead of stopping the run."""
    retry_s: float = Field(default=120.0, gt=0)
    """Seconds for which scores that did not come are asked for again, before the run is paused. A replica that says
    nothing, or computes one batch, for so long is started again."""
    pause_s: float = Field(default=3600.0, ge=0)
    """Seconds for which a paused run waits for the service, or for room on a full disk; nothing is sampled meanwhile,
    and nothing is lost. Then the run stops with the reason."""

    @property
    def uses_own_model(self) -> bool:
        """Whether a part is the run's own reward model."""
        return any(part.kind == "model" and part.target is None for part in self.parts)

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [part.name for part in self.parts]
        if len(set(names)) != len(names):
            raise ValueError(f"the reward sources are called {names}; give each part a name of its own")
        if all(part.gate for part in self.parts):
            raise ValueError(
                f"the reward sources {names} are all gates, so there is nothing to sum; add a part without"
            )
        return self


class LabelerConfig(Section):
    """Who ranks completions when no person does."""

    name: str = "simulated:vader"
    """simulated:vader (sentiment by the VADER lexicon), or module:function, (list[str]) -> list[float]."""
    tie_margin: float = Field(default=0.05, ge=0)
    """Verdicts at most this far apart are a tie."""


class Limits(Section):
    """What one server takes on."""

    max_body_bytes: int = Field(default=32 * 2**20, ge=1)
    """Largest body of a post."""
    max_bytes: int = Field(default=256 * 2**20, ge=1)
    """Most bytes of all posts that have no answer yet; one more is turned away with 503."""
    max_connections: int = Field(default=256, ge=1)
    """Most connections; one more costs the oldest on which no request is under way."""
    max_requests: int = Field(default=4096, ge=1)
    """Most responses in a post."""
    max_waiting: int = Field(default=64, ge=1)
    """Posts computed or waiting; one more is turned away with 503."""
    batch_tokens: int = Field(default=32_768, ge=1)
    """Most tokens that are scored at once, for all who wait; those with the least left come first."""
    max_batch: int = Field(default=1024, ge=1)
    """Most responses that are scored at once, which is the bound where no model reads tokens."""
    header_s: float = Field(default=10.0, gt=0)
    """Seconds that a connection has to begin a request and send its headers."""
    read_s: float = Field(default=30.0, gt=0)
    """Seconds that a client has to send its body."""
    health_s: float = Field(default=60.0, gt=0)
    """Seconds that the probe of /health may take, waiting for its turn included."""
    remember: int = Field(default=100_000, ge=1)
    """Scores kept by request id, so that a retry is answered without computing again."""


class ServeConfig(Section):
    """The reward service as a service of its own: `rayward serve`, and the replicas of a run's."""

    host: str = "127.0.0.1"
    """Address to listen on; off the loopback a token is needed: RAYWARD_REWARD_TOKEN in the environment, or the name of
    a file with it (mode 0600) in RAYWARD_REWARD_TOKEN_FILE."""
    port: int = Field(default=8700, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    replicas: int = Field(default=1, ge=1)
    """Copies of the service. More than one run on Ray Serve, which spreads the posts over them."""
    max_replicas: int | None = Field(default=None, ge=1)
    """Let Ray Serve add copies up to this number while posts queue, and take them away again."""
    posts_per_replica: float = Field(default=4.0, gt=0)
    """Posts computed or waiting at a copy, on average, above which another is added."""
    upscale_s: float = Field(default=30.0, gt=0)
    """Seconds that posts must queue for a copy to be added."""
    downscale_s: float = Field(default=600.0, gt=0)
    """Seconds that fewer copies must be enough for one to be taken away."""
    threads: int = Field(default=1, ge=1)
    """Threads of a copy, and the CPUs that Ray reserves for it."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs that Ray reserves for a copy; a part of one to share it."""
    limits: Limits = Limits()
    """What one copy takes on."""

    @property
    def on_ray(self) -> bool:
        """Whether it takes Ray Serve."""
        return max(self.replicas, self.max_replicas or 1) > 1

    @model_validator(mode="after")
    def _counts_are_ordered(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"serve.max_replicas = {self.max_replicas} is below serve.replicas = {self.replicas}: raise or unset it"
            )
        return self
