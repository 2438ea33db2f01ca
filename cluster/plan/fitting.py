"""Whether the memory of devices and machines is enough for the processes on them."""

from collections.abc import Iterator, Sequence

from cluster.plan.hardware import GIB, Machine
from cluster.plan.memory import OBJECT_STORE, Held
from cluster.runtime.fitting import Placed

_CONTROLLER = int(1.2 * GIB)  # the command itself, with torch imported and the buffer's tokens


def misfits(held: Sequence[Held], placed: Placed[Machine]) -> Iterator[str]:
    """Every device and machine whose processes need more memory than it has, in words."""
    by_device: dict[str, list[Held]] = {}
    by_machine: dict[str, list[Held]] = {}
    machines: dict[str, Machine] = {}
    for one in held:
        machine = placed.at[one.process.name][1]
        machines[machine.name] = machine
        by_machine.setdefault(machine.name, []).append(one)
        for device in placed.devices[one.process.name]:
            by_device.setdefault(device, []).append(one)
    for device, users in by_device.items():
        machine = machines[device.partition("/")[0]]
        needed = sum(one.device for one in users)
        if needed > machine.device.memory:
            yield _too_much(f"{device} ({machine.device.name})", users, needed, machine.device.memory, gpu=True)
        for one in users:
            cached = one.items.get("keys and values")
            if cached is not None and cached.device <= 0:
                yield (
                    f"{one.process.name}'s weights do not fit into its share of {device}: "
                    f"{-cached.device / GIB:.1f} GiB are missing before any key or value is cached"
                )
    for index, (name, users) in enumerate(by_machine.items()):
        needed = sum(one.host for one in users) + OBJECT_STORE + (_CONTROLLER if index == 0 else 0)
        if needed > machines[name].memory:
            yield _too_much(f"the main memory of {name}", users, needed, machines[name].memory, gpu=False)


def _too_much(where: str, users: Sequence[Held], needed: float, limit: float, gpu: bool) -> str:
    sizes = {one.process.name: (one.device if gpu else one.host) for one in users}
    each = ", ".join(f"{name}: {size / GIB:.1f}" for name, size in list(sizes.items())[:6])
    largest = max(users, key=lambda one: sizes[one.process.name])
    item, size = max(largest.items.items(), key=lambda pair: pair[1].device if gpu else pair[1].host)
    most = (size.device if gpu else size.host) / GIB
    return (
        f"{where} has {limit / GIB:.1f} GiB and needs {needed / GIB:.1f} ({each}; the most is {largest.process.name}'s "
        f"{item}, {most:.1f})"
    )
