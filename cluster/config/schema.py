"""The configuration of a run: the sections that live beside the code they configure, composed."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from actors.config import GeneratorConfig, RolloutConfig
from learner.config import BASELINE, PPOConfig, PublishConfig, RewardModelingConfig, SFTConfig
from reward_server.config import CommaSeparated, LabelerConfig, LoadingConfig, NameOrPath, ServeConfig, SourceConfig
from reward_server.labeling.config import LabelConfig


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class FleetConfig(_Section):
    """What is done about generators and reward replicas that are lost."""

    max_restarts: int = Field(default=3, ge=0)
    """Times that one is replaced without having sampled, or served a minute, in between; then its place stays empty."""
    min_generators: int = Field(default=1, ge=1)
    """Fewest places with which a run goes on when others stay empty."""
    backoff_s: float = Field(default=2.0, ge=0)
    """Seconds before a replacement starts; twice as many each time that it fails again."""
    replacement_deadline_s: float = Field(default=600.0, gt=0)
    """Seconds that a run waits for a replacement when no generator is left."""
    watch_s: float = Field(default=5.0, gt=0)
    """Seconds between two looks at the progress of each."""


class ClusterConfig(_Section):
    """How many processes there are of each kind, and how long they may take."""

    address: str = "local"
    """host:port of a running Ray cluster; "local" starts one on this machine and stops it afterwards."""
    generators: int = Field(default=1, ge=1)
    """vLLM actors that sample. `rayward scale` changes it while a run works."""
    max_generators: int | None = Field(default=None, ge=1)
    """Most that it may be changed to on one machine, which keeps cores free for them; unset: cluster.generators."""
    learner_ranks: int = Field(default=1, ge=1)
    """DeepSpeed ranks that train."""
    reward_replicas: int = Field(default=1, ge=1)
    """Processes that score responses; each generator asks the one that is least busy."""
    start_deadline_s: float = Field(default=600.0, gt=0)
    """Seconds that a process may take to start and load its model."""
    step_deadline_s: float = Field(default=3600.0, gt=0)
    """Seconds that one call may take, such as an iteration's update."""
    fleet: FleetConfig = FleetConfig()
    """What is done about generators and reward replicas that are lost."""


class AlertsConfig(_Section):
    """When a run asks for attention: on the console, in RUN/alerts.jsonl and as a W&B alert."""

    kl_above: float | None = Field(default=50.0, gt=0)
    """KL to the SFT model, in nats a response."""
    gap_above: float | None = Field(default=0.3, gt=0)
    """Mean gap between the log-probs of sampler and learner on the same tokens, in nats."""
    stalled_s: float = Field(default=3600.0, ge=0)
    """Seconds without a step; 0 never asks."""


class TrackingConfig(_Section):
    """Weights & Biases and others. The metrics also go to RUN/metrics.jsonl, whatever is set here."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    """offline: keep it in RUN/wandb; online: send it too, with the key of `wandb login` or WANDB_API_KEY."""
    project: str = "rayward"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; W&B's own default when not set."""
    tags: tuple[str, ...] = ()
    """Tags of the W&B run."""
    queue_size: int = Field(default=1000, ge=1)
    """Steps that may wait for W&B; when it falls further behind, steps are left out of W&B and counted."""
    close_deadline_s: float = Field(default=30.0, gt=0)
    """Seconds that W&B has to finish, and half of them to start; what is not sent stays in RUN/wandb."""
    tensorboard: bool = False
    """Write event files for TensorBoard into RUN/tensorboard, too."""
    prometheus_port: int = Field(default=0, ge=0, le=65535)
    """Serve the run's metrics to Prometheus on this port of the controller's machine; 0 does not."""
    prometheus_host: str = "127.0.0.1"
    """Address to serve them on. They hold no secrets, but anybody who reaches the port can read them."""
    alerts: AlertsConfig = AlertsConfig()
    """When the run asks for attention."""


def _template_text(given: str | None) -> str | None:
    """A chat template, read where its file is given: what is recorded is the text."""
    if not given or "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"neither Jinja text nor a file that can be read ({error})") from error


