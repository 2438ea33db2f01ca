"""An engine without the remedy for tied heads, to show that the proof of sync notices."""

from typing import Any

from actors import weights


class StaleHead(weights.WeightReceiver):
    """For Generator.worker_extension; importing this module in a worker takes the remedy out."""

    model_runner: Any

    def damage(self) -> None:
        """Change a weight of the first layer, as broken memory would."""
        self.model_runner.model.model.layers[0].input_layernorm.weight.data.mul_(2.0)


weights.repack_heads = lambda model: None
