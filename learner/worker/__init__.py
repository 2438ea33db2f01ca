"""The learner's processes: networks, DeepSpeed, what one rank does, and all ranks as one."""