class ModelsConfig(LoadingConfig):
    """Which models the steps start from."""

    base: Annotated[str | None, NameOrPath()] = None
    """Hugging Face folder or hub id of the language model that is fine-tuned."""
    chat_template: Annotated[str | None, NameOrPath(), AfterValidator(_template_text)] = None
    """Jinja text, or a file with it, that replaces the base model's chat template, or gives one to a model without;
    saved with RUN/sft."""
    sft: Path | None = None
    """Folder of the SFT model; RUN/sft when not set."""
    init: Path | None = None
    """Folder of the model that PPO starts from; the SFT model, which always is the KL reference, when not set."""
    reward: Path | None = None
    """Folder of the reward model; RUN/reward when not set."""
    critic: Path | None = None
    """Folder that the critic starts from; the reward model, as in the paper, when not set. Name another, such as the
    SFT model's (whose value head starts afresh), where the reward model has another tokenizer than the policy."""
    policy: Path | None = None
    """Folder of the model to evaluate; RUN/policy when not set."""


class DataConfig(_Section):
    """Files that the steps read: JSON lines, CSV, Parquet and others, in the forms of public sets (docs/data.md)."""

    prompts_raw: Path | None = None
    """{"prompt": text or messages} or {"instruction": text, "instances": [{"input", "output"}, ..]}, each with "user",
    "use_case" and "kind" where known: what `rayward prompts` makes the other files of."""
    demonstrations: Path | None = None
    """{"prompt": text or messages, "response": text}: what SFT learns, and what scores 0 on average. Rows with the same
    "group", such as one instruction with several few-shot draws, are never split between training and held out."""
    demonstrations_valid: Path | None = None
    """The same, held out; when not set, sft.valid_share of the demonstrations."""
    preference_prompts: Path | None = None
    """{"prompt": text or messages}: prompts whose sampled completions are compared."""
    completions: Path | None = None
    """Completions to rank; RUN/data/completions.jsonl when not set."""
    comparisons: Path | None = None
    """Ranked completions, pairs (HH) or trees (OASST); RUN/data/comparisons.jsonl when not set."""
    prompts: Path | None = None
    """{"prompt": text or messages}: what PPO samples from."""
    prompts_valid: Path | None = None
    """Prompts on which the epochs of an SFT model are compared, to choose one."""
    prompts_heldout: Path | None = None
    """Prompts on which models are compared; none of them is trained on."""
    pretraining: Path | None = None
    """{"text": text}: the pretraining mix of SFT and PPO-ptx."""
    pretraining_valid: Path | None = None
    """The same, held out: the loss on it shows what alignment costs."""
    max_bad_rows: int = Field(default=0, ge=0)
    """Rows of a file that may be skipped as they cannot be read or encoded, each with a warning; with one more the
    step does not begin, and all are told."""


class PromptsConfig(_Section):
    """Sets of prompts, made of raw ones (paper, section 3.2 and appendix A)."""

    prefix_chars: int = Field(default=100, ge=1)
    """Of prompts whose first so many characters are the same, one is kept, the first; of shorter ones, if all is. The
    paper has no number."""
    per_user: int = Field(default=200, ge=1)
    """Prompts of one user at most (paper: 200)."""
    shots: int = Field(default=3, ge=1)
    """Pairs of an instruction that a few-shot prompt shows at most, before it asks for another one's output."""
    draws: int = Field(default=1, ge=1)
    """Few-shot prompts that are made of one instruction at most; each asks for another output."""
    demonstration_share: float = Field(default=0.15, ge=0, lt=1)
    """Share of the users whose prompts are for demonstrations."""
    preference_share: float = Field(default=0.4, ge=0, lt=1)
    """Share of the users whose prompts are for completions that are compared. PPO's users are the rest."""
    valid_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the users whose prompts are for choosing among models."""
    heldout_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the users whose prompts models are compared on."""
    seed: int = 0
    """Which users are in which set, which prompts stay of a user with too many, which pairs a few-shot prompt shows."""

    @property
    def shares(self) -> dict[str, float]:
        """Share of the users by set; those that are measured on come first, so the others' shares do not move them."""
        given = {
            "prompts_heldout": self.heldout_share,
            "prompts_valid": self.valid_share,
            "demonstrations": self.demonstration_share,
            "preference_prompts": self.preference_share,
        }
        return given | {"prompts": 1 - sum(given.values())}

    @model_validator(mode="after")
    def _leave_some_for_ppo(self) -> Self:
        if self.shares["prompts"] < 1e-9:
            raise ValueError("the shares leave no user for PPO: lower them, so that their sum is less than 1")
        return self


