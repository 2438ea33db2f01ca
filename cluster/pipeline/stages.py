"""The stages, in the order in which the help lists them."""

from cluster.pipeline.evaluate import Evaluate
from cluster.pipeline.evaluation.best_of_n import BestOfN
from cluster.pipeline.labeling.stage import Label
from cluster.pipeline.ppo import PPO
from cluster.pipeline.preferences import Rank, Sample
from cluster.pipeline.prompts.stage import Prompts
from cluster.pipeline.quickstart.stage import Quickstart
from cluster.pipeline.reward_model import RewardModel
from cluster.pipeline.rounds import Rounds
from cluster.pipeline.selection import Select
from cluster.pipeline.serve import Serve
from cluster.pipeline.sft import SFT, Baseline
from cluster.pipeline.stage import Stage

_ALL: tuple[type[Stage], ...] = (
    Quickstart,
    Prompts,
    SFT,
    Baseline,
    Sample,
    Rank,
    RewardModel,
    Select,
    PPO,
    Rounds,
    Evaluate,
    BestOfN,
    Label,
    Serve,
)
STAGES = {stage.name: stage for stage in _ALL}
"""name -> stage"""