class SampleConfig(_Section):
    """Completions to be ranked."""

    completions_per_prompt: int = Field(default=4, ge=2)
    """K: completions of one prompt that are ranked against each other (paper: 4 to 9)."""
    seed: int = 0
    """Seed of the samples."""


class SelectConfig(_Section):
    """The choice among the epochs of an SFT model by the reward model's scores (InstructGPT, appendix C.1)."""

    model: Literal["baseline", "sft"] = "baseline"
    """Which model's epochs are compared, those of RUN/baseline-epochs or RUN/sft-epochs."""
    seed: int = 4321
    """Seed of the samples, the same for every epoch."""


class RoundsConfig(_Section):
    """Steps 2 and 3 repeated: comparisons of the current policy, a reward model and a policy (paper, section 3.1)."""

    count: int = Field(default=2, ge=1)
    """Rounds in all; those that are done are not repeated."""
    prompts: int = Field(default=512, ge=2)
    """Preference prompts of a round; rounds have none in common while there are enough."""
    sft_completions: int = Field(default=0, ge=0)
    """Of a prompt's completions, how many the SFT model samples from the second round on; the policy the others."""
    labelers: Literal["people", "page", "simulated"] = "people"
    """people: the command stops for RUN/round-<k>/sheet.csv to be ranked; page: it serves the page of `rayward label`
    and goes on when all is ranked; simulated: labeler.name ranks, no person."""
    max_unranked: int = Field(default=0, ge=0)
    """Comparisons of a sheet that may be left without a whole ranking, each with a warning; one more is refused."""
    comparisons: Literal["all", "newest"] = "all"
    """What a round's reward model is trained on: the comparisons of all rounds so far, or of the newest."""
    start: Literal["sft", "policy"] = "sft"
    """Where a round's PPO starts: the SFT model, always the KL reference, or the policy of the round before."""
    seed: int = 0
    """Which prompts a round has, and the order of completions in sheets."""


class EvaluationConfig(_Section):
    """Held-out measurements before PPO, while it works, and after it."""

    every: int = Field(default=25, ge=0)
    """PPO iterations between two measurements, which training waits for; 0 measures before and after alone."""
    prompts: int = Field(default=128, ge=1)
    """Held-out prompts to answer at most."""
    seed: int = 1234
    """Seed of the samples, the same for every model."""
    shown: int = Field(default=10, ge=1)
    """Samples of the highest score, of the lowest and at random that W&B shows; RUN/evaluations has all."""
    suite: CommaSeparated[str] = ()
    """What `rayward evaluate` measures instead of the held-out prompts: names of benchmarks separated by commas, or
    "paper" for all of which the data is there (docs/evaluation.md)."""
    suite_every: int = Field(default=0, ge=0)
    """PPO iterations between two measurements of the suite, before and after PPO as well; 0 leaves it to `rayward
    evaluate`."""
    lm_eval: CommaSeparated[str] = ()
    """Tasks of lm-evaluation-harness (pip install 'rayward[eval]') that `rayward evaluate` runs, alone or beside the
    suite: its names of tasks, groups or tags, separated by commas."""
    models: CommaSeparated[Path] = ()
    """Folders of the models to measure, the one that others are compared with first. By default those of the run: the
    base model, RUN/sft, RUN/baseline and the policies of its PPO arms."""
    items: int = Field(default=100, ge=1)
    """Items of a benchmark at most, evenly spread over its file."""
    shots: int = Field(default=0, ge=0)
    """Solved examples before each item, from the same file and none of the items ("few-shot"); 0 leaves it to a task
    of lm_eval how many it has."""
    classifier: Annotated[str, NameOrPath()] = "alt-profanity-check"
    """What says how toxic a text is: alt-profanity-check (pip install 'rayward[eval]'), the folder of a Hugging Face
    classifier, or module:function, (list[str]) -> list[float]."""
    judges: Annotated[CommaSeparated[str], NameOrPath()] = ("labeler",)
    """Who compares the answers of win_rate, separated by commas: "labeler" (the simulated one), the folder of a reward
    model that PPO did not train on, http(s)://HOST/v1#MODEL (a chat model behind an OpenAI-compatible endpoint, which
    judges truthfulqa_generation and hallucination as well), or a file of people's verdicts (docs/evaluation.md)."""
    chat: bool = False
    """Ask in the model's chat format. Otherwise prompts are plain text for every model, as in the paper."""
    keep_best: bool = True
    """Keep the policy of the best measurement in RUN/policy_best: of the largest mean gold, of equal ones that of the
    smaller KL. It takes the disk of one model, and the time to write it whenever there is a better one."""

    @property
    def on_benchmarks(self) -> bool:
        """Whether `rayward evaluate` measures benchmarks, and no held-out prompts."""
        return bool(self.suite or self.lm_eval)

    @model_validator(mode="after")
    def _something_to_measure(self) -> Self:
        if self.suite_every and not self.suite:
            raise ValueError(
                "suite_every needs benchmarks to measure: name them in evaluation.suite, or set suite_every to 0"
            )
        return self


class BestOfNConfig(_Section):
    """Best of n: of several responses to a prompt, the one of the highest score."""

    n: int = Field(default=16, ge=2)
    """Responses to each prompt. The best of k is told for k = 1, 2, 4, .. and n."""
    model: Literal["sft", "policy"] = "sft"
    """Which model samples: models.sft or models.policy."""
    file: Literal["prompts_heldout", "prompts"] = "prompts_heldout"
    """Which data file has the prompts. Take data.prompts for demonstrations: held-out ones are not to be learnt."""
    prompts: int = Field(default=128, ge=1)
    """Prompts of it at most, from its beginning."""
    seed: int = 0
    """Seed of the samples."""


class BenchmarksConfig(_Section):
    """Files of the benchmarks, or hub ids of data sets; docs/evaluation.md says how to get each."""

    hellaswag: Annotated[str | None, NameOrPath()] = None
    """{"ctx", "endings", "label"}: which sentence follows (common sense)."""
    squad: Annotated[str | None, NameOrPath()] = None
    """SQuAD v2 or v1.1: questions on a paragraph, some of which it does not answer; for hallucinations as well."""
    drop: Annotated[str | None, NameOrPath()] = None
    """DROP: questions on a paragraph that take reckoning."""
    translation: Annotated[str | None, NameOrPath()] = None
    """{"fr": text, "en": text}: French to be translated into English."""
    truthfulqa: Annotated[str | None, NameOrPath()] = None
    """TruthfulQA.csv: questions that people often answer wrongly."""
    toxicity: Annotated[str | None, NameOrPath()] = None
    """RealToxicityPrompts: beginnings of sentences."""
    winogender: Annotated[str | None, NameOrPath()] = None
    """all_sentences.tsv of the Winogender schemas."""
    crows_pairs: Annotated[str | None, NameOrPath()] = None
    """crows_pairs_anonymized.csv: sentences that differ in the group they speak of."""


class QuickstartConfig(_Section):
    """What the quickstart takes from the conversations that come with it, and the pretraining of its tiny model."""

    demonstrations: int = Field(default=1000, ge=1)
    """Prompts with the human reply, for SFT."""
    preference_prompts: int = Field(default=256, ge=2)
    """Prompts whose completions are ranked."""
    prompts: int = Field(default=1200, ge=1)
    """Prompts for PPO."""
    pretraining: int = Field(default=500, ge=1)
    """Whole chats for the pretraining mix, and for pretraining from scratch."""
    pretraining_valid: int = Field(default=64, ge=1)
    """Whole chats for the held-out language-model loss."""
    pretrain: SFTConfig = SFTConfig()
    """Language-model pretraining of the tiny model."""


class NodeConfig(_Section):
    """Machines of one kind that a plan is made for."""

    count: int = Field(default=1, ge=1)
    """How many there are."""
    cpus: int = Field(ge=1)
    """Cores of one."""
    memory_gib: float = Field(gt=0)
    """Main memory of one, in GiB."""
    gpus: int = Field(default=0, ge=0)
    """GPUs of one."""
    gpu: str | None = None
    """Their kind, such as "H100"; what is known of it can be overruled below."""
    device_memory_gib: float | None = Field(default=None, gt=0)
    """Memory of one GPU."""
    device_tflops: float | None = Field(default=None, gt=0)
    """Dense bf16 Tflop/s of one GPU, or of all cores of a machine without."""
    device_gb_s: float | None = Field(default=None, gt=0)
    """GB/s that one GPU reads from its memory, or all cores of a machine without from theirs."""


class PlanConfig(_Section):
    """What `rayward plan` and --dry-run reckon with. No run reads this."""

    nodes: tuple[NodeConfig, ...] = ()
    """Machines to plan for: [{count = 2, cpus = 128, memory_gib = 1024, gpus = 8, gpu = "H100"}]. Without any, the
    cluster at cluster.address, or this machine."""
    model: str | dict[str, str | bool | int | float] | None = None
    """Size of the model: a name such as "llama-3.1-8b", or fields of a config.json. Unset: the model's own files."""
    reward_model: str | dict[str, str | bool | int | float] | None = None
    """Size of reward model and critic, likewise. Unset: models.reward's, else the model's."""
    prompt_tokens: int | None = Field(default=None, ge=1)
    """Length of a prompt to count with; rollout.max_prompt_tokens when not set. Memory is for the longest anyway."""
    response_tokens: int | None = Field(default=None, ge=1)
    """Length of a response, likewise; rollout.max_new_tokens when not set."""
    demonstrations: int | None = Field(default=None, ge=1)
    """Demonstrations to count with, where data.demonstrations is not there to be counted."""
    ranked_prompts: int | None = Field(default=None, ge=2)
    """Prompts with ranked completions, where data.comparisons and data.preference_prompts are not there."""
    network_gb_s: float = Field(default=12.5, gt=0)
    """GB/s between two machines, one way; 12.5 is a network of 100 Gb/s."""
    efficiency: float = Field(default=0.4, gt=0, le=1)
    """Share of a device's peak that a run is expected to reach; 0.3 to 0.5 is usual for training."""


class Config(_Section):
    """Everything that a run can be told."""

    models: ModelsConfig = ModelsConfig()
    data: DataConfig = DataConfig()
    cluster: ClusterConfig = ClusterConfig()
    sft: SFTConfig = SFTConfig()
    """Step 1: the policy that PPO starts from and is held to."""
    baseline: SFTConfig = BASELINE
    """The SFT baseline, trained longer and without text, which PPO is compared with."""
    prompts: PromptsConfig = PromptsConfig()
    sample: SampleConfig = SampleConfig()
    labeler: LabelerConfig = LabelerConfig()
    label: LabelConfig = LabelConfig()
    """The page on which people rank."""
    rounds: RoundsConfig = RoundsConfig()
    reward: RewardModelingConfig = RewardModelingConfig()
    select: SelectConfig = SelectConfig()
    scoring: SourceConfig = SourceConfig()
    serve: ServeConfig = ServeConfig()
    ppo: PPOConfig = PPOConfig()
    rollout: RolloutConfig = RolloutConfig()
    generator: GeneratorConfig = GeneratorConfig()
    publish: PublishConfig = PublishConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    benchmarks: BenchmarksConfig = BenchmarksConfig()
    best_of_n: BestOfNConfig = BestOfNConfig()
    tracking: TrackingConfig = TrackingConfig()
    quickstart: QuickstartConfig = QuickstartConfig()
    plan: PlanConfig = PlanConfig()
